"""The train command on tiny models: a folder to work in, short runs, and ways to disturb them.

A test module with such runs uses the fixture `workspace`, which the conftest.py of its directory imports.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.oracles import tiny_checkpoint, tiny_config
from train.commands import train as command
from train.model import lora
from train.runs.folder import ADAPTER
from train.runs.losses import read
from train.training import loop

ROOT = Path(__file__).parents[2]
TINY = {"save_every": "0", "batch": "2", "accumulation": "2", "length": "96", "rank": "4", "zero": "0"}
LONG: dict[str, Any] = {"steps": 24, "save_every": 3, "dropout": 0.05, "zero": 2}  # long enough to be disturbed


def write_rows(path: Path, count: int = 12) -> Path:
    """Conversations of unequal length."""
    rows = [{"instruction": f"Question {n}?", "output": f"Answer {n}. " * (1 + n % 4)} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder of a module's tests: two tiny bases and a data set."""
    folder = tmp_path_factory.mktemp("workspace")
    tiny_checkpoint(folder / "models" / "tiny-Int4", tiny_config(), int4=True)
    tiny_checkpoint(folder / "models" / "tiny-qwen", tiny_config("qwen"))
    write_rows(folder / "data.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def confident_base(folder: Path) -> None:
    """A tiny base that can be sure of a token: with a random head of unit size no loss gets under 0.3."""
    from safetensors.torch import load_file, save_file

    path = tiny_checkpoint(folder, tiny_config(), int4=True) / "model.safetensors"
    state = load_file(path)
    state["lm_head.weight"] *= 4
    save_file(state, path, metadata={"format": "pt"})


# --- runs -------------------------------------------------------------------------------------------------------------


def options(**keys: Any) -> dict[str, str]:
    base = {"data": "data.jsonl", "model": "tiny-Int4", "recipe": "smoke", **TINY}
    return {key: str(value) for key, value in {**base, **keys}.items()}


def train(**keys: Any) -> None:
    """`python -m train train key=value …` in this process."""
    command.run(command.parse(options(**keys)))


def start(keys: dict[str, Any], launcher: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    """The same in a process of its own."""
    words = [f"{key}={value}" for key, value in options(**keys).items()]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    line = [*launcher, sys.executable, "-m", "train", "train", *words]
    return subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def losses(run: str) -> list[dict[str, Any]]:
    """The rows of losses.jsonl without their times, which differ in every run."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read(Path("runs") / run)]


def adapter(run: str) -> bytes:
    return (Path("runs") / run / ADAPTER / lora.WEIGHTS).read_bytes()


# --- disturbances -----------------------------------------------------------------------------------------------------


def wrap_step(monkeypatch: pytest.MonkeyPatch, wrapper: Callable[[Callable[[], Any], Any, int, int], Any]) -> list[int]:
    """Call `wrapper(real_step, engine, step, number of steps computed)` for each step; the list of steps computed."""
    real: Callable[..., Any] = loop._step
    computed: list[int] = []

    def wrapped(run: Any, engine: Any, step: int, *rest: Any) -> Any:
        computed.append(step)
        return wrapper(lambda: real(run, engine, step, *rest), engine, step, len(computed))

    monkeypatch.setattr(loop, "_step", wrapped)
    return computed


def signal_at_step(step: int, number: int, monkeypatch: pytest.MonkeyPatch, start: int = 0) -> list[int]:
    """Send a signal to this process at the end of `step`, first after `start` steps; the list of steps computed.

    In the middle of a step it would end the step on a CPU.
    """

    def wrapper(real: Callable[[], Any], engine: Any, now: int, count: int) -> Any:
        result = real()
        if now == step and count > start:
            signal.raise_signal(number)
        return result

    return wrap_step(monkeypatch, wrapper)


def multiply_loss(step: int, factor: float, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Multiply the loss of global step `step` by `factor`; the list of steps computed."""

    def wrapper(real: Callable[[], Any], engine: Any, now: int, count: int) -> Any:
        if now != step:
            return real()
        with monkeypatch.context() as patch:
            micro = engine.forward_backward
            patch.setattr(engine, "forward_backward", lambda batch, labels: micro(batch, labels) * factor)
            return real()

    return wrap_step(monkeypatch, wrapper)


def use_fused_path(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Compute on the CPU as on a GPU: fused passes and one vector of all adapters. Keys for `train`."""
    monkeypatch.setattr("train.training.deepspeed_engine.FUSED_DEVICES", ("cpu",))
    return {"zero": 2}
