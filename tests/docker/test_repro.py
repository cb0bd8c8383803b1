"""tests/image/repro.py: what it compares and how it says so; with a stand-in for `docker`. The real builds are tests/image/test_repro.py's."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.image import repro

ROOT = repro.ROOT
DOCKER = """#!/bin/sh
case "$*" in
save*) cat "$(dirname "$0")/$2.tar" ;;
create*) echo "$2" ;;
cp*) case $2 in *:/app) cat "$(dirname "$0")/${2%%:*}.program" ;; *) tar -cf - -T /dev/null ;; esac ;;
"image inspect --format {{.Id}}"*) echo "sha256:$(sha256sum <"$(dirname "$0")/$5.tar")" ;;
esac
"""


def layer(files: dict[str, str], mode: int = 0o644) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.mtime = len(text), mode, 5
            archive.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


def image(folder: Path, name: str, *layers: bytes, user: str = "1000") -> None:
    """What `docker save` writes: blobs by their hash, and the manifest that names them."""
    config = json.dumps({"config": {"User": user}}).encode()
    paths = {f"blobs/sha256/{hashlib.sha256(blob).hexdigest()}": blob for blob in (config, *layers)}
    config_name, *layer_names = list(paths)
    paths["manifest.json"] = json.dumps([{"Config": config_name, "Layers": layer_names}]).encode()
    with tarfile.open(folder / f"{name}.tar", "w") as archive:
        for path, blob in sorted(paths.items()):
            member = tarfile.TarInfo(path)
            member.size = len(blob)
            archive.addfile(member, io.BytesIO(blob))
    (folder / f"{name}.program").write_bytes(layers[-1])


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "docker").write_text(DOCKER)
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def built(name: str) -> repro.Built:
    return repro.Built("", [], repro.program(name), *repro.contents(name))


def test_the_same_image_has_no_differences(shelf: Path) -> None:
    image(shelf, "one", layer({"usr/a": "a"}), layer({"app/b": "b"}))
    first = built("one")
    assert repro.compare(first, *repro.contents("one")) == []
    assert set(first.files) == {"layer 1: /usr/a", "layer 2: /app/b"}


def test_files_that_differ_are_named_with_what_they_are(shelf: Path) -> None:
    image(shelf, "one", layer({"usr/a": "a", "usr/gone": ""}), layer({"app/b": "b"}))
    image(shelf, "two", layer({"usr/a": "other"}), layer({"app/b": "b"}, mode=0o600))
    lines = repro.compare(built("one"), *repro.contents("two"))
    assert [line.splitlines()[0] for line in lines] == ["layer 1: /usr/a", "layer 1: /usr/gone", "layer 2: /app/b"]
    assert hashlib.sha256(b"a").hexdigest() in lines[0]
    assert hashlib.sha256(b"other").hexdigest() in lines[0]
    assert "absent" in lines[1]
    assert "0644" in lines[2]
    assert "0600" in lines[2]


def test_a_setting_that_differs_is_named(shelf: Path) -> None:
    image(shelf, "one", layer({"a": "a"}))
    image(shelf, "two", layer({"a": "a"}), user="0")
    (line,) = repro.compare(built("one"), *repro.contents("two"))
    assert '"User": "1000"' in line
    assert '"User": "0"' in line


def test_a_layer_that_is_large_is_read_as_it_comes(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repro, "SMALL", 2000)
    image(shelf, "one", layer({"large": "x" * 50_000}), layer({"small": ""}))
    assert set(repro.contents("one")[0]) == {"layer 1: /large", "layer 2: /small"}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-C", str(tmp_path / "clone")]
    (tmp_path / "clone/train").mkdir(parents=True)
    (tmp_path / "clone" / repro.CHANGED).write_bytes((ROOT / repro.CHANGED).read_bytes())
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    return tmp_path / "clone"


def test_one_byte_is_one_byte_and_git_sees_none(clone: Path) -> None:
    before = (clone / repro.CHANGED).read_bytes()
    repro.change_one_byte(clone)
    after = (clone / repro.CHANGED).read_bytes()
    assert sum(a != b for a, b in zip(before, after)) == 1
    assert len(before) == len(after)
    assert compile(after, repro.CHANGED, "exec")
    assert repro.run("git", "-C", str(clone), "status", "--porcelain") == ""


@pytest.mark.parametrize("place", repro.PLACES)
def test_a_place_shows_in_a_checkout(
    tmp_path: Path, clone: Path, place: repro.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repro, "ROOT", clone)
    path = repro.checkout(tmp_path / "here", place, repro.head()) / repro.CHANGED
    assert place.time <= path.stat().st_mtime < place.time + 2**24
    assert path.stat().st_mode & 0o777 == 0o666 & ~place.umask


def test_a_quick_build_changes_only_what_the_program_is_made_of(tmp_path: Path) -> None:
    """The modes of another umask everywhere, but on what the layers below are built from, which the builder must know again."""
    folder = repro.checkout(tmp_path / "here", repro.PLACES[1], repro.head())
    repro.keep_below(folder)
    modes = {
        name: (folder / name).stat().st_mode & 0o777
        for name in ("env.lock", "docker/setup", "docker/apt", "train/common/errors.py")
    }
    assert modes == {name: (ROOT / name).stat().st_mode & 0o777 for name in modes} | {"train/common/errors.py": 0o600}


def test_the_places_differ_in_everything() -> None:
    for key in ("folder", "umask", "time", "locale", "zone"):
        assert len({getattr(place, key) for place in repro.PLACES}) == 3


def test_settings_are_those_of_make_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repro, "ROOT", tmp_path)
    monkeypatch.delenv("TORCH", raising=False)
    monkeypatch.setenv("CUDA", "12.8")
    (tmp_path / ".env").write_text("# ours\nTORCH=registry\nCUDA=11.8\nCA=ca.pem\nUSER_ID=7\n")
    found = repro.settings("name", repro.PLACES[1])
    assert (found["TORCH"], found["CUDA"], found["CA"]) == ("registry", "12.8", f"{tmp_path}/ca.pem")
    assert (found["IMAGE"], found["LC_ALL"], found["TZ"]) == ("name", "C", "Asia/Shanghai")


def test_a_build_that_fails_ends_it_with_the_builders_words(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"(?s)no space left.*exit status 3"):
        repro.run(sys.executable, "-c", "import sys; print('no space left', file=sys.stderr); sys.exit(3)")
