"""Every way in which an image is not what its SBOM, its provenance and env.lock say, in words.

Knows the shape of the two documents (sbom.py writes them) and of what inventory.py and `docker image inspect` tell;
asks nothing. The trade-off: an engine's own digest of an image depends on how it stores it, so layers and settings are
compared, which do not.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

SBOM = "sbom.cdx.json"
SETTINGS = (
    *("Env", "Entrypoint", "Cmd", "User", "WorkingDir", "StopSignal", "StopTimeout", "Labels", "ExposedPorts"),
    *("Volumes", "Healthcheck", "OnBuild", "Shell"),
)
BUILT = ("/app/image.json",)  # files of the program that the build makes
Json = dict[str, Any]


def render(document: Json) -> bytes:
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def sha256(data: bytes | Path) -> str:
    return hashlib.sha256(data.read_bytes() if isinstance(data, Path) else data).hexdigest()


def settings(inspected: Json) -> Json:
    """What a container gets from the image beside its files."""
    return {key: value for key in SETTINGS if (value := inspected["Config"].get(key))}


def differences(
    found: Json, inspected: Json, bill: Json, origin: Json, locked: dict[str, str], lock_sha256: str
) -> list[str]:
    """Empty: the image is what they say.

    Args:
        found: inventory.py's. inspected: the engine's. bill, origin: the documents.
        locked: name -> version of what env.lock has for such an image. lock_sha256: of env.lock itself.
    """
    components = bill["components"]
    listed, debian = (
        {c["name"]: c["version"] for c in components if c["purl"].startswith(f"pkg:{kind}/")}
        for kind in ("pypi", "deb")
    )
    installed, noted = (dict(entry.split("=", 1) for entry in found[key]) for key in ("apt", "apt_list"))
    lines = [
        *compare("package", found["packages"], locked, "env.lock"),
        *compare("package", found["packages"], listed, "the SBOM"),
        *compare("apt package", installed, noted, "/opt/apt.list"),
        *compare("apt package", installed, debian, "the SBOM"),
        *found["altered"],
        *_program(found, origin),
        *_image(inspected, origin, bill),
    ]
    if found["image"].get("lock_sha256") != lock_sha256:
        lines.append("env.lock: the image was made from another one than this checkout's")
    return lines


def compare(kind: str, there: dict[str, str], wanted: dict[str, str], where: str) -> list[str]:
    """A line for each name that only one side has, and for each that has another value in the image (`there`)."""
    missing, extra = sorted(wanted.keys() - there.keys()), sorted(there.keys() - wanted.keys())
    both = sorted(there.keys() & wanted.keys())
    return [
        *(f"{kind} {name} {wanted[name]}: in {where}, not in the image" for name in missing),
        *(f"{kind} {name} {there[name]}: in the image, not in {where}" for name in extra),
        *(f"{kind} {n}: {there[n]} in the image, {wanted[n]} in {where}" for n in both if there[n] != wanted[n]),
    ]


def _program(found: Json, origin: Json) -> list[str]:
    """The program's files by content and mode, and what image.json says of the build."""
    build = origin["predicate"]["buildDefinition"]
    wanted = {d["name"]: d["digest"]["sha256"] for d in build["resolvedDependencies"] if d["uri"].startswith("file:")}
    there = {name: file["sha256"] for name, file in found["files"].items() if name not in BUILT}
    asked = {key: str(value) for key, value in build["externalParameters"].items()}
    said = {key: str(value) for key, value in found["image"].items() if key in asked}
    loose = [name for name, file in sorted(found["files"].items()) if int(file["mode"], 8) & 0o022]
    return [
        *compare("file", there, wanted, "the provenance"),
        *compare("image.json:", said, asked, "the provenance"),
        *(f"file {name}: may be written by others" for name in loose),
    ]


def _image(inspected: Json, origin: Json, bill: Json) -> list[str]:
    products = {p["name"]: p["digest"]["sha256"] for p in origin["predicate"]["runDetails"]["byproducts"]}
    layers = {f"layer {n}": layer.removeprefix("sha256:") for n, layer in enumerate(inspected["RootFS"]["Layers"])}
    there = {**layers, "settings": sha256(render(settings(inspected))), SBOM: sha256(render(bill))}
    return compare("digest", there, products, "the provenance")
