"""What a run's folder says, whole, under way, stopped, continued or damaged."""

import json
import shutil
from pathlib import Path

import pytest

from train.common.errors import UserError
from train.common.files import read_json, write_json
from train.pages.run_facts import collect
from train.runs.folder import lock_run

OLD_RUNS = Path(__file__).parents[1] / "assets/old_runs/runs"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A copy of runs of an earlier program, which a test may change."""
    return Path(shutil.copytree(OLD_RUNS, tmp_path / "runs"))


def test_a_finished_run(runs: Path) -> None:
    facts = collect(runs / "whole")
    rows = [json.loads(line) for line in (runs / "whole/losses.jsonl").read_text().splitlines()]
    assert (facts.state, facts.steps, facts.planned, facts.damage) == ("finished", 20, 20, [])
    assert facts.curves.loss == [(row["step"], row["loss"]) for row in rows]
    assert facts.curves.grad_norm[4] == (5, rows[4]["grad_norm"])
    assert facts.curves.speed[2] == (3, rows[2]["tokens"] / rows[2]["seconds"])
    assert facts.tokens == sum(row["tokens"] for row in rows)
    assert facts.seconds == pytest.approx(sum(row["seconds"] for row in rows))
    assert len(facts.answers) > 0 and facts.parity and facts.recipe["model"] == "tiny-Int4"


def test_a_stopped_run_and_one_under_way(runs: Path) -> None:
    facts = collect(runs / "cut")
    assert (facts.state, facts.steps, facts.planned, facts.checkpoint) == ("stopped", 7, 20, 7)
    assert len(facts.starts) == 1 and facts.answers == [] and facts.parity is None
    with lock_run(runs / "cut"):
        assert collect(runs / "cut").state == "running"
    shutil.rmtree(runs / "cut/checkpoints")
    assert collect(runs / "cut").state == "begun"
    (runs / "cut/losses.jsonl").unlink()
    facts = collect(runs / "cut")
    assert facts.steps == 0 and facts.curves.loss == [] and facts.epoch == 0


def test_the_line_that_is_being_written_is_no_damage(runs: Path) -> None:
    with (runs / "cut/losses.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    facts = collect(runs / "cut")
    assert facts.steps == 7 and facts.damage == []


def test_a_continued_run_has_its_starts(runs: Path) -> None:
    state = runs / "cut/checkpoints/step-000007/state.json"
    starts = [{"after": 0, "processes": 1}, {"after": 4, "processes": 2}]
    write_json(state, read_json(state) | {"starts": starts})
    assert collect(runs / "cut").starts == starts


def test_stages_come_before_the_run(runs: Path) -> None:
    facts = collect(runs / "voice")
    assert [stage.name for stage in facts.stages] == ["1"] and facts.stages[0].state == "finished"
    assert facts.record and [one["run"] for one in facts.record["lineage"]]


def test_held_out_losses_and_steps_that_were_left_out(runs: Path) -> None:
    path = runs / "whole/losses.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["held_out_loss_before"], rows[9]["held_out_loss"] = 6.0, 5.0
    rows[3] |= {"loss": None, "grad_norm": None}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = collect(runs / "whole")
    assert facts.curves.held_out == [(0, 6.0), (10, 5.0)] and facts.skipped == [4]
    assert [step for step, _ in facts.curves.loss] == [1, 2, 3, *range(5, 21)]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("losses.jsonl", '{"step": 1, "loss": 2.0}\n{"step"', "losses.jsonl has 1 whole lines; 20 are expected."),
        ("losses.jsonl", '{"step": 1, "loss": "<b>"}\n', "0 whole lines; 20 are expected"),
        ("run.json", "{", "run.json is damaged: not JSON"),
        ("run.json", '{"run": 1}', "run.json is damaged: run is 1"),
        ("inputs.json", "[]", "inputs.json is damaged"),
        ("answers.jsonl", '{"question": 1}\n', "answers.jsonl is damaged"),
        ("answers.jsonl", "\xff", "answers.jsonl is damaged"),
    ],
)
def test_damage_is_said_and_the_rest_is_there(runs: Path, name: str, text: str, said: str) -> None:
    (runs / "whole" / name).write_bytes(text.encode("latin-1"))
    facts = collect(runs / "whole")
    assert len(facts.damage) == 1 and said in facts.damage[0]
    assert facts.recipe["model"] == "tiny-Int4"


@pytest.mark.parametrize("name", ["manifest.json", "../compare.json", "../checkpoints/step-000020/state.json"])
def test_files_beside_may_hold_anything(runs: Path, name: str) -> None:
    for text in ("", "[]", "null", '{"parity": 1, "after": null, "starts": 3}', "\0"):
        (runs / "whole/merged" / name).write_text(text)
        collect(runs / "whole")


def test_what_is_no_run_is_refused(runs: Path) -> None:
    (runs / "empty").mkdir()
    for name, said in (("empty", "holds no run"), ("absent", "does not exist")):
        with pytest.raises(UserError, match=said):
            collect(runs / name)
