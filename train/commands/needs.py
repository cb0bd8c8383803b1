"""The paths that a command needs, for the script that starts a container and mounts those outside its folders.

    python -m train needs VERB [key=value …]

writes records `WHAT PATH`, each ended by a zero byte. Paths are as they were typed: relative to the working folder.

    make PATH     the command writes to this folder, which is made if it is missing
    write PATH    the command writes to this folder
    read PATH     the command reads this file or folder, if it is there
    fetch NAME    not a path: the base that `model` has to fetch first

A recipe names the data of its stages, and a run its data, its base and what it started from. Where the recipe or the
run is not visible yet, the script mounts it and asks again, until there is nothing new. Errors in the words or the
files are not reported here: the command itself reports them.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from train.common.errors import UserError
from train.common.files import read_json
from train.config.options import SWITCH
from train.config.recipe import load_recipe, read_data, read_stages, read_sweep
from train.data.origins.sources import named_paths
from train.runs.folder import newest_run

Record = tuple[str, str]
RECORD_KINDS = {"write": "make", "may-write": "write", "read": "read"}  # by the word in the verb table
PATH_KEYS = ("model", "recipe", "onto", "questions", "log")  # keys that name a path to read, in every verb


class Verb(Protocol):
    """The columns of a row of the verb table that name folders."""

    @property
    def models(self) -> str: ...

    @property
    def runs(self) -> str: ...


def paths(name: str, verb: Verb, words: list[str]) -> list[Record]:
    """The records for verb `name` with these words, each once, folders to write first; none for --help."""
    values = dict(word.split("=", 1) for word in words if "=" in word)
    if {"-h", "--help", "help"} & set(words):
        return []
    records = [*_folders(name, verb, values), *(("read", path) for path in _paths_to_read(name, values))]
    order = ("make", "write", "read")
    return sorted({record: None for record in records if record[1]}, key=lambda record: order.index(record[0]))


def write(records: Iterable[Record]) -> None:
    """Print the records; a path that is not UTF-8 is printed as the bytes that were typed."""
    sys.stdout.buffer.write(b"".join(os.fsencode(f"{what} {path}") + b"\0" for what, path in records))
    sys.stdout.buffer.flush()


def _folders(name: str, verb: Verb, values: dict[str, str]) -> Iterator[Record]:
    for key, use in (("runs", verb.runs), ("models", verb.models)):
        if key in values and use in RECORD_KINDS:
            yield RECORD_KINDS[use], values[key]
    if (page := values.get("html", "")) and page.lower() not in SWITCH:
        yield "write", str(Path(page).parent)
    out = values.get("out", "")
    if questions := values.get("questions", "") if name == "infer" else "":
        yield "write", str(Path(values.get("answers") or questions).parent)
    if "/" in out or (out and verb.models != "write"):  # otherwise it is a name below models/
        yield "write", str(Path(out).parent)
    elif SWITCH.get(values.get("fix", "").lower()):  # the result lies beside the data
        parents = {str(Path(part).parent) for part in named_paths(values.get("data", ""))}
        yield from (("write", parent) for parent in sorted(parents))


def _paths_to_read(name: str, values: dict[str, str]) -> Iterator[str]:
    yield from (values[key] for key in PATH_KEYS if key in values)
    yield from named_paths(values.get("data", ""))
    if recipe := values.get("recipe", ""):
        yield from _recipe_paths(recipe)
    runs = Path(values.get("runs", "runs"))
    parent = values.get("from_run") or values.get("from", "")
    if parent and not os.path.isdir(runs / parent):  # noqa: PTH112  # Path.is_dir raises for a name that is too long
        yield parent
    newest = newest_run(runs) if name in ("infer", "serve") and not values.get("run") else None
    for run in [newest] if newest else [runs / one for one in values.get("run", "").split(",") if one]:
        for path in (run, *sorted(run.glob("stages/*"))):
            yield from _run_paths(path)


def _recipe_paths(recipe: str) -> Iterator[str]:
    """The base of a recipe, and the data of its stages."""
    with suppress(UserError, OSError):
        yield load_recipe(recipe, dict(*read_sweep(recipe, {})[:1])).model
        if data := read_data(recipe):
            yield from named_paths(data)
        for stage in read_stages(recipe):
            yield from named_paths(stage.get("data", ""))


def _run_paths(run: Path) -> Iterator[str]:
    """The base and the data of a run, the questions that may be next to the data, and the runs that it started from."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        inputs: dict[str, Any] = read_json(run / "inputs.json")
        base, data = str(inputs["base"]["name"]), str(inputs["data"]["path"])
        yield base
        data_paths = list(named_paths(data))
        yield from data_paths
        for path in (Path(part) for part in data_paths if Path(part).name):
            yield from (str(path.with_name(f"{path.stem}_questions{end}")) for end in (".txt", ".jsonl", ".json"))
    with suppress(OSError, ValueError, KeyError, TypeError):
        yield from (str(entry["run"]) for entry in read_json(run / "run.json")["lineage"])
