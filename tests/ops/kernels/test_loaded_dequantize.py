"""The kernels of NF4, FP4 and int8 weights against their definitions, bit for bit."""

from collections.abc import Sequence

import pytest
import torch

from tests.support.interpreter import run_interpreted
from train.ops import eight_bit, four_bit
from train.ops.kernels import dequantize_eight_bit, dequantize_four_bit

SHAPES = [(64, 64), (128, 200), (320, 130)]  # in_features, out_features
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(device: str, dtypes: Sequence[torch.dtype]) -> int:
    """Compare all cases bit for bit, into a matrix of their own and into the corner of a larger one; how many there were."""
    count, tables = 0, (four_bit.table, torch.device(device))
    for rows, columns in SHAPES:
        weight = torch.randn(columns, rows, generator=torch.Generator().manual_seed(rows)).to(device)
        for kind in ("nf4", "fp4", "int8"):
            parts = list((eight_bit.quantize(weight) if kind == "int8" else four_bit.quantize(weight, kind)).values())
            for dtype in dtypes:
                larger = torch.full((rows + 3, columns + 5), -7.0, dtype=dtype, device=device)
                if kind == "int8":
                    plain = eight_bit.dequantize_plain(*parts, dtype)
                    fast = dequantize_eight_bit(*parts, dtype)
                    dequantize_eight_bit(*parts, dtype, larger[:rows, :columns])
                else:
                    values = [tables[0](name, tables[1]) for name in (kind, "absmax")]
                    plain = four_bit.dequantize_plain(*parts, kind, dtype)
                    fast = dequantize_four_bit(*parts, *values, dtype)
                    dequantize_four_bit(*parts, *values, dtype, larger[:rows, :columns])
                assert torch.equal(fast, plain), (rows, columns, kind, dtype)
                assert torch.equal(larger[:rows, :columns], plain)
                assert (larger[rows:] == -7).all() and (larger[:, columns:] == -7).all()
                count += 1
    return count


def interpreted() -> int:
    return check("cpu", DTYPES[:2])  # the interpreter truncates to bfloat16, a GPU rounds


def test_the_kernels_equal_the_definitions_through_the_interpreter() -> None:
    assert run_interpreted(__name__, "interpreted") == len(SHAPES) * 6


@pytest.mark.gpu
def test_the_kernels_equal_the_definitions_on_a_gpu() -> None:
    assert check("cuda", DTYPES) == len(SHAPES) * 9
