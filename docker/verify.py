"""Is an image what this checkout builds? `make verify-image` calls it: verify.py IMAGE [FOLDER]

Builds the checkout's image (where it was built before, from the builder's cache, in seconds; elsewhere it takes what a
first build takes) and compares: every layer by its digest, and in a layer that differs every file, byte code included;
then the settings of a container, the SBOM and the provenance in FOLDER (.image/NAME-TAG), and the signature where
cosign is there. Nothing of the image runs, and nothing that came along with it is believed. Exit status: 0 it is the
same, 1 a line for each difference, 2 it could not be found out.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import sbom  # type: ignore[import-not-found]
from differences import SBOM, render, settings  # type: ignore[import-not-found]
from layer_files import Layer, merged, name_differences, saved_layers  # type: ignore[import-not-found]

SHOWN = 100  # lines; a whole layer may differ
PLATFORM = ("Architecture", "Os", "Variant")
ISSUER = "https://token.actions.githubusercontent.com"
Json = dict[str, Any]


# --- the two images


def inspect(image: str) -> Json:
    return json.loads(sbom.docker("image", "inspect", image))[0]  # type: ignore[no-any-return]


def published(image: str) -> str:
    """Name and digest of an image that a registry knows, else ''."""
    return next((digest for digest in inspect(image).get("RepoDigests") or [] if "/" in digest), "") if image else ""


def build_reference(image: str) -> str:
    """Name of the image of this checkout, built as `make image` builds it; '' where that fails."""
    name = f"qwen-finetune-reference:{os.getpid()}"
    flavour = re.search(r"-(cu118|cu128|registry)(@|$)", image)
    asked = {"TORCH": flavour[1]} if flavour else {}
    if flavour and flavour[1] != "registry":
        asked["CUDA"] = {"cu118": "11.8", "cu128": "12.8"}[flavour[1]]
    if published(image) and "SOURCE_URL" not in os.environ and (repository := _repository()):
        asked["SOURCE_URL"] = f"https://github.com/{repository}"
    environment = {**os.environ, **asked, "IMAGE": name, "LIKE": image}
    done = subprocess.run(["docker/build"], cwd=sbom.ROOT, env=environment, stdout=2)
    return "" if done.returncode else name


def read_layers(image: str, digests: list[str], wanted: list[str]) -> dict[str, Layer]:
    """Digest -> content of the `wanted` ones of an image's layers."""
    if not wanted:
        return {}
    with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as saving:
        assert saving.stdout is not None
        try:
            found: dict[str, Layer] = saved_layers(saving.stdout, digests, wanted)
        finally:
            saving.kill()
    return found


# --- what differs


def compare_layers(image: str, there: Json, reference: str, here: Json) -> list[str]:
    """A line for each layer that this checkout does not build, or builds and is not there, and each file of them."""
    theirs, ours = there["RootFS"]["Layers"], here["RootFS"]["Layers"]
    if theirs == ours:
        return []
    odd, missing = [d for d in theirs if d not in ours], [d for d in ours if d not in theirs]
    lines = [
        f"layer {n}: {digest} is not one that this checkout builds" for n, digest in enumerate(theirs) if digest in odd
    ]
    lines += [
        f"layer {n} of this checkout, {digest}: not in the image" for n, digest in enumerate(ours) if digest in missing
    ]
    if not odd and not missing:
        return ["layers: the same ones in another order, or one of them twice"]
    found, wished = read_layers(image, theirs, odd), read_layers(reference, ours, missing)
    expected, seen = merged(wished.values()), set()
    for number, digest in enumerate(theirs):
        if digest in odd and digest not in found:
            lines.append(f"layer {number}: cannot be read")
        elif digest in odd:
            lines += name_differences(f"layer {number}", found[digest], expected)
            seen |= found[digest].keys()
    return lines + [f"{path}: missing; this checkout puts it there" for path in sorted(expected.keys() - seen)]


def compare_settings(there: Json, here: Json) -> list[str]:
    """What a container gets beside its files: environment, entrypoint, labels, user, health check, ..."""
    one, other = (flatten({**settings(side), **{key: side.get(key) for key in PLATFORM}}) for side in (there, here))
    return [f"setting {line}" for line in compare_flat(one, other, "in the image", "by this checkout")]


def flatten(value: Any, path: str = "") -> dict[str, str]:
    """A nested value as path -> text. Members of a list go by their name where they have one, NAME=value by NAME."""
    if value in ({}, []):
        return {path: str(value)}
    if isinstance(value, dict):
        parts = [(str(key), part) for key, part in value.items()]
    elif isinstance(value, list):
        parts = [(_name(n, part), part) for n, part in enumerate(value)]
    else:
        return {path: "" if value is None else str(value)}
    found: dict[str, str] = {}
    places: set[str] = set()
    for key, part in parts:
        place = f"{path}.{key}" if path else key
        while place in places:
            place += "'"
        places.add(place)
        found |= flatten(part, place)
    return found


def _name(number: int, part: Any) -> str:
    if isinstance(part, dict):
        return str(part.get("bom-ref") or part.get("name") or part.get("uri") or number)
    named = re.match(r"(\w+)=", part) if isinstance(part, str) else None
    return named[1] if named else str(number)


def compare_flat(there: dict[str, str], here: dict[str, str], where: str, wish: str) -> list[str]:
    lines = []
    for path in sorted(there.keys() | here.keys()):
        one, other = there.get(path), here.get(path)
        if (one or "") != (other or ""):
            lines.append(f"{path}: {one or 'nothing'} {where}, {other or 'nothing'} {wish}")
    return lines


def check_reference(found: Json, inspected: Json) -> list[str]:
    """Is what was built this checkout's? A builder may take a file of the same size and time for the one it has."""
    locked = (sbom.ROOT / "env.lock").read_text(encoding="utf-8")
    lines: list[str] = sbom.check(found, inspected, *sbom.documents(found, inspected), locked)
    return lines


def compare_documents(folder: Path, found: Json, inspected: Json) -> list[str]:
    """SBOM and provenance, those that are there, against those that this checkout gives."""
    lines: list[str] = []
    for name, right in zip((SBOM, sbom.PROVENANCE), sbom.documents(found, inspected), strict=True):
        if not (folder / name).is_file():
            continue
        data = (folder / name).read_bytes()
        try:
            told = flatten(json.loads(data))
        except ValueError:
            lines.append(f"{name}: not JSON")
            continue
        other = [f"{name}: {line}" for line in compare_flat(told, flatten(right), "there", "by this checkout")]
        if not other and data != render(right):
            other = [f"{name}: other bytes than this checkout writes"]
        lines += other
    return lines


# --- the signature


def check_signature(image: str, folder: Path) -> tuple[list[str], str]:
    """Differences, and what was done: signed images have a digest in a registry, and cosign tells."""
    digest = published(image)
    if not digest:
        return [], "built or loaded here: no registry's signature"
    if not shutil.which("cosign"):
        return [], "signature not checked: cosign is not here"
    repository = _repository()
    if not repository:
        return [], "signature not checked: this checkout has no origin at github.com to compare the signer with"
    signer = ["--certificate-oidc-issuer", ISSUER, "--certificate-identity-regexp"]
    signer.append(f"^https://github\\.com/{re.escape(repository)}/\\.github/workflows/publish\\.yml@refs/tags/v")
    commands = [["cosign", "verify", *signer, digest]]
    for path in sorted(folder.glob("*.sigstore.json")):
        commands.append(
            ["cosign", "verify-blob", "--bundle", str(path), *signer, str(path).removesuffix(".sigstore.json")]
        )
    wrong = []
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            wrong.append(
                f"signature of {command[-1]}: {(done.stderr.strip().splitlines() or ['cosign refuses it'])[-1]}"
            )
    return wrong, "" if wrong else f"signed by {repository}'s publishing workflow"


def _repository() -> str:
    done = subprocess.run(["git", "remote", "get-url", "origin"], cwd=sbom.ROOT, capture_output=True, text=True)
    found = re.search(r"github\.com[:/]([\w.-]+/[\w.-]+?)(\.git)?/?$", done.stdout.strip())
    return found[1] if found else ""


# --- the command


def fingerprint(image: str) -> str:
    command = ["bash", "-c", '. docker/common.sh; fingerprint "$1"', "-", image]
    return subprocess.run(command, cwd=sbom.ROOT, capture_output=True, text=True).stdout.strip()


def commit_note(there: Json, here: Json) -> list[str]:
    """Where the two are of different commits, one hint more."""
    key = "org.opencontainers.image.revision"
    one, other = ((side["Config"].get("Labels") or {}).get(key, "") for side in (there, here))
    if one == other:
        return []
    return [
        f"the image says that it is of commit {one or 'none'}, this checkout is {other or 'none'}: git checkout {one}"
    ]


def verify(image: str, folder: Path) -> int:
    there = inspect(image)
    reference = build_reference(image)
    if not reference:
        print(
            f"error: this checkout's image could not be built here (above), so {image} is not proven.\n"
            f"Its fingerprint is {fingerprint(image)}: compare it with that of a host that built or verified it.",
            file=sys.stderr,
        )
        return 2
    try:
        found, here = sbom.look(reference, quick=True)
        if stale := check_reference(found, here):
            print(*stale, sep="\n", file=sys.stderr)
            print(
                "error: the builder made another image than this checkout's (above): docker builder prune",
                file=sys.stderr,
            )
            return 2
        signature, told = check_signature(image, folder)
        wrong = [
            *compare_settings(there, here),
            *compare_layers(image, there, reference, here),
            *compare_documents(folder, found, here),
            *signature,
        ]
    finally:
        subprocess.run(["docker", "image", "rm", reference], capture_output=True)
    if wrong:
        return report(image, wrong + commit_note(there, here))
    layers = len(there["RootFS"]["Layers"])
    written = [name for name in (SBOM, sbom.PROVENANCE) if (folder / name).is_file()]
    print(f"{image}: all {layers} layers and every setting are what this checkout builds, to the bit.")
    print(f"{' and '.join(written) or 'No SBOM, no provenance'} in {folder}{': right' if written else ''}. {told}")
    print(f"fingerprint {fingerprint(image)}")
    return 0


def report(image: str, wrong: list[str]) -> int:
    for line in wrong[:SHOWN]:
        print(f"{image}: {line}", file=sys.stderr)
    more = f", {len(wrong) - SHOWN} more than are shown" if len(wrong) > SHOWN else ""
    print(f"error: {image} is not what this checkout builds: {len(wrong)} differences (above){more}.", file=sys.stderr)
    return 1


def main(argv: list[str]) -> int:
    if len(argv) not in (1, 2) or argv[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    return verify(argv[0], Path(argv[1]) if len(argv) == 2 else sbom.folder_of(argv[0]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
