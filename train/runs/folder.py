"""The folder of one run: the name of every file in it, the files written at its start, its lock and its record.

Knows names, text and JSON; nothing of recipes, models or training. Other modules pass plain values.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from train.common.errors import UserError
from train.common.files import make_folder, read_json, write_json, write_text
from train.runs.record_form import RECORD as RECORD_FORM
from train.runs.record_form import find_problem

# Names below the run's folder, in the order in which they are written.
LOCK = ".lock"  # held by the process that trains
RECIPE = "recipe.yaml"  # the recipe after overrides
INPUTS = "inputs.json"  # hashes of data, base and recipe: what this folder belongs to
RUNTIME = ".runtime"  # container, where one began the run: it is not continued elsewhere unasked
LINEAGE = "lineage.txt"  # for a person: the runs that this one starts from, one line each
HELD_OUT = "held_out.jsonl"  # conversations that are measured on, not trained on; a data file
REMOVED = "removed.jsonl"  # rows that cleaning took, with the reason
LOSSES = "losses.jsonl"  # one line per step
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"  # step-000123/
ADAPTER = "adapter"  # in the files that peft reads
MODEL = "model"  # instead of an adapter where every weight was trained: a model folder, in float32
RECORD = "run.json"  # written last: its presence means that the run is finished
ANSWERS = "answers.jsonl"  # before and after, by `compare`
SCORES = "scores.json"  # of both models, by `compare`
REPORT = "report.html"  # the page about the run

RESTORE = "Restore it from a copy, or train again under another RUN=."  # a result that is damaged
TOKENS = ".cache/tokens"  # beside the runs: tokens of large data, which several runs share


def adapter_source(name: str, runs: Path) -> Path:
    """The folder that FROM= names: a run below `runs`, or else a path, to a run's folder or to one with an adapter."""
    run = runs / name
    is_path = os.path.isdir(name) and not os.path.isdir(run)  # noqa: PTH112  # Path.is_dir raises for a name too long
    return Path(name) if is_path else run


def adapter_folder(source: Path) -> Path:
    """Where the adapter of a run is; `source` itself if that is no run's folder."""
    is_run = (source / ADAPTER).is_dir() or (source / INPUTS).is_file() or not source.is_dir()
    return source / ADAPTER if is_run else source


def trained_model(run: Path) -> Path | None:
    """The model folder of a run that trained every weight; None for a run with an adapter, and for any other folder."""
    folder = run / MODEL
    whole = all(os.path.isfile(path) for path in (folder / "config.json", run / INPUTS))  # noqa: PTH113  # as above
    return folder if whole else None


def result_folder(run: Path) -> Path:
    """Where the result of a run is: its adapter, or its model where every weight was trained."""
    return trained_model(run) or run / ADAPTER


def finished(run: Path) -> bool:
    return (run / RECORD).is_file()


def newest_run(runs: Path) -> Path | None:
    """The folder below `runs` whose run finished last; None if none has."""
    records = sorted(runs.glob(f"*/{RECORD}"), key=lambda path: path.stat().st_mtime)
    return records[-1].parent if records else None


def read_run(run: Path) -> dict[str, Any]:
    """The record (run.json) of a finished run.

    Raises:
        UserError: there is no such run, it is not finished, or its record is damaged.
    """
    path = run / RECORD
    try:
        record: dict[str, Any] = read_json(path)
        problem = find_problem(record, RECORD_FORM)
    except FileNotFoundError:
        state = "is not finished: the same `make train` continues it" if run.is_dir() else "does not exist"
        raise UserError(f"run {run.name!r} {state}. (Looked for {path}.)") from None
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        problem = f"not JSON ({error})"
    if problem:
        raise UserError(f"{path} is damaged: {problem}. Restore it from a copy, or train again under another RUN=.")
    return record


def begin(run: Path, recipe: dict[str, Any], inputs: dict[str, Any], lineage: str = "") -> None:
    """Make the folder and write what it belongs to: the recipe after overrides, the inputs, and the lineage if any.

    A later command that continues the run writes these files again with its own values (a new `batch=`, for example).
    """
    make_folder(run)
    write_text(run / RECIPE, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    write_json(run / INPUTS, inputs)
    if runtime := os.environ.get("RUNTIME_NAME", "container" if "IMAGE_FILE" in os.environ else ""):
        write_text(run / RUNTIME, runtime)
    if lineage:
        write_text(run / LINEAGE, lineage)
    else:  # an earlier start without a checkpoint may have had FROM=
        (run / LINEAGE).unlink(missing_ok=True)


def is_locked(run: Path) -> bool:
    """Whether a process trains this run now."""
    try:
        with (run / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file; or a file system without locks
        return False
    return False


@contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Hold the run's folder. The operating system releases it when the process ends, however it ends.

    Raises:
        UserError: another process holds it.
    """
    make_folder(run)
    with (run / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"run {run.name!r} is being trained by another process. Wait for it, or choose another RUN=."
            ) from None
        yield
