"""`make data FIX=1`: what it prints, what it writes, what it refuses; the original is never touched."""

from pathlib import Path

import pytest

from tests.data.damaged_files import GOOD, NEXT
from train.__main__ import VERBS, main
from train.commands.needs import paths
from train.data.checked import conversations

BROKEN = f"[{GOOD[:-1]},}},\n{NEXT}"  # a trailing comma, and no ] at the end
HALF = f'{GOOD[:-1]},}}\n{{"instruction": "r", "output": ""}}\n'  # the second row has no answer


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.json"
    path.write_text(BROKEN)
    return path


def run(*words: object) -> int:
    return main(["data", "fix=1", *(str(word) for word in words)])


def test_the_result_lies_beside_the_original(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"data={file}") == 0
    fixed = file.with_name("mine.fixed.jsonl")
    assert fixed.read_text() == f"{GOOD}\n{NEXT}\n" and file.read_text() == BROKEN
    out = capsys.readouterr().out
    assert f"{file}: 2 rows, 1 of them mended.\n  trailing comma deleted: 1\n" in out
    assert f"{fixed}: 2 rows written, and read back without a mistake.\n" in out
    assert sorted(path.name for path in file.parent.iterdir()) == ["mine.fixed.jsonl", "mine.json"]


def test_the_same_again_finds_it_done(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"data={file}") == 0 and run(f"data={file}") == 0
    assert "2 rows, which were there already" in capsys.readouterr().out


def test_other_content_is_replaced_only_when_told(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fixed = file.with_name("mine.fixed.jsonl")
    fixed.write_text("mine\n")
    assert run(f"data={file}") == 2
    assert "OVERWRITE=1" in capsys.readouterr().err and fixed.read_text() == "mine\n"
    assert run(f"data={file}", "overwrite=1") == 0
    assert len(conversations.load(fixed)) == 2


def test_what_is_left_is_listed_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "half.jsonl"
    path.write_text(HALF)
    assert run(f"data={path}") == 2
    printed = capsys.readouterr()
    assert "error: 1 row is left that only a person can mend; nothing was written." in printed.err
    assert f"{path}:2:32: found an empty text" in printed.err and "PARTIAL=1" in printed.err
    assert "1 row, 1 of them mended; 1 other left for you." in printed.out
    assert [p.name for p in tmp_path.iterdir()] == ["half.jsonl"]


def test_the_other_rows_are_written_when_told_and_the_status_says_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "half.jsonl", tmp_path / "out.jsonl"
    path.write_text(HALF)
    assert run(f"data={path}", f"out={out}", "partial=1") == 2
    assert out.read_text() == f"{GOOD}\n" and path.read_text() == HALF
    assert "1 row is left that only a person can mend and not among the rows" in capsys.readouterr().err


def test_sound_data_is_not_written_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sound.jsonl"
    path.write_text(f"{GOOD}\n")
    assert run(f"data={path}", f"out={tmp_path}/out.jsonl") == 0
    assert "no mistakes, nothing to mend" in capsys.readouterr().out and len(list(tmp_path.iterdir())) == 1


def test_several_files_have_a_result_each_and_a_folder_has_one(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = file.parent / "many"
    folder.mkdir()
    for name in ("a.json", "b.jsonl"):
        (folder / name).write_text(BROKEN)
    assert run(f"data={file},{folder}") == 0
    assert len(conversations.load(file.with_name("mine.fixed.jsonl"))) == 2
    assert len(conversations.load(file.with_name("many.fixed.jsonl"))) == 4
    assert sorted(p.name for p in folder.iterdir()) == ["a.json", "b.jsonl"]
    assert run(f"data={folder}/a.json,{folder}/b.jsonl", f"out={file.parent}/all.jsonl") == 0
    assert len(conversations.load(file.parent / "all.jsonl")) == 4


def test_two_results_of_one_name_need_an_out(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.with_suffix(".jsonl").write_text(BROKEN)
    assert run(f"data={file},{file.with_suffix('.jsonl')}") == 2
    assert "the place of two results. Give one for all: OUT=" in capsys.readouterr().err


def test_the_original_is_never_the_result(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"data={file}", f"out={file}", "overwrite=1") == 2
    assert "the original stays" in capsys.readouterr().err and file.read_text() == BROKEN


def test_another_kind_of_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.pdf"
    path.write_bytes(b"%PDF-1.7\n")
    assert run(f"data={path}") == 2
    assert "FIX=1 mends JSON" in capsys.readouterr().err


def test_a_folder_with_a_table_would_lose_its_rows(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file.parent / "b.csv").write_text("question,answer\nq,a\n")
    assert run(f"data={file.parent}") == 2
    assert "b.csv: not JSON, so its rows would be missing" in capsys.readouterr().err
    assert run(f"data={file},{file.parent}/b.csv") == 0  # a result each, and none for the table
    out = capsys.readouterr().out
    assert f"{file.parent}/b.csv: sound as it is, so nothing was written." in out
    assert not (file.parent / "b.fixed.jsonl").exists()


def test_a_large_file_shows_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "large.jsonl"
    path.write_text(
        "{'instruction': '" + "q" * 999 + "', 'output': 'a'}\n" + (GOOD.replace("q", "q" * 999) + "\n") * 2001
    )
    assert run(f"data={path}") == 0
    assert "mending large.jsonl: 100 of 100 %" in capsys.readouterr().out


def test_the_container_may_write_beside_the_data() -> None:
    assert paths("data", VERBS["data"], ["data=x/a.json,b.json", "fix=1"])[:2] == [("write", "."), ("write", "x")]
    assert ("write", "x") not in paths("data", VERBS["data"], ["data=x/a.json", "fix=0"])
    assert paths("data", VERBS["data"], ["data=x/a.json", "fix=1", "out=y/b"])[0] == ("write", "y")
