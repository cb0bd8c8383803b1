"""What an image was made of: SBOM and provenance.

    sbom.py write IMAGE [FOLDER]    look at the image, hold it against this checkout, and write sbom.cdx.json and
                                    provenance.json

For an image that was just built here: it is asked from inside (inventory.py). verify.py asks an image nothing.
FOLDER is .image/NAME-TAG by default. The SBOM is CycloneDX 1.6: a component a package of env.lock, with every hash that
the lock allows it, and one a Debian package. The provenance is an in-toto statement with SLSA's predicate: sources by
sha256, base, commit, settings, layers. Neither knows a clock, a builder's name or a random number: the same image gives
the same bytes, and so does the same image in another kind of store: it is named by its layers and settings, since an
engine's own digest of it depends on how it stores it. Knows Docker by `image inspect` and one `run` without network;
runs on a bare Python.
"""

import json
import re
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

# Not the folder above: Docker's own library for Python is called docker too
sys.path.insert(0, str(Path(__file__).resolve().parent))
import lock  # type: ignore[import-not-found]
from differences import SBOM, differences, render, settings, sha256  # type: ignore[import-not-found]

ROOT: Path = lock.ROOT
PROVENANCE = "provenance.json"
SECTIONS = ("build", "common", "source")  # of env.lock, with the image's torch; as docker/setup installs them
PARAMETERS = ("version", "cuda", "torch", "base", "source_date_epoch")  # of the build, as image.json has them
PYTHON = "/opt/venv/bin/python"
SPACE = uuid.UUID("7f5f1f0e-6a3c-5d0c-9d6b-6a4b7a0f3c11")  # of the serial numbers, which follow from the content
Json = dict[str, Any]


@dataclass(frozen=True, order=True)
class Package:
    """A package of env.lock: `hashes` are those of the files that may be installed, `url` where one stands in the
    lock."""

    name: str
    version: str
    url: str
    hashes: tuple[str, ...]


# --- the sources


def pinned(text: str, flavour: str, python: str) -> list[Package]:
    """What env.lock has in an image of this flavour and Python."""
    sections = lock.split(text)
    if f"torch-{flavour}" not in sections:
        sys.exit(f"sbom.py: env.lock has no section torch-{flavour}.")
    found = []
    for name in (*SECTIONS, f"torch-{flavour}"):
        for line in sections[name].replace("\\\n", " ").splitlines():
            pin, *hashes = line.split(" --hash=sha256:")
            pin, _, marker = pin.partition(" ; ")
            if pin.strip() and (not marker or f'"{python}"' in marker):
                found.append(_package(pin.strip(), tuple(sorted(h.strip() for h in hashes))))
    return sorted(found)


def _package(pin: str, hashes: tuple[str, ...]) -> Package:
    name, _, url = pin.partition(" @ ")
    if url:
        version = unquote(url.rsplit("/", 1)[1]).split("-")[1]
        return Package(name, version, url, hashes)
    name, _, version = pin.partition("==")
    return Package(name, version, "", hashes)


def sources(root: Path) -> dict[str, Path]:
    """Path in the image -> file of the checkout, by the list of what the build may see."""
    listed = (root / "docker/Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    tops = [line[1:] for line in listed if line.startswith("!") and not line.startswith("!docker")]
    files = [path for top in tops for path in sorted([root / top, *(root / top).rglob("*")]) if path.is_file()]
    kept = [path for path in files if path.suffix != ".pyc" and "__pycache__" not in path.parts]
    program = {f"/app/{path.relative_to(root).as_posix()}": path for path in kept}
    return program | {"/usr/local/bin/entrypoint.sh": root / "docker/entrypoint.sh"}


def base_reference(dockerfile: str, base: str) -> str:
    """The image that the name of a stage means (cuda11.8, ubuntu), by digest; a name that is no stage is one itself."""
    stages = {name: source for source, name in re.findall(r"^FROM (\S+) AS (\S+)$", dockerfile, flags=re.M)}
    while base in stages:
        base = stages[base]
    return base


# --- the two documents


def sbom(packages: list[Package], found: Json) -> Json:
    """CycloneDX 1.6. `found` is the inventory: its Debian packages, system and image.json."""
    image, system = found["image"], found["system"]
    subject = {"type": "container", "name": "qwen-finetune", "version": image["version"], "bom-ref": "image"}
    subject["properties"] = _properties({f"image:{key}": str(value) for key, value in image.items()})
    components = [_python(package) for package in packages] + [_debian(entry, system) for entry in found["apt"]]
    components.sort(key=lambda component: component["bom-ref"])
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": subject},
        "components": components,
        "dependencies": [{"ref": "image", "dependsOn": [component["bom-ref"] for component in components]}],
    }
    return {**document, "serialNumber": f"urn:uuid:{uuid.uuid5(SPACE, render(document).decode())}"}


def _properties(values: dict[str, str]) -> list[Json]:
    return [{"name": name, "value": value} for name, value in sorted(values.items())]


def _python(package: Package) -> Json:
    purl = f"pkg:pypi/{package.name}@{quote(package.version, safe='')}"
    component: Json = {
        "type": "library",
        "name": package.name,
        "version": package.version,
        "purl": purl,
        "bom-ref": purl,
    }
    if package.url:
        component["externalReferences"] = [
            {"type": "distribution", "url": package.url, "hashes": [{"alg": "SHA-256", "content": package.hashes[0]}]}
        ]
    # Not `hashes`: that would say that the component is each of these files; the lock allows any one of them.
    component["properties"] = [{"name": "env.lock:sha256", "value": value} for value in package.hashes]
    return component


def _debian(entry: str, system: Json) -> Json:
    name, _, version = entry.partition("=")
    distro = system.get("ID", "debian")
    release = f"{distro}-{system.get('VERSION_ID', '')}"
    purl = f"pkg:deb/{distro}/{quote(name, safe='')}@{quote(version, safe='')}?distro={release}"
    return {"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl}


def provenance(root: Path, found: Json, inspected: Json, bill: bytes) -> Json:
    """An in-toto statement: which image (its layers and settings), of which sources, base, commit and settings."""
    build = {
        "buildType": "urn:qwen-finetune:dockerfile:1",
        "externalParameters": {key: found["image"][key] for key in PARAMETERS},
        "resolvedDependencies": _dependencies(root, found["image"]),
    }
    run = {"builder": {"id": "urn:qwen-finetune:make-image"}, "byproducts": _products(inspected, bill)}
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "qwen-finetune", "digest": {"layersAndSettings": identity(inspected)}}],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {"buildDefinition": build, "runDetails": run},
    }


def identity(inspected: Json) -> str:
    """One number for the image, whatever store it is in."""
    return sha256(render({"layers": inspected["RootFS"]["Layers"], "settings": settings(inspected)}))


def _dependencies(root: Path, image: Json) -> list[Json]:
    """The base, the commit if there is one, and every file of the program."""
    base = base_reference((root / "docker/Dockerfile").read_text(encoding="utf-8"), image["base"])
    name, _, digest = base.partition("@sha256:")
    found: list[Json] = [{"uri": f"docker-image:{name}", "name": "base"}]
    if digest:
        found[0]["digest"] = {"sha256": digest}
    if commit := image["commit"].removesuffix("-dirty"):
        changed = {"changed": commit != image["commit"]}
        found.append({"uri": "git", "name": "commit", "digest": {"gitCommit": commit}, "annotations": changed})
    for inside, path in sorted(sources(root).items()):
        outside = quote(path.relative_to(root).as_posix())
        found.append({"uri": f"file:{outside}", "name": inside, "digest": {"sha256": sha256(path)}})
    return found


def _products(inspected: Json, bill: bytes) -> list[Json]:
    """The SBOM, the image's settings and its layers."""
    config, layers = settings(inspected), inspected["RootFS"]["Layers"]
    named = {SBOM: sha256(bill), "settings": sha256(render(config))}
    named |= {f"layer {n}": layer.removeprefix("sha256:") for n, layer in enumerate(layers)}
    found: list[Json] = [{"name": name, "digest": {"sha256": digest}} for name, digest in named.items()]
    found[1]["annotations"] = config
    return found


# --- the engine, the commands


def docker(*words: str, stdin: bytes | None = None) -> str:
    try:
        done = subprocess.run(["docker", *words], input=stdin, capture_output=True)
    except FileNotFoundError:
        sys.exit("sbom.py: no docker here. An image is looked at through a Docker engine.")
    if done.returncode:
        sys.exit(f"sbom.py: docker {' '.join(words[:2])}: {done.stderr.decode().strip()}")
    return done.stdout.decode()


def look(image: str, quick: bool = False) -> tuple[Json, Json]:
    """The image's inventory, taken inside it without a network, and what the engine says of it. `quick`: no package's
    files are read."""
    script = (ROOT / "docker/inventory.py").read_bytes()
    inspected: Json = json.loads(docker("image", "inspect", image))[0]
    cage = ["--rm", "-i", "--network", "none", "--read-only", "--cap-drop", "ALL"]
    found: Json = json.loads(
        docker("run", *cage, "--entrypoint", PYTHON, image, "-I", "-", *["quick"] * quick, stdin=script)
    )
    if not found["image"]:
        sys.exit(f"sbom.py: {image} holds no /app/image.json: not an image of this project.")
    return found, inspected


def folder_of(image: str) -> Path:
    """.image/qwen-finetune-0.1.0-cu118 for qwen-finetune:0.1.0-cu118"""
    return ROOT / ".image" / re.sub(r"[^\w.-]+", "-", image.rsplit("/", 1)[-1].partition("@")[0])


def wanted(locked: str, found: Json) -> list[Package]:
    return pinned(locked, found["image"].get("torch", ""), found["python"])


def check(found: Json, inspected: Json, bill: Json, origin: Json, locked: str) -> list[str]:
    versions = {package.name: package.version for package in wanted(locked, found)}
    return differences(found, inspected, bill, origin, versions, sha256(locked.encode()))


def documents(found: Json, inspected: Json) -> tuple[Json, Json]:
    """SBOM and provenance of an image of this checkout, by its inventory and what the engine says of it."""
    bill = sbom(wanted((ROOT / "env.lock").read_text(encoding="utf-8"), found), found)
    return bill, provenance(ROOT, found, inspected, render(bill))


def write(image: str, folder: Path) -> int:
    found, inspected = look(image)
    bill, origin = documents(found, inspected)
    locked = (ROOT / "env.lock").read_text(encoding="utf-8")
    if report(image, check(found, inspected, bill, origin, locked), "this checkout"):
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    for name, document in ((SBOM, bill), (PROVENANCE, origin)):
        (folder / f".{name}").write_bytes(render(document))
        (folder / f".{name}").replace(folder / name)
    print(f"{folder / SBOM}: {len(bill['components'])} components; {PROVENANCE} beside it")
    return 0


def report(image: str, wrong: list[str], against: str) -> bool:
    """Print the differences; whether there are any."""
    for line in wrong:
        print(f"{image}: {line}", file=sys.stderr)
    if wrong:
        print(f"error: {image} differs from {against} in {len(wrong)} points (above).", file=sys.stderr)
    return bool(wrong)


def main(argv: list[str]) -> int:
    if len(argv) not in (2, 3) or argv[0] != "write":
        print(__doc__, file=sys.stderr)
        return 2
    return write(argv[1], Path(argv[2]) if len(argv) == 3 else folder_of(argv[1]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
