"""The kernel that dequantises Int4 weights against its definition, bit for bit, and the border that it writes."""

from collections.abc import Sequence

import pytest
import torch

from tests.support.interpreter import round_as_cards, run_interpreted
from train.ops import fp8, gptq
from train.ops.kernels import gptq_fp8
from train.ops.kernels.fp8 import LEAST_CAPABILITY
from train.ops.kernels.gptq_dequantize import Border, dequantize

CASES = [  # rows, columns, group, bits
    (64, 64, 32, 4), (128, 200, 128, 4), (256, 72, 64, 4), (96, 40, 96, 4), (256, 130, 128, 8), (128, 48, 32, 2),
]  # fmt: skip
FP8_CASES = 6  # those whose tiles lie in one group, both ways round
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def packed(rows: int, columns: int, group: int, bits: int, shuffled: bool, device: str) -> list[torch.Tensor]:
    """Random qweight, qzeros, scales and g_idx, in which every code and every stored zero may occur."""
    g = torch.Generator().manual_seed(rows + columns)
    top = 2**bits
    qweight = gptq.pack_rows(torch.randint(0, top, (rows, columns), generator=g, dtype=torch.int32), bits)
    zeros = torch.randint(0, top, (rows // group, columns), generator=g, dtype=torch.int32)
    scales = (torch.rand(rows // group, columns, generator=g) + 0.1).half()
    g_idx = torch.arange(rows, dtype=torch.int32) // group
    if shuffled:
        g_idx = g_idx[torch.randperm(rows, generator=g)]
    return [t.to(device) for t in (qweight, gptq.pack_columns(zeros, bits), scales, g_idx)]


def check(device: str, dtypes: Sequence[torch.dtype]) -> int:
    """Compare all cases bit for bit; returns how many there were."""
    count = 0
    for rows, columns, group, bits in CASES:
        for shuffled in (False, True):
            for dtype in dtypes:
                parts = packed(rows, columns, group, bits, shuffled, device)
                plain = gptq.dequantize_plain(*parts, bits, dtype)
                fast = dequantize(*parts[:3], parts[3] if shuffled else None, bits, dtype)
                assert torch.equal(fast, plain), (rows, columns, group, bits, shuffled, dtype)
                count += 1
    return count


def check_fp8(device: str) -> int:
    """The weight rounded to fp8 in one kernel is that of the float32 weight; both ways round. Returns the cases."""
    count = 0
    for rows, columns, group, bits in CASES:
        parts = packed(rows, columns, group, bits, False, device)
        if not gptq_fp8.supports(parts[0], parts[2], bits):
            continue
        weight = gptq.dequantize_plain(*parts, bits, torch.float32)
        for by_output, matrix in ((True, weight.t()), (False, weight)):
            scale = fp8.row_scales(matrix)
            values = torch.empty(matrix.shape, dtype=fp8.E4M3, device=device)
            out = values.t() if by_output else values
            gptq_fp8.dequantize_to_fp8(*parts[:3], bits, scale, by_output, out)
            expected = (matrix * scale.reciprocal()[:, None]).to(fp8.E4M3)
            assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8)), (rows, columns, by_output)
            count += 1
    return count


def check_border(device: str) -> None:
    """The kernel writes what Border.fill writes below and to the right of W, and nothing else."""
    for rows, columns, group, bits in CASES:
        parts = packed(rows, columns, group, bits, False, device)
        g = torch.Generator().manual_seed(1)
        B, A = (torch.randn(*shape, generator=g).to(device) for shape in ((columns, 3), (70, rows)))
        borders = [
            Border(below=B.t(), offset=66, height=70),
            Border(right=A.t()),
            Border(height=5),
            Border(B.t(), A.t(), offset=1, height=4),
            Border(B.t().contiguous(), A.t().contiguous(), offset=1, height=4),
        ]
        for border in borders:
            plain, fast = (torch.full((rows + 80, columns + 80), -7.0, device=device) for _ in range(2))
            border.fill(plain[:rows, :columns])
            plain[:rows, :columns] = gptq.dequantize_plain(*parts, bits, torch.float32)
            dequantize(*parts[:3], None, bits, torch.float32, fast[:rows, :columns], border)
            assert torch.equal(fast, plain), (rows, columns, border)


def test_the_definition_of_a_border() -> None:
    larger = torch.full((6, 5), 9)
    below, right = torch.tensor([[1, 2, 3]]), torch.tensor([[4], [5]])
    Border(below, right, offset=1, height=3).fill(larger[:2, :3])
    assert larger.tolist() == [
        [9, 9, 9, 4, 9],
        [9, 9, 9, 5, 9],
        [0, 0, 0, 9, 9],
        [1, 2, 3, 9, 9],
        [0, 0, 0, 9, 9],
        [9, 9, 9, 9, 9],
    ]


def interpreted() -> int:
    check_border("cpu")
    round_as_cards()
    assert check_fp8("cpu") == FP8_CASES
    return check("cpu", DTYPES[:2])  # the interpreter truncates to bfloat16, a GPU rounds


def test_the_kernel_equals_the_definition_through_the_interpreter() -> None:
    assert run_interpreted(__name__, "interpreted") == len(CASES) * 4


@pytest.mark.gpu
def test_the_kernel_equals_the_definition_on_a_gpu() -> None:
    assert check("cuda", DTYPES) == len(CASES) * 6
    check_border("cuda")
    if torch.cuda.get_device_capability() >= LEAST_CAPABILITY:
        assert check_fp8("cuda") == FP8_CASES
