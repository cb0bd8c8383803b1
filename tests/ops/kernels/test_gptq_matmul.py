"""Products with packed weights against float64 products with the definition: in Triton's interpreter, and on a GPU."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.kernels.test_gptq_dequantize import packed
from train.ops import gptq

CASES = [  # in_features, out_features, group, bits
    (256, 96, 128, 4), (512, 130, 64, 4), (256, 64, 32, 4), (640, 64, 640, 4), (256, 64, 256, 8), (256, 48, 32, 8),
]  # fmt: skip
BATCHES = (1, 3, 17, 64)
TOLERANCE = 2e-6  # in every dtype: W is not rounded, and sums are float32
ROUNDED_ONCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # where W or x Aᵀ is rounded to dtype


def weights(
    in_features: int, out_features: int, group: int, bits: int, act_order: bool, device: str, bias: bool = True
) -> tuple[Any, Tensor]:
    """A PackedWeight on `device`, and W itself: float64 [K, N] on the CPU."""
    from train.ops.kernels.gptq_matmul import PackedWeight

    qweight, qzeros, scales, g_idx = packed(in_features, out_features, group, bits, act_order, "cpu")
    w = gptq.dequantize_plain(qweight, qzeros, scales, g_idx, bits, torch.float64)
    order = None
    if act_order:
        order = torch.argsort(g_idx, stable=True).int()
        qweight = gptq.pack_rows(gptq.unpack_rows(qweight, bits)[order.long()], bits).contiguous()
    generator = torch.Generator().manual_seed(out_features)
    parts = [qweight, qzeros, scales, torch.randn(out_features, generator=generator).half() if bias else None, order]
    qweight, qzeros, scales, b, order = (None if t is None else t.to(device) for t in parts)
    return PackedWeight(qweight, qzeros, scales, bits, b, order), w


def activations(batch: int, in_features: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(batch, in_features, generator=torch.Generator().manual_seed(batch)).to(dtype).to(device)


def check_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (actual.double().cpu() - expected).abs().max() / expected.abs().max()
    assert error < tolerance, float(error)


def check_product(
    device: str, dtypes: tuple[torch.dtype, ...], cases: list[Any], batches: tuple[int, ...] = BATCHES
) -> int:
    """How many weights, with as many batches and dtypes, were compared."""
    from train.ops.kernels.gptq_matmul import product

    count = 0
    for in_features, out_features, group, bits in cases:
        for act_order in (False, True):
            weight, w = weights(in_features, out_features, group, bits, act_order, device)
            for batch in batches:
                for dtype in dtypes:
                    x = activations(batch, in_features, dtype, device)
                    parts = product(x, weight)
                    # where a tile spans groups, tensor cores get W itself, rounded
                    rounded = batch > 1 and weight.group % 128 != 0
                    expected = x.double().cpu() @ w + weight.bias.double().cpu()
                    check_close(parts.sum(0), expected, ROUNDED_ONCE[dtype] if rounded else TOLERANCE)
                    assert torch.equal(parts, product(x, weight))
                    count += 1
    return count


def check_three_linears(device: str, dtype: torch.dtype, batches: tuple[int, ...] = BATCHES) -> None:
    """Three linears side by side, each with its own adapter."""
    from train.ops.kernels.down_product import down_product
    from train.ops.kernels.gptq_matmul import LowRankSegments, product
    from train.ops.kernels.gptq_tiles import Tile

    weight, w = weights(256, 192, 128, 4, False, device)
    a, b = adapters(dtype)
    for batch in batches:
        x = activations(batch, 256, dtype, device)
        down = down_product(x, a.to(device))
        exact_down = x.double().cpu() @ a.double().t()
        check_close(down.sum(0), exact_down, TOLERANCE)
        terms = [exact_down[:, 16 * n : 16 * n + 16] @ b[64 * n : 64 * n + 64].double().t() for n in range(3)]
        expected = x.double().cpu() @ w + weight.bias.double().cpu() + torch.cat(terms, dim=1)
        for tile in (None, Tile(16, 32, 1, 4, 2), Tile(32, 64, 2, 8), Tile(16, 128)):  # the last spans two linears
            parts = product(x, weight, LowRankSegments(down, b.to(device), (64, 128)), tile=tile)
            check_close(parts.sum(0), expected, ROUNDED_ONCE[dtype])


def check_gate_and_up(device: str, dtype: torch.dtype, batches: tuple[int, ...] = BATCHES) -> None:
    """Two weights in one product, without and with adapters, and SwiGLU of the two."""
    from train.ops.kernels.decode_step import swiglu_parts
    from train.ops.kernels.down_product import down_product
    from train.ops.kernels.gptq_matmul import NO_SEGMENT, LowRankSegments, product

    a, b = adapters(dtype)
    for batch in batches:
        x = activations(batch, 256, dtype, device)
        down = down_product(x, a.to(device))
        exact_down = x.double().cpu() @ a.double().t()
        (gate, gate_w), (up, up_w) = (weights(256, 192, 128, 4, True, device, bias=False) for _ in range(2))
        gate.scales.mul_(1 / 64)
        up.scales.mul_(1 / 32)
        b_of_both = torch.cat([b, b.flip(0)]).to(device)
        for adapter in (None, LowRankSegments(down, b_of_both, (192, NO_SEGMENT))):
            gate_out, up_out = x.double().cpu() @ gate_w / 64, x.double().cpu() @ up_w / 32
            if adapter:
                gate_out += exact_down[:, :16] @ b.double().t()
                up_out += exact_down[:, 16:32] @ b.double().flip(0).t()
            parts = product(x, gate, adapter, up)
            check_close(parts.sum(0), torch.cat([gate_out, up_out], dim=1), ROUNDED_ONCE[dtype])
            expected = torch.nn.functional.silu(gate_out) * up_out
            tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
            check_close(swiglu_parts(parts, dtype), expected, tolerance)
            if batch == 1:
                y, arrivals = (
                    torch.empty_like(parts[0, :, :192], dtype=dtype),
                    torch.zeros_like(parts[0, 0], dtype=torch.int32),
                )
                for _ in range(2):  # the count of programs is at zero again for the second
                    product(x, gate, adapter, up, swiglu=y, arrivals=arrivals)
                    assert torch.equal(y, swiglu_parts(parts, dtype))
                assert not arrivals.any()


def adapters(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A of three linears [48, 256], and B [192, 16]."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3 * 16, 256, generator=generator) * 0.1
    return a.to(dtype), (torch.randn(192, 16, generator=generator) * 0.1).to(dtype)


def check_adapters(device: str, dtype: torch.dtype, batches: tuple[int, ...] = BATCHES) -> None:
    check_three_linears(device, dtype, batches)
    check_gate_and_up(device, dtype, batches)


def test_products_equal_their_definition_through_the_interpreter() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    code = (
        "import os; os.environ['TRITON_INTERPRET'] = '1'\n"
        "import torch\nfrom tests.ops.kernels.test_gptq_matmul import CASES, check_adapters, check_product\n"
        "assert check_product('cpu', (torch.float32,), CASES, (1, 17)) == 4 * len(CASES)\n"
        "check_product('cpu', (torch.float16,), CASES[:1], (1, 3))\n"
        "check_adapters('cpu', torch.float32, (1, 17))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


POINTERS = ("x", "scales", "bias", "up", "scales2", "bias2", "swiglu")  # those to activations


def compile_for(capability: int, rows: int) -> None:
    """Compile products for a card of this compute capability, which need not be here."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from train.ops.kernels import gptq_matmul, gptq_tiles

    tile = gptq_tiles.tile_for(rows, 2048, 2048, 4, torch.device("cpu"))
    constants = {"BITS": 4, "WORDS": tile.words, "TM": rows, "TN": tile.columns, "PERM": True, "BIAS": True, "RANK": 64}
    constants |= {"DOWN_SPLITS": 4, "ONE_GROUP": True, "STAGES": tile.stages, "OVERLAP": 3 if capability >= 90 else 0}
    types = dict.fromkeys(POINTERS, "*fp16") | dict.fromkeys(("down", "out"), "*fp32")
    types |= dict.fromkeys(("qweight", "qzeros", "perm", "qweight2", "qzeros2", "arrivals"), "*i32")
    kernel = gptq_matmul._product
    for pair in (False, True):
        values = {**constants, "PAIR": pair, "SWIGLU_SPLITS": tile.splits if pair and rows == 1 else 0}
        signature = {name: "constexpr" if name in values else types.get(name, "i32") for name in kernel.arg_names}
        by_index = {(n,): values[name] for n, name in enumerate(kernel.arg_names) if name in values}
        target, options = GPUTarget("cuda", capability, 32), {"num_warps": tile.warps}
        compiled = triton.compile(ASTSource(kernel, signature, by_index), target=target, options=options)
        assert compiled.metadata.shared < (64 << 10 if rows == 1 else 99 << 10)  # bytes that small cards have


def test_every_product_compiles_for_other_cards() -> None:
    """An operation that a card lacks fails to compile; in a process of its own, because such a failure can end it.

    test_compile.py has one row on 90 too.
    """
    code = (
        "from tests.ops.kernels.test_gptq_matmul import compile_for\n"
        "for capability, rows in ((75, 1), (80, 16), (90, 64)):\n    compile_for(capability, rows)"
    )
    root = Path(__file__).parents[3]
    process = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]


@pytest.mark.gpu
def test_products_equal_their_definition_on_the_gpu() -> None:
    assert check_product("cuda", (torch.bfloat16,), CASES, (1, 17)) == 4 * len(CASES)
    check_product("cuda", (torch.float16,), CASES[:2], (1, 3))
    check_product("cuda", (torch.float32,), CASES, (2,))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_products_with_adapters_equal_their_definition_on_the_gpu(dtype: torch.dtype) -> None:
    check_adapters("cuda", dtype, (1, 17))


@pytest.mark.gpu
def test_products_in_the_shapes_of_qwen_on_the_gpu() -> None:
    shapes = [(2048, 6144, 128, 4), (2048, 5504, 128, 4), (5504, 2048, 128, 4)]
    assert check_product("cuda", (torch.bfloat16,), shapes, (1, 64)) == 4 * len(shapes)
