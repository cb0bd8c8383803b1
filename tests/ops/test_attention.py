"""Attention's own kernels against softmax in float64, and on a GPU beside torch's flash attention."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.interpreter import run_interpreted
from tests.support.tensors import rope_tables
from train.ops import attention
from train.ops.attention import Tokens
from train.ops.kernels import attention as own_kernels
from train.ops.rope import apply_rope

TOKEN_TENSORS = ("positions", "segment_ids", "cu_seqlens", "seq_start", "seq_end", "seed")
CASES = [  # lengths of conversations, heads, key heads, head size
    ([70], 2, 2, 16),
    ([5, 40, 1, 21], 4, 2, 16),
    ([16, 16, 32, 64], 2, 1, 16),
    ([33], 1, 1, 32),
]
LARGE = [
    ([512] * 4, 4, 4, 128),
    ([2048], 4, 2, 128),
    ([1, 700, 64, 3, 129, 128, 127, 872], 4, 2, 64),
    ([77, 300], 14, 2, 64),
]


def tokens(lengths: list[int], device: str) -> Tokens:
    """One row of conversations of these lengths."""
    count = torch.tensor(lengths)
    ends = count.cumsum(0)
    starts = ends - count
    seq_start, seq_end = (x.repeat_interleave(count).int() for x in (starts, ends))
    segment_ids = torch.arange(1, len(lengths) + 1).repeat_interleave(count)[None]
    cu_seqlens = torch.cat([starts, ends[-1:]]).int()
    parts = [torch.arange(len(seq_start)) - seq_start, segment_ids, cu_seqlens, seq_start, seq_end, torch.zeros(1)]
    return Tokens(*(part.to(device) for part in parts))


def inputs(lengths: list[int], heads: int, keys: int, size: int, dtype: torch.dtype, device: str) -> tuple[Any, Tensor]:
    """q, k and v with strided rows, as a block has them, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(sum(lengths), (heads + 2 * keys) * size, generator=generator).to(device, dtype)
    grad = torch.randn(sum(lengths), heads, size, generator=generator).to(device, dtype)
    return mixed.unflatten(1, (-1, size)).split([heads, keys, keys], dim=1), grad


def tables(size: int, device: str) -> tuple[Tensor, Tensor]:
    return rope_tables(4096, size // 2, device)


def exact_results(qkv: Any, grad: Tensor, t: Tokens) -> list[Tensor]:
    """The output, and the gradients before the rotary embedding, in float64 on the CPU."""
    q, k, v = (x.double().cpu().requires_grad_() for x in qkv)
    t = Tokens(*(getattr(t, f).cpu() for f in TOKEN_TENSORS))
    out = attention._masked_attention(q, k, v, t)
    grads: Any = torch.autograd.grad(out, (q, k, v), grad.double().cpu())
    grad_qkv = torch.empty(len(q), sum(x[0].numel() for x in grads), dtype=torch.float64)
    apply_rope(grads, None, tables(q.shape[2], "cpu"), t.positions, grad_qkv, inverse=True)
    return [out.detach(), *split_parts(grad_qkv, qkv)]


def split_parts(mixed: Tensor, qkv: Any) -> list[Tensor]:
    """The gradients of q, k and v."""
    return list(mixed.split([x[0].numel() for x in qkv], dim=1))


def errors(outputs: Any, exact: list[Tensor]) -> list[float]:
    """The distance of each tensor, relative to its norm."""
    return [float((a.double().cpu() - b).norm() / b.norm()) for a, b in zip(outputs, exact)]


def check(device: str, dtype: torch.dtype, cases: list[Any], bound: float) -> None:
    """With the tiles for long rows and with those for short ones."""
    for lengths, *shape in cases:
        qkv, grad = inputs(lengths, *shape, dtype, device)
        t = tokens(lengths, device)
        exact = exact_results(qkv, grad, t)
        two_rows = len(lengths) == 4 and lengths[0] == 16  # of 64 tokens, with no conversation in both
        row_length = 64 if two_rows else len(grad)
        for short in (False, True):
            out, lse = own_kernels.attend(*qkv, t.seq_start, row_length, short)
            columns = shape[2] * (shape[0] + 2 * shape[1])
            grad_qkv = torch.empty(len(out), columns + 8, dtype=dtype, device=device)[:, :-8]
            grads = own_kernels.attend_backward(
                grad, *qkv, out, lse, t.seq_start, t.seq_end, row_length, short, grad_qkv
            )
            apply_rope(grads, None, tables(shape[2], device), t.positions, grad_qkv, inverse=True)
            for error in errors((out, *split_parts(grad_qkv, qkv)), exact):
                assert error < bound, (lengths, shape, short, error)


def check_interpreted() -> None:
    """With small tiles, so that small inputs have several."""
    own_kernels.FORWARD = ((16, 16, 1, 1), (32, 16, 1, 1))
    own_kernels.FOR_KEYS = ((16, 32, 1, 1), (16, 16, 1, 1))
    own_kernels.FOR_QUERIES = ((32, 16, 1, 1), (16, 16, 1, 1))
    check("cpu", torch.float32, CASES, 2e-6)


def test_kernels_equal_the_definition_through_the_interpreter() -> None:
    run_interpreted(__name__, "check_interpreted")


def test_a_conversation_does_not_see_another() -> None:
    """The definition itself, against each conversation alone."""
    lengths = [5, 30, 1]
    qkv, _ = inputs(lengths, 4, 2, 16, torch.float64, "cpu")
    together, _ = attention.attend(*qkv, tokens(lengths, "cpu"))
    start = 0
    for n in lengths:
        alone, _ = attention.attend(*(x[start : start + n] for x in qkv), tokens([n], "cpu"))
        torch.testing.assert_close(together[start : start + n], alone)
        start += n


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kernels_equal_the_definition_on_the_gpu(dtype: torch.dtype) -> None:
    check("cuda", dtype, [*CASES, *LARGE], 2e-3 if dtype == torch.float16 else 1.2e-2)


@pytest.mark.gpu
def test_kernels_are_as_exact_as_torchs_flash_attention_and_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    for lengths, *shape in LARGE:
        qkv, grad = inputs(lengths, *shape, torch.bfloat16, "cuda")
        t, runs = tokens(lengths, "cuda"), []
        for own in (True, True, False):
            monkeypatch.setattr(attention, "use_own_kernels", lambda q, own=own: own)
            out, state = attention.attend(*qkv, t)
            grad_qkv = torch.empty(len(out), shape[2] * (shape[0] + 2 * shape[1]), dtype=out.dtype, device="cuda")
            attention.attend_backward(grad, *qkv, out, state, t, tables(shape[2], "cuda"), grad_qkv)
            runs.append((out, *split_parts(grad_qkv, qkv)))
        assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1]))
        exact = exact_results(qkv, grad, t)
        for ours, theirs in zip(errors(runs[0], exact), errors(runs[2], exact)):
            assert ours < 1.2 * theirs, (lengths, shape)


def test_only_torchs_backward_pass_runs_in_deterministic_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums in another order each time would make a resumed run differ. An operator reads the mode when it is called."""
    seen = []
    monkeypatch.setattr(attention, "_masked_attention_backward", lambda *_: seen.append(flags()) or 1 / 0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    before = flags()
    t = tokens([1], "cpu")
    with pytest.raises(ZeroDivisionError):
        attention.attend_backward(*[torch.zeros(1)] * 5, (), t, tables(2, "cpu"), torch.zeros(1))
    assert seen == [(True, False, False)]
    assert flags() == before == (False, False, True)


def flags() -> tuple[bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
