"""The curves of a run in Weights & Biases, SwanLab or MLflow, beside TensorBoard, where TRAIN_TRACKER asks for them.

None of the packages is a dependency. Each tracker uses its own variables for keys and addresses; without a key it writes
files below the run, which its own command uploads later. Points are sent by a thread, so a slow server delays no step. A
tracker that fails is reported once and left out: it never ends a run, and it changes no result.
"""

import hashlib
import importlib.util
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from train.common.errors import UserError
from train.common.files import read_json, write_json

VARIABLE = "TRAIN_TRACKER"  # names with commas between
PROJECT = "qwen-finetune"
FOLDER = "trackers"  # below the run
CLOSING_SECONDS = 60.0  # for points that are still on their way when the run ends


class Tracker(Protocol):
    """One run of a tracker. `log` is called in the sending thread, all else in the one that trains: SwanLab insists on it."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _RunTracker:
    """What the runs of Weights & Biases and of SwanLab have in common."""

    _run: Any

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class WandbTracker(_RunTracker):
    """Weights & Biases; offline without WANDB_API_KEY unless WANDB_MODE says otherwise: `wandb sync` uploads it."""

    def __init__(self, run: Path, config: dict[str, Any]) -> None:
        import wandb  # type: ignore[import-not-found,unused-ignore]

        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=run.name, id=_identity(run), resume="allow",
            dir=str(run / FOLDER), config=config, mode=mode, settings=wandb.Settings(console="off", silent=True),
        )  # fmt: skip


class SwanLabTracker(_RunTracker):
    """SwanLab; offline without SWANLAB_API_KEY unless SWANLAB_MODE says otherwise: `swanlab sync` uploads it."""

    def __init__(self, run: Path, config: dict[str, Any]) -> None:
        import swanlab  # type: ignore[import-not-found,unused-ignore]

        mode = os.environ.get("SWANLAB_MODE") or ("online" if os.environ.get("SWANLAB_API_KEY") else "offline")
        self._run = swanlab.init(
            project=PROJECT, name=run.name, id=_identity(run), resume="allow", log_dir=str(run / FOLDER / "swanlab"),
            config=config, mode=mode,
        )  # fmt: skip


class MlflowTracker:
    """MLflow; without MLFLOW_TRACKING_URI it writes below the run: `mlflow ui --backend-store-uri` shows it."""

    def __init__(self, run: Path, config: dict[str, Any]) -> None:
        for key, value in (("MAX_RETRIES", "2"), ("TIMEOUT", "10")):  # its own values wait for minutes
            os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{key}", value)
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow-skinny has nothing else
        from mlflow import MlflowClient  # type: ignore[import-not-found,unused-ignore]

        folder = (run / FOLDER).resolve()
        database = importlib.util.find_spec("sqlalchemy") is not None
        here = f"sqlite:///{folder / 'mlflow.db'}" if database else f"file://{folder / 'mlruns'}"
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or here)
        name, kept = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT), folder / "mlflow.json"
        if kept.is_file():  # the run goes on
            self._id = str(read_json(kept)["run_id"])
            self._client.update_run(self._id, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        self._id = str(self._client.create_run(experiment, run_name=run.name).info.run_id)
        for key, value in config.items():
            self._client.log_param(self._id, key, value)
        write_json(kept, {"run_id": self._id})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._client.log_metric(self._id, key, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._id)


KINDS: dict[str, Callable[[Path, dict[str, Any]], Tracker]] = {
    "wandb": WandbTracker,
    "swanlab": SwanLabTracker,
    "mlflow": MlflowTracker,
}


def asked_for() -> list[str]:
    """The trackers that TRAIN_TRACKER names.

    Raises:
        UserError: an unknown name, or a package that is not installed.
    """
    names = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    for name in names:
        if name not in KINDS:
            raise UserError(f"{VARIABLE}={name!r}: expected {', '.join(KINDS)}, with commas between.")
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"{VARIABLE}={name}: the package {name} is not installed here. Install it (.venv/bin/uv pip install "
                f"--python .venv/bin/python {name}), or unset {VARIABLE}."
            )
    return list(dict.fromkeys(names))


class Trackers:
    """Every tracker that was asked for, of a run that starts or goes on; the points are sent in the order of the calls."""

    def __init__(self, run: Path, config: dict[str, Any], names: list[str], report: Callable[[str], None]) -> None:
        """report: is called with the reason why a tracker was left out."""
        self._report, self._trackers = report, dict[str, Tracker]()
        for name in names:
            (run / FOLDER).mkdir(exist_ok=True)
            with self._left_out_on_error(name), _own_signal_handlers():
                self._trackers[name] = KINDS[name](run, config)
        self._points: queue.SimpleQueue[tuple[int, Mapping[str, float]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send, daemon=True, name="trackers")
        self._thread.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._points.put((step, values))

    def close(self) -> None:
        """Wait for the points that are on their way, at most CLOSING_SECONDS."""
        self._points.put(None)
        self._thread.join(CLOSING_SECONDS)
        if self._thread.is_alive():
            self._report(f"{', '.join(self._trackers)}: the last points were not delivered in {CLOSING_SECONDS:.0f} s.")
            return
        for name, tracker in list(self._trackers.items()):
            with self._left_out_on_error(name), _own_signal_handlers():
                tracker.close()

    def _send(self) -> None:
        while (point := self._points.get()) is not None:
            for name, tracker in list(self._trackers.items()):
                with self._left_out_on_error(name):
                    tracker.log(*point)

    @contextmanager
    def _left_out_on_error(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each package has errors of its own, and none of them may end a run
            self._trackers.pop(name, None)
            self._report(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason'}")


def start(run: Path, config: dict[str, Any]) -> Trackers | None:
    """The trackers of TRAIN_TRACKER for this run, whose recipe is `config`; None if none is asked for.

    Raises:
        UserError: as `asked_for`.
    """
    names = asked_for()
    return Trackers(run, config, names, _warn) if names else None


def _warn(reason: str) -> None:
    print(f"{VARIABLE}: left out, and training goes on: {reason}", file=sys.stderr, flush=True)


def _identity(run: Path) -> str:
    """21 letters and digits, the same each time that this run goes on and in no other run."""
    return hashlib.sha256(f"{run.resolve()}".encode() + (run / "inputs.json").read_bytes()).hexdigest()[:21]


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Undo what a package does with Ctrl-C and SIGTERM when it starts: a run ends with a checkpoint."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    hook = sys.excepthook
    try:
        yield
    finally:
        sys.excepthook = hook
        for number, handler in kept.items():
            signal.signal(number, handler)
