"""The fused step around the passes: its batches, its vector of parameters, its shapes, and its CUDA graphs."""

from pathlib import Path

import pytest
import torch

from tests.support.fused_step import (
    PACKED,
    RAGGED,
    adapted_decoder,
    batch_of,
    bound_step,
    by_autograd,
    by_fused_step,
    relative_error,
)
from train.model import lora
from train.model.int4_linear import Int4Linear
from train.training.graph_step import flatten_batch


def test_flatten_batch_ends_each_conversation_and_pads_the_shapes() -> None:
    flat = flatten_batch(batch_of(PACKED), 128)
    assert flat["segment_ids"].shape == (3, 128)
    assert flat["cu_seqlens"].tolist() == [0, 17, 57, 60, 128, 137, 198, 256, 320, *[384] * 8]
    assert flat["positions"][128:138].tolist() == [*range(9), 0]
    some = [0, 16, 17, 59, 60, 61, 128, 319, 320]
    assert flat["seq_start"][some].tolist() == [0, 0, 17, 57, 60, 61, 128, 256, 320]
    assert flat["seq_end"][some].tolist() == [17, 17, 57, 60, 61, 62, 137, 320, 321]
    labelled = sum(n - max(n // 3, 1) for row in PACKED for n in row)
    assert len(flat["labelled_positions"]) == len(flat["labels"]) == labelled
    assert torch.equal(flat["input_ids"][flat["labelled_positions"] + 1], flat["labels"])


def test_batches_that_are_nearly_full_have_one_shape(tmp_path: Path) -> None:
    """At least half full: padded to the full shape, with the same loss. Less than half: a shape of its own."""
    model = adapted_decoder(tmp_path, "qwen2", True, torch.float32, "cpu")
    losses = []
    for full_shape in (None, (4, 100)):
        step = bound_step(model, full_shape=full_shape)
        losses += [float(step(batch_of(lengths))) for lengths in (PACKED, [[64]] * 4, [[5]])]
        shapes = [key[0] for key in step.shapes]
    assert shapes == [(4, 128), (1, 64)]
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-6)


def test_the_vector_holds_each_parameter_once(tmp_path: Path) -> None:
    model = adapted_decoder(tmp_path, "qwen", True, torch.float32, "cpu")
    before = {name: p.detach().clone() for name, p in lora.trainable(model).items()}
    step = bound_step(model)
    assert step.vector.numel() == sum(p.numel() for p in before.values())
    step.vector.data.mul_(2)  # peft's own parameters are views of it
    for name, p in lora.trainable(model).items():
        assert torch.equal(p, before[name] * 2)
    assert list(step.layout.split(step.vector)) == list(before)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", ["0", "0.1"])
def test_graphs_change_nothing(tmp_path: Path, dropout: str) -> None:
    """Bit for bit, with batches of three shapes in turn."""
    results = []
    for graphs in (False, True):
        torch.manual_seed(0)
        step = bound_step(
            adapted_decoder(tmp_path, "qwen", True, torch.bfloat16, "cuda", dropout=dropout), graphs=graphs
        )
        steps = []
        for n in range(9):
            step.vector.grad = None
            loss = step(batch_of((PACKED, RAGGED, [[64], [64], [64], [12]])[n % 3]))
            loss.backward()
            steps.append((float(loss), step.vector.grad.clone()))
        assert any(passes.forward_graph is not None for passes in step.shapes.values()) == graphs
        results.append(steps)
    for (eager_loss, eager), (loss, grad) in zip(*results):
        assert loss == eager_loss
        assert torch.equal(grad, eager)


@pytest.mark.gpu
def test_activation_order_under_graphs(tmp_path: Path) -> None:
    """desc_act: the rows of a group are anywhere."""
    model = adapted_decoder(tmp_path, "qwen2", True, torch.bfloat16, "cuda")
    generator = torch.Generator().manual_seed(0)
    for m in model.modules():
        if isinstance(m, Int4Linear):
            m.g_idx.copy_(m.g_idx[torch.randperm(len(m.g_idx), generator=generator).to(m.g_idx.device)])
            m._in_order = None
    batch = batch_of(PACKED)
    expected_loss, expected = by_autograd(model, batch)
    loss, grads = by_fused_step(model, batch, graphs=True, times=3)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-2)
    assert relative_error(grads, expected) < 5e-2
