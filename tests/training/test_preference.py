"""DPO: the loss, its gradients and twenty steps are those of stock transformers and peft; runs from end to end."""

import copy
import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from tests.model.test_lora import randomize, recipe, reference
from tests.support.fused_step import assert_grads_close, bound_step
from tests.support.oracles import tiny_config, tiny_decoder
from tests.support.pairs import log_probability, random_pairs, stock_loss, write_pairs
from tests.support.tiny_training import adapter, losses, signal_at_step, train, use_fused_path
from train.__main__ import main
from train.common.errors import UserError
from train.common.files import read_json
from train.config.recipe import Recipe, check_preference
from train.data.tokens.batches import collate
from train.model import lora
from train.model.decoder import linear_names
from train.ops.preference_loss import METRICS
from train.training import distributed
from train.training.deepspeed_engine import Engine
from train.training.preference import PreferenceLoss
from train.training.signals import EXIT_INTERRUPTED

pytestmark = pytest.mark.usefixtures("workspace")
PAIRS = random_pairs((9, 7, 12), (4, 21, 3), (15, 2, 2), (6, 5, 30))
ROWS = [[0, 1], [2, 3]]  # two pairs in a row
KEYS: dict[str, Any] = {
    **{"data": "pairs.jsonl", "loss": "dpo", "length": 192, "dropout": 0, "steps": 6, "learning_rate": 5e-3, "zero": 2},
}


@pytest.fixture(scope="module", autouse=True)
def data(workspace: Path) -> None:
    write_pairs(workspace / "pairs.jsonl")


def models(layout: str) -> tuple[Any, Any]:
    """Ours and stock peft's, with fresh adapters."""
    ours = lora.attach(tiny_decoder(tiny_config(layout)), recipe()).train()
    names = list(linear_names(layout))
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=names)
    return ours, get_peft_model(reference(layout, tiny_decoder(tiny_config(layout))), config)


def set_values(ours: Any, stock: Any) -> None:
    """Values as after a training, the same in both."""
    randomize(ours)
    theirs = lora.trainable(stock)
    for name, p in lora.trainable(ours).items():
        theirs[name].data.copy_(p)


def base_of(stock: Any) -> Any:
    """The log-probability of a sample by the base: stock peft with its adapter off."""

    def base(sample: Any) -> Tensor:
        with torch.no_grad(), stock.disable_adapter():
            return log_probability(stock, sample)

    return base


def batch(rows: list[list[int]] = ROWS) -> dict[str, Tensor]:
    return collate(rows, PAIRS, 256)


@pytest.mark.parametrize(("layout", "smoothing"), [("qwen2", 0.0), ("qwen2", 0.2), ("qwen", 0.0)])
def test_loss_and_gradients_are_those_of_stock_transformers_and_peft(layout: str, smoothing: float) -> None:
    ours, stock = models(layout)
    loss = PreferenceLoss(ours, 0.1, smoothing)
    assert loss(batch())[0].item() == pytest.approx(4 * math.log(2)), "it does not begin at the reference"
    set_values(ours, stock)
    found, expected = loss(batch()), stock_loss(stock, base_of(stock), PAIRS, 0.1, smoothing)
    assert abs(expected.item() - 4 * math.log(2)) > 0.05
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)
    if layout == "qwen2":
        parameters = lora.trainable(ours)
        theirs = torch.autograd.grad(expected, list(lora.trainable(stock).values()))
        grads = dict(zip(parameters, torch.autograd.grad(found[0], list(parameters.values())), strict=True))
        assert_grads_close(grads, dict(zip(lora.trainable(stock), theirs, strict=True)))


def test_the_metrics_are_sums_over_the_pairs_and_a_batch_without_labels_counts_nothing() -> None:
    ours, stock = models("qwen2")
    loss = PreferenceLoss(ours, 0.3, 0.0)
    set_values(ours, stock)
    base = base_of(stock)
    rewards = torch.tensor(
        [[0.3 * (log_probability(stock, one) - base(one)).item() for one in pair.sequences] for pair in PAIRS]
    )
    margins = rewards[:, 0] - rewards[:, 1]
    expected = [(margins > 0).sum(), margins.sum(), *rewards.sum(0)]
    assert METRICS == ("reward_accuracy", "reward_margin", "chosen_reward", "rejected_reward")
    torch.testing.assert_close(loss(batch())[1:], torch.stack([x.float() for x in expected]), rtol=1e-4, atol=1e-4)
    empty = {**batch(), "labels": torch.full_like(batch()["labels"], -100)}
    sums = loss(empty)
    assert sums.tolist() == [0.0] * 5
    assert not any(grad.any() for grad in torch.autograd.grad(sums[0], list(lora.trainable(ours).values())))


def test_an_adapter_to_start_from_is_the_reference() -> None:
    """The loss follows stock peft against a copy of it as it was before training."""
    ours, stock = models("qwen2")
    set_values(ours, stock)
    before, loss = copy.deepcopy(stock), PreferenceLoss(ours, 0.1, 0.0)
    assert loss(batch())[0].item() == pytest.approx(4 * math.log(2))
    for model in (ours, stock):
        for p in lora.trainable(model).values():
            p.data *= 1.5
    with torch.no_grad():
        expected = stock_loss(stock, lambda sample: log_probability(before, sample), PAIRS, 0.1)
    values = {name: p.detach().clone() for name, p in lora.trainable(ours).items()}
    torch.testing.assert_close(loss(batch())[0], expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(p, values[name]) for name, p in lora.trainable(ours).items())


@pytest.mark.slow
def test_twenty_steps_follow_stock_peft_and_torchs_adamw() -> None:
    """Two micro batches a step; losses within 1e-4, relative to those of the control."""
    keys = Recipe(loss="dpo", rank=4, alpha=8.0, dropout=0.0, zero=2, batch=1, accumulation=2, clip=1.0)
    ours, stock = models("qwen2")
    own = dict(lora.trainable(stock))
    for name, p in lora.trainable(ours).items():
        own[name].data.copy_(p)
    optimizer = torch.optim.AdamW(own.values(), lr=2e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    base, expected = base_of(stock), []
    for _ in range(20):
        optimizer.zero_grad()
        mean = stock_loss(stock, base, PAIRS, 0.1) / len(PAIRS)
        mean.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(own.values(), 1.0)
        optimizer.step()
        expected.append(mean.item())
    distributed.join(distributed.RankInfo(), cuda=False)
    engine, found = Engine(ours, keys, torch.float32, 1), []
    try:
        for _ in range(20):
            sums = []
            for micro, row in enumerate(ROWS):
                sums.append(engine.forward_backward(engine.to_device(batch([row])), len(PAIRS))[0].item())
                engine.step(last=micro == 1, rate=2e-3)
            found.append(sum(sums) / len(PAIRS))
    finally:
        engine.close()
        distributed.destroy_single_process_group()
    assert expected[-1] < 0.5 * expected[0]
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("rows", [ROWS, [[3], [1]]])
def test_the_fused_passes_give_the_same(begun: bool, rows: list[list[int]]) -> None:
    ours, _ = models("qwen2")
    if begun:
        randomize(ours)
    loss = PreferenceLoss(ours, 0.1, 0.1)
    for name, p in lora.trainable(ours).items():
        p.data += 0.05 if ".lora_A." in name else 0.02
    expected = loss(batch(rows))
    grads = torch.autograd.grad(expected[0], list(lora.trainable(ours).values()))
    by_name = dict(zip(lora.trainable(ours), grads, strict=True))
    step = bound_step(ours, preference=loss)
    for _ in range(2):
        step.vector.grad = None
        sums = step(batch(rows))
        (sums[0] * 0.5).backward()
    torch.testing.assert_close(sums, expected.detach(), rtol=1e-4, atol=1e-5)
    assert step.vector.grad is not None
    assert_grads_close({n: g * 2 for n, g in step.layout.split(step.vector.grad).items()}, by_name)


# --- runs


def test_a_run_prefers_the_chosen_answers_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    train(run="dpo", held_out=4, measure_every=3, keep_best="on", **KEYS)
    said, rows = capsys.readouterr().out, losses("dpo")
    assert "the reference is the base" in said and "4 of 24 conversations" in said and "20 pairs" in said
    assert rows[0]["loss"] == pytest.approx(math.log(2)) and rows[0]["reward_margin"] == 0
    assert rows[-1]["loss"] < 0.2 and rows[-1]["reward_accuracy"] == 1 and rows[-1]["reward_margin"] > 1
    assert rows[0]["held_out_loss_before"] == pytest.approx(math.log(2))
    assert rows[-1]["held_out_loss"] < 0.3 and rows[-1]["held_out_reward_accuracy"] == 1
    record = read_json(Path("runs/dpo/run.json"))
    assert record["held_out"]["adapter_step"] == record["held_out"]["best_step"]
    assert main(["infer", "run=dpo", "prompt=Hi", "max_tokens=4"]) == 0
    assert main(["verify", "run=dpo"]) == 0
    assert main(["report", "run=dpo"]) == 0
    rows_of_file = [json.loads(line) for line in Path("runs/dpo/held_out.jsonl").read_text().splitlines()]
    assert all({"prompt", "chosen", "rejected"} <= row.keys() for row in rows_of_file)


@pytest.mark.slow
def test_it_is_resumed_to_the_bit_and_like_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {**KEYS, "dropout": 0.05, "save_every": 2}
    train(run="whole", **keys)
    with monkeypatch.context() as patch:
        signal_at_step(4, signal.SIGTERM, patch)
        with pytest.raises(SystemExit) as stopped:
            train(run="cut", **keys)
    assert stopped.value.code == EXIT_INTERRUPTED
    train(run="cut", **keys)
    assert adapter("cut") == adapter("whole") and losses("cut") == losses("whole")
    train(run="plain", **KEYS)
    train(run="as-on-a-card", **KEYS, **{k: v for k, v in use_fused_path(monkeypatch).items() if k not in KEYS})
    found, expected = ([row["loss"] for row in losses(run)] for run in ("as-on-a-card", "plain"))
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_run_goes_on_from_conversations(capsys: pytest.CaptureFixture[str]) -> None:
    train(run="first", steps=3, learning_rate=2e-2, dropout=0)
    words = [f"{key}={value}" for key, value in {**KEYS, "run": "second", "from": "first", "steps": 2}.items()]
    size = ["model=tiny-Int4", "recipe=smoke", "batch=2", "accumulation=2", "rank=4"]
    assert main(["train", *words, *size]) == 0
    assert "the reference is the base with the adapter of 'first'" in capsys.readouterr().out
    assert losses("second")[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mask": "published"}, "Give mask=assistant"),
        ({"zero": 3}, "Give zero=2"),
        ({"columns": "question:a,answer:b"}, "Leave columns= out"),
        ({"loss": "sft", "dpo_beta": 0.2}, "Give loss=dpo"),
    ],
)
def test_what_does_not_go_with_it_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_preference(Recipe(**{"loss": "dpo", **changes}))


def test_the_other_kind_of_data_is_one_error(capsys: pytest.CaptureFixture[str]) -> None:
    for keys, said in (({"loss": "sft"}, "RECIPE=dpo"), ({"data": "data.jsonl"}, "RECIPE=qlora")):
        with pytest.raises(UserError, match=said) as raised:
            train(run="wrong", **{**KEYS, **keys})
        assert "1 problem in" in str(raised.value) and not Path("runs/wrong").exists()
