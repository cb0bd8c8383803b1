"""Every command takes every form of DATA: a part of a file, sets of a dataset_info.json, a set of a hub, a recipe's own."""

import json
from pathlib import Path

import pytest

from tests.commands.test_fetch import jsonl
from tests.support.data_hub import commit_of, data_hub
from tests.support.tiny_training import ROOT, TINY, losses, train
from train.__main__ import main
from train.commands.train import wanted_base
from train.common.errors import UserError
from train.common.files import read_json
from train.evaluation.report import short_name
from train.host import machine

FILES = {"train.jsonl": jsonl(*(f"hub {n}" for n in range(6)))}
MIXED = "data.jsonl:0.5x,data:short:2x,data:long,hub:o/n:4rows"


@pytest.fixture(scope="module", autouse=True)
def sets(workspace: Path) -> Path:
    """The workspace with two sets of a dataset_info.json and a fetched one."""
    (workspace / "data").mkdir()
    for name in ("short", "long"):
        rows = [{"q": f"{name} {n}?", "a": f"Answer {n}. " * 5} for n in range(3)]
        (workspace / f"data/{name}.json").write_text(json.dumps(rows))
    entry = {"columns": {"prompt": "q", "response": "a"}}
    info = {name: {"file_name": f"{name}.json", **entry} for name in ("short", "long")}
    (workspace / "data/dataset_info.json").write_text(json.dumps(info))
    with data_hub({"o/n": {"main": FILES}}) as (address, _), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", address)
        patch.setenv("HF_HUB_OFFLINE", "0")
        assert main(["fetch", "data=hub:o/n"]) == 0
    own = "model: tiny-Int4\ndata:\n- data.jsonl:0.5x\n- data:short,long\nsteps: 1\n"
    (workspace / "mine.yaml").write_text(own)
    return workspace


def test_data_shows_each_part_before_and_after(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", f"data={MIXED}", "model=tiny-Int4"]) == 0
    said = capsys.readouterr().out
    for line in (
        "data.jsonl:0.5x: 12 rows read, 6 used (0.50x)",
        "data:short:2x: 3 rows read, 6 used (2.00x)",
        "data:long: 3 rows read, 3 used (1.00x)",
        "hub:o/n:4rows: 6 rows read, 4 used (0.67x)",
    ):
        assert line in said
    assert "19 (Alpaca)" in said and "copies" not in said
    assert f"hub:o/n: commit {commit_of(FILES)[:12]}" in said


def test_doctor_reads_the_same_rows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "probe_torch", lambda: {"seen": 0, "errors": []})
    main(["doctor", f"data={MIXED}", "model=tiny-Int4", "recipe=smoke"])
    assert "19 conversations" in capsys.readouterr().out
    main(["doctor", "data=hub:o/other", "model=tiny-Int4", "recipe=smoke"])
    assert "make fetch DATA=hub:o/other" in " ".join(capsys.readouterr().out.split())
    main(["doctor", "recipe=mine.yaml"])
    assert "12 conversations" in capsys.readouterr().out


def test_train_compare_and_verify(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the replay, in a process of its own
    train(data=MIXED, run="mixed", steps=2)
    record = read_json(Path("runs/mixed/run.json"))["data"]
    assert record["path"] == MIXED.replace("hub:o/n", f"hub:o/n@{commit_of(FILES)}#train")
    assert [part["draws"] for part in record["parts"]] == [["0.5x"], ["2x"], [], ["4rows"]]
    assert len(record["files"]) == 4
    assert short_name(record["path"]) == "data.jsonl:0.5x, short:2x, long, n#train:4rows"
    first = losses("mixed")
    train(data=MIXED, run="again", steps=2)
    assert losses("again") == first

    assert main(["compare", "run=mixed", "max_tokens=4"]) == 0
    answers = [json.loads(line) for line in Path("runs/mixed/answers.jsonl").read_text().splitlines()]
    assert answers and all(answer["seen"] for answer in answers)
    capsys.readouterr()
    assert main(["verify", "run=mixed", "replay=on"]) == 0
    assert f"same     data {record['path']}" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"data": MIXED.replace("0.5x", "0.6x")}, {"data": "data.jsonl"}, {"seed": 7}])
def test_a_run_with_another_draw_is_not_continued(change: dict[str, str]) -> None:
    train(data=MIXED, run="kept", steps=2)
    with pytest.raises(UserError, match="was started with other inputs"):
        train(**{"data": MIXED, "run": "kept", "steps": 2, **change})


def test_a_run_is_named_after_the_first_part() -> None:
    for data, name in (("data:short:2x,long", "short"), ("hub:o/n", "n"), ("data.jsonl:0.5x", "data")):
        train(data=data, steps=1)
        assert (Path("runs") / f"{name}-smoke-tiny-Int4/run.json").is_file()


def test_what_has_to_be_fetched_stops_train_before_its_base(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data=hub:o/other", "model=Qwen/X"]
    assert wanted_base(words) == ""
    assert main(["train", *words, "run=other"]) == 2
    said = capsys.readouterr().err
    assert "Fetch it first" in said and "make fetch DATA=hub:o/other" in said
    assert not Path("runs/other").exists()


def test_a_recipe_may_hold_the_data_as_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recipe=mine.yaml", *(f"{key}={value}" for key, value in TINY.items())]
    assert main(["data", "recipe=mine.yaml"]) == 0
    assert "data:short: 3 rows read, 3 used" in capsys.readouterr().out
    assert main(["train", *words]) == 0
    assert read_json(Path("runs/mine-tiny-Int4/run.json"))["data"]["path"] == "data.jsonl:0.5x,data:short,long"
    assert main(["train", *words, "data=data.jsonl", "run=typed"]) == 0  # what is typed counts
    assert read_json(Path("runs/typed/run.json"))["data"]["path"] == "data.jsonl"


def test_each_stage_may_have_a_mixture() -> None:
    Path("two.yaml").write_text(
        "model: tiny-Int4\nstages:\n- data: [data:short:2x]\n  steps: 1\n- data: [data.jsonl:0.5x, data:long]\n  steps: 1\n"
    )
    words = ["recipe=two.yaml", "run=two", *(f"{key}={value}" for key, value in TINY.items() if key != "rank")]
    assert main(["train", *words, "rank=4"]) == 0
    assert read_json(Path("runs/two/stages/1/run.json"))["data"]["path"] == "data:short:2x"
    assert read_json(Path("runs/two/run.json"))["data"]["path"] == "data.jsonl:0.5x,data:long"
    assert main(["verify", "run=two"]) == 0
