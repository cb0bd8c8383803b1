"""Products with packed weights against gptq.dequantize_plain @ in float64: through Triton's interpreter, and compiled where there is a GPU."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.kernels.test_gptq_dequantize import packed
from train.ops import gptq

CASES = [  # rows, columns, group, bits
    (256, 96, 128, 4), (512, 130, 64, 4), (256, 64, 32, 4), (640, 64, 640, 4), (256, 64, 256, 8), (256, 48, 32, 8),
]  # fmt: skip
MANY = (1, 3, 17, 64)
TOLERANCE = {
    torch.float32: 2e-6,
    torch.float16: 2e-6,
    torch.bfloat16: 2e-6,
}  # of sums: W is not rounded, sums are float32


def weights(
    rows: int, columns: int, group: int, bits: int, shuffled: bool, device: str, bias: bool = True
) -> tuple[Any, Tensor]:
    """A Packed, and the W + what it stands for: float64 [K, N] on the CPU."""
    from train.ops.kernels.gptq_matmul import Packed

    qweight, qzeros, scales, g_idx = packed(rows, columns, group, bits, shuffled, "cpu")
    plain = gptq.dequantize_plain(qweight, qzeros, scales, g_idx, bits, torch.float64)
    order = None
    if shuffled:
        order = torch.argsort(g_idx, stable=True).int()
        qweight = gptq.pack_rows(gptq.unpack_rows(qweight, bits)[order.long()], bits).contiguous()
    g = torch.Generator().manual_seed(columns)
    parts = [qweight, qzeros, scales, torch.randn(columns, generator=g).half() if bias else None, order]
    qweight, qzeros, scales, b, order = (None if t is None else t.to(device) for t in parts)
    return Packed(qweight, qzeros, scales, bits, b, order), plain


def activations(many: int, rows: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(many, rows, generator=torch.Generator().manual_seed(many)).to(dtype).to(device)


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    error = (got.double().cpu() - want).abs().max() / want.abs().max()
    assert error < tolerance, float(error)


def check_product(device: str, dtypes: tuple[torch.dtype, ...], cases: list[Any], every: tuple[int, ...] = MANY) -> int:
    from train.ops.kernels.gptq_matmul import product

    count = 0
    for rows, columns, group, bits in cases:
        for shuffled in (False, True):
            w, plain = weights(rows, columns, group, bits, shuffled, device)
            for many in every:
                for dtype in dtypes:
                    x = activations(many, rows, dtype, device)
                    parts = product(x, w)
                    grouped = w.group % 128 == 0  # else a tile spans groups, and tensor cores get W itself, rounded
                    rounded = many > 1 and not grouped and dtype != torch.float32
                    loss = {torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype] if rounded else TOLERANCE[dtype]
                    close(parts.sum(0), x.double().cpu() @ plain + w.bias.double().cpu(), loss)
                    assert torch.equal(parts, product(x, w))
                    count += 1
    return count


def check_adapted(device: str, dtype: torch.dtype, every: tuple[int, ...] = MANY) -> None:
    """Three linears side by side, each with its own adapter, and the gated pair."""
    from train.ops.kernels.decode_step import activate
    from train.ops.kernels.gptq_matmul import NEVER, Thin, narrow, product
    from train.ops.kernels.gptq_tiles import Tile

    g = torch.Generator().manual_seed(0)
    w, plain = weights(256, 192, 128, 4, False, device)
    a, b = (torch.randn(3 * 16, 256, generator=g) * 0.1).to(dtype), (torch.randn(192, 16, generator=g) * 0.1).to(dtype)
    loss = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]  # t is rounded once
    for many in every:
        x = activations(many, 256, dtype, device)
        low = narrow(x, a.to(device))
        close(low.sum(0), x.double().cpu() @ a.double().t(), TOLERANCE[dtype])
        t = (x.double().cpu() @ a.double().t()).split(16, dim=1)
        extra = torch.cat([t[n] @ b[64 * n : 64 * (n + 1)].double().t() for n in range(3)], dim=1)
        for tile in (None, Tile(16, 32, 1, 4, 2), Tile(32, 64, 2, 8), Tile(16, 128)):  # the last across two edges
            got = product(x, w, Thin(low, b.to(device), (64, 128)), tile=tile).sum(0)
            close(got, x.double().cpu() @ plain + w.bias.double().cpu() + extra, loss)
        (gate, plain1), (up, plain2) = (weights(256, 192, 128, 4, True, device, bias=False) for _ in range(2))
        gate.scales.mul_(1 / 64)
        up.scales.mul_(1 / 32)
        b2 = torch.cat([b, b.flip(0)])
        for thin in (None, Thin(low, b2.to(device), (192, NEVER))):
            y1, y2 = x.double().cpu() @ plain1 / 64, x.double().cpu() @ plain2 / 32
            if thin:
                y1, y2 = y1 + t[0] @ b.double().t(), y2 + t[1] @ b.double().flip(0).t()
            parts = product(x, gate, thin, up)
            close(parts.sum(0), torch.cat([y1, y2], dim=1), loss)
            want = torch.nn.functional.silu(y1) * y2
            rounded = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
            close(activate(parts, dtype), want, rounded)


def test_products_equal_their_definition_through_the_interpreter() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    code = (
        "import os; os.environ['TRITON_INTERPRET'] = '1'\n"
        "import torch\nfrom tests.ops.kernels.test_gptq_matmul import CASES, check_adapted, check_product\n"
        "assert check_product('cpu', (torch.float32,), CASES, (1, 17)) == 4 * len(CASES)\n"
        "check_product('cpu', (torch.float16,), CASES[:1], (1, 3))\n"
        "check_adapted('cpu', torch.float32, (1, 17))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


POINTERS = {"x", "qweight", "qzeros", "scales", "bias", "perm", "low", "up", "out", "qweight2", "qzeros2", "scales2"}
POINTERS |= {"bias2", "up2"}


def compile_for(capability: int, high: int) -> None:
    """Compile products for a card that need not be here."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from train.ops.kernels import gptq_matmul, gptq_tiles

    tile = gptq_tiles.tile_for(high, 2048, 2048, 4, torch.device("cpu"))
    fixed = {"BITS": 4, "WORDS": tile.words, "TM": high, "TN": tile.columns, "PERM": True, "BIAS": True, "RANK": 64}
    fixed |= {"LOW_SPLITS": 4, "ONE_GROUP": True, "STAGES": tile.stages}
    types = {"qweight": "*i32", "qzeros": "*i32", "perm": "*i32", "low": "*fp32", "qweight2": "*i32", "qzeros2": "*i32"}
    for two in (False, True):
        kinds, values = {}, {}
        kernel = gptq_matmul._product
        for n, name in enumerate(kernel.arg_names):
            known = {**fixed, "TWO": two}
            kinds[name] = (
                "constexpr"
                if name in known
                else {**types, "out": "*fp32"}.get(name, "*fp16")
                if name in POINTERS
                else "i32"
            )
            if name in known:
                values[(n,)] = known[name]
        target, options = GPUTarget("cuda", capability, 32), {"num_warps": tile.warps}
        compiled = triton.compile(ASTSource(kernel, kinds, values), target=target, options=options)
        assert (
            compiled.metadata.shared < 64 << 10 if high == 1 else compiled.metadata.shared < 99 << 10
        )  # what small cards have


def test_every_product_compiles_for_cards_that_are_not_here() -> None:
    """It is where an operation that a card lacks shows; a process of its own, because the compiler's failures end it."""
    code = (
        "from tests.ops.kernels.test_gptq_matmul import compile_for\n"
        "for card, high in ((75, 1), (80, 16), (90, 1), (90, 64)):\n    compile_for(card, high)"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
def test_products_equal_their_definition_on_the_gpu() -> None:
    assert check_product("cuda", (torch.bfloat16,), CASES, (1, 17)) == 4 * len(CASES)
    check_product("cuda", (torch.float16,), CASES[:2], (1, 3))
    check_product("cuda", (torch.float32,), CASES, (2,))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_adapted_products_equal_their_definition_on_the_gpu(dtype: torch.dtype) -> None:
    check_adapted("cuda", dtype, (1, 17))


@pytest.mark.gpu
def test_products_in_the_shapes_of_qwen_on_the_gpu() -> None:
    shapes = [(2048, 6144, 128, 4), (2048, 5504, 128, 4), (5504, 2048, 128, 4)]
    assert check_product("cuda", (torch.bfloat16,), shapes, (1, 64)) == 4 * len(shapes)
