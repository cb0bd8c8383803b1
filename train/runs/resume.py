"""May this command continue a run, and from which checkpoint?

Compares plain values with those in inputs.json, and checkpoints with losses.jsonl; knows nothing of recipes or
training. Nothing is written here: a refused command leaves the folder as it was. A run that stopped before its first
checkpoint has no progress to lose, so its folder may be started again with any inputs.
"""

from pathlib import Path
from typing import Any

from train.common.errors import UserError
from train.common.files import read_json
from train.runs import checkpoint, losses
from train.runs.folder import CHECKPOINTS, INPUTS, LOSSES, finished
from train.runs.record_form import INPUTS as INPUTS_FORM
from train.runs.record_form import find_problem

# Keys of a recipe that another command may change when it continues a run.
MAY_CHANGE_ON_RESUME = frozenset(
    {
        *("model",),  # its name; its files are compared by hash
        # how fast and where the same values are computed
        *("rows_per_step", "batch", "accumulation", "processes", "zero", "checkpointing", "embedding"),
        *("save_every", "keep", "background"),  # how often the run is saved
        *("guard", "spike", "unlearnable", "patience"),  # what to do about a fault: no effect on steps without one
    }
)

CHOOSE_ROWS = (
    "clean",
    "near",
    "tokens_min",
    "tokens_max",
    "answer_max",
    "held_out",
)  # keys that choose rows of the data


def read_inputs(run: Path) -> dict[str, Any] | None:
    """inputs.json of a run's folder; None if no run was started in it.

    Raises:
        UserError: inputs.json is damaged.
    """
    path = run / INPUTS
    try:
        inputs: dict[str, Any] = read_json(path)
        problem = find_problem(inputs, INPUTS_FORM)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        problem = f"not JSON ({error})"
    if problem:
        raise UserError(f"{path} is damaged: {problem}. Restore it from a copy, or begin a new run with another RUN=.")
    return inputs


def has_progress(run: Path) -> bool:
    """Whether a run's folder holds anything that a command could continue: a checkpoint, or the finished run."""
    return finished(run) or any((run / CHECKPOINTS).glob("step-*"))


def check_unchanged(run: Path, inputs: dict[str, Any], recipe_defaults: dict[str, Any]) -> list[str]:
    """Once a run has a checkpoint, its folder belongs to one set of inputs: refuse others.

    Returns:
        A sentence if the run starts again with other inputs, after a start that left no checkpoint; else none.
    Raises:
        UserError: every difference, in words; or a folder of a run without inputs.json.
    """
    if (run / INPUTS).is_file() and not has_progress(run):
        return _begins_anew(run, inputs, recipe_defaults)
    old = read_inputs(run)
    if old is None:
        if finished(run) or (run / CHECKPOINTS).is_dir():
            raise UserError(f"{run}: a run folder without {INPUTS}. Choose another RUN=, or remove it.")
        return []
    if differences := changes(old, inputs, recipe_defaults):
        listed = "\n  ".join(differences)
        raise UserError(
            f"run {run.name!r} was started with other inputs:\n  {listed}\n"
            f"Nothing was changed. Start a new run with RUN=another-name, and FROM={run.name} to begin with the "
            "adapter of this one; or give the same inputs to continue it."
        )
    return []


def _begins_anew(run: Path, inputs: dict[str, Any], recipe_defaults: dict[str, Any]) -> list[str]:
    """What has changed since a start that left no checkpoint, in one sentence; none if nothing has."""
    try:
        differences = changes(read_inputs(run) or inputs, inputs, recipe_defaults)
    except UserError:
        differences = [f"{INPUTS} was damaged"]
    if not differences:
        return []
    listed = "; ".join(differences)
    return [f"run {run.name!r} starts again: an earlier start stopped before its first checkpoint ({listed})."]


def changes(old: dict[str, Any], new: dict[str, Any], recipe_defaults: dict[str, Any]) -> list[str]:
    """The differences between two runs' inputs, in words. Keys of MAY_CHANGE_ON_RESUME are no difference.

    Args:
        old: inputs.json as it was written. new: the inputs of this command.
        recipe_defaults: every key of today's recipe and its default. A run of an older version has no value for a newer
            key: the default of a new key computes what the older version computed.
    """
    differences = []
    if old["data"]["sha256"] != new["data"]["sha256"]:
        differences.append(f"data: {new['data']['path']} is not what {old['data']['path']} was")
    if differ := _different_keys(old["base"]["files"], new["base"]["files"]):
        differences.append(f"base: {', '.join(differ[:3])} differ")
    if (old["from"] or {}).get("sha256") != (new["from"] or {}).get("sha256"):
        differences.append("from: another adapter to start from")
    recipe = {**recipe_defaults, **old["recipe"]}
    same_keys = all(recipe.get(key) == new["recipe"].get(key) for key in CHOOSE_ROWS)
    if not differences and same_keys and old.get("rows", "") != new.get("rows", ""):
        differences.append(
            "rows: this program cleans, or holds out, other rows of the same data than an earlier one did"
        )
    for key in sorted(new["recipe"].keys() - MAY_CHANGE_ON_RESUME):
        if recipe.get(key) != new["recipe"][key]:
            differences.append(f"{key}: was {recipe.get(key)}, now {new['recipe'][key]}")
    if old["rows_per_step"] != new["rows_per_step"]:
        rows = f"was {old['rows_per_step']} rows per step, now {new['rows_per_step']}"
        differences.append(f"batch × accumulation × processes: {rows}")
    if old["dtype"] != new["dtype"]:
        differences.append(f"dtype: was {old['dtype']}, now {new['dtype']} (set by precision=)")
    return differences


def _different_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return sorted(key for key in {**old, **new} if old.get(key) != new.get(key))


def fitted_accumulation(run: Path, batch: int, accumulation: int, processes: int) -> int:
    """The accumulation that keeps a run's rows per step when it continues in another number of processes.

    Returns:
        `accumulation` itself for a new run, or where the rows per step are the same.
    Raises:
        UserError: these processes cannot share the rows of a step equally.
    """
    old = read_inputs(run) if has_progress(run) else None
    if old is None or old["rows_per_step"] == batch * accumulation * processes:
        return accumulation
    rows, share = old["rows_per_step"], batch * processes
    if rows % share:
        able = [str(n) for n in range(1, rows // batch + 1) if rows % (batch * n) == 0]
        raise UserError(
            f"run {run.name!r} was started with {rows} rows per step, which {processes} processes of batch={batch} cannot "
            f"share equally: {rows} / ({batch} × {processes}) is not a whole number. With this batch: "
            f"{', '.join(able) or 'none'} processes (GPUS=, processes=); or another batch=."
        )
    return int(rows // share)


def resume_point(run: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from, and a sentence for each that is not used: damaged, or later than losses.jsonl.

    Raises:
        UserError: losses.jsonl ends before every checkpoint.
    """
    newest, notes = checkpoint.newest(run)
    if newest is None or checkpoint.step_of(newest) <= (steps := len(losses.read(run))):
        return newest, notes
    covered, _ = checkpoint.newest(run, steps)
    if covered is None:
        raise UserError(
            f"{run / LOSSES} ends after step {steps}, and {newest.name} continues after step "
            f"{checkpoint.step_of(newest)}. Restore the file from a copy; or begin a new run: another RUN=, or this "
            f"one after you remove {run / CHECKPOINTS}."
        )
    return covered, [*notes, f"checkpoint {newest.name} is not used: {LOSSES} ends after step {steps}."]
