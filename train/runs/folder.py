"""The folder of a run: its paths, its lock, the inputs it belongs to, its record, and the checkpoint to go on from."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train.common.errors import UserError
from train.common.files import make_folder, read_json
from train.runs import checkpoint
from train.runs.losses import whole_lines


def read_run(run: Path) -> dict[str, Any]:
    """run.json of a finished run."""
    try:
        return read_json(run / "run.json")
    except FileNotFoundError:
        state = "is not finished: the same `make train` goes on with it" if run.is_dir() else "does not exist"
        raise UserError(f"run {run.name!r} {state}. (Looked for {run / 'run.json'}.)") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{run / 'run.json'}: not JSON ({error}). Train again under another RUN=.") from error


# keys that change how fast or how safely a run goes, not what it computes: another value may go on with it
MAY_CHANGE_ON_RESUME = {"model", "batch", "accumulation", "processes", "zero", "checkpointing", "embedding"}


MAY_CHANGE_ON_RESUME |= {"save_every", "keep", "background"}


MAY_CHANGE_ON_RESUME |= {
    "guard",
    "spike",
    "unlearnable",
    "patience",
}  # what to do when something is wrong; nothing was, so far


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two runs' inputs, in words; how fast they are computed is no difference."""
    found = []
    if old["data"]["sha256"] != new["data"]["sha256"]:
        found.append(f"data: {new['data']['path']} is not what {old['data']['path']} was")
    files = {**old["base"]["files"], **new["base"]["files"]}
    differ = [name for name in files if old["base"]["files"].get(name) != new["base"]["files"].get(name)]
    if differ:
        found.append(f"base: {', '.join(sorted(differ)[:3])} differ")
    if (old["from"] or {}).get("sha256") != (new["from"] or {}).get("sha256"):
        found.append("from: another adapter to start from")
    for key in sorted(new["recipe"].keys() - MAY_CHANGE_ON_RESUME):
        if old["recipe"].get(key) != new["recipe"][key]:
            found.append(f"{key}: was {old['recipe'].get(key)}, now {new['recipe'][key]}")
    if old["rows_per_step"] != new["rows_per_step"]:
        found.append(
            f"batch × accumulation × processes: was {old['rows_per_step']} rows a step, now {new['rows_per_step']}"
        )
    if old["dtype"] != new["dtype"]:
        found.append(f"computed in: was {old['dtype']}, now {new['dtype']} (precision= decides)")
    return found


def recorded(run: Path) -> dict[str, Any] | None:
    """The inputs that a run folder belongs to; None if it is none yet.

    Raises:
        UserError: the file is damaged.
    """
    path = run / "inputs.json"
    try:
        found: dict[str, Any] = read_json(path)
        found["data"]["sha256"], found["base"]["files"], found["recipe"], found["rows_per_step"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}). Put it back from a copy; or begin anew with another RUN=."
        ) from error
    return found


@contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Hold the run folder; the system lets go of it when the process ends, however it ends.

    Raises:
        UserError: another process holds it.
    """
    make_folder(run)
    with (run / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"run {run.name!r} is being trained by another process. Wait for it, or choose another RUN=."
            ) from None
        yield


def resume_point(run: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and a sentence for each that is passed over: damaged, or past the end of losses.jsonl.

    Raises:
        UserError: losses.jsonl ends before every checkpoint.
    """
    found, notes = checkpoint.newest(run)
    if found is None or checkpoint.step_of(found) <= (lines := len(whole_lines(run / "losses.jsonl"))):
        return found, notes
    covered, _ = checkpoint.newest(run, lines)
    if covered is None:
        raise UserError(
            f"{run / 'losses.jsonl'} ends after step {lines}, and {found.name} goes on after step {checkpoint.step_of(found)}. "
            f"Put the file back; or begin anew: another RUN=, or this one once {run / 'checkpoints'} is removed."
        )
    return covered, [*notes, f"checkpoint {found.name} is not used: losses.jsonl ends after step {lines}."]
