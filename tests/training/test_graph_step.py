"""The passes written by hand against autograd through the decoder: loss and every gradient, on the CPU and on a GPU."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.oracles import tiny_checkpoint, tiny_config
from train.config.recipe import load_recipe
from train.data.batches import collate
from train.data.samples import Sample
from train.model import lora
from train.model.int4_linear import Int4Linear
from train.model.loading import load
from train.ops.kernels import low_rank
from train.training import fused_decoder
from train.training.graph_step import Step, arrange

LAYOUTS = ("qwen", "qwen2")


def adapted(
    tmp_path: Path, layout: str, int4: bool, dtype: torch.dtype, device: str, wide: bool = False, **changes: str
) -> Any:
    """A tiny decoder with adapters whose B is not zero, in training mode; `wide`: with heads of 64."""
    config = tiny_config(layout, **({"hidden_size": 256, "head_dim": 64} if wide else {}))
    folder = tiny_checkpoint(tmp_path / f"{layout}-{int4}", config, int4=int4)
    recipe = load_recipe("qlora", {"dropout": "0", "rank": "4", **changes})
    model = lora.attach(load(folder, dtype, device), recipe).to(device)
    generator = torch.Generator().manual_seed(5)
    for p in lora.trainable(model).values():
        p.data = (torch.randn(p.shape, generator=generator) * 0.1).to(device, dtype)
    return model.train()


def batch_of(lengths: list[list[int]], width: int | None = None) -> dict[str, Tensor]:
    """Rows of conversations of these lengths; the first third of each is not learnt."""
    generator = torch.Generator().manual_seed(1)
    samples, rows = [], []
    for row in lengths:
        rows.append(list(range(len(samples), len(samples) + len(row))))
        for n in row:
            ids = torch.randint(0, 512, (n,), generator=generator).int().numpy()
            mask = (torch.arange(n) >= n // 3).byte().numpy()
            samples.append(Sample(ids, mask, "here"))
    return collate(rows, samples, 256, width)


PACKED = [[17, 40, 3], [9, 61], [64]]
RAGGED = [[30], [51], [2]]


def by_autograd(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The definition: the decoder's own forward, and autograd."""
    parameters = lora.trainable(model)
    device = next(iter(parameters.values())).device
    loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
    slopes = torch.autograd.grad(loss, list(parameters.values()))
    return loss.detach(), dict(zip(parameters, slopes))


def by_hand(
    model: Any, batch: dict[str, Tensor], graphs: bool = False, times: int = 1
) -> tuple[Tensor, dict[str, Tensor]]:
    names = {p: name for name, p in lora.trainable(model).items()}
    step = Step(model.get_base_model(), names, 64, graphs)
    step.vector.data = step.vector.data.to(next(iter(names)).dtype)
    step.bind()
    for _ in range(times):
        step.vector.grad = None
        loss = step(batch)
        (loss * 0.5).backward()
    assert step.vector.grad is not None
    return loss.detach(), {name: slope * 2 for name, slope in step.layout.split(step.vector.grad).items()}


@pytest.mark.parametrize("lengths", [PACKED, RAGGED], ids=["packed", "ragged"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("int4", [False, True], ids=["float", "int4"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_equal_autograds(
    tmp_path: Path, layout: str, int4: bool, checkpointing: bool, lengths: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_decoder, "HALVES", 100)  # rows of 64 by three: checkpointing goes by halves
    model = adapted(tmp_path, layout, int4, torch.float32, "cpu")
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable()
    batch = batch_of(lengths)
    want, slopes = by_autograd(model, batch)
    got, ours = by_hand(model, batch)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    assert ours.keys() == slopes.keys()
    for name, slope in slopes.items():
        torch.testing.assert_close(ours[name], slope, rtol=1e-4, atol=1e-4 * float(slope.abs().max()), msg=name)
        assert slope.abs().max() > 0, name


def test_some_linears_only(tmp_path: Path) -> None:
    """Linears without an adapter stand beside those with one."""
    model = adapted(tmp_path, "qwen2", True, torch.float32, "cpu", targets="q_proj,v_proj,up_proj,down_proj")
    batch = batch_of(PACKED)
    want, slopes = by_autograd(model, batch)
    got, ours = by_hand(model, batch)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    for name, slope in slopes.items():
        torch.testing.assert_close(ours[name], slope, rtol=1e-4, atol=1e-4 * float(slope.abs().max()), msg=name)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "halves"])
def test_dropout_has_the_gradient_of_the_masks_it_drew(
    tmp_path: Path, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Along a direction, the loss under one seed changes as the gradient says."""
    monkeypatch.setattr(fused_decoder, "HALVES", 64)
    model = adapted(tmp_path, "qwen2", True, torch.float64, "cpu", dropout="0.3")
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable()
    batch = batch_of(PACKED)
    names = {p: name for name, p in lora.trainable(model).items()}
    step = Step(model.get_base_model(), names, 64, graphs=False)
    step.vector.data = step.vector.data.double()
    step.bind()

    def loss() -> Tensor:
        torch.manual_seed(3)
        return step(batch)

    loss().backward()
    assert step.vector.grad is not None
    direction = torch.randn(step.vector.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    slope, size, start = float(step.vector.grad @ direction), 1e-6, step.vector.data.clone()
    values = []
    for sign in (1, -1):
        step.vector.data.copy_(start + sign * size * direction)
        values.append(float(loss()))
    assert (values[0] - values[1]) / (2 * size) == pytest.approx(slope, rel=1e-5)
    first = values[0]
    torch.manual_seed(4)
    assert float(step(batch)) != pytest.approx(first, rel=1e-6)  # another seed, another mask


def test_arrange_closes_every_conversation_and_pads_shapes() -> None:
    host = arrange(batch_of(PACKED), 128)
    assert host["segments"].shape == (3, 128)
    assert host["bounds"].tolist() == [0, 17, 57, 60, 128, 137, 198, 256, 320, *[384] * 8]
    assert host["positions"][128:138].tolist() == [*range(9), 0]
    assert host["starts"][[0, 16, 17, 59, 60, 61, 128, 319, 320]].tolist() == [0, 0, 17, 57, 60, 61, 128, 256, 320]
    assert host["ends"][[0, 16, 17, 59, 60, 61, 128, 319, 320]].tolist() == [17, 17, 57, 60, 61, 62, 137, 320, 321]
    assert len(host["rows"]) == len(host["labels"]) == sum(n - max(n // 3, 1) for row in PACKED for n in row)
    assert torch.equal(host["ids"][host["rows"] + 1], host["labels"])


def test_batches_that_are_nearly_full_have_one_shape(tmp_path: Path) -> None:
    """What is half of it at least is padded to it, and learns the same; less keeps a shape of its own."""
    model = adapted(tmp_path, "qwen2", True, torch.float32, "cpu")
    names = {p: name for name, p in lora.trainable(model).items()}
    losses = []
    for full in (None, (4, 100)):
        step = Step(model.get_base_model(), names, 64, False, full)
        step.bind()
        losses += [float(step(batch_of(lengths))) for lengths in (PACKED, [[64]] * 4, [[5]])]
        shapes = [key[0] for key in step.shapes]
    assert shapes == [(4, 128), (1, 64)]
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-6)


def test_the_vector_holds_each_number_once(tmp_path: Path) -> None:
    model = adapted(tmp_path, "qwen", True, torch.float32, "cpu")
    parameters = lora.trainable(model)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    step = Step(model.get_base_model(), {p: name for name, p in parameters.items()}, 64, graphs=False)
    step.bind()
    assert step.vector.numel() == sum(p.numel() for p in before.values())
    step.vector.data.mul_(2)  # peft's own parameters are views of it
    for name, p in lora.trainable(model).items():
        assert torch.equal(p, before[name] * 2)
    assert list(step.layout.split(step.vector)) == list(before)


# --- on a GPU: the kernels, flash attention and the graphs


def closeness(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Distance of all gradients together, relative to their size."""
    a, b = (torch.cat([x[name].double().flatten().cpu() for name in sorted(exact)]) for x in (ours, exact))
    return float((a - b).norm() / b.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("lengths", [PACKED, RAGGED], ids=["packed", "ragged"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_the_gpu_as_near_to_the_exact_gradient_as_autograd_is(
    tmp_path: Path, layout: str, checkpointing: bool, lengths: Any, dtype: torch.dtype
) -> None:
    """The exact one is float32's on the CPU, from the same numbers."""
    batch = batch_of(lengths)
    exact_model = adapted(tmp_path, layout, True, torch.float32, "cpu")
    model = adapted(tmp_path, layout, True, dtype, "cuda")
    for p, q in zip(lora.trainable(exact_model).values(), lora.trainable(model).values()):
        p.data = q.data.float().cpu()
    exact_loss, exact = by_autograd(exact_model, batch)
    _, plain = by_autograd(model, batch)
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable()
    loss, ours = by_hand(model, batch, graphs=True, times=4)  # run, captured, replayed
    bound = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    assert abs(float(loss) / float(exact_loss) - 1) < bound / 5
    assert closeness(ours, exact) < max(1.5 * closeness(plain, exact), bound / 10) < bound * 2


def check_full_card(
    tmp_path: Path, layout: str, dropout: str, dtype: torch.dtype, device: str, lengths: list[list[int]]
) -> None:
    """What serves many tokens (a thin product taken along) learns what serves few does, masks and all."""
    found: list[Any] = []
    least = low_rank.LEAST_ROWS
    for first in (10**9, 0):
        low_rank.LEAST_ROWS = first
        torch.manual_seed(0)
        model = adapted(tmp_path / str(first), layout, True, dtype, device, wide=True, dropout=dropout)
        found.append(by_hand(model, batch_of(lengths)))
    low_rank.LEAST_ROWS = least
    (want, slopes), (got, ours) = found
    bound = 1e-5 if dtype == torch.float32 else 5e-3
    assert float(got) == pytest.approx(float(want), rel=bound / 5)
    assert closeness(ours, slopes) < bound


@pytest.mark.slow
def test_what_serves_a_full_card_through_the_interpreter(tmp_path: Path) -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported. Attention's own kernels want a GPU."""
    code = (
        "import os, sys, torch; os.environ['TRITON_INTERPRET'] = '1'\n"
        "from pathlib import Path; from tests.training.test_graph_step import check_full_card\n"
        "check_full_card(Path(sys.argv[1]), 'qwen', '0.1', torch.float32, 'cpu', [[30, 20]])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", ["0", "0.1"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_serves_a_full_card_on_the_gpu(tmp_path: Path, layout: str, dropout: str) -> None:
    check_full_card(tmp_path, layout, dropout, torch.float16, "cuda", PACKED)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", ["0", "0.1"])
def test_graphs_change_nothing(tmp_path: Path, dropout: str) -> None:
    """Bit for bit, over shapes that take turns."""
    found = []
    for graphs in (False, True):
        torch.manual_seed(0)
        model = adapted(tmp_path, "qwen", True, torch.bfloat16, "cuda", dropout=dropout)
        names = {p: name for name, p in lora.trainable(model).items()}
        step = Step(model.get_base_model(), names, 64, graphs)
        step.vector.data = step.vector.data.bfloat16()
        step.bind()
        slopes = []
        for n in range(9):
            step.vector.grad = None
            loss = step(batch_of((PACKED, RAGGED, [[64], [64], [64], [12]])[n % 3]))
            loss.backward()
            slopes.append((float(loss), step.vector.grad.clone()))
        assert any(shape.forth is not None for shape in step.shapes.values()) == graphs
        found.append(slopes)
    for (a, x), (b, y) in zip(*found):
        assert a == b
        assert torch.equal(x, y)


@pytest.mark.gpu
def test_activation_order_under_graphs(tmp_path: Path) -> None:
    """desc_act: rows of a group anywhere."""
    model = adapted(tmp_path, "qwen2", True, torch.bfloat16, "cuda")
    generator = torch.Generator().manual_seed(0)
    for m in model.modules():
        if isinstance(m, Int4Linear):
            m.g_idx.copy_(m.g_idx[torch.randperm(len(m.g_idx), generator=generator).to(m.g_idx.device)])
            m._in_order = None
    batch = batch_of(PACKED)
    want, slopes = by_autograd(model, batch)
    got, ours = by_hand(model, batch, graphs=True, times=3)
    assert float(got) == pytest.approx(float(want), rel=1e-2)
    assert closeness(ours, slopes) < 5e-2
