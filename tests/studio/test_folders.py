"""Names from a browser: inside data/, models/ and runs/, or refused."""

from pathlib import Path

import pytest

from train.common.errors import UserError
from train.studio.folders import Folders, inside

CLIMBING = [
    *("../secret.jsonl", "a/../../secret.jsonl", "/etc/passwd", "..", ".", "", "a/./b.jsonl", "x\0.jsonl"),
    *("out.jsonl", "out/secret.jsonl", ".hidden/x.jsonl", "n" * 300 + ".jsonl"),
]


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    """data/ with two files, and two links that lead out of it; runs/ with a run and a link to a folder elsewhere."""
    for name in ("data/sub", "data/.hidden", "models", "runs/one", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("data/a.jsonl", "data/sub/b.json", "data/.hidden/x.jsonl", "secret.jsonl", "elsewhere/secret.jsonl"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "data/out.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (tmp_path / "data/out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/notes.py").write_text("")
    for name in ("runs/one/inputs.json", "elsewhere/inputs.json", "elsewhere/config.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "runs/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "models/linked").symlink_to(tmp_path / "elsewhere")
    return Folders(tmp_path / "data", tmp_path / "models", tmp_path / "runs")


@pytest.mark.parametrize("name", CLIMBING)
def test_a_name_that_leads_out_of_data_is_refused(folders: Folders, name: str) -> None:
    with pytest.raises(UserError):
        folders.data_file(name)


@pytest.mark.parametrize("name", ["../data", "linked", ".studio", "", "one/..", "two"])
def test_a_name_that_is_no_run_is_refused(folders: Folders, name: str) -> None:
    with pytest.raises(UserError):
        folders.run(name)


def test_lists_have_only_what_is_inside(folders: Folders) -> None:
    assert folders.data_files() == ["a.jsonl", "sub/b.json"]
    assert folders.run_names() == ["one"]
    assert folders.bases() == []


def test_an_upload_never_takes_the_place_of_a_file(folders: Folders) -> None:
    assert folders.free_name("a.jsonl").name == "a-2.jsonl"
    assert folders.free_name("out.jsonl").name == "out-2.jsonl"  # a link is a file too
    assert folders.free_name("../../../x/new 数据.jsonl") == folders.data / "new 数据.jsonl"
    assert folders.free_name("C:\\Users\\me\\new.csv") == folders.data / "new.csv"


@pytest.mark.parametrize(
    "name", ["", ".jsonl", "x.py", "x.html", "a,b.jsonl", "a:0.5x.jsonl", "a\n.jsonl", "..", "\u202e.json"]
)
def test_an_upload_with_another_kind_of_name_is_refused(folders: Folders, name: str) -> None:
    with pytest.raises(UserError):
        folders.free_name(name)


def test_a_link_to_itself_is_outside(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError):
        inside(tmp_path, "loop/x", "data")
