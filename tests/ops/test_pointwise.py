"""Each pass between the products against its definition and autograd; the kernels through Triton's interpreter, and on a GPU."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from train.ops import dropout, low_rank, rms_norm, rope, swiglu
from train.ops.dropout import Drop
from train.ops.kernels import low_rank as thinly
from train.ops.low_rank import Thin

SIZES = [(3, 64), (5, 200), (2, 2048)]


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(device, dtype)


def tables(length: int, half: int, device: str) -> tuple[Tensor, Tensor]:
    angles = torch.arange(length)[:, None] / 7 + torch.arange(half)[None]
    return angles.cos().to(device), angles.sin().to(device)


def results(device: str, dtype: torch.dtype) -> list[Tensor]:
    """Every function on odd shapes; on a device with Triton the kernels, else the definitions."""
    found: list[Tensor] = []

    def make(*shape: int, seed: int = 0) -> Tensor:
        return numbers(*shape, seed=seed, dtype=dtype, device=device)

    for rows, size in SIZES:
        x, weight, slope, residual = make(rows, size), make(size), make(rows, size, seed=1), make(rows, size, seed=2)
        found.append(rms_norm.rms_norm(x, weight, 1e-6))
        summed = x.clone()
        found += [rms_norm.rms_norm(summed, weight, 1e-6, add=residual), summed]
        found.append(rms_norm.rms_norm_backward(slope, x, weight, 1e-6))
        found.append(rms_norm.rms_norm_backward(slope, x, weight, 1e-6, residual))
        scale = torch.tensor(0.3, device=device)
        found.append(rms_norm.rms_norm_backward(slope, x, weight, 1e-6, residual, None, scale))
        strided = make(rows, size + 8)[:, :size]
        normed = torch.empty_like(x)
        found.append(rms_norm.rms_norm_backward(slope, x, weight, 1e-6, residual, out=strided, normed=normed))
        assert torch.equal(normed, rms_norm.rms_norm(x, weight, 1e-6))
        both, slope = make(rows, 2 * size + 8)[:, : 2 * size], make(rows, size, seed=3)
        found.append(swiglu.swiglu(both))
        swiglu.swiglu_backward(both, slope)
        found += [both, slope]
    for queries, keys, size in [(4, 2, 16), (3, 3, 8), (16, 16, 128), (14, 2, 64)]:
        mixed = make(5, (queries + 2 * keys) * size)
        bias = make(mixed.shape[1], seed=4).float()
        positions = torch.tensor([0, 3, 9, 1, 0], device=device)
        for sign, added in ((1, bias), (-1, None)):
            parts: Any = mixed.unflatten(1, (-1, size)).split([queries, keys, keys], dim=1)
            out = mixed.clone()
            inside: Any = out.unflatten(1, (-1, size)).split([queries, keys, keys], dim=1)
            apart = rope.turn(parts, added, *tables(10, size // 2, device), positions, torch.empty_like(mixed), sign)
            rope.turn(inside, added, *tables(10, size // 2, device), positions, out, sign)
            assert torch.equal(apart, out)  # in place or not
            found.append(out)
    return found


SEED = 123_456_789_012
RATE = 0.25


def dropped(device: str, dtype: torch.dtype) -> list[Tensor]:
    """Whatever drops, with and without what it adds to."""
    found: list[Tensor] = []
    for rows, size, r in [(3, 50, 4), (70, 200, 16), (65, 130, 80)]:
        x, more = (numbers(rows, size, seed=n, dtype=dtype, device=device) for n in (1, 2))
        thin = numbers(rows, r + 3, dtype=dtype, device=device)[:, :r]
        matrix = numbers(r, size, dtype=dtype, device=device)
        how = Drop(torch.tensor([SEED], device=device), 5, RATE, 2)
        found += [dropout.drop(x, how), dropout.drop(x, how, more.clone(), add=True)]
        found.append(low_rank.spread(thin, matrix, how, more.clone()))
        found += [rms_norm.rms_norm(x, more[0], 1e-6, how=how), torch.empty_like(x)]
        rms_norm.rms_norm_backward(x, x, more[0], 1e-6, normed=found[-1], how=how)
        assert torch.equal(found[-1], found[-2])
        both, slope = numbers(rows, 2 * size, dtype=dtype, device=device), x.clone()
        swiglu.swiglu_backward(both, slope, how)
        found.append(slope)
    return found


def taken_along(device: str, dtype: torch.dtype, rows: int) -> list[Tensor]:
    """Gradients turned back, where they are or elsewhere, with the thin products of one reader or three."""
    found: list[Tensor] = []

    def thin(parts: list[int], r: int) -> Thin:
        """Of so many columns each, side by side."""
        made, at = [], 0
        for columns in parts:
            made.append((slice(at, at + columns), numbers(columns, r, seed=at + 1, dtype=dtype, device=device)))
            at += columns
        out = numbers(rows, r * len(parts) + 8, dtype=dtype, device=device)[:, :-8]
        return Thin(made, 0.25, out)

    positions = torch.arange(rows, device=device) % 10
    for queries, keys, size, r in [(4, 2, 32, 4), (3, 3, 32, 16), (14, 2, 64, 64)]:
        widths = [n * size for n in (queries, keys, keys)]
        mixed = numbers(rows, sum(widths) + 8, dtype=dtype, device=device)[:, :-8]
        for one in (thin([sum(widths)], r), thin(widths, r)):
            for out in (torch.empty_like(mixed), mixed.clone()):
                given = mixed if len(found) % 4 == 0 else out
                parts: Any = given.unflatten(1, (-1, size)).split([queries, keys, keys], dim=1)
                rope.turn(parts, None, *tables(10, size // 2, device), positions, out, -1, one)
                found += [out, one.out.clone()]
    return found


def cross_entropies(device: str, dtype: torch.dtype) -> list[Tensor]:
    from train.ops.kernels.cross_entropy import cross_entropy

    found = []
    for rows, size in [(3, 50), (2, 5000), (2, 9001)]:
        logits = (numbers(rows, size) * 5).to(device, dtype)
        labels = torch.arange(rows, device=device) * 7
        exact = logits.double().cpu().requires_grad_()
        loss = F.cross_entropy(exact, labels.cpu(), reduction="none")
        loss.sum().backward()
        ours = cross_entropy(logits, labels, 4.0)
        logits /= 4
        torch.testing.assert_close(ours.double().cpu(), loss.detach(), rtol=1e-5, atol=1e-5)
        room = 1e-6 if dtype == torch.float32 else 4e-3
        torch.testing.assert_close(logits.double().cpu(), exact.grad, rtol=room, atol=room / 4)
        found.append(ours)
    return found


def check(device: str, dtype: torch.dtype, definitions: list[Tensor], less: list[Tensor]) -> None:
    room = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    kernels = results(device, dtype)
    assert len(kernels) == len(definitions) > 20
    for ours, want in zip(kernels, definitions):
        torch.testing.assert_close(ours.float().cpu(), want.float(), rtol=room, atol=room)
    kernels = dropped(device, dtype)
    assert len(kernels) == len(less) == 18
    for ours, want in zip(kernels, less):
        torch.testing.assert_close(ours.float().cpu(), want.float(), rtol=2 * room, atol=4 * room)
    assert len(cross_entropies(device, dtype)) == 3


def check_taken_along(device: str, dtype: torch.dtype, definitions: list[Tensor], rows: int) -> None:
    """The kernel, not the pass beside cuBLAS: that is for fewer rows."""
    parts = (torch.empty(rows, 4, 32, dtype=dtype),) * 3
    assert thinly.serves(parts, [4]) and not thinly.serves(parts, [4, 8])
    room = {torch.float32: 4e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    found = taken_along(device, dtype, rows)
    assert len(found) == len(definitions) == 24
    for ours, want in zip(found, definitions):
        error = (ours.float().cpu() - want.float()).abs().max() / want.float().abs().max()
        assert float(error) < room, (tuple(want.shape), float(error))


def check_drop(device: str) -> None:
    x, seed = torch.ones(70, 100, device=device), torch.tensor([11], device=device)
    kept = dropout.drop(x, Drop(seed, 3, RATE))
    assert torch.equal(kept, dropout.drop(x, Drop(seed, 3, RATE)))
    for other in (Drop(seed, 4, RATE), Drop(seed + 1, 3, RATE), Drop(seed + 2**32, 3, RATE)):
        same = ((kept > 0) == (dropout.drop(x, other) > 0)).float().mean()
        assert float(same) == pytest.approx(RATE**2 + (1 - RATE) ** 2, abs=0.03)
    assert kept.unique().tolist() == pytest.approx([0, 1 / (1 - RATE)])
    for some in (kept, kept[:35], kept[:, :50], kept[::2], kept[:, ::2]):
        assert float((some == 0).float().mean()) == pytest.approx(RATE, abs=0.03)
    zero = ((kept == 0).float() - RATE).flatten()
    for shift in (1, 2, 7, 100):  # neighbours, beside and below, know nothing of each other
        assert abs(float((zero[shift:] * zero[:-shift]).mean())) < 0.01
    assert torch.equal(dropout.drop(x[30:], Drop(seed, 3, RATE, 30)), kept[30:])


def test_the_definitions_are_what_autograd_says() -> None:
    x = numbers(3, 64, dtype=torch.float64).requires_grad_()
    weight, slope = numbers(64, dtype=torch.float64), numbers(3, 64, seed=1, dtype=torch.float64)
    y = rms_norm.rms_norm(x, weight, 1e-6)
    (want,) = torch.autograd.grad(y, x, slope)
    torch.testing.assert_close(rms_norm.rms_norm_backward(slope, x.detach(), weight, 1e-6), want)
    both = numbers(3, 128, dtype=torch.float64).requires_grad_()
    y = swiglu.swiglu(both)
    (want,) = torch.autograd.grad(y, both, slope)
    branches, product = both.detach().clone(), slope.clone()
    swiglu.swiglu_backward(branches, product)
    torch.testing.assert_close(branches, want)
    torch.testing.assert_close(product, y.detach())


def test_turning_back_undoes_turning() -> None:
    mixed = numbers(4, 5 * 16)
    positions = torch.tensor([0, 5, 2, 9])
    for sign in (1, -1):
        parts: Any = mixed.unflatten(1, (-1, 16)).split([3, 1, 1], dim=1)
        mixed = rope.turn(parts, None, *tables(10, 8, "cpu"), positions, torch.empty_like(mixed), sign)
    torch.testing.assert_close(mixed, numbers(4, 5 * 16))


def test_dropout_draws_by_seed_and_site() -> None:
    check_drop("cpu")


def test_kernels_equal_their_definitions_through_the_interpreter(tmp_path: Path) -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    f32 = torch.float32
    torch.save((results("cpu", f32), dropped("cpu", f32), taken_along("cpu", f32, 37)), tmp_path / "definitions")
    code = (
        "import os, sys, torch; os.environ['TRITON_INTERPRET'] = '1'\n"
        "from tests.ops.test_pointwise import check, check_drop, check_taken_along, thinly\n"
        "from train.ops.kernels import usable; assert usable(torch.device('cpu'))\n"
        "plain, less, along = torch.load(sys.argv[1]); thinly.LEAST_ROWS, thinly.ROWS = 1, 16\n"
        "check('cpu', torch.float32, plain, less); check_drop('cpu')\n"
        "check_taken_along('cpu', torch.float32, along, 37)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "definitions")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kernels_equal_their_definitions_on_the_gpu(dtype: torch.dtype) -> None:
    check("cuda", dtype, results("cpu", dtype), dropped("cpu", dtype))
    check_drop("cuda")
    if dtype != torch.float32:
        check_taken_along("cuda", dtype, taken_along("cpu", dtype, 8200), 8200)
