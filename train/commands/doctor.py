"""Find what would fail with this machine, recipe, base and data, and how to fix it, before anything is loaded.

make doctor [DATA=file] [MODEL=base] [RECIPE=name] [GPUS=n] [ARGS="key=value …"]

One line per check: ok, warn (it runs, but not as you may expect) or fail. Status 0 when nothing fails, 2 when something
does; STRICT=1: 2 for a warning too. JSON=1: one JSON object for a program. The machine is inspected without torch,
which is then tried in a process of its own. make plan says what of a card's memory a step takes.

make doctor LOG=file explains a failed run, of this program or of another one, by its log: cause and remedy. LOG=- reads
the standard input. Status 2 when the log shows a failure.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from train.commands.doctor_memory import as_trained, check_host_memory, check_training_memory
from train.commands.findings import Report
from train.common import commands
from train.common.errors import UserError
from train.config.options import RecipeOptions, build_with_overrides, describe, option
from train.config.recipe import Recipe, check_measured, check_preference, read_data, read_stages
from train.config.stages import Stage, stage
from train.data.checked import conversations
from train.data.checked.conversations import Conversation
from train.data.choice.cleaning import named_steps
from train.data.choice.selection import check_settings, keeps_empty, select, token_counter
from train.data.rows.data_row import GUESS, ReadOptions
from train.data.tokens.settings import row_length
from train.host import checks, failures, machine
from train.host.checks import Finding
from train.host.machine import Machine
from train.host.windows import check_windows, inspect_windows
from train.model.architecture import STORED, Shape
from train.model.folder import find, find_damage, is_hub_id, read_manifest
from train.model.names import hub_name
from train.model.published import read_folder_shape
from train.training import step_setting

if TYPE_CHECKING:
    from train.model.decoder import Decoder
    from train.model.tokenizer import Tokenizer

__doc__ = f"{__doc__}\nEvery key of the recipe may be given too:\n{describe(Recipe)}\n\nKeys of this command:"

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "env.lock"
MODELS = ROOT / "data" / "models.lock"
NO_DATA = "?"  # stands for the data of a stage that is not given yet


@dataclass(frozen=True)
class Options(RecipeOptions):
    """What to check."""

    data: str = option("", "file, folder or several with commas between; empty: no data is checked")
    model: str = option("", "base; empty: the recipe's")
    recipe: str = option("qlora", "a name in train/recipes/, or the path of a .yaml file")
    gpus: int = option(0, "GPUs that must be there; 0: any number", interval="[0, 64]")
    models: str = option("models", "folder of bases")
    runs: str = option("runs", "folder of runs")
    log: str = option("", "explain this log of a failed run instead; -: the standard input")
    json: bool = option(False, "print one JSON object")
    strict: bool = option(False, "a warning fails too")


def parse(values: dict[str, str]) -> Options:
    """Options from key=value; any other key is left for the check of the recipe, which reports unknown ones."""
    return build_with_overrides(Options, values)


def run(options: Options) -> None:
    report = Report(options.json)
    if options.log:
        explain_log(report, options.log)
        report.end(options.strict)
        return

    # --- this machine, without torch
    here = machine.inspect_machine()
    report.section("this machine")
    for finding in checks.check_machine(here, options.gpus, LOCK, machine.probe_torch):
        report.add(finding)
    for windows_finding in check_windows(inspect_windows(ROOT)):
        report.add(windows_finding)
    torch_starts = "torch" not in report.failed

    # --- the recipe, or the recipes of its stages
    report.section(f"recipe {options.recipe}")
    parts = _parts(report, options)
    recipes = [part.recipe for part in parts if part.recipe]
    for recipe in recipes if torch_starts else []:
        _check_precision(report, recipe, here)

    # --- the base, the data
    folder = _check_base_folder(report, recipes[0], Path(options.models)) if recipes else None
    if folder and torch_starts:
        shape = _shape(folder, recipes[0].load_as)
        concrete = [as_trained(report, recipe, shape, here, options.gpus) for recipe in recipes]
        largest = max(concrete, key=lambda recipe: recipe.batch * row_length(recipe))
        _check_base(report, largest, folder, here, Path(options.runs))
    else:
        report.add(checks.check_folder("runs", Path(options.runs)))
    for part in parts:
        if part.data:
            report.section(f"data {part.data}{part.suffix}")
            _check_data(report, part.recipe, folder if torch_starts else None, part.data)
    report.end(options.strict)


# --- a log


def explain_log(report: Report, log: str) -> None:
    """What made the run of this log fail, a finding each; ok where it shows no failure."""
    report.section("the standard input" if log == "-" else log)
    explanations = failures.explain_log(_read_log(log))
    for found in explanations:
        cause = f"{found.cause}.\n" if found.cause else "no known cause; the last error is\n"
        remedy = found.remedy or "make doctor DATA=… MODEL=… checks machine, data and base"
        report.add(Finding(found.name, "fail", f"{cause}line {found.line}: {found.text}", remedy))
    if not explanations:
        report.add(Finding("log", "ok", "it shows no failure"))


def _read_log(log: str) -> str:
    """The text of a log in any encoding: what is not UTF-8 matters to no known failure.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        raw = sys.stdin.buffer.read() if log == "-" else Path(log).read_bytes()
    except OSError as error:
        raise UserError(f"log={log}: cannot be read: {error.strerror}. Example: make doctor LOG=train.log") from error
    encoding = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"  # PowerShell's > writes UTF-16
    return raw.decode(encoding, "replace")


# --- the recipe


@dataclass(frozen=True)
class Part:
    """One run of the recipe. recipe: None where it cannot be read. data: empty where none is to be checked."""

    recipe: Recipe | None
    data: str
    suffix: str = ""  # ", stage 1 of 2"

    @classmethod
    def of(cls, found: Stage) -> "Part":
        return cls(found.recipe, "" if found.data == NO_DATA else found.data, found.text and f", {found.text}")


def _parts(report: Report, options: Options) -> list[Part]:
    """One part, or one for each stage; the data of a stage that names none is checked only with DATA=."""
    parts = report.attempt("keys", lambda: _read_parts(options), lambda parts: "; then ".join(map(_sum_up, parts)))
    return parts or [Part(None, options.data)]


def _read_parts(options: Options) -> list[Part]:
    overrides = options.overrides | ({"model": options.model} if options.model else {})
    stages = read_stages(options.recipe)
    needs_data = not stages or any("data" not in values for values in stages)
    data = options.data or (NO_DATA if needs_data and not read_data(options.recipe) else "")
    numbers = range(1, len(stages) + 1) if stages else [0]
    parts = [Part.of(stage(options.recipe, number, overrides, data, Path(), None)) for number in numbers]
    for recipe in filter(None, (part.recipe for part in parts)):
        check_settings(recipe)
        check_measured(recipe)
        check_preference(recipe)
        step_setting.by_default(recipe, options.gpus or recipe.processes)
    return parts


def _sum_up(part: Part) -> str:
    recipe = part.recipe
    assert recipe is not None
    steps = f"{recipe.steps} steps" if recipe.steps else f"{recipe.epochs:g} epochs"
    rows = step_setting.rows_of_a_process(recipe, 1)
    step = f"{rows} × {row_length(recipe)} tokens per step and process"
    words = ["" if recipe.method == "lora" else recipe.method, "" if recipe.method == "ia3" else f"r {recipe.rank}"]
    trained = "all weights" if recipe.trains_all else " ".join([*filter(None, words), f"on {recipe.targets}"])
    return f"{trained}, {steps}, {step}, ZeRO {recipe.zero}"


def _check_precision(report: Report, recipe: Recipe, here: Machine) -> None:
    """Do precision, ZeRO stage and checkpointing work together on this machine?"""
    from train.training import fp8_recipe
    from train.training.prepare import check_supported

    device = "cuda" if here.cards else "cpu"
    oldest = min((card.capability for card in here.cards if card.capability), default=None)

    def check() -> None:
        check_supported(recipe, device)
        fp8_recipe.check_recipe(recipe, oldest)

    works = f"precision={recipe.precision} and zero={recipe.zero} work together here"
    report.attempt("combination", check, lambda _: works)
    old = [card for card in here.cards if card.capability and card.capability < (8, 0)]
    if old and recipe.precision == "bf16":
        text = f"bf16 on {old[0].name}, which has no arithmetic for it: slow"
        report.add(Finding("precision", "warn", text, "precision=auto takes fp16 there"))


# --- the base


def _check_base_folder(report: Report, recipe: Recipe, models: Path) -> Path | None:
    """The base's folder, if it is there and whole; else the findings about fetching it."""
    report.section(f"base {recipe.model}")
    try:
        folder = find(recipe.model, models)
    except UserError as error:
        report.add(Finding("folder", "fail", str(error)))
        return None
    if folder is None:
        report.add(_missing_base(recipe.model))
        report.add(checks.check_folder("models", models, _download_bytes(recipe.model)))
        return None
    whole = report.attempt("folder", lambda: _check_manifest(folder), lambda text: f"{folder}: {text}")
    return folder if whole else None


def _missing_base(model: str) -> Finding:
    text, remedy = "not here yet", f"{commands.make('model', model=model)} fetches it; `make train` also fetches it"
    if is_hub_id(model) or _download_bytes(model):
        return Finding("folder", "warn", text, remedy)
    return Finding("folder", "fail", f"{text}: no folder, no hub id (owner/name), no name in data/models.lock")


def _download_bytes(model: str) -> int:
    """Disk that fetching a name of data/models.lock takes: pieces, whole file, float16 weights; 0 for other names."""
    import yaml

    lock = yaml.safe_load(MODELS.read_text(encoding="utf-8")) if MODELS.is_file() else {}
    return 4 * int(lock[name]["bytes"]) if (name := hub_name(model)) in lock else 0


def _check_manifest(folder: Path) -> str:
    manifest = read_manifest(folder)
    if wrong := find_damage(folder, manifest, full=False) if manifest else []:
        raise UserError(
            f"{folder} is damaged: {'; '.join(wrong)}. Remove the folder and fetch it again; or, if the change is yours, "
            "remove its manifest.json."
        )
    return "names and sizes as in its manifest" if manifest else "your own folder, without a manifest"


def _shape(folder: Path, load_as: str) -> Shape | None:
    """The shape of a base; None where it is wrong, which the checks of its tensors and of load_as report."""
    try:
        return read_folder_shape(folder, load_as)
    except UserError:
        return None


def _check_base(report: Report, recipe: Recipe, folder: Path, here: Machine, runs: Path) -> None:
    """Config, tensors, tokenizer; then the disk and the memory that this base takes with this recipe."""
    from train.model import lora
    from train.model.base_files import check_all_json
    from train.model.loading import load_structure
    from train.model.stops import no_chat_model
    from train.model.tokenizer import load_tokenizer
    from train.training import full_recipe, trained_size

    tokenizer = report.attempt("tokenizer", lambda: load_tokenizer(folder), lambda read: f"{read.vocab_size:,} tokens")
    report.attempt("files", lambda: check_all_json(folder), lambda _: "every JSON file can be read")
    loaded = report.attempt(
        "tensors", lambda: load_structure(folder), lambda pair: f"all {len(pair[1])}: {_layers(pair[0])}"
    )
    if loaded is None:
        return
    model, config = loaded[0], loaded[0].config
    shape = read_folder_shape(folder)
    if recipe.trains_all:
        report.attempt("method", lambda: full_recipe.check_base(recipe, shape), lambda _: "every weight can be trained")
    if recipe.load_as != STORED:
        loaded_as = report.attempt(
            "load_as",
            lambda: shape.loaded(recipe.load_as, str(folder)),
            lambda shape: f"{shape.load_as}: {shape.bits} bits",
        )
        if loaded_as is None:
            return
        shape = loaded_as
    if tokenizer and (text := no_chat_model(folder, tokenizer, recipe.template)):
        report.add(Finding("chat", "warn", text))
    names = report.attempt("targets", lambda: lora.targets(config.layout, recipe.targets), ", ".join)
    if recipe.length > config.max_position_embeddings:
        text = f"length={recipe.length} is more than the {config.max_position_embeddings} it was made for"
        report.add(Finding("length", "warn", text, f"length={config.max_position_embeddings}"))
    if names:
        report.add(checks.check_folder("runs", runs, trained_size.disk_space(config, names, recipe)))
        parameters = trained_size.trained_parameters(config, names, recipe)
        report.add(check_training_memory(here, model, shape, folder, parameters, recipe))
    if here.cards:
        report.add(check_host_memory(here, shape, recipe))


def _layers(model: "Decoder") -> str:
    config = model.config
    return f"layout {config.layout}, {config.num_hidden_layers} layers of {config.hidden_size}"


# --- the data


def _check_data(report: Report, recipe: Recipe | None, folder: Path | None, data: str) -> None:
    """Read all of it; with the base's tokenizer and a recipe also count its tokens, as training will."""
    options = GUESS
    if recipe:
        pairs, keep_empty = recipe.loss == "dpo", keeps_empty(recipe.clean)
        options = ReadOptions(recipe.columns, seed=recipe.seed, pairs=pairs, keep_empty=keep_empty)
    reading = report.attempt("rows", lambda: _read(data, options), _rows_text)
    if reading is None or recipe is None:
        return
    tokenizer = _tokenizer(folder)
    trained = _check_selection(report, reading.conversations, recipe, tokenizer)
    if tokenizer and trained:
        from train.data.tokens.training_set import count_tokens

        characters = reading.counts.characters
        report.attempt("tokens", lambda: count_tokens(trained, tokenizer, recipe, characters), str)


def _tokenizer(folder: Path | None) -> "Tokenizer | None":
    """That of the base; None where it cannot be read, which is reported with the base."""
    from train.model.tokenizer import load_tokenizer

    try:
        return load_tokenizer(folder) if folder else None
    except UserError:
        return None


def _check_selection(
    report: Report, conversations: Sequence[Conversation], recipe: Recipe, tokenizer: "Tokenizer | None"
) -> Sequence[Conversation] | None:
    """The conversations that training takes; None where nothing would be left."""
    if not (recipe.clean or recipe.held_out):
        return conversations
    if tokenizer is None and "tokens" in named_steps(recipe):
        report.add(Finding("selection", "warn", "clean=tokens is not checked: it counts with the base's tokenizer"))
        return None
    counter = token_counter(tokenizer, recipe) if tokenizer else None
    selection = report.attempt(
        "selection", lambda: select(conversations, recipe, counter), lambda chosen: " ".join(chosen.notes())
    )
    return selection.trained if selection else None


def _rows_text(reading: conversations.CheckedData) -> str:
    return "; ".join([f"{len(reading.conversations):,} conversations", *reading.notices()])


def _read(data: str, options: ReadOptions) -> conversations.CheckedData:
    reading = conversations.check(data, options=options)
    if reading.problems:
        more = f"\nAll of them: {commands.make('data', data=data)}" if len(reading.problems) > 3 else ""
        raise UserError(conversations.report(reading.problems, limit=3) + more)
    return reading
