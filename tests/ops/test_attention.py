"""Our attention kernels against softmax in float64: through Triton's interpreter, and on a GPU beside torch's flash attention."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from train.ops import attention
from train.ops.attention import Tokens
from train.ops.kernels import attention as own
from train.ops.rope import turn

CASES = [  # lengths of conversations, heads, key heads, head size
    ([100], 2, 2, 16),
    ([5, 50, 1, 23, 64], 4, 2, 16),
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
    ends = torch.tensor(lengths).cumsum(0)
    starts = ends - torch.tensor(lengths)
    count = torch.tensor(lengths)
    segments = torch.arange(1, len(lengths) + 1).repeat_interleave(count)[None]
    bounds = torch.cat([starts, ends[-1:]]).int()
    where = [starts.repeat_interleave(count).int(), ends.repeat_interleave(count).int()]
    parts = [torch.arange(len(where[0])) - where[0], segments, bounds, *where, torch.zeros(1)]
    return Tokens(*(part.to(device) for part in parts))


def inputs(lengths: list[int], heads: int, keys: int, size: int, dtype: torch.dtype, device: str) -> tuple[Any, Tensor]:
    """Strided q, k, v as a block has them, and a gradient."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(sum(lengths), (heads + 2 * keys) * size, generator=generator).to(device, dtype)
    slope = torch.randn(sum(lengths), heads, size, generator=generator).to(device, dtype)
    return mixed.unflatten(1, (-1, size)).split([heads, keys, keys], dim=1), slope


def turns(size: int, device: str) -> tuple[Tensor, Tensor]:
    angles = torch.arange(4096)[:, None] / 7 + torch.arange(size // 2)[None]
    return angles.cos().to(device), angles.sin().to(device)


def exactly(parts: Any, slope: Tensor, t: Tokens) -> list[Tensor]:
    """Output, and the gradients turned back and side by side, in float64 on the CPU."""
    q, k, v = (x.double().cpu().requires_grad_() for x in parts)
    t = Tokens(*(getattr(t, f).cpu() for f in ("positions", "segments", "bounds", "starts", "ends", "seed")))
    out = attention._plain(q, k, v, t)
    slopes: Any = torch.autograd.grad(out, (q, k, v), slope.double().cpu())
    into = torch.empty(len(q), sum(x[0].numel() for x in slopes), dtype=torch.float64)
    turn(slopes, None, *turns(q.shape[2], "cpu"), t.positions, into, sign=-1)
    return [out.detach(), *_split(into, parts)]


def _split(mixed: Tensor, parts: Any) -> list[Tensor]:
    """Gradients of q, k and v."""
    return list(mixed.split([x[0].numel() for x in parts], dim=1))


def errors(found: Any, exact: list[Tensor]) -> list[float]:
    return [float((a.double().cpu() - b).norm() / b.norm()) for a, b in zip(found, exact)]


def check(device: str, dtype: torch.dtype, cases: list[Any], bound: float) -> None:
    """For long rows and for short ones."""
    for lengths, *shape in cases:
        parts, slope = inputs(lengths, *shape, dtype, device)
        t = tokens(lengths, device)
        exact = exactly(parts, slope, t)
        width = 64 if len(lengths) == 4 and lengths[0] == 16 else len(slope)  # two rows of 64, no conversation in both
        for short in (False, True):
            out, lse = own.attend(*parts, t.starts, width, short)
            into = torch.empty(len(out), shape[2] * (shape[0] + 2 * shape[1]) + 8, dtype=dtype, device=device)[:, :-8]
            slopes = own.attend_backward(slope, *parts, out, lse, t.starts, t.ends, width, short, into)
            turn(slopes, None, *turns(shape[2], device), t.positions, into, sign=-1)
            for error in errors((out, *_split(into, parts)), exact):
                assert error < bound, (lengths, shape, short, error)


def check_interpreted() -> None:
    own.FORWARD, own.FOR_KEYS = ((16, 16, 1, 1), (32, 16, 1, 1)), ((16, 32, 1, 1), (16, 16, 1, 1))
    own.FOR_QUERIES = ((32, 16, 1, 1), (16, 16, 1, 1))
    check("cpu", torch.float32, CASES, 2e-6)


def test_kernels_equal_the_definition_through_the_interpreter() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    code = "import os; os.environ['TRITON_INTERPRET'] = '1'\nfrom tests.ops.test_attention import check_interpreted\ncheck_interpreted()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_conversation_does_not_see_another() -> None:
    """The definition itself, against each conversation alone."""
    lengths = [5, 30, 1]
    parts, _ = inputs(lengths, 4, 2, 16, torch.float64, "cpu")
    together, _ = attention.attend(*parts, tokens(lengths, "cpu"))
    at = 0
    for n in lengths:
        alone, _ = attention.attend(*(x[at : at + n] for x in parts), tokens([n], "cpu"))
        torch.testing.assert_close(together[at : at + n], alone)
        at += n


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kernels_equal_the_definition_on_the_gpu(dtype: torch.dtype) -> None:
    check("cuda", dtype, [*CASES, *LARGE], 2e-3 if dtype == torch.float16 else 1.2e-2)


@pytest.mark.gpu
def test_no_worse_than_torchs_flash_attention_and_the_same_bits_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for lengths, *shape in LARGE:
        parts, slope = inputs(lengths, *shape, torch.bfloat16, "cuda")
        t, found = tokens(lengths, "cuda"), []
        for hopper in (True, True, False):
            monkeypatch.setattr(attention, "hopper", lambda q, hopper=hopper: hopper)
            out, kept = attention.attend(*parts, t)
            into = torch.empty(len(out), shape[2] * (shape[0] + 2 * shape[1]), dtype=out.dtype, device="cuda")
            attention.attend_backward(slope, *parts, out, kept, t, turns(shape[2], "cuda"), into)
            found.append((out, *_split(into, parts)))
        assert all(torch.equal(a, b) for a, b in zip(found[0], found[1]))
        exact = exactly(parts, slope, t)
        for ours, theirs in zip(errors(found[0], exact), errors(found[2], exact)):
            assert ours < 1.2 * theirs, (lengths, shape)


def test_torchs_backward_is_asked_to_add_in_order_and_nothing_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """What adds up in another order every time would make a resumed run another one. The flag is read when the operator is called."""
    seen = []
    monkeypatch.setattr(attention, "_plain_backward", lambda *_: seen.append(flags()) or 1 / 0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    before = flags()
    with pytest.raises(ZeroDivisionError):
        attention.attend_backward(*[torch.zeros(1)] * 5, (), None, None, torch.zeros(1))  # type: ignore[arg-type]
    assert seen == [(True, False, False)]
    assert flags() == before == (False, False, True)


def flags() -> tuple[bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
