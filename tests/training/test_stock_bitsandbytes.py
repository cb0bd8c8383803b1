"""load_as= against stock peft and bitsandbytes: the losses of 50 steps on the same base, data and first A."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.oracles import llama, tiny_checkpoint, tiny_config
from train.config.recipe import Recipe
from train.model import lora
from train.model.loading import load

STEPS = 50
pytestmark = pytest.mark.slow


def batches() -> Iterator[Tensor]:
    """Sequences that can be learnt: each token is a function of the last one and of its row."""
    generator = torch.Generator().manual_seed(11)
    for _ in range(STEPS):
        start = torch.randint(0, 256, (4, 1), generator=generator)
        yield (start + 7 * torch.arange(48)) % 256


def loss_of(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def losses(model: Any) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, found = torch.optim.AdamW(trained, lr=5e-3), []
    for ids in batches():
        loss = loss_of(model, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def stock(folder: Path, kind: str, a_of: dict[str, Tensor]) -> Any:
    """transformers' Llama with bitsandbytes' linears and peft's adapters, whose A are `a_of` by the linear's name."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    decoder = load(folder, torch.float32)
    model = llama(decoder.config)
    model.load_state_dict(decoder.state_dict(), strict=False)
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]:
        parent, _, child = name.rpartition(".")
        sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
        if kind == "int8":
            packed: Any = bnb.nn.Linear8bitLt(*sizes, bias, has_fp16_weights=False, threshold=6.0)
            packed.state.memory_efficient_backward = False  # peft 0.12 asks for it; bitsandbytes 0.46 has it no more
            packed.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        else:
            packed = bnb.nn.Linear4bit(*sizes, bias, torch.float32, True, kind)
            packed.weight = bnb.nn.Params4bit(linear.weight.data, False, quant_type=kind)
        if bias:
            packed.bias = nn.Parameter(linear.bias.data, requires_grad=False)
        setattr(model.get_submodule(parent), child, packed.to("cpu"))
    floats = {n: m.weight.data.clone() for n, m in decoder.named_modules() if isinstance(m, nn.Linear)}
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind != "int8", kind == "int8"
    adapted: Any = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules=sorted({n.rpartition(".")[2] for n in a_of}))
    )
    for name, p in adapted.named_parameters():
        if ".lora_A." in name:
            p.data.copy_(a_of[name.removeprefix("base_model.model.").partition(".lora_A.")[0]])
    if kind == "int8":  # on a CPU each .to() of peft has rounded the codes again, with a scale of 127
        for name, module in adapted.named_modules():
            if isinstance(module, bnb.nn.Linear8bitLt) and name.endswith(".base_layer"):
                float_weight = floats[name.removeprefix("base_model.model.").removesuffix(".base_layer")]
                module.weight = bnb.nn.Int8Params(float_weight, requires_grad=False, has_fp16_weights=False).to("cpu")
    return adapted


@pytest.mark.parametrize(("kind", "tolerance"), [("nf4", 2e-3), ("int8", 3e-2)])
def test_the_losses_are_those_of_stock_peft_and_bitsandbytes(tmp_path: Path, kind: str, tolerance: float) -> None:
    """nf4: to noise. int8: bitsandbytes rounds the inputs too, which shows."""
    folder = tiny_checkpoint(
        tmp_path / "base", tiny_config("qwen2", hidden_size=128, head_dim=32, intermediate_size=256)
    )
    ours: Any = lora.attach(load(folder, torch.float32, load_as=kind), Recipe(rank=8, alpha=16, dropout=0.0, seed=3))
    a_of = {n.partition(".lora_A.")[0]: p.detach() for n, p in lora.trainable(ours).items() if ".lora_A." in n}
    a_of = {name.removeprefix("base_model.model."): a for name, a in a_of.items()}
    theirs = stock(folder, kind, a_of)
    mine, reference = losses(ours.train()), losses(theirs.train())
    exact: Any = lora.attach(load(folder, torch.float32), Recipe(rank=8, alpha=16, dropout=0.0, seed=3))
    unquantised = losses(exact.train())
    worst = max(abs(a - b) for a, b in zip(mine, reference))
    print(
        f"{kind}: first {mine[0]:.4f}, last {mine[-1]:.4f}; theirs {reference[-1]:.4f}; largest difference {worst:.2e}"
    )
    assert mine[-1] < mine[0] - 1
    assert worst < tolerance
    assert abs(mine[0] - unquantised[0]) > abs(mine[0] - reference[0])  # the control sees the rounding of the weights
