"""Each file of a checkpoint × each kind of damage: it is found, the one before is used, the run ends the same."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.oracles import tiny_checkpoint, tiny_config
from tests.support.tiny_training import adapter, losses, signal_at_step, train, write_rows
from train.runs import checkpoint
from train.runs.resume import resume_point

KEYS: dict[str, Any] = {"steps": 6, "save_every": 2, "dropout": 0.05}
FILES = (*checkpoint.FILES, checkpoint.SUMS)


def missing(path: Path, other: Path) -> None:
    path.unlink()


def truncated(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def zeroed(path: Path, other: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def one_bit_flipped(path: Path, other: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def another_steps(path: Path, other: Path) -> None:
    shutil.copyfile(other, path)


DAMAGES = (missing, truncated, zeroed, one_bit_flipped, another_steps)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, and one that was stopped with the checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("matrix")
    tiny_checkpoint(folder / "models" / "tiny-Int4", tiny_config(), int4=True)
    write_rows(folder / "data.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(run="whole", **KEYS)
        signal_at_step(3, signal.SIGTERM, patch)
        with pytest.raises(SystemExit):
            train(run="cut", **KEYS)
    return folder


@pytest.fixture(autouse=True)
def copy(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workspace)
    return Path(shutil.copytree(workspace / "runs" / "cut", tmp_path / "cut"))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_the_checkpoint_before_is_used(
    name: str, damage: Callable[[Path, Path], None], copy: Path
) -> None:
    newest, before = checkpoint.folder_of(copy, 4), checkpoint.folder_of(copy, 2)
    damage(newest / name, before / name)
    found, notes = resume_point(copy)
    assert found == before
    assert len(notes) == 1 and notes[0].startswith("checkpoint step-000004 is not used: ")


def test_every_single_bit_of_the_small_files_counts(copy: Path) -> None:
    folder = checkpoint.folder_of(copy, 4)
    for name in ("state.json", checkpoint.SUMS):
        whole = (folder / name).read_bytes()
        for bit in range(0, 8 * len(whole), 7):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(bytes(damaged))
            assert checkpoint.find_damage(folder), f"bit {bit} of {name}"
        (folder / name).write_bytes(whole)
    assert checkpoint.find_damage(folder) == ""


SOME = [(missing, FILES[0]), (one_bit_flipped, "state.json"), (another_steps, "optimizer.safetensors")]
ALL = [pytest.param(h, n, marks=() if (h, n) in SOME else pytest.mark.slow) for h in DAMAGES for n in FILES]


@pytest.mark.parametrize(("damage", "name"), ALL)
def test_the_run_ends_in_the_same_bytes(
    damage: Callable[[Path, Path], None], name: str, copy: Path, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = f"{damage.__name__}-{name}"
    os.rename(copy, workspace / "runs" / run)  # noqa: PTH104
    folders = [checkpoint.folder_of(workspace / "runs" / run, step) for step in (4, 2)]
    damage(*(folder / name for folder in folders))
    train(run=run, **KEYS)
    assert "continues after step 2 of 6" in capsys.readouterr().out
    assert losses(run) == losses("whole")
    assert adapter(run) == adapter("whole")
