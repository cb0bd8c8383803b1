"""Staged folders are complete or not there, also when the process that wrote one was killed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from train.common import files
from train.common.files import staged, write_text

KILLED = """
import os, signal, sys
from pathlib import Path
from train.common import files
folder, where = Path(sys.argv[1]), sys.argv[2]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
files._exchange = lambda *_: False  # as on a file system that cannot
with files.staged(folder) as aside:
    (aside / "new").write_text("half")
    if where == "writing":
        die()
    rename = Path.replace
    Path.replace = lambda self, to: die() if Path(to) == folder else rename(self, to)  # between the two renames
"""


def killed(folder: Path, where: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), where], cwd=Path(__file__).parents[2])
    assert done.returncode == -9


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_complete_or_not_there(tmp_path: Path) -> None:
    with staged(tmp_path / "a") as aside:
        write_text(aside / "one", "1")
        assert not (tmp_path / "a").exists()
    with pytest.raises(RuntimeError), staged(tmp_path / "a") as aside:
        raise RuntimeError
    with staged(tmp_path / "a") as aside:
        write_text(aside / "two", "2")
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["two"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    killed(tmp_path / "a[1]", "writing")
    assert len(names(tmp_path)) == 1 and not (tmp_path / "a[1]").exists()
    alive, other = tmp_path / f".a[1].{os.getppid()}.tmp", tmp_path / ".a[1]x.999999999.tmp"
    alive.mkdir()
    other.mkdir()
    with staged(tmp_path / "a[1]"):
        pass
    assert names(tmp_path) == sorted([alive.name, other.name, "a[1]"])


def test_killed_between_two_renames_the_older_folder_comes_back(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_text(tmp_path / "a" / "old", "whole")
    killed(tmp_path / "a", "renaming")
    assert not (tmp_path / "a").exists() and len(names(tmp_path)) == 2
    with pytest.raises(RuntimeError), staged(tmp_path / "a"):
        raise RuntimeError((tmp_path / "a" / "old").read_text())
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["old"]


def test_a_killed_process_may_have_had_our_process_id(tmp_path: Path) -> None:
    """In a container every start has the same one."""
    old = tmp_path / f".merged.{os.getpid()}.old"
    old.mkdir()
    (old / "kept").touch()
    with pytest.raises(KeyError), staged(tmp_path / "merged"):
        raise KeyError
    assert (tmp_path / "merged/kept").exists() and not old.exists()


def test_two_folders_exchange_names_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name always has a folder, also for a moment in between."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert files._exchange(tmp_path / "a", tmp_path / "b")
    assert names(tmp_path / "a") == ["b"] and names(tmp_path / "b") == ["a"]
    with pytest.raises(FileNotFoundError):
        files._exchange(tmp_path / "a", tmp_path / "nowhere")


@pytest.mark.parametrize("able", [True, False])
def test_an_older_folder_is_replaced_either_way(able: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not able:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    for text in ("one", "two"):
        with staged(tmp_path / "a") as aside:
            write_text(aside / text, text)
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["two"]


def test_the_entry_of_every_new_folder_is_flushed_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this, a power failure can keep the bytes of a checkpoint and lose the folder that they are in."""
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync", synced.append)
    files.make_folder(tmp_path / "runs" / "mine" / "checkpoints")
    assert synced == [tmp_path, tmp_path / "runs", tmp_path / "runs" / "mine"]
    files.make_folder(tmp_path / "runs" / "mine")
    assert len(synced) == 3 and (tmp_path / "runs/mine/checkpoints").is_dir()


# Lines


def test_only_line_ends_end_a_line() -> None:
    text = "one\u2028two\x85three\x0bfour\x0cfive\x1csix"
    assert files.split_lines(f"{text}\n\r\n{text}\rlast") == [text, "", text, "last"]
    assert files.split_lines("") == [] and files.split_lines("a\n") == ["a"]


def test_no_text_of_a_file_is_split_elsewhere() -> None:
    """str.splitlines ends a line at U+2028 and others too; of bytes it does not."""
    train = Path(files.__file__).parents[1]
    sources = {path: path.read_text(encoding="utf-8") for path in train.rglob("*.py")}
    assert [path.name for path, text in sources.items() if re.search(r"read_text\([^)]*\)\.splitlines", text)] == []
