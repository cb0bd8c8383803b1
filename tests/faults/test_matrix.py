"""Every file of a checkpoint × every way to spoil it: found before step 1, the one before is used, the run ends in the
same bytes."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.oracles import tiny_checkpoint, tiny_config
from tests.training.test_train import adapter, losses, rows, stop_at, train
from train.runs import checkpoint
from train.runs import folder as folder_module

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


HARMS = (missing, truncated, zeroed, one_bit_flipped, another_steps)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, and one that was cut off with the checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("matrix")
    tiny_checkpoint(folder / "models" / "tiny-Int4", tiny_config(), int4=True)
    rows(folder / "data.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(run="whole", **KEYS)
        stop_at(3, signal.SIGTERM, patch)
        with pytest.raises(SystemExit):
            train(run="cut", **KEYS)
    return folder


@pytest.fixture(autouse=True)
def copy(house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(house)
    return Path(shutil.copytree(house / "runs" / "cut", tmp_path / "cut"))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", HARMS)
def test_it_is_found_and_the_one_before_is_used(name: str, harm: Callable[[Path, Path], None], copy: Path) -> None:
    newest, before = checkpoint.folder_of(copy, 4), checkpoint.folder_of(copy, 2)
    harm(newest / name, before / name)
    found, notes = folder_module.resume_point(copy)
    assert found == before
    assert len(notes) == 1 and notes[0].startswith("checkpoint step-000004 is not used: ")


def test_every_single_bit_of_the_small_files_counts(copy: Path) -> None:
    folder = checkpoint.folder_of(copy, 4)
    for name in ("state.json", checkpoint.SUMS):
        whole = (folder / name).read_bytes()
        for bit in range(0, 8 * len(whole), 7):
            spoilt = bytearray(whole)
            spoilt[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(bytes(spoilt))
            assert checkpoint.harm(folder), f"bit {bit} of {name}"
        (folder / name).write_bytes(whole)
    assert checkpoint.harm(folder) == ""


SOME = [(missing, FILES[0]), (one_bit_flipped, "state.json"), (another_steps, "optimizer.safetensors")]
ALL = [pytest.param(h, n, marks=() if (h, n) in SOME else pytest.mark.slow) for h in HARMS for n in FILES]


@pytest.mark.parametrize(("harm", "name"), ALL)
def test_the_run_ends_in_the_same_bytes(
    harm: Callable[[Path, Path], None], name: str, copy: Path, house: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = f"{harm.__name__}-{name}"
    os.rename(copy, house / "runs" / run)  # noqa: PTH104
    folders = [checkpoint.folder_of(house / "runs" / run, step) for step in (4, 2)]
    harm(*(folder / name for folder in folders))
    train(run=run, **KEYS)
    assert "goes on after step 2 of 6" in capsys.readouterr().out
    assert losses(run) == losses("whole")
    assert adapter(run) == adapter("whole")
