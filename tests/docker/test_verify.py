"""docker/verify.py: a small image in six layers, more than forty ways of tampering with it and with its documents, and
every one named from an honest checkout. The engine is a stand-in; with a real one: tests/image/test_verify.py."""

import copy
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from docker import verify
from tests.docker.test_sbom import DOCKERFILE, LOCK, put

ROOT = Path(__file__).resolve().parents[2]
sbom = verify.sbom
IMAGE = "qwen-finetune:0.1.0-cu118"
SITE = "opt/venv/lib/python3.11/site-packages"
PYTHON = "usr/lib/python3.11"
EINOPS = f"{SITE}/einops-0.8.2.dist-info/RECORD"
ABOUT = {"version": "0.1.0", "commit": "c" * 40, "cuda": "11.8", "torch": "cu118", "base": "cuda12.8"}


def member(name: str, text: str = "", mode: int = 0o644, **more: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(text.encode()), mode
    for key, value in more.items():
        setattr(info, key, value)
    return info, text.encode()


LAYERS: list[dict[str, tuple[str, int]]] = [
    {"usr/bin/bash": ("bash", 0o755), "usr/lib/libc.so.6": ("libc", 0o755), f"{PYTHON}/os.py": ("os", 0o644)},
    {
        "usr/bin/tini": ("tini", 0o755),
        "usr/bin/python3.11": ("python", 0o755),
        "var/lib/dpkg/status": ("tini 0.19", 0o644),
    }
    | {f"{PYTHON}/__pycache__/os.pyc": ("code of os", 0o644)},
    {f"{SITE}/torch/__init__.py": ("torch", 0o644), f"{SITE}/torch/lib/libtorch.so": ("library", 0o755)},
    {f"{SITE}/einops/__init__.py": ("einops", 0o644), f"{SITE}/einops/__pycache__/__init__.pyc": ("code", 0o644)}
    | {EINOPS: ("einops/__init__.py,sha256=x,6", 0o644)},
    {"app/train/loop.py": ("loop", 0o644), "app/train/__pycache__/loop.pyc": ("code of loop", 0o644)}
    | {"app/env.lock": ("lock", 0o644), "app/image.json": ("{}", 0o644)}
    | {"usr/local/bin/entrypoint.sh": ("#!/bin/bash", 0o755)},
    {"workspace": ("", 0o755)},
]
CONFIG = {
    "Env": ["PATH=/opt/venv/bin", "PYTHONPATH=/app"],
    "Entrypoint": ["/usr/bin/tini", "--", "/usr/local/bin/entrypoint.sh"],
    "Cmd": ["help"],
    "User": "1000:1000",
    "WorkingDir": "/workspace",
    "Labels": {"org.opencontainers.image.revision": "c" * 40, "qwen-finetune.cuda": "11.8"},
    "Healthcheck": None,
}


@dataclass
class Image:
    """Layers as members of a tar, and a config; `packed`: those that the engine keeps as they were pulled."""

    layers: list[list[tuple[tarfile.TarInfo, bytes]]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=lambda: copy.deepcopy(CONFIG))
    packed: frozenset[int] = frozenset()

    def tar(self, number: int) -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as layer:
            for info, data in self.layers[number]:
                layer.addfile(info, io.BytesIO(data))
        return file.getvalue()

    def inspected(self) -> dict[str, Any]:
        digests = [f"sha256:{hashlib.sha256(self.tar(n)).hexdigest()}" for n in range(len(self.layers))]
        return {"Id": "sha256:" + "1" * 64, "RootFS": {"Layers": digests}, "Config": self.config, "Os": "linux"}

    def save(self) -> bytes:
        """As `docker save` has it: blobs, then manifest.json."""
        blobs = [self.tar(n) for n in range(len(self.layers))]
        blobs = [gzip.compress(blob) if n in self.packed else blob for n, blob in enumerate(blobs)]
        names = [f"blobs/sha256/{hashlib.sha256(blob).hexdigest()}" for blob in blobs]
        manifest = json.dumps([{"Config": "blobs/sha256/c", "RepoTags": [IMAGE], "Layers": names}]).encode()
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            for name, data in sorted(
                [*zip(names, blobs, strict=True), ("blobs/sha256/c", b"{}"), ("manifest.json", manifest)]
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return file.getvalue()

    # --- ways of tampering

    def place(self, name: str, text: str, layer: int | None = None, mode: int = 0o644, **more: Any) -> None:
        """Into a layer of its own on top, or in place of what that layer has there."""
        if layer is None:
            self.layers.append([])
        kept = [one for one in self.layers[-1 if layer is None else layer] if one[0].name != name]
        self.layers[-1 if layer is None else layer] = [*kept, member(name, text, mode, **more)]

    def change(self, name: str, layer: int, **more: Any) -> None:
        for info, _ in self.layers[layer]:
            if info.name == name:
                for key, value in more.items():
                    setattr(info, key, value)

    def drop(self, name: str, layer: int) -> None:
        self.layers[layer] = [one for one in self.layers[layer] if one[0].name != name]


def honest() -> Image:
    image = Image()
    for tree in LAYERS:
        image.layers.append([member(name, text, mode) for name, (text, mode) in tree.items()])
    image.layers[5][0][0].type = tarfile.DIRTYPE
    return image


# --- the engine, and a checkout

DOCKER = """#!{python}
import sys, pathlib
here, words = pathlib.Path({here!r}), sys.argv[1:]
with (here / "log").open("a") as log:
    print(*words, file=log)
which = "reference" if any(word.startswith("qwen-finetune-reference") for word in words) else "image"
if words[:2] == ["image", "inspect"]:
    print((here / f"{{which}}.json").read_text())
elif words[0] == "save":
    sys.stdout.buffer.write((here / f"{{which}}.tar").read_bytes())
elif words[0] == "run":
    assert which == "reference", "what is to be verified must not be run"
    print((here / "found.json").read_text())
"""


class Bench:
    """A checkout that builds the honest image, and the documents of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.checkout, self.documents = folder, folder / "checkout", folder / "documents"
        put(self.checkout / "docker/Dockerfile", DOCKERFILE)
        put(self.checkout / "docker/Dockerfile.dockerignore", "*\n!env.lock\n!train\n")
        put(self.checkout / "docker/inventory.py", "")
        put(self.checkout / "docker/common.sh", "fingerprint() { echo f00d; }\n")
        put(self.checkout / "docker/build", '#!/bin/sh\n[ -n "$LIKE" ] && [ ! -e broken ]\n')
        put(self.checkout / "docker/entrypoint.sh", "#!/bin/bash")
        put(self.checkout / "env.lock", LOCK)
        put(self.checkout / "train/loop.py", "loop")
        (self.checkout / "docker/build").chmod(0o755)
        put(folder / "bin/docker", DOCKER.format(python=sys.executable, here=str(folder)))
        (folder / "bin/docker").chmod(0o755)
        self.found: dict[str, Any] = {
            "python": "3.10",
            "system": {"ID": "ubuntu", "VERSION_ID": "22.04"},
            "apt": ["tini=0.19"],
        }
        self.found["image"] = {
            **ABOUT,
            "source_date_epoch": 1,
            "lock_sha256": hashlib.sha256(LOCK.encode()).hexdigest(),
        }
        self.found["packages"] = {one.name: one.version for one in sbom.pinned(LOCK, "cu118", "3.10")}
        self.found["apt_list"], self.found["altered"] = self.found["apt"], []
        inside = sbom.sources(self.checkout).items()
        self.found["files"] = {name: {"mode": "644", "sha256": sbom.sha256(path)} for name, path in inside}
        put(folder / "found.json", json.dumps(self.found))
        self.show("reference", honest())

    def show(self, name: str, image: Image) -> None:
        put(self.folder / f"{name}.json", json.dumps([image.inspected()]))
        (self.folder / f"{name}.tar").write_bytes(image.save())

    def write(self, image: Image, **found: Any) -> None:
        """The documents that someone gives along with an image."""
        bill, origin = sbom.documents(self.found | found, image.inspected())
        for name, document in ((sbom.SBOM, bill), (sbom.PROVENANCE, origin)):
            put(self.documents / name, sbom.render(document).decode())

    def edit(self, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
        document = json.loads((self.documents / name).read_text())
        change(document)
        put(self.documents / name, sbom.render(document).decode())


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(sbom, "ROOT", made.checkout)
    made.write(honest())
    return made


def told(bench: Bench, image: Image, capsys: pytest.CaptureFixture[str], status: int = 1) -> str:
    bench.show("image", image)
    assert verify.main([IMAGE, str(bench.documents)]) == status
    said = capsys.readouterr()
    return said.out + said.err


Change = Callable[[Image], Any]
LOOP, CODE = "app/train/loop.py", "app/train/__pycache__/loop.pyc"
FILES: dict[str, tuple[Change, str]] = {
    "a source in its own layer": (lambda i: i.place(LOOP, "evil", 4), f"layer 4: /{LOOP}: not as this checkout builds it"),
    "a source in a layer on top": (lambda i: i.place(LOOP, "evil"), f"layer 6: /{LOOP}: a file that this checkout does not put there"),
    "byte code in its own layer": (lambda i: i.place(CODE, "evil", 4), f"layer 4: /{CODE}: not as"),
    "byte code on top": (lambda i: i.place(CODE, "evil"), f"layer 6: /{CODE}"),
    "a source more": (lambda i: i.place("app/train/evil.py", "", 4), "layer 4: /app/train/evil.py: a file that"),
    "a source taken out": (lambda i: i.drop(LOOP, 4), f"/{LOOP}: missing"),
    "a source taken out on top": (lambda i: i.place("app/train/.wh.loop.py", ""), "layer 6: /app/train/.wh.loop.py: takes a file away"),
    "a folder emptied on top": (lambda i: i.place("app/train/.wh..wh..opq", ""), ".wh..wh..opq: takes a file away"),
    "a source open to all": (lambda i: i.change(LOOP, 4, mode=0o666), f"/{LOOP}: mode 666; 644"),
    "a source of another owner": (lambda i: i.change(LOOP, 4, uid=1000), f"/{LOOP}: owner"),
    "the lock": (lambda i: i.place("app/env.lock", "other", 4), "/app/env.lock: not as"),
    "image.json": (lambda i: i.place("app/image.json", '{"a": 1}', 4), "/app/image.json: not as"),
    "the entrypoint's script": (lambda i: i.place("usr/local/bin/entrypoint.sh", "evil", 4, 0o755), "/usr/local/bin/entrypoint.sh: not as"),
    "a command before the others": (lambda i: i.place("usr/local/bin/python", "evil", 4, 0o755), "/usr/local/bin/python: a file that"),
    "a library, its list of files too": (lambda i: (i.place(f"{SITE}/einops/__init__.py", "evil", 3), i.place(EINOPS, "evil", 3)), "layer 3: /opt/venv/lib/python3.11/site-packages/einops/__init__.py: not as"),
    "a library's list of files": (lambda i: i.place(EINOPS, "evil", 3), "RECORD: not as"),
    "a library's byte code": (lambda i: i.place(f"{SITE}/einops/__pycache__/__init__.pyc", "evil", 3), "einops/__pycache__/__init__.pyc: not as"),
    "torch's native library": (lambda i: i.place(f"{SITE}/torch/lib/libtorch.so", "evil", 2, 0o755), "layer 2: /opt/venv/lib/python3.11/site-packages/torch/lib/libtorch.so: not as"),
    "a path file": (lambda i: i.place(f"{SITE}/evil.pth", "import os"), "evil.pth: a file that"),
    "sitecustomize": (lambda i: i.place(f"{SITE}/sitecustomize.py", "", 3), "sitecustomize.py: a file that"),
    "tini": (lambda i: i.place("usr/bin/tini", "evil", 1, 0o755), "layer 1: /usr/bin/tini: not as"),
    "tini on top": (lambda i: i.place("usr/bin/tini", "evil", None, 0o755), "layer 6: /usr/bin/tini"),
    "Python's library": (lambda i: i.place(f"{PYTHON}/os.py", "evil", 0), "layer 0: /usr/lib/python3.11/os.py: not as"),
    "Python's byte code": (lambda i: i.place(f"{PYTHON}/__pycache__/os.pyc", "evil", 1), "os.pyc: not as"),
    "Python itself": (lambda i: i.place("usr/bin/python3.11", "", 1, type=tarfile.SYMTYPE, linkname="/app/evil"), "/usr/bin/python3.11: a link; this checkout puts a file"),
    "the C library": (lambda i: i.place("usr/lib/libc.so.6", "evil", 0, 0o755), "/usr/lib/libc.so.6: not as"),
    "a library loaded before all": (lambda i: i.place("etc/ld.so.preload", "/app/evil.so"), "/etc/ld.so.preload: a file that"),
    "dpkg's list": (lambda i: i.place("var/lib/dpkg/status", "evil", 1), "/var/lib/dpkg/status: not as"),
    "a set-user-id bit": (lambda i: i.change("usr/bin/bash", 0, mode=0o4755), "/usr/bin/bash: mode 4755; 755"),
    "a capability of a file": (lambda i: i.change("usr/bin/bash", 0, pax_headers={"SCHILY.xattr.security.capability": "x"}), "/usr/bin/bash: owner or attributes"),
    "a hard link": (lambda i: i.place("usr/bin/tini", "", 1, type=tarfile.LNKTYPE, linkname="usr/bin/bash"), "/usr/bin/tini: a hard link"),
    "a device": (lambda i: i.place("dev/evil", "", type=tarfile.CHRTYPE, devmajor=1), "/dev/evil: a device that"),
    "a folder open to all": (lambda i: i.change("workspace", 5, mode=0o777), "layer 5: /workspace: mode 777; 755"),
    "changed and changed back on top": (lambda i: (i.place(LOOP, "evil"), i.place(LOOP, "loop")), f"layer 6: /{LOOP}"),
    "a path twice in one layer": (lambda i: i.layers[4].append(member(LOOP, "evil")), f"/{LOOP} (number 2): a file that"),
    "two layers in another order": (lambda i: i.layers.reverse(), "layers: the same ones in another order"),
    "a layer less": (lambda i: i.layers.pop(4), "layer 4 of this checkout"),
    "all layers in one": (lambda i: i.layers.__setitem__(slice(None), [[m for tree in i.layers for m in tree if m[0].name != LOOP]]), f"/{LOOP}: missing"),
}  # fmt: skip
SETTINGS: dict[str, tuple[Change, str]] = {
    "the entrypoint": (lambda i: i.config.update(Entrypoint=["/app/evil"]), "setting Entrypoint.0: /app/evil in the image"),
    "the command": (lambda i: i.config.update(Cmd=["train"]), "setting Cmd.0: train in the image, help"),
    "a variable more": (lambda i: i.config["Env"].append("LD_PRELOAD=/evil.so"), "setting Env.LD_PRELOAD: LD_PRELOAD=/evil.so in the image"),
    "a variable changed": (lambda i: i.config["Env"].__setitem__(1, "PYTHONPATH=/evil"), "setting Env.PYTHONPATH"),
    "a variable twice": (lambda i: i.config["Env"].append("PYTHONPATH=/evil"), "PYTHONPATH=/evil in the image, nothing"),
    "the user": (lambda i: i.config.update(User="0"), "setting User: 0 in the image, 1000:1000"),
    "the folder": (lambda i: i.config.update(WorkingDir="/evil"), "setting WorkingDir"),
    "a label": (lambda i: i.config["Labels"].update({"qwen-finetune.cuda": "12.8"}), "setting Labels.qwen-finetune.cuda: 12.8"),
    "the label of the commit": (lambda i: i.config["Labels"].update({"org.opencontainers.image.revision": "d" * 40}), "the image says that it is of commit dddd"),
    "a health check": (lambda i: i.config.update(Healthcheck={"Test": ["CMD", "evil"]}), "setting Healthcheck.Test.1: evil"),
    "a trigger": (lambda i: i.config.update(OnBuild=["RUN evil"]), "setting OnBuild.0: RUN evil"),
    "a volume": (lambda i: i.config.update(Volumes={"/app": {}}), "setting Volumes./app: {} in the image"),
    "the shell": (lambda i: i.config.update(Shell=["/evil"]), "setting Shell.0: /evil"),
}  # fmt: skip


def test_there_are_thirty_and_more() -> None:
    assert len(FILES) + len(SETTINGS) >= 50


@pytest.mark.parametrize("name", [*FILES, *SETTINGS])
@pytest.mark.parametrize("forged", [False, True], ids=["documents of the honest one", "both documents forged"])
def test_tampering_is_named(name: str, forged: bool, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    change, expected = (FILES | SETTINGS)[name]
    image = honest()
    change(image)
    if forged:
        bench.write(image)
    said = told(bench, image, capsys)
    assert expected in said, said
    assert f"error: {IMAGE} is not what this checkout builds" in said
    assert len(said.splitlines()) < 30


def test_the_honest_image_passes_and_nothing_of_it_is_run_or_read(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    said = told(bench, honest(), capsys, status=0)
    assert "all 6 layers and every setting are what this checkout builds" in said
    assert "fingerprint f00d" in said
    asked = (bench.folder / "log").read_text().splitlines()
    assert not [line for line in asked if line.startswith("save")]
    assert [line for line in asked if line.startswith("image rm qwen-finetune-reference")]


@pytest.mark.parametrize("packed", [range(6), [0], [1], [0, 4]], ids=str)
def test_layers_that_were_pulled_are_packed(
    packed: list[int], bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base's are, of an image that was built here."""
    image = honest()
    image.packed = frozenset(packed)
    bench.show("reference", image)
    image.place("usr/bin/tini", "evil", 1, 0o755)
    said = told(bench, image, capsys)
    assert "layer 1: /usr/bin/tini: not as" in said and len(said.splitlines()) < 10, said


DOCUMENTS: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "SBOM: a version": (sbom.SBOM, lambda d: d["components"][1].update(version="9"), "version: 9 there"),
    "SBOM: a component less": (sbom.SBOM, lambda d: d["components"].pop(), "nothing there, "),
    "SBOM: a hash": (sbom.SBOM, lambda d: d["components"][2]["properties"][0].update(value="0" * 64), "value: 0000"),
    "SBOM: its number": (sbom.SBOM, lambda d: d.update(serialNumber="urn:uuid:0"), "serialNumber: urn:uuid:0 there"),
    "provenance: the commit": (sbom.PROVENANCE, lambda d: d["predicate"]["buildDefinition"]["resolvedDependencies"][1]["digest"].update(gitCommit="d"), "commit.digest.gitCommit: d there"),
    "provenance: the base": (sbom.PROVENANCE, lambda d: d["predicate"]["buildDefinition"]["resolvedDependencies"][0].update(uri="docker-image:evil"), "base.uri: docker-image:evil there"),
    "provenance: the image": (sbom.PROVENANCE, lambda d: d["subject"][0]["digest"].update(layersAndSettings="0"), "layersAndSettings: 0 there"),
    "provenance: the builder": (sbom.PROVENANCE, lambda d: d["predicate"]["runDetails"]["builder"].update(id="urn:evil"), "builder.id: urn:evil there"),
}  # fmt: skip


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_alone(name: str, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    file, change, expected = DOCUMENTS[name]
    bench.edit(file, change)
    said = told(bench, honest(), capsys)
    assert f"{file}: " in said and expected in said, said
    assert "layer" not in said.replace("layersAndSettings", "")


def test_both_documents_of_another_image(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.write(honest(), apt=["tini=0.18"])
    said = told(bench, honest(), capsys)
    assert "sbom.cdx.json: " in said and "provenance.json: " in said


def test_other_bytes_and_no_json(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    path = bench.documents / sbom.SBOM
    path.write_text(path.read_text() + "\n")
    assert "other bytes" in told(bench, honest(), capsys)
    path.write_text("{")
    assert "sbom.cdx.json: not JSON" in told(bench, honest(), capsys)


def test_where_the_checkout_cannot_be_built_there_is_the_fingerprint(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    put(bench.checkout / "broken", "")
    said = told(bench, honest(), capsys, status=2)
    assert "is not proven" in said and "fingerprint is f00d" in said


def test_a_builder_that_took_an_old_file_is_noticed(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the same size and time as this checkout's."""
    put(bench.checkout / "train/loop.py", "l00p")
    said = told(bench, honest(), capsys, status=2)
    assert "file /app/train/loop.py" in said and "docker builder prune" in said


# --- the signature


def signed(bench: Bench, status: int) -> Image:
    """An image of a registry, an origin at github.com, and a cosign that answers."""
    put(
        bench.folder / "bin/cosign",
        f'#!/bin/sh\necho cosign "$@" >>{bench.folder}/log\necho refused >&2\nexit {status}\n',
    )
    (bench.folder / "bin/cosign").chmod(0o755)
    subprocess.run(["git", "init", "-q"], cwd=bench.checkout, check=True)
    subprocess.run(["git", "remote", "add", "origin", "https://github.com/me/tune.git"], cwd=bench.checkout, check=True)
    put(bench.documents / "sbom.cdx.json.sigstore.json", "{}")
    return honest()


@pytest.mark.parametrize("status", [0, 1])
def test_cosign_is_asked_who_signed(
    status: int, bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, digest = signed(bench, status), "ghcr.io/me/qwen-finetune@sha256:ab"
    monkeypatch.setattr(Image, "inspected", lambda self, old=Image.inspected: old(self) | {"RepoDigests": [digest]})
    said = told(bench, image, capsys, status=status)
    asked = [line for line in (bench.folder / "log").read_text().splitlines() if line.startswith("cosign")]
    assert len(asked) == 2 and asked[0].endswith(digest) and "verify-blob" in asked[1]
    assert all(r"^https://github\.com/me/tune/\.github/workflows/publish\.yml@refs/tags/v" in line for line in asked)
    assert ("signed by me/tune's publishing workflow" if status == 0 else f"signature of {digest}: refused") in said


def test_without_cosign_it_is_said(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = "ghcr.io/me/qwen-finetune@sha256:ab"
    monkeypatch.setattr(Image, "inspected", lambda self, old=Image.inspected: old(self) | {"RepoDigests": [digest]})
    monkeypatch.setattr(verify.shutil, "which", lambda name: None)
    assert "signature not checked: cosign is not here" in told(bench, honest(), capsys, status=0)


def test_it_runs_on_a_bare_python() -> None:
    done = subprocess.run([sys.executable, "-I", "-S", ROOT / "docker/verify.py"], capture_output=True, text=True)
    assert done.returncode == 2 and "verify.py IMAGE" in done.stderr
