"""Check that a finished run is still what run.json says: every file that it names, by its hash.

make verify RUN=name [REPLAY=1]

REPLAY=1 also trains the run and its stages again, in a folder below it, from the same inputs, and compares every loss
and the adapter's bytes. They are the same on the same machine with the same packages and number of processes, however
often the run was interrupted. Where the number of processes changed during the run, losses may differ by the order of
sums, and with dropout a replay is refused. Nothing of the run is changed. If the program, the lock or the machine has
changed since, that is printed as a note, not as an error.
"""

import math
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.common.errors import UserError
from train.common.files import sha256
from train.common.names import below
from train.config.options import option
from train.config.recipe import Recipe
from train.data.origins.sources import hash_data
from train.model.folder import find, find_damage, read_manifest
from train.runs import checkpoint, losses, provenance
from train.runs.folder import HELD_OUT, REMOVED, read_run, result_folder, trained_model
from train.runs.record_form import VERIFIED, find_problem

TOLERANCE = 1e-5  # relative, where float32 is summed in another order
# The keys of losses.jsonl that depend on the order of sums
SUMS = ("loss", "grad_norm", "held_out_loss", "held_out_loss_before")
Checks = list[tuple[str, list[str]]]  # what was checked, and its differences from the record


@dataclass(frozen=True)
class Options:
    """Check a finished run against its record."""

    run: str = option("", "name of a finished run below runs/")
    replay: bool = option(False, "train it again in another folder, and compare losses and adapter")
    models: str = option("models", "folder of the models")
    runs: str = option("runs", "folder of the runs")


def run(options: Options) -> None:
    # the record
    if not options.run:
        raise UserError("verify: which run? Example: make verify RUN=demo")
    folder = below(options.runs, options.run, "run")
    record = _read_record(folder)
    stages = [(path.parent, _read_record(path.parent)) for path in sorted(folder.glob("stages/*/run.json"))]

    # every hash in it
    checks = [*_check_run(folder, record), *_check_inputs(options, record), *_check_outputs(folder)]
    for path, stage in stages:
        of_stage = [*_check_run(path, stage), *_check_outputs(path)]
        checks += [(f"stage {path.name}: {title}", differences) for title, differences in of_stage]
    for title, differences in checks:
        details = "".join(f"\n           {line}" for line in differences)
        print(f"{'DIFFERS' if differences else 'same   '}  {title}{details}")
    for line in _changes_since(record):
        print(f"note     {line}")
    print(f"run.json itself: sha256 {sha256(folder / 'run.json')}", flush=True)
    if any(differences for _, differences in checks):
        raise UserError(f"run {options.run!r} is not what its record says; see above.")

    # the training itself
    if options.replay:
        for path, stage in [*stages, (folder, record)]:
            _replay(options, path, stage)


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file. The run is not finished; the command that began it continues it.")
    record = read_run(folder)
    missing = "" if provenance.recorded_hashes(record) else "adapter is missing"
    if problem := find_problem(record, VERIFIED) or missing:
        raise UserError(f"{path} is damaged, or not of this program: {problem}. Restore it from a copy.")
    return record


def _check_run(folder: Path, record: dict[str, Any]) -> Checks:
    """The run's own files."""
    keys = {"inputs.json": "inputs_sha256", "recipe.yaml": "recipe_sha256", "losses.jsonl": "losses_sha256"}
    files: Checks = [(name, _check_file(folder / name, record[key])) for name, key in keys.items()]
    for name, key in ((HELD_OUT, "held_out"), (REMOVED, "cleaned")):
        files += [(name, _check_file(folder / name, record[key]["sha256"]))] if key in record else []
    result = result_folder(folder)
    hashes = provenance.hash_folder(result)
    return [*files, (result.name, _compare_hashes(hashes, provenance.recorded_hashes(record)))]


def _check_file(path: Path, recorded: str) -> list[str]:
    if not path.is_file():
        return [f"{path} is missing"]
    return [] if sha256(path) == recorded else [f"{path} has another sha256 than when the run ended"]


def _compare_hashes(now: Mapping[str, str], recorded: Mapping[str, str]) -> list[str]:
    """The differences between two sets of hashes, a line a file."""
    missing = [f"{name} is missing" for name in sorted(recorded.keys() - now.keys())]
    new = [f"{name} is new" for name in sorted(now.keys() - recorded.keys())]
    both = sorted(now.keys() & recorded.keys())
    return missing + new + [f"{name} has another sha256" for name in both if now[name] != recorded[name]]


def _check_inputs(options: Options, record: dict[str, Any]) -> Checks:
    """What the run was made of: data, base, and the runs that it was trained on from."""
    model, recorded = Recipe.from_record(record["recipe"]).model, record["base"]["files"]
    base = find(model, Path(options.models))
    differences = _compare_hashes(provenance.hash_folder(base), recorded) if base else ["it is missing"]
    checks: Checks = [(f"base {model}", differences)]
    path = record["data"]["path"]
    try:
        same = hash_data(path)["sha256"] == record["data"]["sha256"]
        checks.append((f"data {path}", [] if same else [f"{path} has another sha256"]))
    except UserError as error:
        checks.append((f"data {path}", [str(error)]))
    for entry in record["lineage"]:
        hashes = provenance.hash_adapter(Path(entry["run"]))
        checks.append((f"adapter of {entry['run']}", _compare_hashes(hashes, entry["adapter"])))
    return checks


def _check_outputs(folder: Path) -> Checks:
    """Checkpoints and exports in the folder, which hold their own hashes."""
    checks: Checks = []
    for path in sorted((folder / "checkpoints").glob("step-*")):
        problem = checkpoint.find_damage(path)
        checks.append((f"checkpoint {path.name}", [problem] if problem else []))
    for path in sorted(folder.glob("*/manifest.json")):
        if path.parent == trained_model(folder):  # the result itself
            continue
        if manifest := read_manifest(path.parent):
            checks.append((f"export {path.parent.name}", find_damage(path.parent, manifest, full=True)))
    return checks


def _changes_since(record: dict[str, Any]) -> list[str]:
    """What has changed around the run since; a replay may then compute other bytes."""
    now = {
        "env.lock": (record["lock"], provenance.lock()),
        "program": (record["code"], provenance.code()),
        "packages": (record["versions"], provenance.versions()),
        "runtime": (record["runtime"], provenance.runtime()),
        "machine": (record["machine"], provenance.machine()),
    }
    return [f"{name}: was {before}, is {after}" for name, (before, after) in now.items() if before != after]


# the replay


def _replay(options: Options, folder: Path, record: dict[str, Any]) -> None:
    """Train again in replay/ below the run's own folder, which is removed if the result is the same."""
    processes = [start["processes"] for start in record.get("starts", [])]
    mixed = len(set(processes)) > 1
    if mixed and Recipe.from_record(record["recipe"]).dropout:
        raise UserError(
            f"run {folder.name!r} was computed in {', then '.join(map(str, processes))} processes: dropout drew other "
            "masks in each, which a single start does not draw again. The hashes above hold."
        )
    replay = folder / "replay"
    shutil.rmtree(replay, ignore_errors=True)
    print(f"training it again in {replay}", flush=True)
    status = subprocess.run(
        [sys.executable, "-m", "train", "train", *_replay_words(options, folder, record, replay)]
    ).returncode
    if status:
        raise UserError(f"the replay ended with status {status}; what it wrote is in {replay}.")
    if difference := _difference(folder, replay / "again", TOLERANCE if mixed else 0.0):
        raise UserError(f"the replay is not the same: {difference}.\nIt is kept in {replay}.")
    shutil.rmtree(replay)
    result = "model" if "weights" in record else "adapter"
    what = (
        f"losses within {TOLERANCE:g}, in {processes[-1]} processes" if mixed else f"losses, and the {result}'s bytes"
    )
    print(f"the replay is the same: {record['steps']} {what}.")


def _replay_words(options: Options, folder: Path, record: dict[str, Any], replay: Path) -> list[str]:
    """Options of `train` that compute the run again."""
    words = {
        "recipe": str(folder / "recipe.yaml"),
        "data": record["data"]["path"],
        "run": "again",
        "runs": str(replay),
        "models": options.models,
        "processes": str(record["processes"]) if record["device"] == "cpu" else "1",
        "gpus": "1" if record["device"] == "cpu" else str(record["processes"]),
    }
    if record["lineage"]:
        words["from_run"] = str(Path(record["lineage"][-1]["run"]).absolute())
    return [f"{key}={value}" for key, value in words.items()]


def _difference(first: Path, second: Path, tolerance: float) -> str:
    """The first difference between two runs, in words; empty if their losses and adapters are the same to the bit.

    With a relative `tolerance` only losses are compared, to within it.
    """
    before, after = (_read_losses(folder) for folder in (first, second))
    for old, new in zip(before, after):
        keys = [key for key in old if not _same(old[key], new.get(key), tolerance * (key in SUMS))]
        if keys:
            return f"step {old['step']}: " + ", ".join(f"{key} was {old[key]}, is {new.get(key)}" for key in keys)
    if len(before) != len(after):
        return f"{len(before)} steps before, {len(after)} now"
    recorded, again = (provenance.hash_folder(result_folder(folder)) for folder in (first, second))
    same_files = {name: value for name, value in again.items() if name in recorded}  # older runs saved no tokenizer
    return "" if tolerance else ", ".join(_compare_hashes(same_files, recorded))


def _same(first: Any, second: Any, tolerance: float) -> bool:
    if tolerance and isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=tolerance)
    return bool(first == second)


def _read_losses(folder: Path) -> list[dict[str, Any]]:
    """Rows of losses.jsonl without their seconds, which no replay repeats."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in losses.read(folder)]
