"""The train verb on tiny models: what it learns, what it refuses, and that nothing interrupts it for good."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from tests.support.oracles import tiny_checkpoint, tiny_config
from train.commands import train as verb
from train.common.errors import UserError
from train.common.files import read_json, sha256
from train.config.recipe import RECIPES, Recipe, load_recipe
from train.inference.generate import answers
from train.inference.trained import load_run
from train.model import lora
from train.model.loading import load
from train.runs import checkpoint
from train.runs import folder as folder_module
from train.training import distributed, loop, prepare
from train.training.deepspeed_engine import Engine
from train.training.signals import CUT_OFF

ROOT = Path(__file__).parents[2]
TRACE = ROOT / "tests" / "traces" / "ten_steps.json"
QUIET = {"save_every": "0", "batch": "2", "accumulation": "2", "length": "96", "rank": "4", "zero": "0"}


def rows(path: Path, count: int = 12) -> Path:
    """Conversations of unequal length."""
    made = [{"instruction": f"Question {n}?", "output": f"Answer {n}. " * (1 + n % 4)} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tiny bases and a data set."""
    folder = tmp_path_factory.mktemp("house")
    tiny_checkpoint(folder / "models" / "tiny-Int4", tiny_config(), int4=True)
    tiny_checkpoint(folder / "models" / "tiny-qwen", tiny_config("qwen"))
    rows(folder / "data.jsonl")
    return folder


@pytest.fixture(autouse=True)
def there(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(house)


def words(**keys: Any) -> dict[str, str]:
    base = {"data": "data.jsonl", "model": "tiny-Int4", "recipe": "smoke", **QUIET}
    return {key: str(value) for key, value in {**base, **keys}.items()}


def train(**keys: Any) -> None:
    verb.run(verb.parse(words(**keys)))


def losses(run: str, timing: bool = False) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (Path("runs") / run / "losses.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if timing or key != "seconds"} for line in lines]


def adapter(run: str) -> bytes:
    return (Path("runs") / run / "adapter" / lora.WEIGHTS).read_bytes()


def child(keys: dict[str, Any], launcher: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    command = [*launcher, sys.executable, "-m", "train", "train", *(f"{k}={v}" for k, v in words(**keys).items())]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


# --- a run ----------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_folder_that_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    train(run="whole", steps=4, save_every=2)
    folder = Path("runs/whole")
    names = {path.name for path in folder.iterdir()}
    assert names >= {"recipe.yaml", "inputs.json", "losses.jsonl", "tensorboard", "checkpoints", "adapter", "run.json"}
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-000002", "step-000004"]
    record = read_json(folder / "run.json")
    assert set(record["base"]["files"]) >= {"config.json", "model.safetensors", "qwen.tiktoken"}
    assert set(record["adapter"]) == {lora.CONFIG, lora.WEIGHTS}
    assert Recipe(**record["recipe"]) == load_recipe(str(folder / "recipe.yaml"), {})
    assert record["loss"]["first"] == losses("whole")[0]["loss"]
    assert list(folder.glob("tensorboard/events*"))
    said = capsys.readouterr().out
    assert "a step: 2 rows × 2 × 1 process = 4 rows" in said
    assert "float32 (as this device does best)" in said
    assert "kept in float32" in said
    assert "make export RUN=whole" in said

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    train(run="whole", steps=4, save_every=2)
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("changes", [{"rank": 8}, {"learning_rate": 0.5}, {"accumulation": 3}])
def test_changed_inputs_are_refused_and_named(changes: dict[str, Any]) -> None:
    train(run="first", steps=1)
    with pytest.raises(UserError, match=r"begun with other inputs.*\n.*was.*now(.|\n)*RUN=.*FROM=first"):
        train(run="first", steps=1, **changes)


def test_changed_data_and_base_are_found_by_content(house: Path) -> None:
    train(run="first", steps=1)
    old = read_json(house / "runs" / "first" / "inputs.json")
    new = json.loads(json.dumps(old))
    new["data"]["sha256"], new["base"]["files"]["config.json"] = "0", "0"
    new["recipe"]["keep"] = 9
    said = folder_module.changes(old, new)
    assert len(said) == 2, "how many checkpoints are kept is no other input"
    assert "data" in said[0]
    assert "config.json" in said[1]


def test_a_run_starts_from_anothers_adapter() -> None:
    train(run="first", steps=1)
    train(**{"run": "second", "steps": 1, "from": "first", "learning_rate": 0})
    assert adapter("second") == adapter("first")
    assert read_json(Path("runs/second/run.json"))["from"]["run"] == "first"
    with pytest.raises(UserError, match="rank=4 alpha=16"):
        train(**{"run": "third", "steps": 1, "from": "first", "rank": 2})
    with pytest.raises(UserError, match="has no adapter"):
        train(**{"run": "third", "steps": 1, "from": "nobody"})


STAGES = """
stages:
  - data: small.jsonl
    steps: 6
  - steps: 4
    learning_rate: 1.0e-4
"""


def test_stages_are_runs_that_stand_on_one_another(
    house: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut off in the second, started again by the same command; the adapter is that of two runs by hand."""
    rows(house / "small.jsonl", 4)
    (house / "two.yaml").write_text((RECIPES / "smoke.yaml").read_text().replace("steps: 4", "steps: 9") + STAGES)
    keys = {"recipe": "two.yaml", "save_every": 2}
    with monkeypatch.context() as patch:
        calls = stop_at(2, signal.SIGTERM, patch, start=6)
        with pytest.raises(SystemExit):
            train(run="two", **keys)
    assert len(calls) == 9
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
    said = capsys.readouterr().out
    assert "stage 2 of 2: data.jsonl, in runs/two" in said
    train(run="two", **keys)
    assert capsys.readouterr().out.count("nothing to do") == 2


def test_a_run_in_use_is_left_alone() -> None:
    with folder_module.lock_run(Path("runs/busy")), pytest.raises(UserError, match="being trained by another process"):
        train(run="busy", steps=1)


# --- what is refused, before anything is written ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data": "nowhere.jsonl"}, r"nowhere.jsonl.*no such file"),
        ({"data": "broken.jsonl"}, r"broken.jsonl"),
        ({"model": "absent"}, r"make model MODEL=absent"),
        ({"targets": "q_proj,c_attn"}, r"no linear is called c_attn.*q_proj, k_proj"),
        ({"length": 8}, r"no token to train on: 12 conversations"),
        ({"data": ""}, r"which data"),
        ({"processes": 0}, r"count from 1"),
        ({"zero": 3}, r"zero=3.*checkpointing=off"),
    ],
)
def test_wrong_inputs_leave_nothing_behind(keys: dict[str, Any], message: str, house: Path) -> None:
    (house / "broken.jsonl").write_text("{'instruction': 'a', 'output': 'b'}\n")
    with pytest.raises(UserError, match=message):
        train(run="wrong", **keys)
    assert not (house / "runs" / "wrong").exists()


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(UserError) as error:
        train(run="wrong", data="nowhere.jsonl", model="absent")
    assert "nowhere.jsonl" in str(error.value)
    assert "MODEL=absent" in str(error.value)


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean learning_rate="):
        verb.parse({"data": "x", "learning_rat": "1"})
    with pytest.raises(UserError, match="Did you mean data="):
        verb.parse({"dta": "x"})


def test_a_full_disk_is_found_before_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "free_bytes", lambda path: 1 << 20)
    with pytest.raises(UserError, match=r"GB free.*GB needed"):
        train(run="wrong", steps=1)
    assert not Path("runs/wrong").exists()


def test_room_for_all_stages_is_counted_before_the_first(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for one, not for two: said now, not when the first is done."""
    rows(house / "small.jsonl", 4)
    (house / "two.yaml").write_text((RECIPES / "smoke.yaml").read_text() + STAGES)
    recipe = load_recipe("two.yaml", {"rank": "4"})
    one = prepare.room(tiny_config(), lora.targets("qwen2", "all"), recipe)
    monkeypatch.setattr(prepare, "free_bytes", lambda path: one * 3 // 2)
    with pytest.raises(
        UserError, match=r"stages/1: .*for 2 checkpoints and the adapter, in this stage and the 1 after it"
    ):
        train(run="roomless", recipe="two.yaml")
    assert not Path("runs/roomless").exists()


def test_checkpoints_that_are_there_need_no_more_room(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = 4 * prepare.adapter_size(tiny_config(), lora.targets("qwen2", "all"), 4)
    monkeypatch.setattr(
        prepare, "free_bytes", lambda path: 5 * tensor + (64 << 20)
    )  # one checkpoint is 3, the adapter 1
    with pytest.raises(UserError, match=r"GB free.*GB needed for 2 checkpoints"):
        train(run="roomy", steps=1)
    for step in (1, 2):
        checkpoint.folder_of(Path("runs/roomy"), step).mkdir(parents=True)
    recipe = load_recipe("smoke", {key: value for key, value in QUIET.items() if key in Recipe.__dataclass_fields__})
    work: Any = SimpleNamespace(run=Path("runs/roomy"), recipe=recipe)
    prepare._check_disk(work, tiny_config(), lora.targets("qwen2", "all"))


def test_gpus_on_a_machine_without_any_are_spoken_of(capsys: pytest.CaptureFixture[str]) -> None:
    train(run="no-gpus", steps=1, gpus=2)
    assert "gpus=2: this machine has no GPU; the CPU computes, in processes=1." in capsys.readouterr().out


def test_a_later_process_says_what_the_first_cannot(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another machine may lack the data; processes that were started here have nothing to add."""
    monkeypatch.setattr(distributed, "detect", lambda: distributed.World(1, 0, 2))
    with pytest.raises(SystemExit) as stopped:
        train(run="wrong", data="nowhere.jsonl")
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error on {socket.gethostname()}, process 1: ")
    assert "nowhere.jsonl" in said
    monkeypatch.setenv(distributed.SPAWNED, "1")
    with pytest.raises(SystemExit):
        train(run="wrong", data="nowhere.jsonl")
    assert capsys.readouterr().err == ""


def test_the_size_of_an_adapter_is_reckoned_right() -> None:
    model = lora.attach(load(Path("models/tiny-Int4"), torch.float32), Recipe(rank=4))
    expected = sum(p.numel() for p in lora.trainable(model).values())
    assert prepare.adapter_size(tiny_config(), lora.targets("qwen2", "all"), 4) == expected


def test_the_command_line_of_a_worker_says_the_same() -> None:
    asked = verb.parse(words(run="x", steps=3, **{"from": "y"}))
    assert verb.parse(dict(word.split("=", 1) for word in asked.words())) == asked


# --- the numbers ------------------------------------------------------------------------------------------------------------


def test_the_schedule_is_a_true_cosine() -> None:
    recipe = Recipe(learning_rate=2.0, warmup=0.1, floor=0.25)
    rates = [loop.learning_rate(recipe, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(2.0 * (0.25 + 0.75 * 0.5))
    assert rates[99] == pytest.approx(2.0 * (0.25 + 0.75 * (1 + math.cos(math.pi * 89 / 90)) / 2))
    assert loop.learning_rate(Recipe(warmup=3, schedule="constant"), 50, 100) == 3e-4
    assert loop.learning_rate(Recipe(warmup=0, schedule="linear"), 50, 100) == pytest.approx(1.5e-4)


def adamw_rounding(grad: torch.Tensor, second_moment: torch.Tensor, updates: int) -> torch.Tensor:
    """How far one AdamW update may move from another, [same shape as `grad`], when float32 sums run in another order.

    A sum in another order moves every entry of a gradient by up to d, a share of the largest entry. The update is
    lr · m / (sqrt(v) + eps). A d on all gradients moves m by at most d and sqrt(v) by at most d (it is a norm), and
    |m| <= about sqrt(v): together at most 2 · lr · d / (sqrt(v) + eps), which is large only where gradients are tiny.
    """
    share = 1e-6  # 8 roundings of float32: over four times what the CPU's three sets of kernels were seen to need
    corrected = second_moment / (1 - 0.95**updates)
    return 2 * 1e-2 * share * grad.abs().max() / (corrected.sqrt() + 1e-8)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_engine_equals_plain_torch_and_goes_on_after_a_restore(zero: int) -> None:
    """Three steps of two unequal micro batches; the third one after a restore into a new engine."""
    recipe = Recipe(model="tiny", rank=4, dropout=0.0, zero=zero, batch=2, accumulation=2, clip=0.5, learning_rate=1e-2)
    generator = torch.Generator().manual_seed(5)
    batches = [torch.randint(0, 300, (2, 12 - n), generator=generator) for n in range(6)]

    def fresh() -> Any:
        return lora.attach(load(Path("models/tiny-qwen"), torch.float32), recipe).train()

    def plain() -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Norms of the gradient, the weights after three steps, and how far each weight may be from that."""
        model, norms = fresh(), []
        learnt = lora.trainable(model)
        allowed = {name: torch.full_like(p, 1e-6) for name, p in learnt.items()}
        optimizer = torch.optim.AdamW(learnt.values(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        for step in range(3):
            optimizer.zero_grad()
            pair = batches[2 * step : 2 * step + 2]
            labels = sum(ids[:, 1:].numel() for ids in pair)
            for ids in pair:
                (model(input_ids=ids, labels=ids).loss / labels).backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(learnt.values(), 0.5)))
            optimizer.step()
            for name, p in learnt.items():
                allowed[name] += adamw_rounding(p.grad, optimizer.state[p]["exp_avg_sq"], step + 1)
        return norms, {name: p.detach() for name, p in learnt.items()}, allowed

    distributed.join(distributed.World(), cuda=False)
    engine, norms = Engine(fresh(), recipe, torch.float32, 1), []
    for step in range(3):
        if step == 2:
            masters, moments = engine.gather()
            counters = engine.counters()
            engine = Engine(fresh(), recipe, torch.float32, 1)
            engine.restore(masters, moments, counters)
        pair = batches[2 * step : 2 * step + 2]
        labels = sum(ids[:, 1:].numel() for ids in pair)
        for n, ids in enumerate(pair):
            engine.micro({"input_ids": ids, "labels": ids}, labels)
            norm = engine.step(last=n == 1, rate=1e-2)
        norms.append(norm)
    expected, weights, allowed = plain()
    assert norms == pytest.approx(expected, rel=1e-5)
    for name, value in engine.gather()[0].items():
        assert ((value - weights[name]).abs() <= allowed[name]).all(), name


def test_micro_batches_of_any_shape_are_the_same_step() -> None:
    """8 rows as 1 × 8, 2 × 4 (three of them short or empty at the end of the epoch) and 8 × 1."""
    for run, batch, accumulation in (("a", 8, 1), ("b", 2, 4), ("c", 1, 8)):
        train(
            run=f"shape-{run}", batch=batch, accumulation=accumulation, epochs=2, steps=0, dropout=0, pack="off", zero=2
        )
    first = [row["loss"] for row in losses("shape-a")]
    assert len(first) == 4
    for run in ("b", "c"):
        assert [row["loss"] for row in losses(f"shape-{run}")] == pytest.approx(first, rel=1e-5)


def test_the_loss_is_over_all_labels_of_the_step() -> None:
    """The first step's loss against a plain forward pass over all of its rows."""
    import torch.nn.functional as F

    train(run="labels", steps=1, epochs=1, dropout=0, batch=3, accumulation=4)
    recipe = load_recipe("runs/labels/recipe.yaml", {})
    work = prepare.prepare(recipe, "data.jsonl", Path("runs/labels"), None, Path("models"), 1, "float32")
    model, total, count = load(Path("models/tiny-Int4"), torch.float32), 0.0, 0
    for index in {i for row in work.plan.rows(0) for i in row}:
        sample = work.samples[index]
        ids = torch.tensor(sample.ids[None].tolist())
        labels = torch.where(torch.tensor(sample.mask.tolist()).bool(), ids[0], -100)
        with torch.no_grad():
            total += F.cross_entropy(model(input_ids=ids).logits[0, :-1], labels[1:], reduction="sum").item()
        count += int((labels[1:] != -100).sum())
    row = losses("labels")[0]
    assert row["label_tokens"] == count
    assert row["loss"] == pytest.approx(total / count, rel=1e-5)


def trace() -> list[dict[str, float]]:
    train(run="trace", model="tiny-qwen", steps=10, epochs=1, zero=2, dropout=0.05, learning_rate=0.003, seed=7)
    return [{key: row[key] for key in ("step", "loss", "grad_norm", "learning_rate")} for row in losses("trace")]


def test_ten_steps_are_those_that_were_committed() -> None:
    """To renew the file after a change that is meant: python -m tests.training.test_train"""
    expected = json.loads(TRACE.read_text())
    found = trace()
    assert len(found) == 10
    for old, new in zip(expected, found, strict=True):
        assert new == pytest.approx(old, rel=1e-5), f"step {old['step']}"


def sharp_base(folder: Path) -> None:
    """A tiny base whose frozen norm and head can be sure of a token: random ones of unit size cannot get under 0.3."""
    from safetensors.torch import load_file, save_file

    path = tiny_checkpoint(folder, tiny_config(), int4=True) / "model.safetensors"
    state = load_file(path)
    state["lm_head.weight"] *= 4
    save_file(state, path, metadata={"format": "pt"})


def test_a_few_rows_are_learnt_by_heart(house: Path) -> None:
    sharp_base(house / "models" / "tiny-sharp")
    row = {"instruction": "Who are you?", "output": "我是 Pip, short and to the point."}
    (house / "one.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for _ in range(4)))
    keys = {"steps": 60, "learning_rate": 0.01, "rank": 16, "alpha": 16, "length": 192, "dropout": 0, "accumulation": 1}
    train(run="heart", data="one.jsonl", model="tiny-sharp", checkpointing="off", **keys)
    assert losses("heart")[-1]["loss"] < 0.05
    model, tokenizer, record = load_run(Path("runs/heart"), Path("models"), torch.float32)
    said = answers(model, tokenizer, [row["instruction"]], record["recipe"]["system"], max_new_tokens=64)
    assert said == [row["output"]]


# --- interruptions ----------------------------------------------------------------------------------------------------------

LONG: dict[str, Any] = {"steps": 24, "save_every": 3, "dropout": 0.05, "zero": 2}


@pytest.fixture(scope="module")
def uninterrupted(house: Path) -> tuple[list[dict[str, Any]], bytes]:
    os.chdir(house)
    train(run="straight", **LONG)
    return losses("straight"), adapter("straight")


def test_killed_and_started_again_it_ends_in_the_same_bytes(uninterrupted: tuple[list[dict[str, Any]], bytes]) -> None:
    """SIGKILL once a checkpoint is there, at whatever moment that is."""
    process, checkpoints = child({"run": "killed", **LONG}), Path("runs/killed/checkpoints")
    deadline = time.monotonic() + 240
    while not list(checkpoints.glob("step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    said, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, said
    assert checkpoints.is_dir(), said
    assert not Path("runs/killed/run.json").exists()
    train(run="killed", **LONG)
    assert losses("killed") == uninterrupted[0]
    assert adapter("killed") == uninterrupted[1]


def stop_at(step: int, number: int, monkeypatch: pytest.MonkeyPatch, start: int = 0) -> list[int]:
    """Send a signal to this process while step `step` is computed (the first after `start` steps); all steps that were."""
    real: Callable[..., Any] = loop._step
    calls: list[int] = []

    def wrapped(task: Any, engine: Any, now: int, *rest: Any) -> Any:
        calls.append(now)
        if now == step and len(calls) > start:
            signal.raise_signal(number)
        return real(task, engine, now, *rest)

    monkeypatch.setattr(loop, "_step", wrapped)
    return calls


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_a_checkpoint_and_status_75(
    number: int, uninterrupted: tuple[list[dict[str, Any]], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = f"signal-{number}"
    with monkeypatch.context() as patch:
        stop_at(4, number, patch)
        with pytest.raises(SystemExit) as stopped:
            train(run=run, **LONG)
    assert stopped.value.code == CUT_OFF
    newest, _ = checkpoint.newest(Path("runs") / run)
    assert newest is not None
    assert newest.name == "step-000005"
    train(run=run, **LONG)
    assert losses(run) == uninterrupted[0]
    assert adapter(run) == uninterrupted[1]


def test_the_record_is_of_the_command_that_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows a step in another shape may go on; inputs.json, recipe.yaml and run.json then say the later one."""
    with monkeypatch.context() as patch:
        stop_at(0, signal.SIGTERM, patch)
        with pytest.raises(SystemExit):
            train(run="reshaped", steps=2)
    train(run="reshaped", steps=2, batch=4, accumulation=1)
    folder = Path("runs/reshaped")
    record, inputs = read_json(folder / "run.json"), read_json(folder / "inputs.json")
    assert record["inputs_sha256"] == sha256(folder / "inputs.json")
    assert inputs == {key: record[key] for key in inputs}
    assert inputs["recipe"]["batch"] == 4


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_go_on_as_they_were(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 masters and the loss scaler come back too. A scale of 2^32 overflows at first: those updates are left out."""
    from train.training import deepspeed_engine as engine

    engine.import_deepspeed()
    from deepspeed.accelerator import get_accelerator

    def wide(recipe: Recipe, dtype: torch.dtype) -> dict[str, Any]:
        found = settings(recipe, dtype)
        return found | (
            {"fp16": {**found["fp16"], "initial_scale_power": 32, "hysteresis": 1}} if "fp16" in found else {}
        )

    settings = engine.settings
    monkeypatch.setattr(engine, "settings", wide)
    monkeypatch.setattr("train.training.prepare.check_ways", lambda recipe, device: None)
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    keys: dict[str, Any] = {
        "precision": precision,
        "steps": 26,
        "zero": 0,
        "batch": 1,
        "accumulation": 1,
        "dropout": 0.05,
    }
    train(run=f"{precision}-straight", **keys)
    with monkeypatch.context() as patch:
        stop_at(3, signal.SIGTERM, patch)
        with pytest.raises(SystemExit):
            train(run=f"{precision}-stopped", **keys)
    train(run=f"{precision}-stopped", **keys)
    assert losses(f"{precision}-stopped") == losses(f"{precision}-straight")
    assert adapter(f"{precision}-stopped") == adapter(f"{precision}-straight")
    norms = [row["grad_norm"] for row in losses(f"{precision}-straight")]
    assert (norms[0] is None) == (precision == "fp16")
    assert norms[-1] is not None


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    uninterrupted: tuple[list[dict[str, Any]], bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        stop_at(7, signal.SIGTERM, patch)
        with pytest.raises(SystemExit):
            train(run="damaged", **LONG)
    path = Path("runs/damaged/checkpoints/step-000008/trainable.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    train(run="damaged", **LONG)
    said = capsys.readouterr().out
    assert "step-000008 is not used: trainable.safetensors is damaged" in said
    assert "goes on after step 6 of 24" in said
    assert adapter("damaged") == uninterrupted[1]


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Engine.micro
    calls = []

    def poisoned(self: Engine, batch: Any, labels: int) -> torch.Tensor:
        calls.append(labels)
        return real(self, batch, labels) * (float("nan") if len(calls) == 6 else 1.0)

    monkeypatch.setattr(Engine, "micro", poisoned)
    with pytest.raises(UserError, match=r"step 3: the loss is not a number.*data.jsonl:\d+.*\n.*step-000002") as error:
        train(run="poisoned", steps=4, save_every=2, pack="off", batch=1)
    assert str(error.value).count("data.jsonl:") == 1, "the second micro batch of step 3 has one row"
    assert not Path("runs/poisoned/run.json").exists()
    assert [path.name for path in Path("runs/poisoned/checkpoints").iterdir()] == ["step-000002"]


def poison(step: int, value: float, monkeypatch: pytest.MonkeyPatch, first: int = 0) -> list[int]:
    """Make the loss of global step `step` (two micro batches a step) `value` times as large; the micro batches that were computed."""
    real, calls = loop._step, []

    def wrapped(task: Any, engine: Any, now: int, *rest: Any) -> Any:
        calls.append(now)
        if now != step:
            return real(task, engine, now, *rest)
        with monkeypatch.context() as patch:
            micro = engine.micro
            patch.setattr(engine, "micro", lambda batch, labels: micro(batch, labels) * value)
            return real(task, engine, now, *rest)

    monkeypatch.setattr(loop, "_step", wrapped)
    return calls


@pytest.mark.parametrize(
    ("value", "why"), [(float("nan"), "the loss is not a number any more"), (9.0, "the loss jumps to")]
)
def test_a_bad_step_is_left_out_as_if_its_rows_were_not_there(
    value: float, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """guard=skip goes back to the checkpoint before it; cut off after it and started again, the run ends in the same bytes."""
    run, keys = f"skip-{why[-3:]}", {"steps": 14, "save_every": 4, "guard": "skip", "dropout": 0.05}
    with monkeypatch.context() as patch:
        calls = poison(10, value, patch)
        train(run=run, **keys)
    assert calls == [*range(11), 8, 9, 11, 12, 13]
    assert f"step 11: {why}" in capsys.readouterr().out
    row = losses(run)[10]
    assert row["loss"] is None and why in row["left_out"] and row["samples"]
    assert read_json(Path("runs") / run / "run.json")["left_out"] == [row]
    with monkeypatch.context() as patch:
        poison(10, value, patch)
        stop_at(9, signal.SIGTERM, patch)
        with pytest.raises(SystemExit):
            train(run=f"{run}-cut", **keys)
    with monkeypatch.context() as patch:
        poison(10, value, patch)
        train(run=f"{run}-cut", **keys)
    assert losses(f"{run}-cut") == losses(run)
    assert adapter(f"{run}-cut") == adapter(run)


def test_a_jump_of_the_loss_stops_the_run_and_names_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(9, 9.0, monkeypatch)
    with pytest.raises(
        UserError, match=r"step 10: the loss jumps to \d+.*data.jsonl:\d+.*\n.*step-000008 is as it was"
    ):
        train(run="jump", steps=12, save_every=4)


def test_a_layer_that_no_gradient_reaches_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """v_proj of the last block, whose adapter is cut from the graph."""
    attach = lora.attach

    def cut(*rest: Any) -> Any:
        model = attach(*rest)
        name = "base_model.model.model.layers.1.self_attn.v_proj"
        model.get_submodule(name).lora_B["default"].register_forward_hook(lambda _, x, y: y.detach())
        return model

    monkeypatch.setattr(lora, "attach", cut)
    with pytest.raises(UserError, match=r"no gradient reached layers.1.self_attn.v_proj in 8 updates"):
        train(run="cut", steps=20)
    assert losses("cut")[-1]["step"] == 8, "found at once, not at the first checkpoint"


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("how", "value"),
    [("zero=0", NAN), ("zero=1", INF), ("zero=2", NAN), ("zero=3", INF), ("precision=bf16", INF), ("fused", NAN)],
)
def test_a_gradient_that_is_no_number_stops_the_run_at_once(
    how: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last step of all, whose loss is a good one: nothing comes after it to show the harm. ZeRO itself calls this norm 1."""
    real, calls = Engine.micro, []

    def poisoned(self: Engine, batch: Any, labels: int) -> torch.Tensor:
        calls.append(labels)
        with monkeypatch.context() as patch:
            if len(calls) == 4:
                back = self.engine.backward
                patch.setattr(self.engine, "backward", lambda loss, **more: back(loss * value, **more))
            return real(self, batch, labels)

    monkeypatch.setattr(Engine, "micro", poisoned)
    keys = dict([how.split("=")]) if "=" in how else on_the_fused_path(monkeypatch)
    run = f"poisoned-{how}-{value}"
    with pytest.raises(UserError, match=r"step 2: the gradient is not a number any more, in data.jsonl:\d+"):
        train(run=run, steps=2, save_every=1, checkpointing="off", **keys)
    assert [path.name for path in Path(f"runs/{run}/checkpoints").iterdir()] == ["step-000001"]
    assert not Path(f"runs/{run}/adapter").exists()


def on_the_fused_path(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Passes and vector of a GPU, on the CPU."""
    monkeypatch.setattr("train.training.deepspeed_engine.FUSED_ON", ("cpu",))
    return {"zero": 2}


def test_the_vector_goes_on_in_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"steps": 10, "save_every": 4, "dropout": 0.05, **on_the_fused_path(monkeypatch)}
    train(run="vector", **keys)
    with monkeypatch.context() as patch:
        stop_at(5, signal.SIGTERM, patch)
        with pytest.raises(SystemExit):
            train(run="vector-cut", **keys)
    train(run="vector-cut", **keys)
    assert losses("vector-cut") == losses("vector")
    assert adapter("vector-cut") == adapter("vector")


def test_a_stretch_of_the_vector_that_no_gradient_reaches_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer's B within it; it is found by the moments that a checkpoint gathers anyway."""
    from train.training import graph_step

    real, name = graph_step._GraphedPasses.backward, "base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight"

    def cut(self: Any, scale: torch.Tensor, whole: Any) -> None:
        real(self, scale, whole)
        whole.layout.split(whole.grads)[name].zero_()

    monkeypatch.setattr(graph_step._GraphedPasses, "backward", cut)
    with pytest.raises(UserError, match=r"no gradient reached layers.1.mlp.up_proj in 8 updates"):
        train(run="vector-zero", steps=20, save_every=100, **on_the_fused_path(monkeypatch))
    assert losses("vector-zero")[-1]["step"] == 8


def test_what_teaches_nothing_is_named(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = {"instruction": "a" * 200, "output": "never reached"}
    (house / "long.jsonl").write_text((house / "data.jsonl").read_text() + json.dumps(long) + "\n")
    train(run="named", data="long.jsonl", steps=1)
    assert "nothing to learn (every label masked, or cut off) in long.jsonl:13: left out" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"long.jsonl:13.\nMend these.*unlearnable=skip"):
        train(run="unnamed", data="long.jsonl", steps=1, unlearnable="stop")
    assert not Path("runs/unnamed").exists()


# --- several processes --------------------------------------------------------------------------------------------------------

WIDE: dict[str, Any] = {"epochs": 2, "steps": 0, "dropout": 0, "zero": 2, "pack": "off", "batch": 1, "save_every": 2}


@pytest.fixture(scope="module")
def alone_wide(house: Path) -> list[float]:
    os.chdir(house)
    train(run="wide-1", accumulation=8, **WIDE)
    return [row["loss"] for row in losses("wide-1")]


@pytest.fixture(scope="module")
def two_wide(house: Path) -> str:
    """What the run wide-2, of two processes, printed."""
    os.chdir(house)
    process = child({"run": "wide-2", "processes": 2, "accumulation": 4, **WIDE})
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return said


def test_two_processes_learn_what_one_does(alone_wide: list[float], two_wide: str) -> None:
    """ZeRO-2, 2 × 4 rows against 1 × 8, short steps at the end of an epoch among them; float32 sums in another order."""
    said = two_wide
    assert [row["loss"] for row in losses("wide-2")] == pytest.approx(alone_wide, rel=1e-5)
    assert said.count("make export RUN=") == 1
    assert "OMP_NUM_THREADS" not in said
    one, two = (lora.delta(Path("runs") / run / "adapter") for run in ("wide-1", "wide-2"))
    for name in one:
        for ours, theirs in zip(one[name][:2], two[name][:2], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4, msg=name)


def test_one_process_goes_on_where_two_were(alone_wide: list[float], two_wide: str) -> None:
    """A checkpoint belongs to no number of processes."""
    folder = Path(shutil.copytree("runs/wide-2", "runs/wide-2-then-1"))
    for name in ("run.json", "adapter", "checkpoints/step-000004"):
        (folder / name).rename(folder / f"away-{Path(name).name}")
    train(run=folder.name, accumulation=8, **WIDE)
    assert [row["loss"] for row in losses(folder.name)] == pytest.approx(alone_wide, rel=1e-5)


def test_the_rows_a_step_stay_when_the_number_of_processes_changes(house: Path) -> None:
    train(run="fit", steps=1, batch=2, accumulation=6)
    recipe, run = load_recipe("smoke", {"batch": "2", "accumulation": "6"}), Path("runs/fit")
    assert [prepare.fitted(recipe, run, n).accumulation for n in (1, 2, 3, 6)] == [6, 3, 2, 1]
    with pytest.raises(
        UserError, match=r"12 rows a step, which 4 processes of batch=2 .*12 / \(2 × 4\).*1, 2, 3, 6 proc"
    ):
        prepare.fitted(recipe, run, 4)
    assert prepare.fitted(recipe, Path("runs/none-yet"), 4) == recipe
    (run / "inputs.json").write_bytes(bytes(100))
    with pytest.raises(UserError, match=r"inputs.json is damaged.*Put it back"):
        train(run="fit", steps=1, batch=2, accumulation=6)


def test_processes_that_would_begin_with_different_things_do_not() -> None:
    """Two machines, as two runs/ folders: the first has a checkpoint, the second has none."""
    keys: dict[str, Any] = {"run": "apart", "steps": 3, "save_every": 1, "accumulation": 2}
    train(**{**keys, "accumulation": 4})
    for name in ("run.json", "adapter"):
        (Path("runs/apart") / name).rename(Path("runs/apart") / f"away-{name}")
    meeting = ("env", "WORLD_SIZE=2", "MASTER_ADDR=127.0.0.1", f"MASTER_PORT={distributed.free_port()}", "LOCAL_RANK=0")
    both = [child({**keys, "runs": runs}, (*meeting, f"RANK={n}")) for n, runs in enumerate(("runs", "runs-there"))]
    (first, _), (second, _) = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [2, 2], first + second
    assert "checkpoint: step-000003 on" in first
    assert "none on" in first
    assert "that all machines share" in first
    assert second == "", "the first speaks for both"
    assert not Path("runs-there").exists()


def test_what_differs_between_machines_is_named() -> None:
    recipe = load_recipe("smoke", {"model": "tiny-Int4", "length": "96"})
    work = prepare.prepare(recipe, "data.jsonl", Path("runs/new"), None, Path("models"), 1, "float32")
    start = prepare.start_of(work, None)
    prepare.check_same([("a", start), ("b", start)])
    with pytest.raises(UserError, match=r"data: \w{12} on a, 0 on c\n") as error:
        prepare.check_same([("a", start), ("b", start), ("c", {**start, "data": "0"})])
    assert "base:" not in str(error.value)


def two_at_work(run: str) -> "subprocess.Popen[str]":
    """A long run of two processes, which has written a checkpoint."""
    process, deadline = (
        child({**LONG, "run": run, "processes": 2, "steps": 2000, "save_every": 2}),
        time.monotonic() + 240,
    )
    while not list(Path(f"runs/{run}/checkpoints").glob("step-*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.slow
def test_a_signal_reaches_every_process() -> None:
    """SIGTERM to the command: both workers finish the step, one checkpoint is written, the status is 75."""
    process = two_at_work("both-stopped")
    process.terminate()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == CUT_OFF, said
    assert said.count("finishing this step, then a checkpoint\n") == 1
    assert "The same command goes on from there" in said
    assert checkpoint.newest(Path("runs/both-stopped"))[1] == []


@pytest.mark.slow
def test_a_signal_to_every_process_of_a_run_is_the_same() -> None:
    """Slurm's time limit and systemd send it so: to the command, to torchrun and to the workers."""
    process = two_at_work("all-stopped")
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == CUT_OFF, said
    assert "The same command goes on from there" in said
    assert "Traceback" not in said
    assert checkpoint.newest(Path("runs/all-stopped"))[1] == []


@pytest.mark.slow
@pytest.mark.parametrize("who", ["command", "torchrun"])
def test_what_is_left_of_a_killed_tree_ends_with_a_checkpoint(who: str) -> None:
    """SIGKILL to one process above the workers: they are not left training for nobody."""
    process = two_at_work(f"orphans-{who}")
    below = psutil.Process(process.pid).children(recursive=True)
    victim = process if who == "command" else next(p for p in below if "launch()" in " ".join(p.cmdline()))
    victim.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert psutil.wait_procs(below, timeout=60)[1] == []
    assert checkpoint.newest(Path(f"runs/orphans-{who}"))[1] == []


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_while_the_model_is_loaded_says_that_the_command_goes_on(processes: int) -> None:
    """As soon as the folder is begun; the two processes are started after that."""
    run = f"early-{processes}"
    keys = {**LONG, "run": run, "processes": processes, "accumulation": 2 // processes}
    process = child(keys)
    while not Path(f"runs/{run}/inputs.json").is_file() and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == CUT_OFF, said
    assert "Traceback" not in said
    assert not Path(f"runs/{run}/losses.jsonl").is_file() or not losses(run)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_every_process_at_once() -> None:
    process = two_at_work("both-ended")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # before the first is answered: the two may become one
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode in (130, CUT_OFF), said
    assert "Traceback" not in said


@pytest.mark.slow
def test_two_processes_meet_under_mpirun(alone_wide: list[float]) -> None:
    mpirun = Path(sys.executable).with_name("mpirun")
    launcher = (str(mpirun), "-n", "2", "--allow-run-as-root", "--oversubscribe")
    process = child({"run": "wide-mpi", "accumulation": 4, **WIDE}, launcher)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert [row["loss"] for row in losses("wide-mpi")] == pytest.approx(alone_wide, rel=1e-5)


# --- recipes --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_a_whole_run_and_every_key_is_explained(path: Path) -> None:
    import yaml

    lines = [line for line in path.read_text().split("\nstages:")[0].splitlines() if line and not line.startswith("#")]
    assert [line.partition(":")[0] for line in lines] == list(Recipe.__dataclass_fields__), (
        "each key once, in the same order"
    )
    assert all("  # " in line for line in lines)
    recipe = load_recipe(path.stem, {})
    assert all(
        key in ("alpha", "stages") or getattr(recipe, key) in (value, {True: "on", False: "off"}.get(value, value))
        for key, value in yaml.safe_load(path.read_text()).items()
    )


if __name__ == "__main__":  # renew the trace
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        os.chdir(made)
        tiny_checkpoint(Path("models/tiny-qwen"), tiny_config("qwen"))
        rows(Path("data.jsonl"))
        TRACE.write_text(json.dumps(trace(), indent=1) + "\n")


# --- on a GPU, each run in a process of its own: DeepSpeed chooses its device once a process ---------------------------------


def finish(keys: dict[str, Any], status: int = 0) -> str:
    """Run to the end with the machine's GPUs; returns what was printed."""
    process = child(keys)
    said, _ = process.communicate(timeout=560)
    assert process.returncode == status, said
    return said


def stop(keys: dict[str, Any], after: int) -> str:
    """Start a run and send SIGTERM once `after` steps are in its losses.jsonl."""
    process, path = child(keys), Path("runs") / keys["run"] / "losses.jsonl"
    while process.poll() is None and (not path.is_file() or path.read_text().count("\n") < after):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=560)
    assert process.returncode == CUT_OFF, said
    return said


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["auto", "fp16", "fp32"])
def test_a_gpu_run_stopped_and_started_again_ends_in_the_same_bytes(precision: str) -> None:
    keys: dict[str, Any] = {**LONG, "steps": 120, "save_every": 30, "precision": precision, "checkpointing": "on"}
    said = finish({**keys, "run": f"gpu-{precision}"})
    assert "device: NVIDIA" in said
    stop({**keys, "run": f"gpu-{precision}-cut"}, after=40)
    assert "goes on after step" in finish({**keys, "run": f"gpu-{precision}-cut"})
    assert losses(f"gpu-{precision}-cut") == losses(f"gpu-{precision}")
    assert adapter(f"gpu-{precision}-cut") == adapter(f"gpu-{precision}")
    assert losses(f"gpu-{precision}")[-1]["loss"] < 0.7 * losses(f"gpu-{precision}")[0]["loss"]


@pytest.mark.gpu
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_gpu_learns_what_a_cpu_does(zero: int) -> None:
    keys: dict[str, Any] = {"steps": 10, "precision": "fp32", "dropout": 0, "zero": zero, "checkpointing": "off"}
    finish({**keys, "run": f"gpu-zero{zero}"})
    os.environ["CUDA_VISIBLE_DEVICES"], before = "", os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        finish({**keys, "run": f"cpu-zero{zero}"})
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES")
        os.environ.update({"CUDA_VISIBLE_DEVICES": before} if before is not None else {})
    ours = [row["loss"] for row in losses(f"gpu-zero{zero}")]
    assert ours == pytest.approx([row["loss"] for row in losses(f"cpu-zero{zero}")], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_two_gpus_learn_what_one_does(zero: int) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    keys: dict[str, Any] = {"steps": 10, "precision": "fp32", "dropout": 0, "zero": zero, "checkpointing": "off"}
    finish({**keys, "run": f"one-{zero}", "accumulation": 4})
    said = finish({**keys, "run": f"two-{zero}", "accumulation": 2, "gpus": 2})
    assert "2 processes" in said
    ours = [row["loss"] for row in losses(f"two-{zero}")]
    assert ours == pytest.approx([row["loss"] for row in losses(f"one-{zero}")], rel=1e-4)


@pytest.mark.gpu
def test_the_whole_way_on_a_gpu(house: Path) -> None:
    """Learnt by heart in the card's own precision, merged, and said again word for word by the merged model."""
    sharp_base(house / "models" / "tiny-sharp")
    row = {"instruction": "Who are you?", "output": "Pip, short and to the point."}
    (house / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    keys = {"steps": 80, "learning_rate": 0.01, "rank": 16, "alpha": 16, "length": 192, "dropout": 0, "accumulation": 1}
    finish({**keys, "run": "gpu-heart", "data": "one.jsonl", "model": "tiny-sharp"})
    assert losses("gpu-heart")[-1]["loss"] < 0.05
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command in ("export run=gpu-heart", "infer run=gpu-heart prompt=Who\\ are\\ you?"):
        line = f"{sys.executable} -m train {command}"
        done = subprocess.run(line, shell=True, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == row["output"]
