"""Every option of every command with boundary values, wrong types, absurd sizes and odd texts.

What must hold for each case: no traceback; a value outside its interval or choices ends with status 2 and a sentence
that names the option, before anything is loaded; what is refused changes no file; nothing is written outside the
folder of the project. The commands run in this process through train.__main__.main. Where they would load a model,
start a process or use the network, `Cut` ends the case: the options have passed every check.
"""

import copy
import dataclasses
import functools
import importlib
import os
import shutil
import subprocess
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.oracles import tiny_checkpoint, tiny_config
from tests.support.runs import tiny_run
from train.__main__ import VERBS, main
from train.config import recipe, recipe_yaml
from train.config.options import RecipeOptions, _options
from train.config.recipe import Recipe


class Cut(BaseException):
    """A command has passed its checks and would load a model, start a process or use the network."""


CUTS = (  # module, name
    ("train.training.prepare", "begin"),
    ("train.training.train_one", "begin"),
    ("train.training.launch", "spawn"),
    ("train.export.merge", "write"),
    ("train.evaluation.answers", "load"),
    ("train.inference.trained", "load"),
    ("train.commands.infer", "load_stock"),
    ("train.commands.quantize", "write"),
    ("train.model.sources", "fetch_locked"),
    ("train.model.sources", "fetch_published"),
    ("train.data.origins.hub_fetch", "fetch_split"),
    ("train.commands.demo", "call"),
    ("train.commands.serve", "serve"),
    ("train.commands.studio", "serve"),
    ("train.commands.train_sweep", "train_each"),
)
WORDS = {  # a command line of each verb that reaches its checks
    "model": ("model=base-Int4",),
    "fetch": ("data=hub:owner/name",),
    "quantize": ("model=float",),
    "doctor": ("data=conversations.jsonl", "model=base-Int4", "recipe=smoke"),
    "plan": ("model=base-Int4", "gpu=8G", "recipe=smoke"),
    "data": ("data=conversations.jsonl", "model=base-Int4", "recipe=smoke"),
    "train": ("data=conversations.jsonl", "model=base-Int4", "recipe=smoke", "run=new", "background=off"),
    "export": ("run=tiny",),
    "infer": ("run=tiny", "prompt=hi"),
    "compare": ("run=tiny",),
    "report": ("run=tiny",),
    "serve": ("run=tiny",),
    "studio": (),
    "verify": ("run=tiny",),
    "demo": (),
}
RECIPE_VERBS = [
    name for name in VERBS if issubclass(importlib.import_module(f"train.commands.{name}").Options, RecipeOptions)
]
HUGE = "9" * 40
WRONG_NUMBERS = [
    "",
    " ",
    "x",
    "nan",
    "inf",
    "-inf",
    "1e400",
    HUGE,
    f"-{HUGE}",
    "9" * 5000,
    "0x10",
    "1,5",
    "½",
    "None",
    "1;2",
    "--1",
]
WRONG_WHOLE = ["1.5", "1e3", "2.0", "on"]
WRONG_CHOICES = ["", " ", "x", "nan", "-1", "ON OFF", "名", "x" * 5000]
TEXTS = [
    "", " ", "x" * 300, "x" * 5000, "a/" * 2500, ".", "..", "../..", "/", "//", "~", "-", "=", "a=b", ",", ",,", "*", "?",
    "{}", "{x", "%s", "$(id)", "'", '"', "\\", "a\nb", "\t", "\x1b[31m", "名前", "é", "\u200b", "\u202e", "😀", "null", "nan",
    "-1", "1e999", "conversations.jsonl", "models", "runs", "runs/tiny/run.json", "models/base-Int4/config.json",
    "models/base-Int4", "/dev/null", "/proc/self/mem", "C:\\x", "https://x.y/z", "Qwen/", "/Qwen", "a" * 255, "名" * 90,
]  # fmt: skip
NEVER = ["a\0b", "a\udcff"]  # no file and no terminal can hold them
OUTSIDE = [".", "..", "../..", "/", "//", "x" * 300, "x" * 5000, "名" * 90, "/dev/null"]
WRITTEN = ("runs", "models", "out")  # folders that a command may write to, wherever the user says; here: not to /
SHORT = {"numbers": 9, "texts": 6}  # values of each option in the default suite


@dataclasses.dataclass(frozen=True)
class Case:
    """One option with one value; `refused`: the value can never be right."""

    verb: str
    key: str
    value: str
    refused: bool


def cases(verb: str, whole: bool) -> Iterator[Case]:
    """All cases of a verb; `whole`: the long form."""
    options = importlib.import_module(f"train.commands.{verb}").Options
    own = _options(options)
    keys = {**(_options(Recipe) if verb in RECIPE_VERBS else {}), **own}
    types = {**typing.get_type_hints(Recipe), **typing.get_type_hints(options)}
    for number, (key, field) in enumerate(keys.items()):
        if verb in RECIPE_VERBS and key not in own and not whole and (number + RECIPE_VERBS.index(verb)) % 4:
            continue  # in the short form each key of the recipe goes to one of the commands
        values = list(dict.fromkeys(_values(types[key], field)))
        refused, others = [v for v in values if v[1]], [v for v in values if not v[1]]
        if not whole:  # another part of the values for each option
            refused = _some(refused, SHORT["numbers"], number)
            others = _some(others, SHORT["texts"] if types[key] is str else 3, number)
        for value, bad in refused + others:
            sweeps = verb == "train" and value == "1,5"  # two runs, for a number of the recipe
            yield Case(verb, key, value, bad and not sweeps)


def _some(values: list[Any], count: int, start: int) -> list[Any]:
    step = max(1, len(values) // count)
    return (values[start % step :: step])[:count]


def _values(kind: Any, field: "dataclasses.Field[Any]") -> Iterator[tuple[str, bool]]:
    """(value, whether it must be refused)."""
    choices, interval = field.metadata["choices"], field.metadata["interval"]
    if choices or kind is bool:
        yield from ((value, value not in (choices or ())) for value in WRONG_CHOICES)
        yield from ((value, False) for value in choices or ("on", "off", "1", "0", "TRUE", "No"))
    elif kind is str:
        yield from ((value, True) for value in NEVER)
        empty = [] if field.metadata["empty"] else ["", " "]
        outside = [*empty, *(OUTSIDE if field.name == "run" else ())]
        texts = [text for text in [*TEXTS, *OUTSIDE] if field.name not in WRITTEN or not text.startswith("/")]
        yield from ((value, value in outside) for value in texts)
    else:
        yield from ((value, True) for value in [*WRONG_NUMBERS, *(WRONG_WHOLE if kind is int else ())])
        low, high = kind(interval.low), kind(interval.high)
        step = 1 if kind is int else 1e-9 * max(1.0, abs(high))
        below, above = low - step, high + step
        yield from ((str(value), value not in interval) for value in (below, low, low + step, high - step, high, above))
        yield from ((value, False) for value in (f" {field.default} ", str(field.default)))


@functools.cache
def read_recipe(text: str) -> dict[str, Any]:
    """A recipe's YAML: a thousand cases read the same few."""
    return recipe_yaml.read_text_values(text)


@functools.cache
def installed_versions() -> dict[str, str]:
    from train.host import machine

    return machine.installed_versions()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a float base, data and a finished run."""
    root = tmp_path_factory.mktemp("fuzz")
    run = tiny_run(root)
    tiny_checkpoint(root / "models" / "float", tiny_config("qwen2"), int4=False)
    shutil.copytree(Path(__file__).parents[2] / "data", root / "data")
    (run / "inputs.json").write_text((run / "run.json").read_text())
    return root


@pytest.fixture
def house(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the working folder; the cuts are in place."""

    def cut(*args: Any, **keywords: Any) -> Any:
        raise Cut

    from train.host import checks, machine

    house = tmp_path / "a" / "b" / "house"
    shutil.copytree(made, house)
    monkeypatch.chdir(house)
    modules = [importlib.import_module(module) for module, _ in CUTS]  # all, before one could take a cut from another
    for module, (_, name) in zip(modules, CUTS, strict=True):
        monkeypatch.setattr(module, name, cut)
    monkeypatch.setattr(machine, "probe_torch", lambda: {"seen": 0, "errors": []})
    seen = machine.inspect_machine()
    monkeypatch.setattr(machine, "inspect_machine", lambda: seen)
    versions = installed_versions()
    monkeypatch.setattr(checks, "installed_versions", lambda: versions)
    monkeypatch.setattr(subprocess, "run", cut)
    monkeypatch.setattr(recipe, "read_text_values", lambda text: copy.deepcopy(read_recipe(text)))
    return house


def listed(root: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below `root`: size and time of change; folders without, for looking changes nothing."""
    paths = [Path(folder) / name for folder, names, files in os.walk(root) for name in (*names, *files)]
    return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) if not p.is_dir() else (0, 0) for p in paths}


def run(case: Case, capsys: pytest.CaptureFixture[str], needs: bool = False) -> tuple[str, str]:
    """("0", "2", … or "cut", what was printed) of a case; another exception is a failure of the test."""
    words = [word for word in WORDS[case.verb] if not word.startswith(f"{case.key}=")]
    command = [*(["needs"] if needs else []), case.verb, *words, f"{case.key}={case.value}"]
    try:
        status = str(main(command))
    except Cut:
        status = "cut"
    except SystemExit as error:
        status = str(error.code)
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def check(case: Case, house: Path, before: dict[str, tuple[int, int]], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a case; returns its status, or fails with what does not hold. `before` becomes what is there after it."""
    status, printed = run(case, capsys)
    name = f"{case.verb} {case.key}={case.value[:60]!r}: status {status}"
    assert status in ("0", "1", "2", "cut"), name
    assert "Traceback" not in printed, f"{name}\n{printed}"
    if case.refused:
        assert status == "2" and f"{case.key}=" in printed, f"{name}: not refused by name\n{printed[-600:]}"
    if status in ("1", "2"):
        assert printed.strip() and len(printed) < 20_000, f"{name}\n{printed[:300]}"
    root = house.parents[2]
    after = listed(root)
    if status in ("1", "2"):
        assert after == before, f"{name}: changed {set(after.items()) ^ set(before.items())}"
    outside = [path for path in after.keys() - before.keys() if not path.startswith(str(house))]
    assert not outside or case.key in WRITTEN, f"{name}: wrote {outside}"
    for path in sorted(after.keys() - before.keys()):  # what a case has begun does not meet the next one
        shutil.rmtree(path, ignore_errors=True) if Path(path).is_dir() else Path(path).unlink(missing_ok=True)
    if after != before:
        before.clear()
        before.update(listed(root))
    return status


def fuzz(verb: str, whole: bool, house: Path, capsys: pytest.CaptureFixture[str]) -> Counter[str]:
    """All cases of a verb; every one that does not hold is reported."""
    statuses: Counter[str] = Counter()
    failures = []
    before = listed(house.parents[2])
    for case in cases(verb, whole):
        try:
            statuses[check(case, house, before, capsys)] += 1
        except AssertionError as error:
            failures.append(str(error).partition("\nassert")[0])
            before = listed(house.parents[2])
        except Exception as error:
            failures.append(f"{verb} {case.key}={case.value[:60]!r}: {type(error).__name__}: {error!s:.200}")
            before = listed(house.parents[2])
    assert not failures, f"{len(failures)} of {sum(statuses.values()) + len(failures)}:\n" + "\n".join(failures)
    return statuses


@pytest.mark.parametrize("verb", VERBS)
def test_no_option_breaks_a_command(verb: str, house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    statuses = fuzz(verb, False, house, capsys)
    assert statuses["2"] > statuses.total() // 4, statuses


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_no_value_of_an_option_breaks_a_command(
    verb: str, house: Path, capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> None:
    statuses = fuzz(verb, True, house, capsys)
    record_property("cases", statuses.total())
    with capsys.disabled():
        print(f"\n{verb}: {statuses.total():,} cases: {dict(statuses)}")


@pytest.mark.parametrize("verb", VERBS)
def test_needs_takes_every_option(verb: str, house: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """docker/run asks what a command line needs before the command itself can refuse it."""
    for case in cases(verb, False):
        assert main(["needs", verb, *WORDS[verb], f"{case.key}={case.value}"]) in (0, 1, 2), case
        capsysbinary.readouterr()


def test_the_number_of_cases() -> None:
    short, whole = (sum(1 for verb in VERBS for _ in cases(verb, form)) for form in (False, True))
    assert short >= 1000 and whole >= 5000, (short, whole)


def test_every_verb_is_fuzzed() -> None:
    assert {*WORDS} == {*VERBS}
