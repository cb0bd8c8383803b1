"""Say whether a finished run is still what run.json says: every file that it speaks of, by its hash.

make verify RUN=name [REPLAY=1]

REPLAY=1 trains it again, aside, from the same inputs, and compares every loss and the adapter's bytes: the same on the same machine,
packages and number of processes, however often the run was cut off; its stages too. Where that number changed under way, losses
may differ by the order of sums, and with dropout a replay is refused. Nothing of the run is changed. What has become of the program,
the lock and the machine since is told too, but is no fault of the run.
"""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.common.errors import UserError
from train.common.files import read_json, sha256
from train.config.options import option
from train.config.recipe import Recipe
from train.model.folder import find, find_damage, read_manifest
from train.runs import provenance

TOLERANCE, ROUNDED = 1e-5, ("loss", "grad_norm")  # where float32 is summed in another order
Findings = list[tuple[str, list[str]]]  # what was looked at, and what is wrong with it


@dataclass(frozen=True)
class Options:
    """Is a run still what its record says?"""

    run: str = option("", "name of a finished run below runs/")
    replay: bool = option(False, "train it again, aside, and compare losses and adapter")
    models: str = option("models", "folder of the models")
    runs: str = option("runs", "folder of the runs")


def run(options: Options) -> None:
    # --- the record -------------------------------------------------------------------------------------------------------
    if not options.run:
        raise UserError("verify: which run? Example: make verify RUN=demo")
    folder = Path(options.runs) / options.run
    record = _record(folder)

    stages = [(path.parent, _record(path.parent)) for path in sorted(folder.glob("stages/*/run.json"))]

    # --- every hash in it -------------------------------------------------------------------------------------------------
    found = [*_own(folder, record), *_inputs(options, record), *_beside(folder)]
    for path, one in stages:
        found += [(f"stage {path.name}: {title}", wrong) for title, wrong in [*_own(path, one), *_beside(path)]]
    for title, wrong in found:
        print(f"{'same   ' if not wrong else 'DIFFERS'}  {title}" + "".join(f"\n           {line}" for line in wrong))
    for line in _since(record):
        print(f"note     {line}")
    print(f"run.json itself: sha256 {sha256(folder / 'run.json')}", flush=True)
    if any(wrong for _, wrong in found):
        raise UserError(f"run {options.run!r} is not what its record says; see above.")

    # --- the training itself ----------------------------------------------------------------------------------------------
    if options.replay:
        for path, one in [*stages, (folder, record)]:
            _replay(options, path, one)


def _record(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file. The run is not finished; the command that began it goes on.")
    try:
        record: dict[str, Any] = read_json(path)
        record["adapter"], record["base"]["files"], record["data"]["sha256"], record["losses_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged, or of an older version of this program ({error!r}).") from error
    return record


def _own(folder: Path, record: dict[str, Any]) -> Findings:
    """The run's own files."""
    names = {"inputs.json": "inputs_sha256", "recipe.yaml": "recipe_sha256", "losses.jsonl": "losses_sha256"}
    singles: Findings = [(name, _file(folder / name, record[key])) for name, key in names.items()]
    return [*singles, ("adapter", _compare(provenance.hash_folder(folder / "adapter"), record["adapter"]))]


def _file(path: Path, known: str) -> list[str]:
    if not path.is_file():
        return [f"{path} is gone"]
    return [] if sha256(path) == known else [f"{path} has another sha256 than when the run ended"]


def _compare(now: Mapping[str, str], then: Mapping[str, str]) -> list[str]:
    """What differs between two sets of hashes, a line a file."""
    gone = [f"{name} is gone" for name in sorted(then.keys() - now.keys())]
    new = [f"{name} was not there" for name in sorted(now.keys() - then.keys())]
    other = [f"{name} has another sha256" for name in sorted(now.keys() & then.keys()) if now[name] != then[name]]
    return gone + new + other


def _inputs(options: Options, record: dict[str, Any]) -> Findings:
    """What it was made of: data, base, and the runs that it stands on."""
    from train.data.conversations import hash_data

    model = Recipe.from_record(record["recipe"]).model
    base = find(model, Path(options.models))
    files = provenance.hash_folder(base) if base else {}
    found: Findings = [(f"base {model}", _compare(files, record["base"]["files"]) if base else ["it is gone"])]
    path = record["data"]["path"]
    try:
        same = hash_data(path)["sha256"] == record["data"]["sha256"]
        found.append((f"data {path}", [] if same else [f"{path} has another sha256"]))
    except UserError as error:
        found.append((f"data {path}", [str(error)]))
    for entry in record["lineage"]:
        adapter = Path(entry["run"]) / "adapter"
        found.append((f"adapter of {entry['run']}", _compare(provenance.hash_folder(adapter), entry["adapter"])))
    return found


def _beside(folder: Path) -> Findings:
    """What is in the folder and hashed there: checkpoints, and exports."""
    from train.runs import checkpoint

    names = sorted((folder / "checkpoints").glob("step-*"))
    found: Findings = [(f"checkpoint {path.name}", [h] if (h := checkpoint.harm(path)) else []) for path in names]
    for path in sorted(folder.glob("*/manifest.json")):
        if listed := read_manifest(path.parent):
            found.append((f"export {path.parent.name}", find_damage(path.parent, listed, full=True)))
    return found


def _since(record: dict[str, Any]) -> list[str]:
    """What is another here and now; a replay may then compute other bytes."""
    now = {
        "env.lock": (record["lock"], provenance.lock()),
        "program": (record["code"], provenance.code()),
        "packages": (record["versions"], provenance.versions()),
        "runtime": (record["runtime"], provenance.runtime()),
        "machine": (record["machine"], provenance.machine()),
    }
    return [f"{name}: was {then}, is {here}" for name, (then, here) in now.items() if then != here]


# --- training it again ----------------------------------------------------------------------------------------------------


def _replay(options: Options, folder: Path, record: dict[str, Any]) -> None:
    """Train again below the run's own folder; gone afterwards, if it is the same."""
    numbers = [start["processes"] for start in record.get("starts", [])]
    mixed = len(set(numbers)) > 1
    if mixed and Recipe.from_record(record["recipe"]).dropout:
        raise UserError(
            f"run {folder.name!r} was computed in {', then '.join(map(str, numbers))} processes: dropout drew other numbers in each, "
            "which no single start draws again. The hashes above hold."
        )
    aside = folder / "replay"
    shutil.rmtree(aside, ignore_errors=True)
    print(f"training it again in {aside}", flush=True)
    status = subprocess.run(
        [sys.executable, "-m", "train", "train", *_words(options, folder, record, aside)]
    ).returncode
    if status:
        raise UserError(f"the replay ended with status {status}; what it wrote is in {aside}.")
    wrong = _difference(folder, aside / "again", TOLERANCE if mixed else 0.0)
    if wrong:
        raise UserError(f"the replay is not the same: {wrong}.\nIt is kept in {aside}.")
    shutil.rmtree(aside)
    what = f"losses within {TOLERANCE:g}, in {numbers[-1]} processes" if mixed else "losses, and the adapter's bytes"
    print(f"the replay is the same: {record['steps']} {what}.")


def _words(options: Options, folder: Path, record: dict[str, Any], aside: Path) -> list[str]:
    """The command line that computes the run again."""
    words = {
        "recipe": str(folder / "recipe.yaml"),
        "data": record["data"]["path"],
        "run": "again",
        "runs": str(aside),
        "models": options.models,
        "processes": str(record["processes"]) if record["device"] == "cpu" else "1",
        "gpus": "1" if record["device"] == "cpu" else str(record["processes"]),
    }
    if record["lineage"]:
        words["from_run"] = str(Path(record["lineage"][-1]["run"]).absolute())
    return [f"{key}={value}" for key, value in words.items()]


def _difference(first: Path, second: Path, tolerance: float) -> str:
    """How two runs differ, in words; empty if their losses and adapters are the same to the bit, or with a `tolerance` their losses
    within it, relative."""
    one, two = (_losses(folder) for folder in (first, second))
    for ours, theirs in zip(one, two):
        keys = [key for key in ours if not _same(ours[key], theirs.get(key), tolerance * (key in ROUNDED))]
        if keys:
            return f"step {ours['step']}: " + ", ".join(f"{key} was {ours[key]}, is {theirs.get(key)}" for key in keys)
    if len(one) != len(two):
        return f"{len(one)} steps before, {len(two)} now"
    files = _compare(provenance.hash_folder(second / "adapter"), provenance.hash_folder(first / "adapter"))
    return "" if tolerance else ", ".join(files)


def _same(one: Any, two: Any, tolerance: float) -> bool:
    if tolerance and isinstance(one, float) and isinstance(two, float):
        return math.isclose(one, two, rel_tol=tolerance)
    return bool(one == two)


def _losses(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "losses.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]
