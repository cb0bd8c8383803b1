"""Every kernel of train/ops/kernels compiles for cards that are not here, in the shapes of Qwen-1.8B, and what each takes of a card is known.

In processes of their own, because the compiler's failures end them. Triton keeps what it compiled: a second run is quick.
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
SPILLS = {
    "_for_keys": 384,
    "_forward": 16,
    "_turn_back_thin": 40,
}  # bytes of stack a thread: the fastest tiles on an H100


def why_not() -> str:
    """Why nothing can be compiled here, or nothing."""
    try:
        import triton.backends.nvidia.compiler as compiler

        compiler.get_ptxas(90)
    except (ImportError, RuntimeError, OSError) as error:
        return f"Triton cannot compile for NVIDIA's cards here: {error}"
    return ""


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


@cache
def compiled(card: int, group: str) -> list[dict[str, Any]]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    words = [sys.executable, "-m", "tests.support.offline", str(card), group]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def launched() -> set[str]:
    """Names of kernels that some function of train/ops/kernels launches: kernel[grid](…)."""
    found = set()
    for path in (ROOT / "train" / "ops" / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                found.add(getattr(node.func.value, "id", ""))
    return found - {""}


@pytest.mark.parametrize("card", [75, pytest.param(80, marks=pytest.mark.slow), 90])
def test_every_kernel_compiles_and_is_seen_to(card: int) -> None:
    every = compiled(card, "training") + compiled(card, "decoding")
    found, every_name = {row["kernel"] for row in every}, launched()
    assert found <= every_name
    assert {
        "_dequantize_tile",
        "_product",
        "_down_product",
        "_add_norm",
        "_attend",
        "_swiglu_parts",
        "_row",
        "_norm_row",
    } <= found
    if card == 90:  # where the program takes them all
        assert found == every_name
    check(every)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("card", "group"), [(75, "formats"), (90, "formats"), (80, "rest"), (90, "rest"), (90, "full")]
)
def test_other_ways_through_the_kernels_compile(card: int, group: str) -> None:
    check(compiled(card, group))


@pytest.mark.slow
def test_attention_compiles_for_every_size_of_heads() -> None:
    check(compiled(90, "attention"))


def check(rows: list[dict[str, Any]]) -> None:
    """No kernel spills but those that are known to; none has more registers than there are."""
    spilling = {
        f"{row['kernel']} {row['constants']}": row["stack"]
        for row in rows
        if (row["stack"] or 0) > SPILLS.get(row["kernel"], 0)
    }
    assert not spilling
    assert all(row["registers"] is None or 8 <= row["registers"] <= 255 for row in rows)


def test_what_does_not_compile_is_said() -> None:
    """A check that cannot fail shows nothing: tensor cores on a card whose compiler has none."""
    code = (
        "from unittest.mock import patch\nfrom tests.support import offline\nfrom train.ops.kernels import gptq_tiles\n"
        "with offline.card(75), patch.object(gptq_tiles, 'tensor_cores', lambda x: True):\n"
        "    offline.decoding(75, 32, adapter=False)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "PassManager" in done.stderr
