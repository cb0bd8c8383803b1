"""Small decoders with adapters, batches for them, and their loss and gradient by autograd and by the fused step."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.oracles import tiny_checkpoint, tiny_config
from train.config.recipe import load_recipe
from train.data.tokens.batches import collate
from train.data.tokens.samples import Sample
from train.model import lora
from train.model.loading import load
from train.training.graph_step import GraphStep
from train.training.preference import PreferenceLoss

LAYOUTS = ("qwen", "qwen2", "qwen3")
PACKED = [[17, 40, 3], [9, 61], [64]]  # lengths of the conversations in each row
RAGGED = [[30], [51], [2]]


def adapted_decoder(
    tmp_path: Path, layout: str, int4: bool, dtype: torch.dtype, device: str, head_dim: int = 0, **recipe: str
) -> Any:
    """A tiny decoder in training mode, with adapters whose B is not zero. head_dim: 64, or 0 for the tiny default."""
    config = tiny_config(layout, **({"hidden_size": 4 * head_dim, "head_dim": head_dim} if head_dim else {}))
    folder = tiny_checkpoint(tmp_path / f"{layout}-{int4}", config, int4=int4)
    values = load_recipe("qlora", {"dropout": "0", "rank": "4", **recipe})
    model = lora.attach(load(folder, dtype, device), values).to(device)
    generator = torch.Generator().manual_seed(5)
    for p in lora.trainable(model).values():
        p.data = (torch.randn(p.shape, generator=generator) * 0.1).to(device, dtype)
    return model.train()


def batch_of(lengths: list[list[int]], row_length: int | None = None) -> dict[str, Tensor]:
    """Rows of conversations of these lengths; the first third of each has no labels."""
    generator = torch.Generator().manual_seed(1)
    samples, rows = [], []
    for row in lengths:
        rows.append(list(range(len(samples), len(samples) + len(row))))
        for n in row:
            ids = torch.randint(0, 512, (n,), generator=generator).int().numpy()
            mask = (torch.arange(n) >= n // 3).byte().numpy()
            samples.append(Sample(ids, mask, "here"))
    return collate(rows, samples, 256, row_length)


def bound_step(
    model: Any,
    dtype: torch.dtype | None = None,
    graphs: bool = False,
    full_shape: tuple[int, int] | None = None,
    preference: PreferenceLoss | None = None,
    fp8: bool = False,
) -> GraphStep:
    """The fused step of a decoder with adapters, its vector in `dtype`, or in the dtype of the adapters."""
    names = {p: name for name, p in lora.trainable(model).items()}
    step = GraphStep(model.get_base_model(), names, 64, graphs, full_shape, preference, fp8)
    step.vector.data = step.vector.data.to(dtype or next(iter(names)).dtype)
    step.bind()
    return step


def by_autograd(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients by the definition: the decoder's own forward pass, and autograd."""
    parameters = lora.trainable(model)
    device = next(iter(parameters.values())).device
    loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
    grads = torch.autograd.grad(loss, list(parameters.values()))
    return loss.detach(), dict(zip(parameters, grads))


def by_fused_step(
    model: Any, batch: dict[str, Tensor], graphs: bool = False, times: int = 1, fp8: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients by the fused step, of the last of `times` equal batches."""
    step = bound_step(model, graphs=graphs, fp8=fp8)
    for _ in range(times):
        step.vector.grad = None
        loss = step(batch)
        (loss * 0.5).backward()
    assert step.vector.grad is not None
    return loss.detach(), {name: grad * 2 for name, grad in step.layout.split(step.vector.grad).items()}


def assert_grads_close(grads: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()), msg=name)


def relative_error(grads: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The distance of all gradients together, relative to their norm."""
    a, b = (torch.cat([each[name].double().flatten().cpu() for name in sorted(exact)]) for each in (grads, exact))
    return float((a - b).norm() / b.norm())
