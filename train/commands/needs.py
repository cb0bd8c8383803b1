"""The paths that a command will need, for the script that starts a container and mounts those outside its folders.

    python -m train needs VERB [key=value …]

writes records `WHAT PATH`, each ended by a zero byte. Paths are as they were typed: relative to the working folder.

    make PATH     the command writes to this folder, which is made where it is missing
    write PATH    the command writes to this folder
    read PATH     the command reads this file or folder, if it is there
    fetch NAME    no path: the base that `model` is to fetch first

A recipe names the data of its stages, and a run its data and its base. Where the recipe or the run is not visible yet,
the script mounts it and asks again, until it hears nothing new. What is wrong with the words or the files is not said
here: the command itself says it.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.common.errors import UserError
from train.common.files import read_json
from train.config.recipe import load_recipe, read_stages

if TYPE_CHECKING:
    from train.__main__ import Verb

Record = tuple[str, str]
RECORD = {"write": "make", "may-write": "write", "read": "read"}  # for each word of the verb table
READ = ("model", "recipe", "onto", "questions")  # keys that name a path, in every verb alike


def paths(name: str, verb: "Verb", words: list[str]) -> list[Record]:
    """Records of what verb `name` with these words needs, each once, what is written to first. None for --help."""
    values = dict(word.split("=", 1) for word in words if "=" in word)
    if {"-h", "--help", "help"} & set(words):
        return []
    found = [*_folders(verb, values), *(("read", path) for path in _read(name, values))]
    order = ("make", "write", "read")
    return sorted({record: None for record in found if record[1]}, key=lambda record: order.index(record[0]))


def write(records: Iterable[Record]) -> None:
    """Print them; a path that is no UTF-8 comes out as the bytes that it was typed in."""
    sys.stdout.buffer.write(b"".join(os.fsencode(f"{what} {path}") + b"\0" for what, path in records))
    sys.stdout.buffer.flush()


def _folders(verb: "Verb", values: dict[str, str]) -> Iterator[Record]:
    for key, use in (("runs", verb.runs), ("models", verb.models)):
        if key in values and use in RECORD:
            yield RECORD[use], values[key]
    out = values.get("out", "")
    if "/" in out or (out and verb.models != "write"):  # else it is a name below models/
        yield "write", str(Path(out).parent)


def _read(name: str, values: dict[str, str]) -> Iterator[str]:
    yield from (values[key] for key in READ if key in values)
    yield from _data(values.get("data", ""))
    if recipe := values.get("recipe", ""):
        yield from _of_recipe(recipe)
    runs = Path(values.get("runs", "runs"))
    if run := runs / values["run"] if values.get("run") else _newest(runs) if name == "infer" else None:
        for path in (run, *sorted(run.glob("stages/*"))):
            yield from _of_run(path)


def _data(data: str) -> list[str]:
    """A file or folder, or several with commas between; both, where it is not visible yet which of them is meant."""
    with suppress(OSError):  # a list of files may be longer than a name can be
        if Path(data).exists():
            return [data]
    return [data, *(part.strip() for part in data.split(","))]


def _of_recipe(recipe: str) -> Iterator[str]:
    with suppress(UserError, OSError):
        yield load_recipe(recipe, {}).model
        for stage in read_stages(recipe):
            yield from _data(stage.get("data", ""))


def _newest(runs: Path) -> Path | None:
    """The finished run that `infer` takes when it is told none."""
    finished = sorted(runs.glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    return finished[-1].parent if finished else None


def _of_run(run: Path) -> Iterator[str]:
    """Data and base that a run was made of, and the questions beside the data."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        inputs: dict[str, Any] = read_json(run / "inputs.json")
        base, data = str(inputs["base"]["name"]), str(inputs["data"]["path"])
        yield base
        yield from _data(data)
        yield from (str(Path(data).with_name(f"{Path(data).stem}_questions{end}")) for end in (".txt", ".jsonl"))
