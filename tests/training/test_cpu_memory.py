"""The memory of a run on a CPU: against the measured one, and the refusal before anything is written."""

from pathlib import Path

import pytest

from tests.support.oracles import tiny_checkpoint, tiny_config
from train.common.errors import UserError
from train.config.recipe import Recipe
from train.model.architecture import Shape
from train.training import cpu_memory

GB = 1e9


def test_the_estimate_keeps_to_the_measurement_it_was_fitted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured with the 0.5B, whose Int4 weights and their float copy take 2.3 GB: 4 rows of 256 tokens, r 16."""
    shape = Shape("qwen2", 24, 896, 14, 2, 64, 4864, 151936, tied=True)
    monkeypatch.setattr(cpu_memory, "read_folder_shape", lambda folder: shape)
    monkeypatch.setattr(cpu_memory, "memory_needed", lambda *args: int(2.3 * GB))
    recipe = Recipe(batch=4, length=256, checkpointing="off")
    assert cpu_memory.training_bytes(Path(), recipe, 8_800_000, keep_float=True) == pytest.approx(10.28 * GB, rel=0.1)


def test_less_of_each_takes_less(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", tiny_config())
    whole = cpu_memory.step_bytes(base, Recipe(batch=4, length=256, checkpointing="off"))
    assert cpu_memory.step_bytes(base, Recipe(batch=2, length=256, checkpointing="off")) == whole // 2
    assert cpu_memory.step_bytes(base, Recipe(batch=4, length=128, checkpointing="off")) < whole // 2
    assert cpu_memory.step_bytes(base, Recipe(batch=4, length=256, checkpointing="on")) < whole


def test_a_run_that_would_be_killed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_checkpoint(tmp_path / "base", tiny_config())
    needed = cpu_memory.training_bytes(base, Recipe(), 1000)
    monkeypatch.setattr(cpu_memory, "free_memory", lambda: int(0.95 * needed))
    cpu_memory.check(base, Recipe(), 1000, keep_float=False, processes=1)
    with pytest.raises(UserError, match=r"training takes about .* Nothing was changed\.\nbatch=1"):
        cpu_memory.check(base, Recipe(), 1000, keep_float=False, processes=2)
