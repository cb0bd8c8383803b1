"""Every kernel of train/ops/kernels compiles for cards that this machine lacks, in the shapes of Qwen-1.8B.

Each card in a process of its own, because a failure of the compiler ends the process. Triton caches what it compiled,
so a second run is quick.
"""

import ast
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
# Bytes of stack per thread that registers may spill to: with these tiles the kernels were the fastest on an H100
SPILLS = {"_for_keys": 384, "_forward": 16, "_inverse_rope_with_product": 40, "_fp8_product": 240, "_quantize_tile": 16}
ADA_SPILLS = 392  # of products in fp8 without descriptors: not measured on such a card
GROUPED_SPILLS = {
    "_for_keys": 1312
}  # grouped heads of 128: the tiles were chosen for Qwen-1, whose heads have keys each


def obstacle() -> str:
    """Why Triton cannot compile here; empty if it can."""
    try:
        import triton.backends.nvidia.compiler as compiler

        compiler.get_ptxas(90)
    except (ImportError, RuntimeError, OSError) as error:
        return f"Triton cannot compile for NVIDIA's cards here: {error}"
    return ""


pytestmark = pytest.mark.skipif(bool(obstacle()), reason=obstacle())


@cache
def compiled(card: int, group: str) -> list[dict[str, Any]]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.support.offline", str(card), group]
    process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


def launched_kernels() -> set[str]:
    """Names of the kernels that some function of train/ops/kernels launches: kernel[grid](…)."""
    names = set()
    for path in (ROOT / "train" / "ops" / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                names.add(getattr(node.func.value, "id", ""))
    return names - {""}


@pytest.mark.parametrize("card", [75, pytest.param(80, marks=pytest.mark.slow), 90])
def test_every_kernel_compiles(card: int) -> None:
    rows = compiled(card, "training") + compiled(card, "decoding")
    names, launched = {row["kernel"] for row in rows}, launched_kernels()
    everywhere = {
        "_dequantize_tile",
        "_product",
        "_down_product",
        "_add_norm",
        "_add_norm_down",
        "_attend",
        "_swiglu_parts",
        "_row",
        "_norm_row",
    }
    assert everywhere <= names <= launched
    if card == 90:  # on Hopper the program uses all of them
        rows += compiled(card, "fp8")
        assert {row["kernel"] for row in rows} == launched
    check(rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("card", "group"),
    [(75, "formats"), (90, "formats"), (80, "rest"), (90, "rest"), (90, "full"), (89, "fp8")],
)
def test_other_variants_of_the_kernels_compile(card: int, group: str) -> None:
    check(compiled(card, group))


@pytest.mark.slow
def test_attention_compiles_for_every_head_size() -> None:
    check(compiled(90, "attention"))


def allowed_stack(row: dict[str, Any]) -> int:
    if row["kernel"] == "_fp8_product" and not row["constants"]["DESCRIPTORS"]:
        return ADA_SPILLS
    grouped = row["constants"].get("GROUP", 1) > 1 and row["constants"].get("D") == 128
    return (GROUPED_SPILLS if grouped else {}).get(row["kernel"], SPILLS.get(row["kernel"], 0))


def check(rows: list[dict[str, Any]]) -> None:
    """Only the kernels of SPILLS spill, and none needs more registers than a thread has."""
    spilling = {
        f"{row['kernel']} {row['constants']}": row["stack"] for row in rows if (row["stack"] or 0) > allowed_stack(row)
    }
    assert not spilling
    assert all(row["registers"] is None or 8 <= row["registers"] <= 255 for row in rows)


def test_a_kernel_that_does_not_compile_fails() -> None:
    """Tensor cores on a card for which the compiler has none."""
    code = (
        "from unittest.mock import patch\nfrom tests.support import offline\nfrom train.ops.kernels import gptq_tiles\n"
        "with offline.card(75), patch.object(gptq_tiles, 'tensor_cores', lambda x: True):\n"
        "    offline.decoding(75, 32, adapter=False)"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode != 0
    assert "PassManager" in process.stderr
