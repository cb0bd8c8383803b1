"""The numbers of the loop, and what it does about a step that must not count.

python -m tests.training.test_loop        writes traces/ten_steps.json again, after an intended change of the numbers
"""

import json
import math
import os
import signal
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.oracles import tiny_checkpoint, tiny_config
from tests.support.tiny_training import (
    ROOT,
    adapter,
    confident_base,
    losses,
    multiply_loss,
    signal_at_step,
    train,
    use_fused_path,
    write_rows,
)
from train.common.errors import UserError
from train.common.files import read_json
from train.config.recipe import Recipe, load_recipe
from train.inference.generate import answers
from train.inference.trained import load_run
from train.model import lora
from train.model.loading import load
from train.training import graph_step, loop, micro_batches, prepare
from train.training.deepspeed_engine import Engine
from train.training.distributed import RankInfo

pytestmark = pytest.mark.usefixtures("workspace")
TRACE = ROOT / "tests" / "traces" / "ten_steps.json"
NAN, INF = float("nan"), float("inf")


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_the_cosine_schedule_has_a_warm_up_a_peak_and_a_floor() -> None:
    recipe = Recipe(learning_rate=2.0, warmup=0.1, floor=0.25)
    rates = [loop.learning_rate(recipe, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(2.0 * (0.25 + 0.75 * 0.5))
    assert rates[99] == pytest.approx(2.0 * (0.25 + 0.75 * (1 + math.cos(math.pi * 89 / 90)) / 2))
    assert loop.learning_rate(Recipe(warmup=3, schedule="constant"), 50, 100) == 3e-4
    assert loop.learning_rate(Recipe(warmup=0, schedule="linear"), 50, 100) == pytest.approx(1.5e-4)


def test_the_micro_batches_of_all_processes_are_the_rows_of_the_step() -> None:
    """8 rows in 2 processes of 2 micro batches of 2 rows, and a short step of 5 rows."""
    rows = [[n] for n in range(8)]

    def own(rank: int, micro: int, rows: list[list[int]]) -> list[list[int]]:
        run: Any = SimpleNamespace(rank_info=RankInfo(rank, rank, 2), recipe=Recipe(batch=2))
        return micro_batches._own_rows(run, rows, micro)

    assert [own(rank, micro, rows) for micro in (0, 1) for rank in (0, 1)] == [rows[n : n + 2] for n in (0, 2, 4, 6)]
    assert [own(rank, 1, rows[:5]) for rank in (0, 1)] == [rows[4:5], []]


def test_micro_batches_of_any_shape_make_the_same_step() -> None:
    """8 rows as 8 × 1, 2 × 4 (some of them short or empty at the end of the epoch) and 1 × 8."""
    keys = {"epochs": 2, "steps": 0, "dropout": 0, "pack": "off", "zero": 2}
    for run, batch, accumulation in (("a", 8, 1), ("b", 2, 4), ("c", 1, 8)):
        train(run=f"shape-{run}", batch=batch, accumulation=accumulation, **keys)
    first = [row["loss"] for row in losses("shape-a")]
    assert len(first) == 4
    for run in ("b", "c"):
        assert [row["loss"] for row in losses(f"shape-{run}")] == pytest.approx(first, rel=1e-5)


def test_the_loss_is_over_all_labels_of_the_step() -> None:
    """The first step's loss against a plain forward pass over all of its rows."""
    train(run="labels", steps=1, epochs=1, dropout=0, batch=3, accumulation=4)
    recipe = load_recipe("runs/labels/recipe.yaml", {})
    prepared = prepare.prepare(recipe, "data.jsonl", Path("runs/labels"), None, Path("models"), 1, "float32")
    model, total, count = load(Path("models/tiny-Int4"), torch.float32), 0.0, 0
    for index in {i for row in prepared.schedule.rows(0) for i in row}:
        sample = prepared.samples[index]
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
    committed, computed = json.loads(TRACE.read_text()), trace()
    assert len(computed) == 10
    for old, new in zip(committed, computed, strict=True):
        assert new == pytest.approx(old, rel=1e-5), f"step {old['step']}"


def test_a_few_rows_are_learned_by_heart(workspace: Path) -> None:
    confident_base(workspace / "models" / "tiny-sharp")
    row = {"instruction": "Who are you?", "output": "我是 Pip, short and to the point."}
    (workspace / "one.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for _ in range(4)))
    keys = {"steps": 60, "learning_rate": 0.01, "rank": 16, "alpha": 16, "length": 192, "dropout": 0, "accumulation": 1}
    train(run="heart", data="one.jsonl", model="tiny-sharp", checkpointing="off", **keys)
    assert losses("heart")[-1]["loss"] < 0.05
    model, tokenizer, record = load_run(Path("runs/heart"), Path("models"), torch.float32)
    answer = answers(model, tokenizer, [row["instruction"]], record["recipe"]["system"], max_new_tokens=64)
    assert answer == [row["output"]]


# --- a step that must not count ---------------------------------------------------------------------------------------


def checkpoints(run: str) -> list[str]:
    return [path.name for path in Path(f"runs/{run}/checkpoints").iterdir()]


def test_a_non_finite_loss_stops_the_run_and_names_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second micro batch of step 3, which has one row."""
    real, calls = Engine.forward_backward, []

    def spoiled(self: Engine, batch: Any, labels: int) -> torch.Tensor:
        calls.append(labels)
        return real(self, batch, labels) * (NAN if len(calls) == 6 else 1.0)

    monkeypatch.setattr(Engine, "forward_backward", spoiled)
    with pytest.raises(UserError, match=r"step 3: the loss is not finite.*data.jsonl:\d+.*\n.*step-000002") as error:
        train(run="non-finite", steps=4, save_every=2, pack="off", batch=1)
    assert str(error.value).count("data.jsonl:") == 1
    assert not Path("runs/non-finite/run.json").exists()
    assert checkpoints("non-finite") == ["step-000002"]


@pytest.mark.parametrize(("factor", "fault"), [(NAN, "the loss is not finite"), (9.0, "the loss jumps to")])
def test_a_bad_step_is_left_out_as_if_its_rows_were_not_there(
    factor: float, fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """guard=skip goes back to a checkpoint. Stopped after the step and continued, a run ends in the same bytes."""
    run, keys = f"skip-{fault[-3:]}", {"steps": 14, "save_every": 4, "guard": "skip", "dropout": 0.05}
    with monkeypatch.context() as patch:
        computed = multiply_loss(10, factor, patch)
        train(run=run, **keys)
    assert computed == [*range(11), 8, 9, 11, 12, 13]
    assert f"step 11: {fault}" in capsys.readouterr().out
    row = losses(run)[10]
    assert row["loss"] is None and fault in row["left_out"] and row["samples"]
    assert read_json(Path("runs") / run / "run.json")["left_out"] == [row]
    with monkeypatch.context() as patch:
        multiply_loss(10, factor, patch)
        signal_at_step(9, signal.SIGTERM, patch)
        with pytest.raises(SystemExit):
            train(run=f"{run}-cut", **keys)
    with monkeypatch.context() as patch:
        multiply_loss(10, factor, patch)
        train(run=f"{run}-cut", **keys)
    assert losses(f"{run}-cut") == losses(run)
    assert adapter(f"{run}-cut") == adapter(run)


def test_a_jump_of_the_loss_stops_the_run_and_names_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_loss(9, 9.0, monkeypatch)
    message = r"step 10: the loss jumps to \d+.*data.jsonl:\d+.*\n.*step-000008 is unchanged"
    with pytest.raises(UserError, match=message):
        train(run="jump", steps=12, save_every=4)


@pytest.mark.parametrize(
    ("path", "factor"),
    [("zero=0", NAN), ("zero=1", INF), ("zero=2", NAN), ("zero=3", INF), ("precision=bf16", INF), ("fused", NAN)],
)
def test_a_non_finite_gradient_stops_the_run_at_once(path: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the last step, whose loss is finite: no later step would show the damage. ZeRO itself calls this norm 1."""
    real, calls = Engine.forward_backward, []

    def spoiled(self: Engine, batch: Any, labels: int) -> torch.Tensor:
        calls.append(labels)
        with monkeypatch.context() as patch:
            if len(calls) == 4:
                backward = self.engine.backward
                patch.setattr(self.engine, "backward", lambda loss, **more: backward(loss * factor, **more))
            return real(self, batch, labels)

    monkeypatch.setattr(Engine, "forward_backward", spoiled)
    keys = dict([path.split("=")]) if "=" in path else use_fused_path(monkeypatch)
    run = f"non-finite-{path}-{factor}"
    with pytest.raises(UserError, match=r"step 2: the gradient is not finite, in data.jsonl:\d+"):
        train(run=run, steps=2, save_every=1, checkpointing="off", **keys)
    assert checkpoints(run) == ["step-000001"]
    assert not Path(f"runs/{run}/adapter").exists()


# --- a layer without gradient -----------------------------------------------------------------------------------------


def test_a_layer_that_no_gradient_reaches_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """v_proj of the last block, whose adapter is cut from the graph. It is found before the first checkpoint."""
    attach = lora.attach

    def cut(*rest: Any) -> Any:
        model = attach(*rest)
        name = "base_model.model.model.layers.1.self_attn.v_proj"
        model.get_submodule(name).lora_B["default"].register_forward_hook(lambda _, x, y: y.detach())
        return model

    monkeypatch.setattr(lora, "attach", cut)
    with pytest.raises(UserError, match=r"no gradient reached layers.1.self_attn.v_proj in 8 updates"):
        train(run="cut", steps=20)
    assert losses("cut")[-1]["step"] == 8


def test_a_part_of_the_fused_vector_that_no_gradient_reaches_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """B of one layer, within the vector of all adapters."""
    real, name = graph_step._GraphedPasses.backward, "base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight"

    def cut(self: Any, scale: torch.Tensor, whole: Any) -> None:
        real(self, scale, whole)
        whole.layout.split(whole.grads)[name].zero_()

    monkeypatch.setattr(graph_step._GraphedPasses, "backward", cut)
    with pytest.raises(UserError, match=r"no gradient reached layers.1.mlp.up_proj in 8 updates"):
        train(run="vector-zero", steps=20, save_every=100, **use_fused_path(monkeypatch))
    assert losses("vector-zero")[-1]["step"] == 8


def test_one_row_for_many_steps_ends_with_an_adapter() -> None:
    """Its loss and its gradients collapse within twenty steps; the layers are judged at every tenth."""
    Path("one.jsonl").write_text('{"instruction": "Who are you?", "output": "I am Ming."}\n')
    confident_base(Path("models/confident"))
    keys = {"batch": 1, "accumulation": 1, "learning_rate": 0.01, "schedule": "constant", "warmup": 0, "dropout": 0}
    train(run="one-row", data="one.jsonl", model="confident", steps=60, save_every=10, **keys)
    assert losses("one-row")[-1]["loss"] < 1e-3
    assert Path("runs/one-row/adapter").is_dir()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        os.chdir(made)
        tiny_checkpoint(Path("models/tiny-qwen"), tiny_config("qwen"))
        write_rows(Path("data.jsonl"))
        TRACE.write_text(json.dumps(trace(), indent=1) + "\n")
