"""Each kernel against its plain definition: through Triton's interpreter on a CPU, and compiled where there is a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from train.ops import gptq

CASES = [  # rows, columns, group, bits
    (64, 64, 32, 4), (128, 200, 128, 4), (256, 72, 64, 4), (96, 40, 96, 4), (256, 130, 128, 8), (128, 48, 32, 2),
]  # fmt: skip
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def packed(rows: int, columns: int, group: int, bits: int, shuffled: bool, device: str) -> list[torch.Tensor]:
    """Random packed tensors, every code and every stored zero possible: qweight, qzeros, scales, g_idx."""
    g = torch.Generator().manual_seed(rows + columns)
    top = 2**bits
    qweight = gptq.pack_rows(torch.randint(0, top, (rows, columns), generator=g, dtype=torch.int32), bits)
    zeros = torch.randint(0, top, (rows // group, columns), generator=g, dtype=torch.int32)
    scales = (torch.rand(rows // group, columns, generator=g) + 0.1).half()
    g_idx = torch.arange(rows, dtype=torch.int32) // group
    if shuffled:
        g_idx = g_idx[torch.randperm(rows, generator=g)]
    return [t.to(device) for t in (qweight, gptq.pack_columns(zeros, bits), scales, g_idx)]


def check(device: str) -> int:
    """Compare all cases bit for bit on `device`; returns how many."""
    from train.ops import kernels

    count = 0
    for rows, columns, group, bits in CASES:
        for shuffled in (False, True):
            for dtype in (
                DTYPES if device == "cuda" else DTYPES[:2]
            ):  # the interpreter cuts bfloat16 off, a GPU rounds it
                parts = packed(rows, columns, group, bits, shuffled, device)
                plain = gptq.dequantize_plain(*parts, bits, dtype)
                fast = kernels.dequantize(*parts[:3], parts[3] if shuffled else None, bits, dtype)
                assert torch.equal(fast, plain), (rows, columns, group, bits, shuffled, dtype)
                count += 1
    return count


def check_margin(device: str) -> None:
    """What stands below and beside W, and nothing else, is written."""
    from train.ops.kernels import dequantize
    from train.ops.kernels.gptq_dequantize import Border

    for rows, columns, group, bits in CASES:
        parts = packed(rows, columns, group, bits, False, device)
        g = torch.Generator().manual_seed(1)
        B, A = (torch.randn(*shape, generator=g).to(device) for shape in ((columns, 3), (70, rows)))
        for margin in (Border(B, 66, 70), Border(A=A), Border(below=5), Border(B, 1, 4, A)):
            plain, fast = (torch.full((rows + 80, columns + 80), -7.0, device=device) for _ in range(2))
            margin.fill(plain[: rows + margin.below], rows, columns)
            plain[:rows, :columns] = gptq.dequantize_plain(*parts, bits, torch.float32)
            dequantize(*parts[:3], None, bits, torch.float32, fast[:rows, :columns], margin)
            assert torch.equal(fast, plain), (rows, columns, margin)


def test_dequantize_equals_its_definition_through_the_interpreter() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    code = (
        "import os; os.environ['TRITON_INTERPRET'] = '1'\n"
        "from tests.ops.kernels.test_kernels import check, check_margin, CASES\nassert check('cpu') == len(CASES) * 4\ncheck_margin('cpu')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


@pytest.mark.gpu
def test_dequantize_equals_its_definition_on_the_gpu() -> None:
    assert check("cuda") == len(CASES) * 6
    check_margin("cuda")
