"""What on this machine, in this recipe, base and data would fail, and the remedy, before anything is loaded or written.

make doctor [DATA=file] [MODEL=base] [RECIPE=name] [GPUS=n] [ARGS="key=value …"]

One line a check: ok, warn (it runs, but not as you may expect) or fail. Status 0 when nothing fails, 2 when something does. The machine
is looked at without torch, which is then tried in a process of its own. What a step takes of a card's memory is make plan's.
"""

import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from train.common.errors import UserError
from train.common.files import read_json
from train.config.options import RecipeOptions, build_with_overrides, describe, option
from train.config.recipe import Recipe, read_stages
from train.config.stages import Stage, stage
from train.data import conversations
from train.host import checks as diagnosis
from train.host import machine
from train.host.checks import Finding
from train.host.machine import Host
from train.model.folder import find, find_damage, is_hub_id, read_manifest

if TYPE_CHECKING:
    from train.model.decoder import Decoder

T = TypeVar("T")
__doc__ = f"{__doc__}\nEvery key of the recipe may be given too:\n{describe(Recipe)}\n\nKeys of this command:"

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "env.lock"
MODELS = ROOT / "data" / "models.lock"
A_NUMBER = 16  # bytes that an adapter's number takes at least while it learns: weight, gradient, float32 master, Adam's two moments
PROCESS = (
    2 << 30
)  # the machine's memory that a process with a card takes: 0.7 GB for torch and DeepSpeed, the rest for CUDA
UNNAMED = "?"  # data that nobody has named yet
COLOUR = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Options(RecipeOptions):
    """What to look at."""

    data: str = option("", "file, folder or several with commas between; empty: no data is looked at")
    model: str = option("", "base; empty: the recipe's")
    recipe: str = option("qlora", "a name in train/recipes/, or the path of a .yaml file")
    gpus: int = option(0, "GPUs that must be there; 0: whatever is there")
    models: str = option("models", "folder of bases")
    runs: str = option("runs", "folder of runs")


def parse(values: dict[str, str]) -> Options:
    """Options from key=value; any other key is left for the check of the recipe, which reports unknown ones."""
    return build_with_overrides(Options, values)


def run(options: Options) -> None:
    # --- this machine, without torch ----------------------------------------------------------------------------------------
    report = Report()
    here = machine.look()
    report.section("this machine")
    for finding in _machine(here, options.gpus):
        report.add(finding)

    torch_starts = "torch" not in report.failed

    # --- the recipe, or the recipes of its stages ---------------------------------------------------------------------------
    report.section(f"recipe {options.recipe}")
    work = _work(report, options)
    recipes = [part.recipe for part in work if part.recipe]
    for recipe in recipes if torch_starts else []:
        _ways(report, recipe, here)

    # --- the base, the data -------------------------------------------------------------------------------------------------
    folder = _folder(report, recipes[0], Path(options.models)) if recipes else None
    if folder and torch_starts:
        largest = max(recipes, key=lambda recipe: recipe.batch * recipe.length)
        _base(report, largest, folder, here, Path(options.runs))
    else:
        report.add(diagnosis.check_folder("runs", Path(options.runs)))
    for part in work:
        if part.data:
            report.section(f"data {part.data}{part.text}")
            _data(report, part.recipe, folder if torch_starts else None, part.data)
    report.end()


class Report:
    """Prints a line a finding as it comes, and counts."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
        self.counts = {"ok": 0, "warn": 0, "fail": 0}
        self.failed: set[str] = set()

    def section(self, title: str) -> None:
        from rich.text import Text

        self.console.print(Text(("\n" if sum(self.counts.values()) else "") + title, style="bold"))

    def add(self, finding: Finding | None) -> None:
        from rich.table import Table
        from rich.text import Text

        if finding is None:
            return
        self.counts[finding.state] += 1
        self.failed |= {finding.name} if finding.state == "fail" else set()
        line = Table.grid(padding=(0, 2))
        line.add_column(width=6, justify="right")
        line.add_column(width=14)
        line.add_column(overflow="fold")
        line.add_row(Text(finding.state, style=COLOUR[finding.state]), finding.name, Text(finding.text))
        if finding.remedy:
            line.add_row("", "", Text(f"Remedy: {finding.remedy}", style="italic"))
        self.console.print(line)

    def attempt(self, name: str, check: Callable[[], T], tell: Callable[[T], str]) -> T | None:
        """What `check` returns, told as ok; None where it raises a UserError, told as a failure."""
        try:
            value = check()
        except UserError as error:
            self.add(Finding(name, "fail", str(error)))
            return None
        self.add(Finding(name, "ok", tell(value)))
        return value

    def end(self) -> None:
        """The sum; raises UserError if something failed."""
        checks, warned, failed = sum(self.counts.values()), self.counts["warn"], self.counts["fail"]
        self.console.print(f"\n{checks} checks: {self.counts['ok']} ok, {warned} warn, {failed} fail")
        if failed:
            raise UserError(f"{failed} of {checks} checks fail. Nothing was changed.")


def _machine(here: Host, wanted: int) -> Iterator[Finding | None]:
    installed = machine.installed_versions()
    yield diagnosis.check_card(here, wanted)
    yield diagnosis.check_driver(here)
    yield diagnosis.check_generation(here)
    yield diagnosis.check_torch(here, machine.probe() if here.torch else {})
    if here.torch:
        yield diagnosis.check_libraries(importlib.metadata.requires("torch") or [], installed)
    yield diagnosis.check_lock(LOCK.read_text(encoding="utf-8") if LOCK.is_file() else "", installed)
    yield diagnosis.check_triton(here, Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"))
    yield diagnosis.check_shared(here, wanted)


# The recipe


@dataclass(frozen=True)
class Part:
    """What one run learns: by a recipe, None where it cannot be read, from data, empty where none is to be looked at."""

    recipe: Recipe | None
    data: str
    text: str = ""

    @classmethod
    def of(cls, found: Stage) -> "Part":
        return cls(found.recipe, "" if found.data == UNNAMED else found.data, found.text and f", {found.text}")


def _work(report: Report, options: Options) -> list[Part]:
    """One part, or one a stage; a stage that names no data is looked at only with DATA=."""
    overrides = options.overrides | ({"model": options.model} if options.model else {})

    def read() -> list[Part]:
        stages = read_stages(options.recipe)
        open_ends = not stages or any("data" not in values for values in stages)
        data = options.data or (UNNAMED if open_ends else "")
        numbers = range(1, len(stages) + 1) if stages else [0]
        return [Part.of(stage(options.recipe, number, overrides, data, Path(), None)) for number in numbers]

    return report.attempt(
        "keys", read, lambda parts: "; then ".join(_sum_up(part.recipe) for part in parts if part.recipe)
    ) or [Part(None, options.data)]


def _sum_up(recipe: Recipe) -> str:
    steps = f"{recipe.steps} steps" if recipe.steps else f"{recipe.epochs:g} epochs"
    rows = recipe.batch * recipe.accumulation
    return f"r {recipe.rank} on {recipe.targets}, {steps}, a step {rows} × {recipe.length} tokens a process, ZeRO {recipe.zero}"


def _ways(report: Report, recipe: Recipe, here: Host) -> None:
    from train.training.prepare import check_supported

    def check() -> None:
        check_supported(recipe, "cuda" if here.cards else "cpu")

    report.attempt("way", check, lambda _: f"precision={recipe.precision} and zero={recipe.zero} go together here")
    old = [card for card in here.cards if card.capability and card.capability < (8, 0)]
    if old and recipe.precision == "bf16":
        text = f"bf16 on {old[0].name}, which has no arithmetic for it: slow"
        report.add(Finding("precision", "warn", text, "precision=auto takes fp16 there"))


# The base


def _folder(report: Report, recipe: Recipe, models: Path) -> Path | None:
    """The base's folder, if it is there and whole; else what fetching it needs."""
    report.section(f"base {recipe.model}")
    found: list[Path | None] = []
    try:
        found = [find(recipe.model, models)]
    except UserError as error:
        report.add(Finding("folder", "fail", str(error)))
    if found == [None]:
        report.add(_absent(recipe.model))
        report.add(diagnosis.check_folder("models", models, _download(recipe.model)))
    folder = found[0] if found else None
    if folder and report.attempt("folder", lambda: _whole(folder), lambda text: f"{folder}: {text}"):
        return folder
    return None


def _absent(model: str) -> Finding:
    text, remedy = "not here yet", f"make model MODEL={model} fetches it; make train does so by itself"
    if is_hub_id(model) or _download(model):
        return Finding("folder", "warn", text, remedy)
    return Finding("folder", "fail", f"{text}: no folder, no hub id (owner/name), no name in data/models.lock")


def _download(model: str) -> int:
    """Bytes that fetching a name of data/models.lock takes: its pieces, the file and its weights in float16; 0 for any other."""
    import yaml

    lock = yaml.safe_load(MODELS.read_text(encoding="utf-8")) if MODELS.is_file() else {}
    return 4 * int(lock[model]["bytes"]) if model in lock else 0


def _whole(folder: Path) -> str:
    manifest = read_manifest(folder)
    if wrong := find_damage(folder, manifest, full=False) if manifest else []:
        raise UserError(f"{folder} is damaged: {'; '.join(wrong)}. Remove the folder and fetch it again.")
    return "names and sizes as its manifest says" if manifest else "a folder of yours, with no manifest"


def _base(report: Report, recipe: Recipe, folder: Path, here: Host, runs: Path) -> None:
    """Config, tensors, tokenizer; then the room that this base and this recipe take at least."""
    from train.model import lora
    from train.model.architecture import read_shape
    from train.model.loading import load_structure
    from train.model.tokenizer import load_tokenizer
    from train.training import memory_estimate, prepare

    report.attempt("tokenizer", lambda: load_tokenizer(folder), lambda tokenizer: f"{tokenizer.vocab_size:,} tokens")
    found = report.attempt(
        "tensors", lambda: load_structure(folder), lambda found: f"all {len(found[1])}: {_shape(found[0])}"
    )
    if found is None:
        return
    config = found[0].config
    names = report.attempt("targets", lambda: lora.targets(config.layout, recipe.targets), ", ".join)
    if recipe.length > config.max_position_embeddings:
        text = f"length={recipe.length} is more than the {config.max_position_embeddings} it was made for"
        report.add(Finding("length", "warn", text, f"length={config.max_position_embeddings}"))
    if names:
        report.add(diagnosis.check_folder("runs", runs, prepare.disk_space(config, names, recipe)))
        adapter = A_NUMBER * prepare.adapter_parameters(config, names, recipe.rank)
        report.add(_memory(here, found[0], folder, adapter, recipe))
    if here.cards:  # weights pass through one tensor at a time
        largest = 2 * config.vocab_size * config.hidden_size
        kept = memory_estimate.on_host(
            read_shape(read_json(folder / "config.json")), memory_estimate.Setting.of(recipe)
        )
        report.add(diagnosis.check_room("memory", PROCESS + largest + kept, here.memory))


def _shape(model: "Decoder") -> str:
    config = model.config
    return f"layout {config.layout}, {config.num_hidden_layers} layers of {config.hidden_size}"


def _memory(here: Host, model: "Decoder", folder: Path, adapter: int, recipe: Recipe) -> Finding:
    """Room for the step as planned, on the card with most of it; without a plan, for weights, adapter and its optimizer at least."""
    card = max(here.cards, key=lambda card: card.free or 0, default=None)
    if (
        card
        and card.total
        and card.free
        and card.capability
        and card.capability >= (8, 0)
        and recipe.precision != "fp32"
    ):
        return _planned(recipe, folder, card.free, card.total)
    quantised = any(name.endswith("qweight") for name, _ in model.named_buffers())
    width = 2 if here.cards and recipe.precision != "fp32" else 4
    numbers = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    needed = adapter + (stored if quantised and stored else width * numbers)
    if card and card.total and card.free is not None:
        return diagnosis.check_room("card's memory", needed, card.free, card.total)
    return diagnosis.check_room("memory", needed, here.memory)


def _planned(recipe: Recipe, folder: Path, free: int, total: int) -> Finding:
    """The peak of a step, CUDA's context included; where it does not fit, the quickest way to compute the same rows that does."""
    from train.model.architecture import read_shape
    from train.training import memory_estimate

    shape = read_shape(read_json(folder / "config.json"))
    needed = memory_estimate.estimate(shape, memory_estimate.Setting.of(recipe)).with_context
    found = diagnosis.check_room("card's memory", needed, free, total, word="at its peak about")
    chosen = memory_estimate.choose(shape, recipe, free)
    if found.state == "ok" or (chosen and chosen[0] == memory_estimate.Setting.of(recipe)):
        return found
    if chosen is None:
        return replace(found, remedy=f"{found.remedy} What would fit: make plan MODEL={recipe.model}")
    return replace(found, remedy=f'The same rows a step, in less: ARGS="{chosen[0].words()}"')


# The data


def _data(report: Report, recipe: Recipe | None, folder: Path | None, data: str) -> None:
    """Read it all; with the base's tokenizer and a recipe also count it, as training will."""
    reading = report.attempt(
        "rows", lambda: _read(data), lambda reading: f"{len(reading.conversations):,} conversations"
    )
    if reading is None or recipe is None or folder is None:
        return
    from train.data.samples import encode
    from train.model.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(folder)
    except UserError:
        return  # told already, of the base
    report.attempt("tokens", lambda: encode(reading.conversations, tokenizer, recipe)[1], str)


def _read(data: str) -> conversations.CheckedData:
    reading = conversations.check(data)
    if reading.problems:
        more = f"\nAll of them: make data DATA={data}" if len(reading.problems) > 3 else ""
        raise UserError(conversations.report(reading.problems, limit=3) + more)
    return reading
