"""What is checked before a run begins: disk space, conversations without labels, the same start in all processes."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.oracles import tiny_checkpoint, tiny_config
from tests.support.tiny_training import TINY, start, train, write_rows
from train.common.errors import UserError
from train.common.files import read_json, write_json
from train.config.recipe import RECIPES, Recipe, load_recipe
from train.data.checked import conversations
from train.model import lora
from train.model.loading import load
from train.runs import checkpoint
from train.training import distributed, prepare, same_start, trained_size

ASSETS = Path(__file__).parents[1] / "assets"
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
    one = trained_size.disk_space(tiny_config(), TARGETS, load_recipe("two.yaml", {"rank": "4"}))
    monkeypatch.setattr(prepare, "free_bytes", lambda path: one * 3 // 2)
    message = r"stages/1: .*for 2 checkpoints and the adapter, in this stage and the 1 after it"
    with pytest.raises(UserError, match=message):
        train(run="no-space", recipe="two.yaml")
    assert not Path("runs/no-space").exists()


def test_checkpoints_that_are_written_need_no_more_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is three times the adapter. Free are five times the adapter."""
    adapter = 4 * trained_size.adapter_parameters(tiny_config(), TARGETS, 4)
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
    assert trained_size.adapter_parameters(tiny_config(), TARGETS, 4) == expected


# --- data -------------------------------------------------------------------------------------------------------------


def test_a_run_records_its_columns_and_reads_its_data_again_by_them(workspace: Path) -> None:
    (workspace / "t.csv").write_text("ask,reply,answer\n" + "".join(f"q{n},a{n},b{n}\n" for n in range(12)))
    with pytest.raises(UserError, match='"reply" and "answer"'):
        train(run="table", data="t.csv", steps=1)
    train(run="table", data="t.csv", steps=1, columns="question:ask,answer:answer")
    record = read_json(Path("runs/table/run.json"))
    assert record["recipe"]["columns"] == "question:ask,answer:answer"
    read, name = conversations.training_data(record)
    assert [c.turns[1].text for c in read[:2]] == ["b0", "b1"] and name == "t.csv"
    with pytest.raises(UserError, match="columns"):
        train(run="table", data="t.csv", steps=1, columns="question:ask,answer:reply")


def test_plain_text_is_trained_on_and_what_was_recognised_is_said(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workspace / "n.txt").write_text("\n".join(f"Q: q{n}\nA: a{n}" for n in range(12)))
    train(run="text", data="n.txt", steps=1)
    assert "n.txt is read as questions and answers with labels" in " ".join(capsys.readouterr().out.split())


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
    summary = same_start.start_summary(prepared, None)
    same_start.check_same_start([("a", summary), ("b", summary)])
    with pytest.raises(UserError, match=r"data: \w{12} on a, 0 on c\n") as error:
        same_start.check_same_start([("a", summary), ("b", summary), ("c", {**summary, "data": "0"})])
    assert "base:" not in str(error.value)
    with pytest.raises(UserError, match=r"env\.lock: \w{12} on a, 0 on b\n(?s:.*)must be the same everywhere"):
        same_start.check_same_start([("a", summary), ("b", {**summary, "env.lock": "0"})])


def test_unlike_cards_are_named_as_the_cause() -> None:
    """Each process chooses for its own cards; where they differ, no shared folder would help."""
    recipe = load_recipe("smoke", {"model": "tiny-Int4", "length": "96", "batch": "2", "accumulation": "1"})
    prepared = prepare.prepare(recipe, "data.jsonl", Path("runs/new"), None, Path("models"), 1, "float32")
    first = same_start.start_summary(prepared, None)
    other = {**first, "a step": first["a step"].replace("batch=2 accumulation=1", "batch=1 accumulation=2")}
    with pytest.raises(UserError, match="these differ") as error:
        same_start.check_same_start([("a", first), ("b", other)])
    assert 'ARGS="batch=2 accumulation=1 checkpointing=' in str(error.value)
    assert "share" not in str(error.value)
    with pytest.raises(UserError, match="that all machines share"):
        same_start.check_same_start([("a", first), ("b", {**other, "data": "0"})])


# --- starting from a path, and from an adapter of another program ----------------------------------------------------


@pytest.mark.parametrize("path", ["runs/origin", "runs/origin/adapter"])
def test_a_run_starts_from_a_path(path: str) -> None:
    train(run="origin", steps=1)
    name = path.replace("/", "-")
    train(**{"run": name, "steps": 1, "from": path, "learning_rate": 1e-12})
    assert read_json(Path("runs", name, "run.json"))["lineage"][0]["run"] == path
    for linear, (a, b, scale) in lora.delta(Path("runs/origin/adapter")).items():
        copied = lora.delta(Path("runs", name, "adapter"))[linear]
        torch.testing.assert_close(copied, (a, b, scale), rtol=1e-6, atol=1e-6)


def foreign_adapter(folder: Path, **settings: Any) -> Path:
    """An adapter on all linears with r 4 and alpha 16, as current peft writes it, beside a Trainer's files."""
    if not Path("runs/origin").is_dir():
        train(run="origin", steps=2)
    folder.mkdir()
    (folder / lora.WEIGHTS).write_bytes(Path("runs/origin/adapter", lora.WEIGHTS).read_bytes())
    current = read_json(ASSETS / "adapters/peft-0.21-rslora-patterns" / lora.CONFIG)
    plain = {"r": 4, "lora_alpha": 16, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    write_json(folder / lora.CONFIG, {**current, **plain, **settings})
    for name in ("optimizer.pt", "trainer_state.json"):
        (folder / name).touch()
    return folder


def test_a_run_starts_from_an_adapter_of_current_peft(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = foreign_adapter(workspace / "checkpoint-500")
    keys = {"run": "from-folder", "steps": 1, "learning_rate": 1e-12, "from": "checkpoint-500"}
    train(**keys)
    assert "names another base, Qwen/tiny: here it starts on tiny-Int4." in capsys.readouterr().out
    (entry,) = read_json(Path("runs/from-folder/run.json"))["lineage"]
    assert entry["run"] == "checkpoint-500" and set(entry["adapter"]) == {lora.CONFIG, lora.WEIGHTS}
    ours, theirs = (lora.delta(f) for f in (Path("runs/from-folder/adapter"), folder))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_an_rslora_adapter_continues_with_the_same_scale(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign_adapter(workspace / "rslora", use_rslora=True)
    keys = {"run": "from-rslora", "steps": 1, "learning_rate": 1e-12, "from": "rslora"}
    with pytest.raises(UserError, match=r"use_rslora with lora_alpha 16\) there and 16 here. Give rank=4 alpha=32"):
        train(**keys)
    assert not Path("runs/from-rslora").exists()
    train(**keys, alpha=32)
    assert "it continues as plain LoRA with alpha=32" in capsys.readouterr().out
    ours, theirs = (lora.delta(f) for f in (Path("runs/from-rslora/adapter"), workspace / "rslora"))
    assert {scale for *_, scale in ours.values()} == {scale for *_, scale in theirs.values()} == {8.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "from=foreign: .*damaged .DoRA, and no lengths for"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens="),
        ({"alpha_pattern": {"q_proj": 8}}, "from=foreign: its linears have different ranks or scales"),
        ({"r": 8}, "the rank of .* is 4, but adapter_config.json says 8"),
    ],
)
def test_what_is_not_computed_is_refused_before_anything_is_written(
    settings: dict[str, Any], message: str, workspace: Path
) -> None:
    folder = foreign_adapter(workspace / "foreign", **settings)
    try:
        with pytest.raises(UserError, match=message):
            train(**{"run": "refused", "steps": 1, "from": "foreign"})
    finally:
        shutil.rmtree(folder)
    assert not Path("runs/refused").exists()


def test_an_adapter_that_fits_other_linears_is_refused_before_the_base_is_loaded() -> None:
    train(run="few", steps=1, targets="q_proj,v_proj")
    with pytest.raises(UserError, match=r"from=few: its adapter is for other linears: .*Give targets=q_proj,v_proj"):
        train(**{"run": "refused", "steps": 1, "from": "few"})
    with pytest.raises(UserError, match=r"from=few: .*which this base does not have"):
        train(**{"run": "refused", "steps": 1, "from": "few", "model": "tiny-qwen", "targets": "all"})
    assert not Path("runs/refused").exists()


@pytest.mark.parametrize(
    ("layout", "keys", "limit", "reason"),
    [
        ("qwen2", {}, 512, "it has not seen them"),
        ("qwen", {"seq_length": 512}, 512, "it has not seen them"),
        ("qwen", {"seq_length": 64, "use_dynamic_ntk": True}, 64, "training computes positions without dynamic NTK"),
    ],
)
def test_a_length_over_the_context_of_the_base_is_noted(
    layout: str, keys: dict[str, Any], limit: int, reason: str
) -> None:
    config, lengths = tiny_config(layout, **keys), np.array([1100, 9])
    (note,) = prepare.beyond_context(config, 2048, lengths)
    assert note.startswith(f"length=2048 is more than the {limit} tokens that the base was made for, and 1 of 2 conv")
    assert reason in note
    assert prepare.beyond_context(config, limit, lengths) == []


def test_the_note_about_the_length_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    train(run="long", steps=1, length=1024)
    assert "length=1024 is more than the 512 tokens that the base was made for, and 0 of 12" in capsys.readouterr().out


def test_a_run_begins_anew_after_a_start_that_learnt_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> Any:
        raise UserError("a mistake")

    with monkeypatch.context() as patch:
        patch.setattr("train.training.train_one.load_model", fail)
        with pytest.raises(UserError, match="a mistake"):
            train(run="mended", steps=1)
    write_rows(Path("mended.jsonl"), 5)
    train(run="mended", steps=1, rank=2, data="mended.jsonl")
    printed = capsys.readouterr().out
    assert printed.count("run 'mended' starts again: an earlier start stopped before its first checkpoint") == 1
    assert read_json(Path("runs/mended/inputs.json"))["recipe"]["rank"] == 2


def test_a_base_that_is_not_a_chat_model_is_told(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_checkpoint(workspace / "models" / "no-chat", tiny_config(), int4=True)
    (base / "generation_config.json").write_text('{"eos_token_id": 256}')
    train(run="no-chat", model="no-chat", steps=1)
    assert "no-chat is not a chat model" in capsys.readouterr().out
    assert any("Instruct" in note for note in read_json(Path("runs/no-chat/run.json"))["decisions"])
    train(run="no-chat-plain", model="no-chat", steps=1, template="plain")
    assert "not a chat model" not in capsys.readouterr().out
