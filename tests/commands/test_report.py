"""The command `report`: the page of a run in every state; nothing that a run holds is HTML."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from tests.pages.reading import Reader, check_loads_nothing
from tests.support import tiny_training
from train.__main__ import main
from train.common.files import read_json, write_json
from train.config.recipe import Recipe
from train.runs.folder import is_locked, lock_run

OLD_RUNS = Path(__file__).parents[1] / "assets/old_runs/runs"
HOSTILE = "<script>alert(1)</script>\" onload='x' \u202e\0<img src=x onerror=alert(1)>"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A copy of runs of an earlier program, which a test may change."""
    return Path(shutil.copytree(OLD_RUNS, tmp_path / "runs"))


def report(name: str, runs: Path = Path("runs")) -> Reader:
    assert main(["report", f"run={name}", f"runs={runs}"]) == 0
    return check_loads_nothing((runs / name / "report.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["whole", "cut", "qwen", "voice", "voice-cut"])
def test_every_run_has_a_page_and_equal_folders_equal_pages(runs: Path, name: str) -> None:
    report(name, runs)
    first = (runs / name / "report.html").read_bytes()
    report(name, runs)
    assert (runs / name / "report.html").read_bytes() == first
    assert not list((runs / name).glob(".*.tmp"))


def test_the_page_of_a_finished_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reader = report("whole", runs)
    assert f"{runs / 'whole' / 'report.html'}: the page of this run" in capsys.readouterr().out
    answers = [json.loads(line) for line in (runs / "whole/answers.jsonl").read_text().splitlines()]
    for part in ("Finished.", "已完成。", answers[0]["question"], "20 steps, 2 epochs", "make infer RUN=whole"):
        assert part in reader.text, part
    record = read_json(runs / "whole/run.json")
    assert all(digest in reader.text for digest in (record["lock"], *record["adapter"].values()))
    assert [tag for tag, _ in reader.elements].count("svg") == 4  # loss, learning rate, norms, tokens per second


def test_a_stopped_run_says_how_it_goes_on(runs: Path) -> None:
    assert "continues after step" in report("cut", runs).text
    assert "7 / 20" in report("cut", runs).text and "make doctor LOG=train.log" in report("cut", runs).text
    with lock_run(runs / "cut"):
        assert is_locked(runs / "cut") and "Under way" in report("cut", runs).text
    assert not is_locked(runs / "cut") and not is_locked(runs / "none")
    shutil.rmtree(runs / "cut/checkpoints")
    (runs / "cut/losses.jsonl").write_text("")
    reader = report("cut", runs)
    assert "begins anew" in reader.text and "No step was finished yet." in reader.text and "svg" not in reader.tags


def test_nothing_of_a_run_is_html(runs: Path) -> None:
    """Answers, names, decisions and damage of a hostile run make the elements of a harmless one."""
    folder, pages = runs / "whole", []
    record, answers = read_json(folder / "run.json"), (folder / "answers.jsonl").read_text().splitlines()
    for text in (HOSTILE, "plain"):
        values = dict.fromkeys(("question", "before", "after"), text)
        rows = [json.dumps(json.loads(line) | values) for line in answers]
        (folder / "answers.jsonl").write_text("\n".join(rows) + "\n")
        changed = record | {"decisions": [text], "base": {"name": text, "files": {text: text}}}
        changed["data"] = {"path": text, "sha256": text}
        changed["machine"] = record["machine"] | {"gpus": [text]}
        changed["recipe"] = record["recipe"] | {"system": text, "model": text}
        write_json(folder / "run.json", changed)
        pages.append(report("whole", runs))
    hostile, harmless = pages
    assert hostile.elements == harmless.elements
    assert "<script>alert(1)</script>\" onload='x' ⟪U+202E⟫⟪U+0000⟫<img src=x" in hostile.text


def test_what_is_missing_or_odd_in_an_old_record_leaves_a_page(runs: Path) -> None:
    path = runs / "whole/run.json"
    record = read_json(path)
    for key in ("decisions", "lineage", "lock", "starts", "processes", "device", "label_tokens", "steps", "adapter"):
        write_json(path, {name: value for name, value in record.items() if name != key})
        report("whole", runs)
    write_json(path, record | {"lineage": [{}], "starts": [{}], "timings": {"steps_seconds": 1, "began": "x"}})
    report("whole", runs)
    (runs / "whole/inputs.json").write_text("{")
    path.write_text("{")
    assert "is damaged" in report("whole", runs).text


@pytest.mark.parametrize(
    ("words", "said"), [((), "which run?"), (("run=none",), "does not exist"), (("run=../x",), "below runs/")]
)
def test_a_wrong_run_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", *words]) == 2 and said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_stopped_and_continued(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"run": "again", "steps": 6, "held_out": 2, "near": 1}
    with monkeypatch.context() as patch:
        tiny_training.signal_at_step(3, signal.SIGTERM, patch)
        with pytest.raises(SystemExit):
            tiny_training.train(**keys)
    assert "continues after step" in report("again").text
    tiny_training.train(**keys)
    reader = report("again")
    assert "It was interrupted and continued:" in reader.text and "held-out loss" in reader.text
    assert "host memory, at most" in reader.text
    record = read_json(Path("runs/again/run.json"))
    assert record["peak_memory"]["host"] > 1 << 27 and Recipe.from_record(record["recipe"]).held_out == 2
