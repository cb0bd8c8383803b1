"""Checkpoints: read back byte for byte, used only without damage, the newest first."""

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from train.runs import checkpoint
from train.runs.checkpoint import Snapshot


def snapshot(step: int) -> Snapshot:
    make = torch.Generator().manual_seed(step)
    trainable = {f"layer.{n}.lora_A": torch.randn(3, 5, generator=make) for n in range(3)}
    moments = {
        f"{name}/{key}": torch.randn(3, 5, generator=make) for name in trainable for key in ("exp_avg", "exp_avg_sq")
    }
    return Snapshot(
        step, trainable, moments, {"rank0/torch": torch.get_rng_state()}, {"epoch": 1, "scaler": {"cur_scale": 2.0}}
    )


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    wrote = snapshot(7)
    folder = checkpoint.write(tmp_path, wrote, keep=2)
    assert folder.name == "step-000007"
    assert sorted(p.name for p in folder.iterdir()) == [
        "SHA256SUMS",
        "optimizer.safetensors",
        "rng.safetensors",
        "state.json",
        "trainable.safetensors",
    ]
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
    found, notes = checkpoint.newest(tmp_path)
    assert found == folder
    assert not notes
    back = checkpoint.read(folder)
    for name in checkpoint.TENSORS:
        before, after = getattr(wrote, name), getattr(back, name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert back.step == 7
    assert back.state["scaler"] == {"cur_scale": 2.0}


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 30):
        checkpoint.write(tmp_path, snapshot(step), keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000010", "step-000030"]


def flip_a_bit(folder: Path) -> None:
    path = folder / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def cut_off(folder: Path) -> None:
    path = folder / "trainable.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def lose_generators(folder: Path) -> None:
    (folder / "rng.safetensors").unlink()


def lose_state(folder: Path) -> None:
    (folder / "state.json").unlink()


def spoil_state(folder: Path) -> None:
    (folder / "state.json").write_text('{"step": 2')


def lose_sums(folder: Path) -> None:
    (folder / checkpoint.SUMS).unlink()


def add_a_line(folder: Path) -> None:
    path = folder / checkpoint.SUMS
    path.write_text(path.read_text() + "\n")


def rename(folder: Path) -> None:
    """Give it the name of another step."""
    folder.rename(checkpoint.folder_of(folder.parent.parent, 3))


DAMAGES = [
    (flip_a_bit, "optimizer.safetensors is damaged"),
    (cut_off, "trainable.safetensors is damaged"),
    (lose_generators, "rng.safetensors is missing"),
    (lose_state, "state.json is missing"),
    (spoil_state, "state.json is damaged"),
    (lose_sums, "SHA256SUMS is missing"),
    (add_a_line, "SHA256SUMS is damaged"),
    (rename, "it belongs to another step"),
]


def test_the_hashes_are_those_of_sha256sum(tmp_path: Path) -> None:
    folder = checkpoint.write(tmp_path, snapshot(1), keep=1)
    done = subprocess.run(["sha256sum", "-c", checkpoint.SUMS], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout.count(": OK\n")) == (0, 4)


def test_an_error_of_the_disk_is_raised_as_an_oserror(tmp_path: Path) -> None:
    """The library's own exception hides its error number."""
    with pytest.raises(FileNotFoundError) as error:
        checkpoint.save_tensors({"a": torch.zeros(1)}, tmp_path / "nowhere" / "x.safetensors")
    assert error.value.filename == str(tmp_path / "nowhere" / "x.safetensors")


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_is_used(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    checkpoint.write(tmp_path, snapshot(1), keep=2)
    damage(checkpoint.write(tmp_path, snapshot(2), keep=2))
    found, notes = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.name == "step-000001"
    assert len(notes) == 1
    assert message in notes[0]


def test_a_damaged_later_checkpoint_is_removed_before_a_good_one(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, snapshot(4), keep=2)
    lose_generators(checkpoint.write(tmp_path, snapshot(8), keep=2))
    good = checkpoint.write(tmp_path, snapshot(5), keep=1)  # a run that continued from step 4 and was stopped
    assert list((tmp_path / "checkpoints").iterdir()) == [good]
    assert checkpoint.newest(tmp_path) == (good, [])


def test_a_full_disk_leaves_the_checkpoints_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.write(tmp_path, snapshot(1), keep=1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(tmp_path, snapshot(2), keep=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_half_written_checkpoints_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    whole = checkpoint.write(tmp_path, snapshot(1), keep=1)
    (tmp_path / "checkpoints" / ".step-000002.123.tmp").mkdir()
    checkpoint.sweep(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == [whole]


def draws() -> list[float]:
    return [random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand(), torch.randn(3).sum().item()]


def test_every_generator_continues_where_it_was(tmp_path: Path) -> None:
    checkpoint.seed_all(3)
    draws()  # Python's and numpy's generators now hold a second Gaussian value
    saved = checkpoint.rng_state()
    first = draws()
    draws()
    wrote = Snapshot(1, {}, {}, {f"rank0/{key}": value for key, value in saved.items()}, {})
    back = checkpoint.read(checkpoint.write(tmp_path, wrote, keep=1)).rng
    checkpoint.set_rng_state({key.removeprefix("rank0/"): value for key, value in back.items()})
    assert draws() == first
