"""make bundle and make unbundle with a stand-in engine: what is in the archive, and that nothing is taken from one that is not whole
or that promises what it does not hold. With a real engine: tests/image/test_bundle.py.
"""

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.standin import checkout, environment, log, script

BASE = "Qwen-1_8B-Chat-Int4"
IMAGE = "qwen-finetune:0.1.0-cu118"
Files = dict[str, bytes]


def bundle(project: Path, *words: str, status: int = 0, **variables: str) -> str:
    done = subprocess.run(
        ["docker/bundle", *words], cwd=project, env=environment(project, **variables), capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    return done.stderr


def with_base(project: Path) -> Path:
    """A checkout with a base in it."""
    checkout(project)
    (project / "models" / BASE).mkdir()
    for name in ("config.json", "manifest.json", ".lock"):
        (project / "models" / BASE / name).write_text(f"{name} of the base")
    return project


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return with_base(tmp_path / "here")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a checkout, here, and of the bundle that it wrote, b.tar."""
    folder = tmp_path_factory.mktemp("written")
    bundle(with_base(folder / "here"), "write", f"out={folder}/b.tar")
    return folder


@pytest.fixture
def archive(written: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, for a test to damage."""
    return Path(shutil.copy(written / "b.tar", tmp_path))


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return checkout(tmp_path / "there")


def read(archive: Path) -> Files:
    with tarfile.open(archive) as tar:
        return {entry.name: tar.extractfile(entry).read() for entry in tar if entry.isfile()}  # type: ignore[union-attr]


def pack(archive: Path, files: Files, *more: tarfile.TarInfo) -> None:
    with tarfile.open(archive, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in more:
            tar.addfile(info)


def resum(files: Files) -> None:
    """SHA256SUMS that is right for what is there: whoever makes a bundle can write it."""
    lines = [
        f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sorted(files.items()) if name != "SHA256SUMS"
    ]
    files["SHA256SUMS"] = "".join(lines).encode()


def about(files: Files) -> dict[str, str]:
    return dict(line.split("=", 1) for line in files["about"].decode().splitlines())


def promise(files: Files, **values: str) -> None:
    files["about"] = "".join(f"{key}={value}\n" for key, value in (about(files) | values).items()).encode()


def loaded(project: Path) -> dict[str, str]:
    """The names that the engine has by now -> digest."""
    path = project / "bin/loaded"
    return json.loads(path.read_text()) if path.exists() else {}


def test_the_archive_holds_image_lock_source_and_base_hashed(written: Path) -> None:
    files = read(written / "b.tar")
    promised = about(files)
    image = [promised["manifest"], promised["config"], *promised["layers"].split()]
    expected = ["about", "env.lock", "source.tar", f"models/{BASE}/config.json", f"models/{BASE}/manifest.json"]
    assert sorted(files) == sorted([*expected, *(f"image/{digest}" for digest in image), "SHA256SUMS"])
    assert len(image) == 3 and all(hashlib.sha256(files[f"image/{digest}"]).hexdigest() == digest for digest in image)
    assert len(promised["fingerprint"].split()) == 8
    checked = [entry["words"] for entry in log(written / "here") if "verify=on" in entry["words"]]
    assert checked and checked[0][-2:] == [f"model=Qwen/{BASE}", "verify=on"], (
        "the base is fetched, or its hashes checked, first"
    )
    assert sorted(path.name for path in written.iterdir()) == ["b.tar", "here"]


def test_loaded_elsewhere_it_is_ready(archive: Path, there: Path) -> None:
    said = bundle(there, "load", f"bundle={archive}")
    promised = about(read(archive))
    assert loaded(there) == {IMAGE: promised["manifest"]}
    assert "Ready" in said and f"fingerprint {promised['fingerprint']}" in said and "telephone" in said
    assert (there / "models" / BASE / "config.json").read_text() == "config.json of the base"
    settings = dict(line.split("=", 1) for line in (there / ".env").read_text().splitlines()[1:])
    assert settings["IMAGE"] == IMAGE and settings["SOURCE"] == ""
    assert not list(there.glob(".unbundle*"))
    assert "is there already" in bundle(there, "load", f"bundle={archive}")


def test_the_fingerprint_that_was_told_is_asked_for(archive: Path, there: Path) -> None:
    told = about(read(archive))["fingerprint"]
    said = bundle(there, "load", f"bundle={archive}", "fingerprint=0000 1111 2222 3333 4444 5555 6666 7777", status=2)
    assert "removed again: nothing was loaded" in said and loaded(there) == {} and not (there / ".env").exists()
    assert "telephone" not in bundle(there, "load", f"bundle={archive}", f"fingerprint={told}")
    assert list(loaded(there)) == [IMAGE]


def test_without_a_base(here: Path, there: Path) -> None:
    bundle(here, "write", "model=none", "out=b.tar")
    assert not [name for name in read(here / "b.tar") if name.startswith("models")]
    bundle(there, "load", f"bundle={here}/b.tar")
    assert not (there / "models" / BASE).exists()


# --- hostile bundles: whoever makes one can write right hashes


def member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def other_image(files: Files, name: str) -> None:
    """The archive of `docker save` of another image, under the name that bundles once had for it."""
    files["image.tar"] = b"blobs and a manifest.json with RepoTags " + name.encode()


def blob(files: Files, data: bytes) -> str:
    digest = hashlib.sha256(data).hexdigest()
    files[f"image/{digest}"] = data
    return digest


def manifest_with(files: Files, change: Callable[[dict[str, Any]], Any]) -> None:
    """Another manifest, promised and named by its hash."""
    manifest = json.loads(files.pop(f"image/{about(files)['manifest']}"))
    change(manifest)
    promise(files, manifest=blob(files, json.dumps(manifest).encode()))


def misname(files: Files) -> None:
    promised = about(files)
    files[f"image/{promised['layers']}"] = b"other bytes under that name"


def claim(files: Files) -> None:
    """A second promise of a name: which of the two counts?"""
    files["about"] += b"image=debian:bookworm\n"


Change = Callable[[Files], Any]
TAGS = {
    "schemaVersion": 2,
    "manifests": [{"annotations": {"io.containerd.image.name": "docker.io/library/debian:bookworm"}}],
}
DAMAGED = {
    "a byte of a layer": lambda f: f.update({(n := f"image/{about(f)['layers']}"): b"X" + f[n][1:]}),
    "a layer is missing": lambda f: f.pop(f"image/{about(f)['layers']}"),
    "the source is missing": lambda f: f.pop("source.tar"),
    "a file more": lambda f: f.update(more=b"x"),
    "no hashes": lambda f: f.pop("SHA256SUMS"),
    "no promise": lambda f: f.pop("about"),
}
HOSTILE: dict[str, Change] = {
    "it tags debian:bookworm": lambda f: promise(f, image="debian:bookworm"),
    "it tags another registry's": lambda f: promise(f, image="registry.example/library/debian:12"),
    "a name that only ends so": lambda f: promise(f, image="evil-qwen-finetune:1"),
    "a name by digest": lambda f: promise(f, image="qwen-finetune@sha256:" + "1" * 64),
    "two names": claim,
    "an index with names": lambda f: f.update({"index.json": json.dumps(TAGS).encode()}),
    "a manifest.json with names": lambda f: f.update({"manifest.json": b'[{"RepoTags": ["debian:bookworm"]}]'}),
    "an archive of the engine's": lambda f: other_image(f, "debian:bookworm"),
    "a list of images": lambda f: manifest_with(f, lambda m: m.update(TAGS)),
    "a list with its name spelt otherwise": lambda f: manifest_with(f, lambda m: m.update({"x": "\u00e9"})),
    "a manifest of more layers": lambda f: manifest_with(
        f, lambda m: m["layers"].append({"digest": f"sha256:{'1' * 64}"})
    ),
    "a manifest of another config": lambda f: manifest_with(
        f, lambda m: m["config"].update(digest=f"sha256:{'1' * 64}")
    ),
    "a blob more": lambda f: blob(f, b"another image's layer"),
    "a blob that is not its name": misname,
    "no digest promised": lambda f: promise(f, manifest=""),
    "a path for a digest": lambda f: promise(f, manifest="../../about"),
    "a lock that is not the promised": lambda f: f.update({"env.lock": b"other"}),
    "a setting of the host": lambda f: f.update({".env": b"IMAGE=debian:bookworm\n"}),
    "a script of the checkout": lambda f: f.update({"docker/run": b"#!/bin/sh\n"}),
    "a folder of a base that is another": lambda f: promise(f, model="../../outside"),
    "a base's folder that is above": lambda f: promise(f, model=".."),
    "a blank in the name": lambda f: promise(f, image="a b"),
    "another fingerprint": lambda f: promise(f, fingerprint="1111 2222"),
}
KINDS = {
    "a path upwards": member("../outside", tarfile.REGTYPE),
    "an absolute path": member("/tmp/outside-of-it", tarfile.REGTYPE),
    "a link": member("link", tarfile.SYMTYPE, "/etc/passwd"),
    "a hard link": member("image/x", tarfile.LNKTYPE, "about"),
    "a pipe": member("pipe", tarfile.FIFOTYPE),
    "a device": member("disk", tarfile.BLKTYPE),
}


def refused(archive: Path, there: Path) -> str:
    before = {path for path in there.parent.rglob("*") if path.name not in ("log", "loaded")}
    said = bundle(there, "load", f"bundle={archive}", status=2)
    assert "othing was loaded" in said
    assert loaded(there) == {} and not (there / ".env").exists()
    assert {path for path in there.parent.rglob("*") if path.name not in ("log", "loaded")} == before
    return said


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_bundle(name: str, archive: Path, there: Path) -> None:
    files = read(archive)
    DAMAGED[name](files)
    pack(archive, files)
    assert "is damaged" in refused(archive, there)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_bundle_with_its_hashes_right(name: str, archive: Path, there: Path) -> None:
    files = read(archive)
    HOSTILE[name](files)
    resum(files)
    pack(archive, files)
    refused(archive, there)


@pytest.mark.parametrize("name", KINDS)
def test_what_is_no_file_and_no_folder(name: str, archive: Path, there: Path) -> None:
    pack(archive, read(archive), KINDS[name])
    assert "links or paths that lead out of it" in refused(archive, there)


def test_a_name_twice_is_the_one_that_is_hashed(archive: Path, there: Path) -> None:
    files = read(archive)
    hidden = tarfile.TarInfo("about")
    pack(archive, files, hidden)
    assert "is damaged" in refused(archive, there)


def test_a_name_of_your_own_is_said_to_be_meant(archive: Path, there: Path) -> None:
    files = read(archive)
    promise(files, image="registry.example/mine:1")
    resum(files)
    pack(archive, files)
    assert "IMAGE=registry.example/mine:1 says that you mean it" in refused(archive, there)
    bundle(there, "load", f"bundle={archive}", IMAGE="registry.example/mine:1")
    assert list(loaded(there)) == ["registry.example/mine:1"]


def test_a_cut_off_archive(archive: Path, there: Path) -> None:
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2 + 100])
    refused(archive, there)


def test_another_lock_is_refused_with_the_way_out(archive: Path, there: Path) -> None:
    with (there / "env.lock").open("a") as file:
        file.write("# newer\n")
    assert "source.tar" in refused(archive, there)


ENGINE = """if words[0] == "info":
    print("{root}" if "DockerRootDir" in str(words) else "{store}")
elif words[0] == "version":"""
DF = 'case "$*" in *engine*) printf "\\na b c {free}000\\n" ;; *) printf "\\na b c 999999\\n" ;; esac'


@pytest.mark.parametrize(
    ("store", "free", "enough"),
    [("overlay2", 4, True), ("overlay2", 2, False), ("io.containerd.snapshotter.v1", 4, False)],
)
def test_the_engines_room_is_counted_for_its_store(
    store: str, free: int, enough: bool, archive: Path, there: Path
) -> None:
    """3 GB unpacked, and with containerd's store 2 GB packed too."""
    files = read(archive)
    promise(files, unpacked="3000")
    resum(files)
    pack(archive, files)
    (there / "engine").mkdir()
    docker = there / "bin/docker"
    engine = ENGINE.format(root=there / "engine", store=store)
    docker.write_text(docker.read_text().replace('if words[0] == "version":', engine))
    script(there / "bin/df", f"#!/bin/sh\n{DF.format(free=free)}\n")
    script(there / "bin/du", "#!/bin/sh\nprintf '2000\\tx\\n'\n")
    said = bundle(there, "load", f"bundle={archive}", status=0 if enough else 2)
    assert ("the engine needs" in said) is not enough
    assert bool(loaded(there)) is enough


def test_words_that_it_does_not_know(here: Path) -> None:
    assert "expected BUNDLE=" in bundle(here, "load", "file=x", status=2)
    assert "no such file" in bundle(here, "load", "bundle=x", status=2)
    assert "which bundle" in bundle(here, "load", status=2)
