"""What is checked before a run begins: disk space, conversations without labels, the same start in all processes."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.oracles import tiny_config
from tests.support.tiny_training import TINY, start, train, write_rows
from train.common.errors import UserError
from train.common.files import read_json, write_json
from train.config.recipe import RECIPES, Recipe, load_recipe
from train.model import lora
from train.model.loading import load
from train.runs import checkpoint
from train.training import distributed, prepare

pytestmark = pytest.mark.usefixtures("workspace")
TARGETS = lora.targets("qwen2", "all")


# --- space on the disk ------------------------------------------------------------------------------------------------


def test_a_full_disk_is_found_before_the_run_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "free_bytes", lambda path: 1 << 20)
    with pytest.raises(UserError, match=r"GB free.*GB needed"):
        train(run="wrong", steps=1)
    assert not Path("runs/wrong").exists()


def test_space_for_all_stages_is_counted_before_the_first(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for one stage, not for two."""
    write_rows(workspace / "small.jsonl", 4)
    stages = "\nstages:\n  - data: small.jsonl\n  - epochs: 1\n"
    (workspace / "two.yaml").write_text((RECIPES / "smoke.yaml").read_text() + stages)
    one = prepare.disk_space(tiny_config(), TARGETS, load_recipe("two.yaml", {"rank": "4"}))
    monkeypatch.setattr(prepare, "free_bytes", lambda path: one * 3 // 2)
    message = r"stages/1: .*for 2 checkpoints and the adapter, in this stage and the 1 after it"
    with pytest.raises(UserError, match=message):
        train(run="no-space", recipe="two.yaml")
    assert not Path("runs/no-space").exists()


def test_checkpoints_that_are_written_need_no_more_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is three times the adapter. Free are five times the adapter."""
    adapter = 4 * prepare.adapter_parameters(tiny_config(), TARGETS, 4)
    monkeypatch.setattr(prepare, "free_bytes", lambda path: 5 * adapter + (64 << 20))
    with pytest.raises(UserError, match=r"GB free.*GB needed for 2 checkpoints"):
        train(run="continued", steps=1)
    for step in (1, 2):
        checkpoint.folder_of(Path("runs/continued"), step).mkdir(parents=True)
    recipe = load_recipe("smoke", {key: value for key, value in TINY.items() if key in Recipe.__dataclass_fields__})
    prepared: Any = SimpleNamespace(folder=Path("runs/continued"), recipe=recipe)
    prepare._check_disk(prepared, tiny_config(), TARGETS, later_stages=0)


def test_the_parameters_of_an_adapter_are_counted_without_one() -> None:
    model = lora.attach(load(Path("models/tiny-Int4"), torch.float32), Recipe(rank=4))
    expected = sum(p.numel() for p in lora.trainable(model).values())
    assert prepare.adapter_parameters(tiny_config(), TARGETS, 4) == expected


# --- data -------------------------------------------------------------------------------------------------------------


def test_conversations_without_labels_are_named(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = {"instruction": "a" * 200, "output": "never reached"}
    (workspace / "long.jsonl").write_text((workspace / "data.jsonl").read_text() + json.dumps(long) + "\n")
    train(run="named", data="long.jsonl", steps=1)
    note = "no token to train on (every label masked, or cut off) in long.jsonl:13: left out"
    assert note in capsys.readouterr().out
    with pytest.raises(UserError, match=r"long.jsonl:13.\nCorrect these.*unlearnable=skip"):
        train(run="unnamed", data="long.jsonl", steps=1, unlearnable="stop")
    assert not Path("runs/unnamed").exists()


# --- a run of an older program ----------------------------------------------------------------------------------------


def test_a_run_that_lacks_a_newer_recipe_key_is_the_same_run(capsys: pytest.CaptureFixture[str]) -> None:
    """The default of the key is what the older program computed; another value is another run."""
    train(run="older", steps=1)
    path = Path("runs/older/inputs.json")
    inputs = read_json(path)
    del inputs["recipe"]["floor"]
    write_json(path, inputs)
    train(run="older", steps=1)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"floor: was 0.0, now 0.5"):
        train(run="older", steps=1, floor=0.5)


# --- several processes ------------------------------------------------------------------------------------------------


def test_the_rows_per_step_stay_when_the_number_of_processes_changes() -> None:
    train(run="fit", steps=1, batch=2, accumulation=6)
    recipe, run = load_recipe("smoke", {"batch": "2", "accumulation": "6"}), Path("runs/fit")
    assert [prepare.fitted(recipe, run, n).accumulation for n in (1, 2, 3, 6)] == [6, 3, 2, 1]
    assert prepare.fitted(recipe, Path("runs/none-yet"), 4) == recipe


def test_processes_that_would_start_from_different_things_do_not() -> None:
    """Two machines, shown as two runs/ folders: the first has a checkpoint, the second has none."""
    keys: dict[str, Any] = {"run": "apart", "steps": 3, "save_every": 1, "accumulation": 2}
    train(**{**keys, "accumulation": 4})
    for name in ("run.json", "adapter"):
        (Path("runs/apart") / name).rename(Path("runs/apart") / f"away-{name}")
    meeting = ("env", "WORLD_SIZE=2", "MASTER_ADDR=127.0.0.1", f"MASTER_PORT={distributed.free_port()}", "LOCAL_RANK=0")
    both = [start({**keys, "runs": runs}, (*meeting, f"RANK={n}")) for n, runs in enumerate(("runs", "runs-there"))]
    (first, _), (second, _) = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [2, 2], first + second
    assert "checkpoint: step-000003 on" in first
    assert "none on" in first
    assert "that all machines share" in first
    assert second == "", "the first speaks for both"
    assert not Path("runs-there").exists()


def test_what_differs_between_machines_is_named() -> None:
    recipe = load_recipe("smoke", {"model": "tiny-Int4", "length": "96"})
    prepared = prepare.prepare(recipe, "data.jsonl", Path("runs/new"), None, Path("models"), 1, "float32")
    summary = prepare.start_summary(prepared, None)
    prepare.check_same_start([("a", summary), ("b", summary)])
    with pytest.raises(UserError, match=r"data: \w{12} on a, 0 on c\n") as error:
        prepare.check_same_start([("a", summary), ("b", summary), ("c", {**summary, "data": "0"})])
    assert "base:" not in str(error.value)
