"""The sizes of a step, and that planning with them imports no torch."""

import subprocess
import sys
from pathlib import Path

from train.training.step_sizes import FEW_TOKENS, LOGITS_ROWS, logits_rows, padded


def test_rows_are_padded_to_a_multiple() -> None:
    assert [padded(n) for n in (1, 64, 65, 512)] == [64, 64, 128, 512]


def test_few_tokens_have_half_as_many_rows_of_logits() -> None:
    assert [logits_rows(n) for n in (FEW_TOKENS, FEW_TOKENS + 1)] == [LOGITS_ROWS // 2, LOGITS_ROWS]


def test_the_memory_estimate_imports_no_torch() -> None:
    code = "import sys, train.training.memory_estimate; print('torch' in sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert process.stdout.strip() == "False"
