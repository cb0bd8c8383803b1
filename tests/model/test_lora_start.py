"""Adapters that begin with a part of the base: as in stock peft, on a base that stays as it is, written as plain LoRA."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from tests.model.test_lora import IDS, logits, recipe, reference
from tests.support.oracles import tiny_checkpoint, tiny_config, tiny_decoder
from train.common.errors import UserError
from train.model import lora, lora_start
from train.model.decoder import linear_names
from train.model.loading import load
from train.model.lora_layers import AdaptedModel
from train.ops.low_rank_start import largest_part, olora, pissa

START = pytest.mark.parametrize("start", ["olora", "pissa"])
STEPS, RATE = 4, 1e-2


def begun(model: Any, start: str, **changes: Any) -> AdaptedModel:
    ours = lora.attach(model, recipe(start=start, **changes))
    lora_start.set_factors(ours, start, seed=1)
    lora_start.fix(ours, torch.float32)
    return ours


def stock(layout: str, start: str, **keys: Any) -> Any:
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=list(linear_names(layout)), init_lora_weights=start
    )
    for key, value in keys.items():
        setattr(config, key, value)
    return get_peft_model(reference(layout, tiny_decoder(tiny_config(layout))), config)


def trained(model: Any) -> list[dict[str, Tensor]]:
    """The gradients of each of the first steps of AdamW."""
    parameters = lora.trainable(model)
    optimizer, grads = torch.optim.AdamW(parameters.values(), lr=RATE), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(model.train()(input_ids=IDS).logits[0, :-1], IDS[0, 1:])
        loss.backward()
        grads.append({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})
        optimizer.step()
    return grads


@START
@pytest.mark.parametrize("rslora", [False, True])
def test_the_first_steps_are_those_of_stock_peft(start: str, rslora: bool) -> None:
    """peft trains on a changed base, W - scale · B0 A0, and here the same is subtracted as a fixed term."""
    theirs, ours = stock("qwen2", start, use_rslora=rslora), begun(tiny_decoder(tiny_config()), start, rslora=rslora)
    for name, p in lora.trainable(theirs).items():
        torch.testing.assert_close(lora.trainable(ours)[name], p, rtol=1e-4, atol=1e-4, msg=name)
    expected, found = trained(theirs), trained(ours)
    for step, (grads, others) in enumerate(zip(expected, found, strict=True)):
        assert grads.keys() == others.keys()
        for name, grad in grads.items():
            atol = 1e-4 * float(grad.abs().max())
            torch.testing.assert_close(others[name], grad, rtol=1e-3, atol=atol, msg=f"step {step}: {name}")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-3, atol=1e-3)


@START
def test_with_dropout_the_part_that_is_subtracted_has_none_as_in_stock_peft(start: str) -> None:
    torch.manual_seed(0)
    base = nn.Linear(24, 16)
    x = torch.randn(3, 24)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, target_modules=["0"], init_lora_weights=start)
    theirs = get_peft_model(nn.Sequential(copy.deepcopy(base)), config).train()
    layer = lora.LoraLinear(base, 4, 2.0, 0.5)
    for part, own in ((layer.lora_A, "lora_A"), (layer.lora_B, "lora_B")):
        part["default"].weight.data.copy_(getattr(theirs.base_model.model[0], own)["default"].weight)
    layer.fix_start(torch.float32)
    torch.manual_seed(5)
    expected = theirs(x)
    torch.manual_seed(5)
    torch.testing.assert_close(layer.train()(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "int4", "start"),
    [("qwen2", False, "olora"), ("qwen", True, "pissa"), ("qwen3", False, "pissa"), ("qwen2", True, "olora")],
)
def test_it_begins_as_the_base_and_is_written_as_plain_lora_for_it(
    layout: str, int4: bool, start: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "base", tiny_config(layout), int4=int4)
    before = logits(load(folder, torch.float32))
    model = begun(load(folder, torch.float32), start)
    factors = {name: p.detach().clone() for name, p in lora.trainable(model).items()}
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    trained(model)
    assert (logits(model) - before).abs().max() > 0.1, "the training changes nothing: this test would prove nothing"
    lora.save_adapter(model, tmp_path / "adapter", factors=factors)
    ours = lora.load_adapter(load(folder, torch.float32), tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-3, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), before), "the base itself was changed"
    if not int4:
        theirs = PeftModel.from_pretrained(reference(layout, load(folder, torch.float32)), str(tmp_path / "adapter"))
        torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-3, atol=1e-3)


def weight_like_a_models(rows: int, columns: int) -> Tensor:
    """Random, with a few large directions and a long tail, as a trained weight has."""
    generator = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(n, min(rows, columns), generator=generator))[0] for n in (rows, columns))
    sizes = 10 * torch.arange(1, min(rows, columns) + 1).pow(-0.5)
    return (u * sizes) @ v.t()


def test_pissa_of_a_large_weight_is_the_truncated_svd() -> None:
    weight = weight_like_a_models(600, 900)
    exact = torch.linalg.svdvals(weight)
    u, sizes, _ = largest_part(weight, 32, seed=1)
    torch.testing.assert_close(sizes[:16], exact[:16], rtol=1e-3, atol=0.0)
    torch.testing.assert_close(u.t() @ u, torch.eye(32), rtol=0.0, atol=1e-4)
    a, b = pissa(weight, 16, 2.0, seed=1)
    left = float(torch.linalg.matrix_norm(weight - 2 * b @ a))
    least = float(exact[16:].square().sum().sqrt())
    assert least * (1 - 1e-5) <= left <= least * 1.001
    assert torch.equal(pissa(weight, 16, 2.0, seed=1)[0], a)


def test_olora_is_the_first_part_of_q_and_r() -> None:
    weight = weight_like_a_models(40, 60)
    q, r = torch.linalg.qr(weight)
    a, b = olora(weight, 8)
    torch.testing.assert_close(b @ a, q[:, :8] @ r[:8], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(b, q[:, :8], rtol=1e-4, atol=1e-5)


def test_a_rank_over_a_linears_size_is_refused() -> None:
    config = tiny_config()
    names = lora.targets(config.layout, "all")
    lora_start.check_rank("random", 4096, names, config)
    with pytest.raises(UserError, match=r"start=pissa: rank=4096 is more than the \d+ rows or columns of .*Give rank="):
        lora_start.check_rank("pissa", 4096, names, config)
