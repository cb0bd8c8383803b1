"""The norms of each head of q and k: the definition against autograd and RMSNorm, the kernel against the definition."""

import pytest
import torch
from torch import Tensor

from tests.support.interpreter import run_interpreted
from tests.support.tensors import KERNEL_DTYPES, ROUNDING, assert_all_close, normal
from train.ops.head_norm import HeadNorms, norm_heads, norm_heads_backward
from train.ops.rms_norm import rms_norm

SHAPES = [(4, 2, 16), (3, 3, 8), (16, 8, 128), (14, 2, 64), (40, 8, 128), (1, 1, 6)]  # Hq, Hkv, D


def case(queries: int, keys: int, size: int, dtype: torch.dtype, device: str) -> tuple[Tensor, HeadNorms]:
    mixed = normal(5, (queries + 2 * keys) * size, dtype=dtype, device=device)
    q, k = (1 + 0.3 * normal(size, seed=n, device=device).to(dtype) for n in (7, 8))
    return mixed, HeadNorms(q, k, 1e-6)


def results(device: str, dtype: torch.dtype) -> list[Tensor]:
    """Forward and backward, in place and not, on strided rows: by the kernel where Triton runs, else as defined."""
    outputs: list[Tensor] = []
    for queries, keys, size in SHAPES:
        qkv, norms = case(queries, keys, size, dtype, device)
        heads, kept = (queries, keys), (queries + keys) * size
        apart, inside = norm_heads(qkv, norms, heads), qkv.clone()
        norm_heads(inside, norms, heads, out=inside)
        assert torch.equal(apart, inside)
        grads = []
        for source in (qkv, qkv[:, :kept].contiguous()):  # all of it, and queries and keys alone
            wide = normal(5, qkv.shape[1] + 8, seed=3, dtype=dtype, device=device)  # the gradient has extra columns
            beyond = wide[:, qkv.shape[1] :].clone()
            grads.append(norm_heads_backward(wide[:, : qkv.shape[1]], source, norms, heads))
            assert torch.equal(wide[:, qkv.shape[1] :], beyond)
        assert torch.equal(*grads)
        outputs += [apart, grads[0]]
    return outputs


@pytest.mark.parametrize(("queries", "keys", "size"), SHAPES)
def test_it_is_the_norm_of_each_head_and_leaves_the_values(queries: int, keys: int, size: int) -> None:
    qkv, norms = case(queries, keys, size, torch.float32, "cpu")
    normed = norm_heads(qkv, norms, (queries, keys))
    for n in range(queries + 2 * keys):
        head, ours = (x[:, n * size : (n + 1) * size].contiguous() for x in (qkv, normed))
        weight = norms.q if n < queries else norms.k
        expected = rms_norm(head, weight, norms.eps) if n < queries + keys else head
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("queries", "keys", "size"), SHAPES)
def test_the_definition_has_the_gradient_of_autograd(queries: int, keys: int, size: int) -> None:
    mixed, norms = case(queries, keys, size, torch.float64, "cpu")
    qkv, grad = mixed.requires_grad_(), normal(*mixed.shape, seed=1, dtype=torch.float64)
    heads = qkv.unflatten(1, (-1, size))
    weights = torch.cat([norms.q.expand(queries, -1), norms.k.expand(keys, -1)])
    unit = heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + norms.eps)
    normed = torch.cat([unit[:, : queries + keys] * weights, heads[:, queries + keys :]], dim=1).flatten(1)
    (expected,) = torch.autograd.grad(normed, qkv, grad)
    torch.testing.assert_close(norm_heads_backward(grad.clone(), qkv.detach(), norms, (queries, keys)), expected)


def test_the_kernel_equals_the_definition_through_the_interpreter() -> None:
    rounding = 4 * ROUNDING[torch.float32]
    outputs = run_interpreted(__name__, "results", "cpu", torch.float32)
    assert_all_close(outputs, results("cpu", torch.float32), rounding, rounding)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_the_kernel_equals_the_definition_on_a_gpu(dtype: torch.dtype) -> None:
    rounding = 4 * ROUNDING[dtype]
    assert_all_close(results("cuda", dtype), results("cpu", dtype), rounding, rounding)
