"""The train command: what a run leaves behind, what is refused before anything is written, and stages."""

import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.tiny_training import adapter, losses, options, signal_at_step, train, write_rows
from train.commands import train as command
from train.common.errors import UserError
from train.common.files import read_json
from train.config.options import AUTO
from train.config.recipe import RECIPES, Recipe, load_recipe
from train.model import lora
from train.runs.folder import lock_run
from train.training import distributed

pytestmark = pytest.mark.usefixtures("workspace")


def test_a_run_leaves_a_folder_that_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    train(run="whole", steps=4, save_every=2)
    folder = Path("runs/whole")
    names = {path.name for path in folder.iterdir()}
    assert names >= {"recipe.yaml", "inputs.json", "losses.jsonl", "tensorboard", "checkpoints", "adapter", "run.json"}
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-000002", "step-000004"]
    record = read_json(folder / "run.json")
    assert set(record["base"]["files"]) >= {"config.json", "model.safetensors", "qwen.tiktoken"}
    assert set(record["adapter"]) == {lora.CONFIG, lora.WEIGHTS, "tokenizer.json", "tokenizer_config.json"}
    assert Recipe(**record["recipe"]) == load_recipe(str(folder / "recipe.yaml"), {})
    assert record["loss"]["first"] == losses("whole")[0]["loss"]
    assert list(folder.glob("tensorboard/events*"))
    printed = capsys.readouterr().out
    assert "a step: 2 rows × 2 × 1 process = 4 rows" in printed
    assert "float32 (chosen for this device)" in printed
    assert "kept in float32" in printed
    assert "make export RUN=whole" in printed

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    train(run="whole", steps=4, save_every=2)
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("changes", [{"rank": 8}, {"learning_rate": 0.5}, {"accumulation": 3}])
def test_changed_inputs_are_refused_and_named(changes: dict[str, Any]) -> None:
    train(run="first", steps=1)
    with pytest.raises(UserError, match=r"started with other inputs.*\n.*was.*now(.|\n)*RUN=.*FROM=first"):
        train(run="first", steps=1, **changes)


def test_a_run_starts_from_the_adapter_of_another() -> None:
    train(run="first", steps=1)
    train(**{"run": "second", "steps": 1, "from": "first", "learning_rate": 1e-30})
    assert adapter("second") == adapter("first")
    assert read_json(Path("runs/second/run.json"))["from"]["run"] == "first"
    with pytest.raises(UserError, match="rank=4 alpha=16"):
        train(**{"run": "third", "steps": 1, "from": "first", "rank": 2})
    for nobody in ("nobody", "n" * 300):
        with pytest.raises(UserError, match=f"there is no run runs/{nobody}, and no folder of that path"):
            train(**{"run": "third", "steps": 1, "from": nobody})
    Path("runs/half").mkdir()
    (Path("runs/half") / "inputs.json").touch()
    with pytest.raises(UserError, match=r"run runs/half has no adapter\. Finish it first"):
        train(**{"run": "third", "steps": 1, "from": "half"})
    assert not Path("runs/third").exists()


def test_a_run_that_another_process_trains_is_left_alone() -> None:
    with lock_run(Path("runs/busy")), pytest.raises(UserError, match="being trained by another process"):
        train(run="busy", steps=1)


def test_gpus_on_a_machine_without_any_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    train(run="no-gpus", steps=1, gpus=2)
    assert "gpus=2: this machine has no GPU: training runs on the CPU, with processes=1." in capsys.readouterr().out


# --- stages -----------------------------------------------------------------------------------------------------------

STAGES = """
stages:
  - data: small.jsonl
    steps: 6
  - steps: 4
    learning_rate: 1.0e-4
"""


def test_each_stage_is_a_run_that_starts_from_the_one_before(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in the second and continued by the same command, it ends in the adapter of two runs made by hand."""
    write_rows(workspace / "small.jsonl", 4)
    (workspace / "two.yaml").write_text((RECIPES / "smoke.yaml").read_text().replace("steps: 4", "steps: 9") + STAGES)
    keys = {"recipe": "two.yaml", "save_every": 2}
    with monkeypatch.context() as patch:
        computed = signal_at_step(1, signal.SIGTERM, patch, start=6)  # seen in the step after it
        with pytest.raises(SystemExit):
            train(run="two", **keys)
    assert len(computed) == 9
    train(run="two", **keys)
    train(run="by-hand-1", data="small.jsonl", steps=6, save_every=2)
    train(**{"run": "by-hand-2", "from": "by-hand-1", "steps": 4, "learning_rate": 1e-4, "save_every": 2})
    assert adapter("two/stages/1") == adapter("by-hand-1")
    assert adapter("two") == adapter("by-hand-2")
    record = read_json(Path("runs/two/run.json"))
    assert [(one["data"], one["steps"]) for one in record["lineage"]] == [("small.jsonl", 6)]
    assert record["lineage"][0]["adapter"] == read_json(Path("runs/two/stages/1/run.json"))["adapter"]
    first, second = Path("runs/two/lineage.txt").read_text().splitlines()
    assert first.startswith("runs/two/stages/1: 6 steps on small.jsonl, learning rate 0.001, loss ")
    assert second == "runs/two: 4 steps on data.jsonl, learning rate 0.0001"
    assert "stage 2 of 2: data.jsonl, in runs/two" in capsys.readouterr().out
    train(run="two", **keys)
    assert capsys.readouterr().out.count("nothing to do") == 2


# --- what is refused before anything is written -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data": "nowhere.jsonl"}, r"nowhere.jsonl.*no such file"),
        ({"data": "broken.jsonl"}, r"broken.jsonl"),
        ({"model": "absent"}, r"make model MODEL=absent"),
        ({"targets": "q_proj,c_attn"}, r"no linear is called c_attn.*q_proj, k_proj"),
        ({"length": 8}, r"no token to train on: 12 conversations"),
        ({"data": ""}, r"which data"),
        ({"processes": 0}, r"processes=0: expected a whole number from 1"),
        ({"zero": 3}, r"zero=3.*checkpointing=off"),
    ],
)
def test_wrong_inputs_leave_nothing_behind(keys: dict[str, Any], message: str, workspace: Path) -> None:
    (workspace / "broken.jsonl").write_text("{'instruction': 'a', 'output': 'b'}\n")
    with pytest.raises(UserError, match=message):
        train(run="wrong", **keys)
    assert not (workspace / "runs" / "wrong").exists()


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(UserError) as error:
        train(run="wrong", data="nowhere.jsonl", model="absent")
    assert "nowhere.jsonl" in str(error.value)
    assert "MODEL=absent" in str(error.value)


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean learning_rate="):
        command.parse({"data": "x", "learning_rat": "1"})
    with pytest.raises(UserError, match="Did you mean data="):
        command.parse({"dta": "x"})


def test_a_later_process_reports_what_the_first_cannot_know(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another machine may lack the data. Processes that this command started itself have nothing to add."""
    monkeypatch.setattr(distributed, "detect", lambda: distributed.RankInfo(1, 0, 2))
    with pytest.raises(SystemExit) as stopped:
        train(run="wrong", data="nowhere.jsonl")
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error on {socket.gethostname()}, process 1: ")
    assert "nowhere.jsonl" in printed
    monkeypatch.setenv(distributed.SPAWNED, "1")
    with pytest.raises(SystemExit):
        train(run="wrong", data="nowhere.jsonl")
    assert capsys.readouterr().err == ""


def test_the_command_line_of_a_worker_parses_to_the_same_request() -> None:
    request = command.parse(options(run="x", steps=3, **{"from": "y"}))
    assert command.parse(dict(word.split("=", 1) for word in request.words())) == request


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_a_complete_run_with_each_key_explained(path: Path) -> None:
    lines = [line for line in path.read_text().split("\nstages:")[0].splitlines() if line and not line.startswith("#")]
    keys = [line.partition(":")[0] for line in lines]
    assert keys == list(Recipe.__dataclass_fields__), "each key once, in the same order"
    assert all("  # " in line for line in lines)
    recipe, values = load_recipe(path.stem, {}), yaml.safe_load(path.read_text())
    assert all(
        key in ("alpha", "stages")
        or getattr(recipe, key) in (value, {True: "on", False: "off", "auto": AUTO}.get(value, value))
        for key, value in ((k, ",".join(v) if isinstance(v, list) and k != "stages" else v) for k, v in values.items())
    )
