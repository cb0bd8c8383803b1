"""Kernels that start before the one before them has ended compute what they compute without: see ops/kernels/overlap.py.

The interpreter has no such starts, so there the waiting and the prefetching do nothing, and the rest is compared.
"""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.ops.kernels.test_gptq_matmul import activations, adapters, weights


def results(device: str) -> list[Tensor]:
    """Of a chain of the kernels of a decoding step, for one row and for three."""
    from train.ops.kernels import decode_step
    from train.ops.kernels.down_product import down_product
    from train.ops.kernels.gptq_matmul import LowRankSegments, product
    from train.ops.kernels.gptq_tiles import Tile

    a, b = (t.to(device) for t in adapters(torch.float32))
    found = []
    for act_order in (False, True):
        weight, _ = weights(256, 192, 128, 4, act_order, device)
        for batch in (1, 3):
            x, scale = activations(batch, 256, torch.float32, device), torch.ones(256, device=device)
            for tile in (Tile(16, 32, 2, 2, 1), Tile(16, 64, 1, 4, 3)):
                total, h, down = decode_step.add_norm(x, torch.stack([x, x]), scale, 1e-6, a)
                found += [total, h, down_product(h, a) if down is None else down]
                found.append(product(h, weight, LowRankSegments(found[-1], b, (64, 128)), tile=tile))
                found.append(decode_step.swiglu_parts(found[-1], torch.float32))
    return found


def check_modes(device: str) -> None:
    from train.ops.kernels import overlap

    with patch.object(overlap, "most", overlap.OFF):
        expected = results(device)
    for most in (overlap.STARTS, overlap.PREFETCHES, overlap.LOADS):
        with patch.object(overlap, "most", most):
            found = results(device)
        assert len(found) == len(expected)
        assert all(torch.allclose(x, y, rtol=1e-5, atol=1e-5) for x, y in zip(found, expected)), most


def check_modes_without_a_card() -> None:
    """With the instructions of such cards left out."""
    from train.ops.kernels import decode_step, down_product, gptq_matmul, overlap

    with ExitStack() as stack:
        stack.enter_context(patch.object(overlap, "mode", lambda device: overlap.most))
        stack.enter_context(patch.object(overlap, "launch_options", lambda mode: {}))
        for module in (decode_step, down_product, gptq_matmul):
            for name in ("start_next", "wait_for_previous", "prefetch"):
                stack.enter_context(patch.object(module, name, lambda *args: None))
        check_modes("cpu")


def test_an_early_start_changes_no_result_through_the_interpreter() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    code = (
        "import os; os.environ['TRITON_INTERPRET'] = '1'\n"
        "from tests.ops.kernels.test_overlap import check_modes_without_a_card\ncheck_modes_without_a_card()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


@pytest.mark.gpu
def test_an_early_start_changes_no_result_on_the_gpu() -> None:
    check_modes("cuda")
