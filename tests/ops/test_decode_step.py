"""The kernels of a decoding step against their definitions: through Triton's interpreter, and on a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from train.ops import decode_step


def check_attention(device: str) -> None:
    """Attention whose keys are divided into splits, with grouped heads and long rows."""
    from train.ops.kernels import decode_step as decode_step_kernels

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    for batch, heads, key_heads, head_dim, new in ((2, 4, 2, 16, 200), (1, 2, 2, 64, 255), (2, 2, 1, 32, 3)):
        qkv, angles = random(3, batch, (heads + 2 * key_heads) * head_dim), random(1, 256, head_dim // 2)
        rope = (angles.cos(), angles.sin())
        pads = torch.arange(batch, dtype=torch.int32, device=device)
        slot = torch.tensor([new], dtype=torch.int32, device=device)
        cache = (random(batch, key_heads, 256, head_dim), random(batch, key_heads, 256, head_dim))
        logn = random(256).abs()
        expected_cache = [t.clone() for t in cache]
        expected = decode_step.attend_plain(qkv, *rope, logn, pads, slot, *expected_cache, heads)
        for splits in (1, 2, 4):
            kernel_cache, arrivals = (
                [t.clone() for t in cache],
                torch.zeros(batch, heads, dtype=torch.int32, device=device),
            )
            for _ in range(min(splits, 2)):  # the count of programs is at zero again for the second
                out = decode_step_kernels.attend(qkv, *rope, logn, pads, slot, *kernel_cache, heads, splits, arrivals)
                assert torch.allclose(out, expected, atol=2e-5), (batch, splits)
                assert not arrivals.any()
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(kernel_cache, expected_cache))


def check_rows(device: str) -> None:
    """Rows that stand at slots of their own, in other rows of the cache and of the rotary tables."""
    from train.ops.kernels import decode_step as decode_step_kernels

    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    heads, key_heads, head_dim, capacity = 4, 2, 16, 128
    slots = torch.tensor([100, 3, 0], dtype=torch.int32, device=device)
    rows = torch.tensor([2, 0, 4], dtype=torch.int32, device=device)
    pads = torch.zeros(3, dtype=torch.int32, device=device)
    qkv = random(2, 3, (heads + 2 * key_heads) * head_dim)
    keys, values = random(5, key_heads, capacity, head_dim), random(5, key_heads, capacity, head_dim)
    for tables in (1, 5):
        angles = random(tables, capacity, head_dim // 2)
        args = (qkv, angles.cos(), angles.sin(), None, pads, slots)
        expected_cache, cache = [keys.clone(), values.clone()], [keys.clone(), values.clone()]
        expected = decode_step.attend_rows_plain(*args, *expected_cache, heads, rows)
        for splits in (1, 2):
            out = decode_step_kernels.attend(*args, *cache, heads, splits, cache_rows=rows)
            assert torch.allclose(out, expected, atol=2e-5), (tables, splits)
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(cache, expected_cache))
        alone = decode_step.attend_plain(
            qkv[:, 1:2], angles[:1].cos(), angles[:1].sin(), None, pads[:1], slots[1:2], keys[:1], values[:1], heads
        )
        assert torch.equal(expected[1:2], alone)


def check_norm(device: str) -> None:
    """The norm of a sum, and its product with the rows of A that a single row gets in the same kernel."""
    from train.ops.kernels import decode_step as decode_step_kernels

    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    for batch, width, ranks, splits in ((1, 200, 5, 3), (1, 256, 48, 0), (2, 200, 5, 2)):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 4e-3)):
            x, weight, a = (random(*shape).to(device, dtype) for shape in ((batch, width), (width,), (ranks, width)))
            parts = random(splits, batch, width).to(device) if splits else None
            total, normed, down = decode_step_kernels.add_norm(x, parts, weight, 1e-6, a)
            expected = decode_step.add_norm_plain(x, parts, weight, 1e-6, a)
            assert torch.allclose(total, expected[0], atol=tolerance, rtol=tolerance)
            assert torch.allclose(normed, expected[1], atol=tolerance, rtol=tolerance)
            assert (down is None) == (batch > 1)
            if down is not None:
                product = (normed.float() @ a.float().t())[None]  # of the rounded row: sums in float32 agree closely
                assert torch.allclose(down, product, atol=1e-4)
            without = decode_step_kernels.add_norm(x, parts, weight, 1e-6)
            assert torch.equal(without[0], total)
            assert torch.allclose(without[1], normed, atol=tolerance, rtol=tolerance)


def test_the_kernels_of_a_step_through_the_interpreter() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    code = (
        "import os; os.environ['TRITON_INTERPRET'] = '1'\n"
        "from tests.ops.test_decode_step import check_attention, check_norm, check_rows\n"
        "check_attention('cpu'); check_rows('cpu'); check_norm('cpu')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.gpu
def test_the_kernels_of_a_step_on_the_gpu() -> None:
    check_attention("cuda")
    check_rows("cuda")
    check_norm("cuda")


def test_padding_and_empty_slots_are_not_read() -> None:
    """The definition: what stands before a row's first slot and after the new token has no influence."""
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(1, 2, 3 * 8, generator=generator)
    angles = torch.randn(1, 16, 4, generator=generator)
    pads, slot = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([6], dtype=torch.int32)
    keys, values = torch.randn(2, 2, 1, 16, 8, generator=generator)
    args = (qkv, angles.cos(), angles.sin(), None, pads, slot)
    expected = decode_step.attend_plain(*args, keys.clone(), values.clone(), 1)
    for cache in (keys, values):
        cache[1, :, :3] = 100.0
        cache[:, :, 7:] = 100.0
    assert torch.equal(decode_step.attend_plain(*args, keys, values, 1), expected)
