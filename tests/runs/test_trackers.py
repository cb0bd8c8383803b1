"""TRAIN_TRACKER: what is sent, that a failing tracker ends nothing, and the real packages in their offline modes."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from train.common.errors import UserError
from train.runs import trackers
from train.runs.losses import LossLog

ROOT = Path(__file__).parents[2]
ROW = {"step": 1, "loss": 2.5, "learning_rate": 1e-3, "grad_norm": None, "seconds": 1.0}


class Recorder:
    """A tracker that keeps what it gets; it fails at the steps of `failing`."""

    def __init__(self, run: Path, config: dict[str, Any]) -> None:
        self.run, self.config, self.points, self.closed = run, config, list[Any](), False
        self.failing = config.get("failing", ())
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as some packages do
        made.append(self)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step in self.failing:
            raise ConnectionError("the server\nis away")
        self.points.append((step, dict(values)))

    def close(self) -> None:
        self.closed = True


made: list[Recorder] = []


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "inputs.json").write_text("{}")
    made.clear()
    monkeypatch.setitem(trackers.KINDS, "wandb", Recorder)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: name != "mlflow" or None)
    return tmp_path


def test_the_curves_of_tensorboard_are_sent(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv(trackers.VARIABLE, " wandb ")
    log = LossLog(run, 0, trackers.start(run, {"rank": 8}))
    log.write(ROW)
    log.write({**ROW, "step": 2, "held_out_loss": 3.0})
    log.close()
    curve = {"loss": 2.5, "learning_rate": 1e-3}
    assert made[0].points == [(1, curve), (2, {**curve, "held_out_loss": 3.0})]
    assert made[0].config == {"rank": 8} and made[0].closed
    assert signal.getsignal(signal.SIGTERM) == before
    assert len((run / "losses.jsonl").read_text().splitlines()) == 2


def test_a_tracker_that_fails_is_reported_once_and_left_out(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(trackers.VARIABLE, "wandb")
    log = LossLog(run, 0, trackers.start(run, {"failing": (2, 3)}))
    for step in (1, 2, 3):
        log.write({**ROW, "step": step})
    log.close()
    expected = "TRAIN_TRACKER: left out, and training goes on: wandb: ConnectionError: the server\n"
    assert capsys.readouterr().err == expected
    assert [step for step, _ in made[0].points] == [1]
    assert len((run / "losses.jsonl").read_text().splitlines()) == 3


def test_one_that_does_not_start_is_left_out(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def refuse(run: Path, config: dict[str, Any]) -> Any:
        raise RuntimeError

    monkeypatch.setitem(trackers.KINDS, "swanlab", refuse)
    monkeypatch.setenv(trackers.VARIABLE, "swanlab,wandb,wandb")
    log = LossLog(run, 0, trackers.start(run, {}))
    log.write(ROW)
    log.close()
    assert "swanlab: RuntimeError: no reason" in capsys.readouterr().err
    assert len(made) == 1 and made[0].closed


def test_a_server_that_hangs_does_not_hold_the_run(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import threading

    released = threading.Event()
    monkeypatch.setattr(Recorder, "log", lambda self, step, values: released.wait(60))
    monkeypatch.setattr(trackers, "CLOSING_SECONDS", 0.05)
    monkeypatch.setenv(trackers.VARIABLE, "wandb")
    log = LossLog(run, 0, trackers.start(run, {}))
    log.write(ROW)
    log.close()
    assert "wandb: the last points were not delivered" in capsys.readouterr().err
    released.set()


@pytest.mark.parametrize(
    ("value", "message"), [("comet", "expected wandb, swanlab, mlflow"), ("mlflow", "package mlflow is not installed")]
)
def test_a_wrong_name_is_an_error(run: Path, monkeypatch: pytest.MonkeyPatch, value: str, message: str) -> None:
    monkeypatch.setenv(trackers.VARIABLE, value)
    with pytest.raises(UserError, match=message):
        trackers.start(run, {})


def test_nothing_is_asked_for_by_default(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(trackers.VARIABLE, raising=False)
    assert trackers.start(run, {}) is None and not (run / trackers.FOLDER).exists()


SCRIPT = """
import sys
from pathlib import Path
from train.runs import trackers
run = Path(sys.argv[1])
for steps in ((1, 2, 3), (4, 5)):  # it is stopped and goes on
    found = trackers.start(run, {"rank": 8})
    for step in steps:
        found.write(step, {"loss": 1 / step})
    found.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "swanlab", "mlflow"])
def test_the_real_package_keeps_the_curve_offline(tmp_path: Path, name: str) -> None:
    """TRACKERS=FOLDER: made by `uv pip install --target FOLDER wandb swanlab mlflow-skinny`."""
    folder = os.environ.get("TRACKERS")
    if not folder:
        pytest.skip("TRACKERS names no folder with the packages")
    run = tmp_path / "mine"
    run.mkdir()
    (run / "inputs.json").write_text("{}")
    keys = ("WANDB_API_KEY", "SWANLAB_API_KEY", "MLFLOW_TRACKING_URI")
    environment = {key: value for key, value in os.environ.items() if key not in keys}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "TRAIN_TRACKER": name, "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(run)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "TRAIN_TRACKER" not in done.stderr
    below = run / trackers.FOLDER
    if name == "mlflow":
        metric = next(below.glob("mlruns/*/*/metrics/loss")).read_text().splitlines()
        assert [int(line.split()[2]) for line in metric] == [1, 2, 3, 4, 5]
        assert len(list(below.glob("mlruns/*/*/metrics/loss"))) == 1
        assert json.loads((below / "mlflow.json").read_text())["run_id"]
    else:
        suffix = {"wandb": "wandb/offline-run-*/*.wandb", "swanlab": "swanlab/run-*/*.swanlab"}[name]
        files = list(below.glob(suffix))
        assert len(files) == 2 and len({file.stem for file in files}) == 1, "one identity, so that both are one run"
        assert sum(b"loss" in file.read_bytes() for file in files) == 2
