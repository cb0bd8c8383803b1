"""Linear layers with and without adapters in one FusedLinear, and the extra columns of its matrices."""

from pathlib import Path

import torch

from tests.support.fused_step import (
    PACKED,
    adapted_decoder,
    assert_grads_close,
    batch_of,
    by_autograd,
    by_fused_step,
)
from train.training.fused_linear import empty_with_extra, view_with_extra


def test_linears_without_an_adapter_beside_those_with_one(tmp_path: Path) -> None:
    model = adapted_decoder(tmp_path, "qwen2", True, torch.float32, "cpu", targets="q_proj,v_proj,up_proj,down_proj")
    batch = batch_of(PACKED)
    expected_loss, expected = by_autograd(model, batch)
    loss, grads = by_fused_step(model, batch)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert_grads_close(grads, expected)


def test_extra_columns_stand_behind_each_row() -> None:
    whole = empty_with_extra(torch.empty(3, 7), 4, 2)
    whole.copy_(torch.arange(18.0).view(3, 6))
    x = whole[:, :4]
    assert torch.equal(view_with_extra(x, 2), whole)
    assert view_with_extra(x, 0) is x
