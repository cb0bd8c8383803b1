"""make bundle and make unbundle with a stand-in engine: what is in the archive, and that nothing is taken from one that is not whole.
With a real image: tests/image/test_bundle.py.
"""

import hashlib
import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.support.standin import checkout, environment, log

BASE = "Qwen-1_8B-Chat-Int4"


def bundle(project: Path, *words: str, status: int = 0) -> str:
    done = subprocess.run(
        ["docker/bundle", *words], cwd=project, env=environment(project), capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    return done.stderr


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A checkout with a base in it."""
    project = checkout(tmp_path / "here")
    (project / "models" / BASE).mkdir()
    for name in ("config.json", "manifest.json", ".lock"):
        (project / "models" / BASE / name).write_text(f"{name} of the base")
    return project


@pytest.fixture
def archive(here: Path, tmp_path: Path) -> Path:
    bundle(here, "write", f"out={tmp_path}/b.tar")
    return tmp_path / "b.tar"


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return checkout(tmp_path / "there")


def names(archive: Path) -> list[str]:
    with tarfile.open(archive) as tar:
        return [entry.name for entry in tar if entry.isfile()]


def loaded(project: Path) -> bool:
    return any(entry["words"][0] == "load" for entry in log(project))


def test_the_archive_holds_image_lock_source_and_base_hashed(here: Path, archive: Path) -> None:
    expected = [
        "about",
        "env.lock",
        "source.tar",
        "image.tar",
        f"models/{BASE}/config.json",
        f"models/{BASE}/manifest.json",
    ]
    assert sorted(names(archive)) == sorted([*expected, "SHA256SUMS"])
    checked = [entry["words"] for entry in log(here) if "verify=on" in entry["words"]]
    assert checked and checked[0][-2:] == [f"model=Qwen/{BASE}", "verify=on"], (
        "the base is fetched, or its hashes checked, first"
    )
    assert sorted(path.name for path in archive.parent.iterdir()) == ["b.tar", "here"]


def test_loaded_elsewhere_it_is_ready(archive: Path, there: Path) -> None:
    said = bundle(there, "load", f"bundle={archive}")
    assert "Ready" in said and loaded(there)
    assert (there / "models" / BASE / "config.json").read_text() == "config.json of the base"
    settings = dict(line.split("=", 1) for line in (there / ".env").read_text().splitlines()[1:])
    assert settings["IMAGE"] == "qwen-finetune:0.1.0-cu118" and settings["SOURCE"] == ""
    assert not list(there.glob(".unbundle*"))
    assert "is there already" in bundle(there, "load", f"bundle={archive}")


def test_without_a_base(here: Path, there: Path) -> None:
    bundle(here, "write", "model=none", "out=b.tar")
    assert not [name for name in names(here / "b.tar") if name.startswith("models")]
    bundle(there, "load", f"bundle={here}/b.tar")
    assert not (there / "models" / BASE).exists()


def rewrite(archive: Path, change: str) -> None:
    """One thing wrong with an archive."""
    bad = archive.with_suffix(".bad")
    with tarfile.open(archive) as old, tarfile.open(bad, "w") as new:
        for entry in old:
            data = old.extractfile(entry).read() if entry.isfile() else b""  # type: ignore[union-attr]
            if change == "flip" and entry.name == "image.tar":
                data = bytes([data[0] ^ 1]) + data[1:]
            if change == "drop" and entry.name == "source.tar":
                continue
            entry.size = len(data)
            new.addfile(entry, io.BytesIO(data))
        extra = {"climb": "../outside", "absolute": "/tmp/outside-of-it", "more": "extra"}.get(change)
        if extra:
            info = tarfile.TarInfo(extra)
            info.size = 1
            new.addfile(info, io.BytesIO(b"x"))
        if change == "link":
            info = tarfile.TarInfo("link")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            new.addfile(info)
    shutil.move(bad, archive)


@pytest.mark.parametrize("change", ["flip", "drop", "more", "climb", "absolute", "link"])
def test_nothing_is_taken_from_a_bad_archive(archive: Path, there: Path, change: str) -> None:
    rewrite(archive, change)
    assert "Nothing was loaded" in bundle(there, "load", f"bundle={archive}", status=2)
    assert not loaded(there) and not (there / "models" / BASE).exists() and not (there / ".env").exists()
    assert not (there.parent / "outside").exists() and not list(there.glob(".unbundle*"))


@pytest.mark.parametrize(
    "line",
    ["model=../../outside", "model=..", "model=a/b", "image=..", "image=a b", "image=a\nimage=DATA_DIR=/", "model="],
)
def test_names_that_lead_out_are_refused_with_their_hashes_right(archive: Path, there: Path, line: str) -> None:
    """`about` names the folder of the base and a line of .env."""
    key = line.partition("=")[0]
    with tarfile.open(archive) as old:
        held = {entry.name: old.extractfile(entry).read() for entry in old if entry.isfile()}  # type: ignore[union-attr]
    kept = [one for one in held["about"].decode().splitlines() if not one.startswith(f"{key}=")]
    held["about"] = "\n".join([*kept, line, ""]).encode()
    digest = hashlib.sha256(held["about"]).hexdigest()
    sums = [one for one in held["SHA256SUMS"].decode().splitlines() if not one.endswith("  about")]
    held["SHA256SUMS"] = "\n".join([f"{digest}  about", *sums, ""]).encode()
    with tarfile.open(archive, "w") as new:
        for name, data in held.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            new.addfile(info, io.BytesIO(data))
    before = sorted(there.parent.rglob("*"))
    assert "what nothing is called" in bundle(there, "load", f"bundle={archive}", status=2)
    assert not loaded(there) and not (there / ".env").exists()
    assert [path for path in sorted(there.parent.rglob("*")) if path.name != "log"] == [
        p for p in before if p.name != "log"
    ]


def test_a_cut_off_archive(archive: Path, there: Path) -> None:
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2 + 100])
    bundle(there, "load", f"bundle={archive}", status=2)
    assert not loaded(there)


def test_another_lock_is_refused_with_the_way_out(archive: Path, there: Path) -> None:
    with (there / "env.lock").open("a") as file:
        file.write("# newer\n")
    said = bundle(there, "load", f"bundle={archive}", status=2)
    assert "Nothing was loaded" in said and "source.tar" in said and not loaded(there)


def test_words_that_it_does_not_know(here: Path) -> None:
    assert "expected BUNDLE=" in bundle(here, "load", "file=x", status=2)
    assert "no such file" in bundle(here, "load", "bundle=x", status=2)
    assert "which bundle" in bundle(here, "load", status=2)
