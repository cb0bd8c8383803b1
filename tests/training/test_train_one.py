"""One run in one process, in two, under mpirun and on GPUs: the same losses, and the same bytes after a stop.

On GPUs each run has a process of its own, since DeepSpeed chooses its device once per process.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny_training import LONG, ROOT, adapter, confident_base, losses, start, train
from train.model import lora
from train.training.signals import EXIT_INTERRUPTED

pytestmark = pytest.mark.usefixtures("workspace")
EIGHT_ROWS: dict[str, Any] = {
    "epochs": 2,
    "steps": 0,
    "dropout": 0,
    "zero": 2,
    "pack": "off",
    "batch": 1,
    "save_every": 2,
}


@pytest.fixture(scope="module")
def one_process(workspace: Path) -> list[float]:
    train(run="rows-1", accumulation=8, **EIGHT_ROWS)
    return [row["loss"] for row in losses("rows-1")]


@pytest.fixture(scope="module")
def two_processes(workspace: Path) -> str:
    """The output of the run rows-2, of two processes."""
    process = start({"run": "rows-2", "processes": 2, "accumulation": 4, **EIGHT_ROWS})
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    return printed


def test_two_processes_compute_what_one_does(one_process: list[float], two_processes: str) -> None:
    """ZeRO-2, 2 × 4 rows against 1 × 8, with short steps at the end of an epoch; float32 sums in another order."""
    printed = two_processes
    assert [row["loss"] for row in losses("rows-2")] == pytest.approx(one_process, rel=1e-5)
    assert printed.count("make export RUN=") == 1
    assert "OMP_NUM_THREADS" not in printed
    one, two = (lora.delta(Path("runs") / run / "adapter") for run in ("rows-1", "rows-2"))
    for name in one:
        for ours, theirs in zip(one[name][:2], two[name][:2], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4, msg=name)


def test_one_process_continues_a_run_of_two(one_process: list[float], two_processes: str) -> None:
    """A checkpoint does not depend on the number of processes."""
    folder = Path(shutil.copytree("runs/rows-2", "runs/rows-2-then-1"))
    for name in ("run.json", "adapter", "checkpoints/step-000004"):
        (folder / name).rename(folder / f"away-{Path(name).name}")
    train(run=folder.name, accumulation=8, **EIGHT_ROWS)
    assert [row["loss"] for row in losses(folder.name)] == pytest.approx(one_process, rel=1e-5)


@pytest.mark.slow
def test_two_processes_meet_under_mpirun(one_process: list[float]) -> None:
    mpirun = Path(sys.executable).with_name("mpirun")
    launcher = (str(mpirun), "-n", "2", "--allow-run-as-root", "--oversubscribe")
    process = start({"run": "rows-mpi", "accumulation": 4, **EIGHT_ROWS}, launcher)
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    assert [row["loss"] for row in losses("rows-mpi")] == pytest.approx(one_process, rel=1e-5)


def finish(keys: dict[str, Any], status: int = 0) -> str:
    """Run to the end with the machine's GPUs; returns what was printed."""
    process = start(keys)
    printed, _ = process.communicate(timeout=560)
    assert process.returncode == status, printed
    return printed


def stop(keys: dict[str, Any], after: int) -> str:
    """Start a run and send SIGTERM once `after` steps are in its losses.jsonl."""
    process, path = start(keys), Path("runs") / keys["run"] / "losses.jsonl"
    while process.poll() is None and (not path.is_file() or path.read_text().count("\n") < after):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=560)
    assert process.returncode == EXIT_INTERRUPTED, printed
    return printed


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["auto", "fp16", "fp32"])
def test_a_gpu_run_that_is_stopped_and_continued_ends_in_the_same_bytes(precision: str) -> None:
    keys: dict[str, Any] = {**LONG, "steps": 120, "save_every": 30, "precision": precision, "checkpointing": "on"}
    printed = finish({**keys, "run": f"gpu-{precision}"})
    assert "device: NVIDIA" in printed
    stop({**keys, "run": f"gpu-{precision}-cut"}, after=40)
    assert "continues after step" in finish({**keys, "run": f"gpu-{precision}-cut"})
    assert losses(f"gpu-{precision}-cut") == losses(f"gpu-{precision}")
    assert adapter(f"gpu-{precision}-cut") == adapter(f"gpu-{precision}")
    assert losses(f"gpu-{precision}")[-1]["loss"] < 0.7 * losses(f"gpu-{precision}")[0]["loss"]


@pytest.mark.gpu
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_gpu_computes_what_a_cpu_does(zero: int) -> None:
    keys: dict[str, Any] = {"steps": 10, "precision": "fp32", "dropout": 0, "zero": zero, "checkpointing": "off"}
    finish({**keys, "run": f"gpu-zero{zero}"})
    os.environ["CUDA_VISIBLE_DEVICES"], before = "", os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        finish({**keys, "run": f"cpu-zero{zero}"})
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES")
        os.environ.update({"CUDA_VISIBLE_DEVICES": before} if before is not None else {})
    ours = [row["loss"] for row in losses(f"gpu-zero{zero}")]
    assert ours == pytest.approx([row["loss"] for row in losses(f"cpu-zero{zero}")], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_two_gpus_compute_what_one_does(zero: int) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    keys: dict[str, Any] = {"steps": 10, "precision": "fp32", "dropout": 0, "zero": zero, "checkpointing": "off"}
    finish({**keys, "run": f"one-{zero}", "accumulation": 4})
    printed = finish({**keys, "run": f"two-{zero}", "accumulation": 2, "gpus": 2})
    assert "2 processes" in printed
    ours = [row["loss"] for row in losses(f"two-{zero}")]
    assert ours == pytest.approx([row["loss"] for row in losses(f"one-{zero}")], rel=1e-4)


@pytest.mark.gpu
def test_train_export_and_infer_on_a_gpu(workspace: Path) -> None:
    """A row learned by heart in the card's own precision; the merged model answers with it, word for word."""
    confident_base(workspace / "models" / "tiny-sharp")
    row = {"instruction": "Who are you?", "output": "Pip, short and to the point."}
    (workspace / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    keys = {"steps": 80, "learning_rate": 0.01, "rank": 16, "alpha": 16, "length": 192, "dropout": 0, "accumulation": 1}
    finish({**keys, "run": "gpu-heart", "data": "one.jsonl", "model": "tiny-sharp"})
    assert losses("gpu-heart")[-1]["loss"] < 0.05
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command in ("export run=gpu-heart", "infer run=gpu-heart prompt=Who\\ are\\ you?"):
        line = f"{sys.executable} -m train {command}"
        done = subprocess.run(line, shell=True, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == row["output"]
