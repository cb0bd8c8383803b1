"""Check a data set and print its summary; with OUT=, also write it as OpenAI messages. With FIX=1, mend broken JSON.

make data DATA=file-or-folder [RECIPE=name] [MODEL=base] [OUT=new.jsonl] [ARGS="length=1024 overlong=skip …"]
make data DATA=file CLEAN=exact_duplicates,near_duplicates HELD_OUT=0.05 OUT=new.jsonl
make data DATA=file HTML=1
make data DATA=broken.json FIX=1 [OUT=broken.fixed.jsonl] [PARTIAL=1] [OVERWRITE=1]

Data with a mistake is refused with a list of all mistakes by file, line and column, and status 2. Tokens are counted
with the tokenizer of the base and the template of the recipe. Without the base on this machine only these numbers are
missing.

FIX=1 corrects every mistake that can be corrected in one way only, into a new file, and shows each kind of change. The
original stays as it is. What only a person can tell is listed by line and column, with status 2; then nothing is
written, or with PARTIAL=1 all rows but these.

CLEAN= leaves rows out, and HELD_OUT= sets questions aside, as training with the same keys does. Then OUT=new.jsonl has
the conversations to train on, new.held_out.jsonl those to measure on, and new.removed.jsonl says why each other row is
left out.

HTML=1 also writes a page for the browser: lengths, turns, languages, duplicates, ten samples with what is learnt in
colour, every warning and every mistake. The last lines say where it is.
"""

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from train.common.errors import UserError
from train.common.files import make_folder
from train.common.terminal import understands_escapes
from train.config.options import SWITCH, RecipeOptions, build_with_overrides, describe, option, shown
from train.config.recipe import Recipe, check_preference, load_recipe, read_data
from train.data.checked import conversations
from train.data.checked.conversations import CheckedData, Conversation, ProblemsError
from train.data.checked.counts import Counts
from train.data.choice.cleaning import named_steps
from train.data.choice.selection import Selection, check_settings, keeps_empty, select, token_counter
from train.data.choice.writing import write_conversations, write_removed
from train.data.mending import repair, repair_report
from train.data.origins.sources import short_name, sources, stem
from train.data.rows.data_row import ReadOptions
from train.data.tokens import chat_template, training_set
from train.data.tokens.pairs import examples_of
from train.data.tokens.settings import row_length
from train.model.folder import resolve
from train.pages import data_page
from train.runs.folder import TOKENS

if TYPE_CHECKING:
    from train.data.tokens.encoding import TokenArrays
    from train.data.tokens.samples import Summary
    from train.model.tokenizer import Tokenizer

__doc__ = f"{__doc__}\nEvery key of the recipe can be given too:\n{describe(Recipe)}\n\nKeys of this command:"

MAX_SHOWN = 1500  # characters of the example
EXAMPLES = {"out": "messages.jsonl", "html": "data.html"}  # names of files that are written
MAX_NAME = 60  # characters of the data's name in the name of its page


@dataclass(frozen=True)
class Options(RecipeOptions):
    """What to read, and for which run."""

    data: str = option(
        "", "a file (JSON, CSV, Excel, Parquet, text, archive), a folder, a set (data/README.md), or several: a,b"
    )
    recipe: str = option(
        "qlora", "a name in train/recipes/, or the path of a .yaml file: template, length, tokens to train on"
    )
    model: str = option("", "base whose tokenizer counts; empty: the recipe's")
    out: str = option("", "write the conversations to this file, as OpenAI messages, one per line")
    html: str = option("", "1: also write a page for the browser, runs/NAME.data.html; or the name of another .html")
    models: str = option("models", "folder of bases")
    runs: str = option("runs", "folder of runs; the tokens of large data are kept below it, for `train`")
    fix: bool = option(False, "mend broken JSON into out=, or beside each file as NAME.fixed.jsonl")
    partial: bool = option(False, "with fix: write although rows are left that only a person can mend, without these")
    overwrite: bool = option(False, "with fix: replace an older file that has other content")


def parse(values: dict[str, str]) -> Options:
    """Options from key=value; every key that is not an option belongs to the recipe."""
    return build_with_overrides(Options, values, Recipe)


def run(options: Options) -> None:
    # --- read and check ---------------------------------------------------------------------------------------------
    options = replace(options, data=options.data or read_data(options.recipe))
    if not options.data:
        raise UserError("data: which file? Example: make data DATA=data/demo.jsonl")
    recipe = load_recipe(options.recipe, options.overrides | ({"model": options.model} if options.model else {}))
    check_settings(recipe)
    check_preference(recipe)
    if options.fix:
        return _fix(options, recipe)
    html = _page_path(options)
    _check_outputs(options, recipe)
    tokenizer, reason = _tokenizer(recipe, Path(options.models))
    pairs, keep_empty = recipe.loss == "dpo", keeps_empty(recipe.clean)
    read_options = ReadOptions(recipe.columns, seed=recipe.seed, pairs=pairs, keep_empty=keep_empty)
    with _hint_of_fix(options.data, html, pairs):
        checked, tokens = _load(options, recipe, read_options, tokenizer)

    # --- clean, set aside -------------------------------------------------------------------------------------------
    selection = _select(checked.conversations, recipe, tokenizer, reason)
    counts = conversations.count(selection.trained) if selection.cleaned or selection.split else checked.counts

    # --- count ------------------------------------------------------------------------------------------------------
    unit = "pairs" if pairs else "conversations"
    rows = {unit: f"{len(checked.conversations):,} ({_formats(checked)})", **_parts(checked)}
    rows |= _selected(selection) | _words(counts)
    samples = summary = None
    if tokens is not None:
        samples, summary = examples_of(tokens, recipe, selection.trained_rows)
        rows |= _tokens(summary, recipe)
    else:
        rows["tokens"] = f"not counted, that needs the base. {reason}"
    rows |= _notices(checked, counts)

    # --- print, write -----------------------------------------------------------------------------------------------
    print(f"{options.data}: no mistakes.")
    _print_table(rows)
    if tokenizer:
        _print_example(selection.trained[0], tokenizer, recipe)
    if options.out:
        _write(selection, *_outputs(options, recipe))
    if html:
        counted = (tokens, samples, summary, tokenizer) if tokens and samples and summary and tokenizer else None
        make_folder(html.parent)
        data_page.write(html, short_name(options.data), checked, selection, recipe, counted, reason)
        print(f"\n{html}: the page of this data, for a browser.")


# Reading


def _load(
    options: Options, recipe: Recipe, read_options: ReadOptions, tokenizer: "Tokenizer | None"
) -> "tuple[CheckedData, TokenArrays | None]":
    """What is in the data, and their tokens where there is a tokenizer."""
    if tokenizer is None:
        return training_set.read(options.data, read_options), None
    return training_set.load_tokens(options.data, tokenizer, recipe, Path(options.runs, TOKENS), read_options)


@contextmanager
def _hint_of_fix(data: str, html: Path | None, pairs: bool) -> Iterator[None]:
    """Name FIX=1 below the report of problems, if they are in a text; write the page of them, if one is wanted."""
    try:
        yield
    except ProblemsError as error:
        hints = [str(error)]
        if not (error.problems[0].cell or pairs):
            hints.append(f"What has one correction only: make data DATA={shlex.quote(data)} FIX=1")
        if html:
            make_folder(html.parent)
            data_page.write_problems(html, short_name(data), error.checked)
            hints.append(f"{html}: the page of these problems, for a browser.")
        raise UserError("\n".join(hints)) from error


def _tokenizer(recipe: Recipe, models: Path) -> "tuple[Tokenizer | None, str]":
    """The tokenizer of the base, or None and the reason."""
    from train.model.tokenizer import load_tokenizer

    try:
        return load_tokenizer(resolve(recipe.model, models)), ""
    except UserError as error:
        return None, str(error).replace("\n", " ")


def _select(checked: Sequence[Conversation], recipe: Recipe, tokenizer: "Tokenizer | None", reason: str) -> Selection:
    """The conversations to train on. reason: why there is no tokenizer."""
    if tokenizer is None and "tokens" in named_steps(recipe):
        raise UserError(f"clean=tokens counts with the base's tokenizer. {reason}")
    return select(checked, recipe, token_counter(tokenizer, recipe) if tokenizer else None, show_progress=True)


# Rows of the table: title -> text


def _formats(checked: CheckedData) -> str:
    counts = checked.formats.most_common()
    return counts[0][0] if len(counts) == 1 else ", ".join(f"{count:,} {name}" for name, count in counts)


def _parts(checked: CheckedData) -> dict[str, str]:
    """The rows of each part of DATA, before and after it is drawn from; nothing for a single part that is not."""
    if len(checked.parts) == 1 and checked.parts[0].read == checked.parts[0].used:
        return {}
    return {
        f"part {n}": f"{part.text}: {part.read:,} rows read, {part.used:,} used ({part.used / (part.read or 1):.2f}x)"
        for n, part in enumerate(checked.parts, 1)
    }


def _selected(selection: Selection) -> dict[str, str]:
    rows = {"cleaned": str(selection.cleaned)} if selection.cleaned else {}
    return rows | ({"held out": str(selection.split)} if selection.split else {})


def _words(counts: Counts) -> dict[str, str]:
    chinese = counts.chinese / counts.conversations
    several = f"{counts.several:,} conversations have several, at most {counts.most}"
    return {
        "turns": f"{counts.turns // 2:,} questions and answers; {several}",
        "languages": f"answers roughly {chinese:.0%} Chinese, {1 - chinese:.0%} other",
    }


def _tokens(s: "Summary", recipe: Recipe) -> dict[str, str]:
    mode = "packed" if recipe.pack else f"one {s.unit} per row"
    spread = f"min {s.tokens_min:,}, median {s.tokens_median:,}, p95 {s.tokens_p95:,}, max {s.tokens_max:,}"
    real = f"{s.efficiency:.1%} of their positions are real tokens"
    rows = {
        "tokens": f"{s.tokens:,}; per {'sequence, two a pair' if s.pairs else 'conversation'}: {spread}",
        "trained on": f"{s.label_tokens:,} tokens",
        "too long": s.overlong_text,
        "an epoch": f"{s.rows:,} rows of at most {row_length(recipe)} tokens, {mode}: {real}",
    }
    if s.unlearnable:
        listed = ", ".join(s.unlearnable[:5]) + (", …" if len(s.unlearnable) > 5 else "")
        reason = "no two different answers" if s.pairs else "no answer"
        rows["left out"] = f"{len(s.unlearnable):,}, {reason} within the length: {listed}"
    return rows


def _notices(checked: CheckedData, counts: Counts) -> dict[str, str]:
    rows = {}
    if count := counts.duplicates():
        kept = "they are kept (clean=exact_duplicates leaves them out)"
        rows["notice"] = f"{count:,} conversations are exact copies of an earlier one; {kept}"
    for number, sentence in enumerate(checked.notices(), 1):
        rows[f"note {number}"] = sentence
    return rows


# Printing


def _print_table(rows: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 2))
    for title, text in rows.items():
        table.add_row(Text(title, style="bold"), Text(text))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _print_example(conversation: Conversation, tokenizer: "Tokenizer", recipe: Recipe) -> None:
    """A conversation as the model reads it, with marks around the tokens that are trained on."""
    before, after = ("\033[1;32m", "\033[0m") if understands_escapes() else ("⟦", "⟧")
    kinds = ("",) if conversation.rejected is None else (", chosen", ", rejected")
    for kind, sequence in zip(kinds, conversation.sequences, strict=True):
        ids, mask = chat_template.render(sequence, tokenizer, recipe.template, recipe.mask, recipe.system)
        print(f"\n{conversation.location} as the model reads it{kind}, {before}trained on{after}:")
        print(mark(ids[: recipe.length], mask[: recipe.length], tokenizer, before, after))


def mark(ids: list[int], mask: list[int], tokenizer: "Tokenizer", before: str, after: str) -> str:
    """The text of `ids`, with control tokens, and `before` and `after` around each stretch that is trained on."""
    text, start = "", 0
    while start < len(ids) and len(text) < MAX_SHOWN:
        stop = next((at for at in range(start, len(ids)) if mask[at] != mask[start]), len(ids))
        part = tokenizer.decode(ids[start:stop], skip_control=False)
        text += f"{before}{part}{after}" if mask[start] else part
        start = stop
    return text.rstrip("\n") if start == len(ids) else f"{text}…"


# Mending


def _fix(options: Options, recipe: Recipe) -> None:
    """Write what can be mended of DATA, or say what is left to a person.

    Raises:
        UserError: something is left, or the result would replace something else.
    """
    if recipe.clean or recipe.held_out:
        raise UserError("fix=1 only mends: clean= and held_out= are for its result. Leave them out here.")
    if recipe.loss == "dpo":
        raise UserError("fix=1 mends rows with one answer. Correct rows of loss=dpo by hand, where the report says.")
    if options.html:
        raise UserError("fix=1 only mends: html= is for its result. Leave it out here.")
    if options.out:
        _check_out(Path(options.out), options.data)
    targets = repair.targets(options.data, options.out)
    for path in targets:
        _check_out(path, options.data)
    repairs = {path: [_repaired(source, recipe) for source in files] for path, files in targets.items()}
    for one in (one for group in repairs.values() for one in group):
        print("\n".join(repair_report.lines(one, colour=sys.stdout.isatty())))
    left = [one for group in repairs.values() for one in group if one.left]
    if left and not options.partial:
        raise UserError(repair_report.refusal(left))
    for path, group in repairs.items():
        print(repair.write(group, path, options.overwrite))
    if left:
        raise UserError(repair_report.left_out(left))


def _repaired(source: Path, recipe: Recipe) -> repair.Repair:
    with training_set.share_bar(f"mending {source.name}", 1, source.stat().st_size) as on_progress:
        return repair.repair(source, ReadOptions(recipe.columns), lambda share: on_progress(source.name, share))


# Writing


def _outputs(options: Options, recipe: Recipe) -> list[Path]:
    """The files to write: the conversations to train on, those to measure on, the rows that are left out."""
    out = Path(options.out)
    names = ["held_out"] * bool(recipe.held_out) + ["removed"] * bool(recipe.clean)
    return [out, *(out.with_name(f"{out.stem}.{name}.jsonl") for name in names)] if options.out else []


def _page_path(options: Options) -> Path | None:
    """Where html= wants the page; None for no page.

    Raises:
        UserError: no switch and no name of a page; or it would replace something else.
    """
    is_on = SWITCH.get(options.html.lower())
    if not options.html or is_on is False:
        return None
    if is_on:
        name = re.sub(r"[^\w.-]+", "-", stem(options.data)).strip("-.")[:MAX_NAME]
        return Path(options.runs, f"{name or 'data'}.data.html")
    if not options.html.lower().endswith((".html", ".htm")):
        raise UserError(f"html={shown(options.html)}: expected 1, or the name of a page: HTML=data.html")
    _check_out(Path(options.html), options.data, "html")
    return Path(options.html)


def _check_out(out: Path, data: str, key: str = "out") -> None:
    """Refuse what would overwrite something else than an older result.

    Raises:
        UserError: a file that is read, a folder, a device, or a file in a folder that does not exist.
    """
    if out.resolve() in {path.resolve() for path in sources(data)}:
        raise UserError(f"{key}={out} is a file that was read: give another name, so that the original stays.")
    if out.is_dir():
        raise UserError(f"{key}={out}: this is a folder. Give the name of a file: {key.upper()}={out / EXAMPLES[key]}")
    if out.exists() and not out.is_file():
        raise UserError(f"{key}={out}: this is a device. Give the name of a file: {key.upper()}={EXAMPLES[key]}")
    if not out.parent.is_dir():
        raise UserError(
            f"{key}={out}: there is no folder {out.parent}. Make it first: mkdir -p {shlex.quote(str(out.parent))}"
        )


def _check_outputs(options: Options, recipe: Recipe) -> None:
    for out in _outputs(options, recipe):
        _check_out(out, options.data)
    if options.out and (recipe.clean or recipe.held_out):
        _check_apart(Path(options.out), options.data)


def _check_apart(out: Path, data: str) -> None:
    """Refuse to write beside the files of a folder that was read: the next reading would take both for its data."""
    folders = [Path(part.strip()) for part in ([data] if Path(data).exists() else data.split(","))]
    if any(folder.is_dir() and folder.resolve() == out.resolve().parent for folder in folders):
        raise UserError(
            f"out={out} is in the folder that is read: give another, so that DATA={out.parent} stays as it is."
        )


def _write(selection: Selection, out: Path, *beside: Path) -> None:
    write_conversations(out, selection.trained)
    pairs = selection.trained[0].rejected is not None
    form = "pairs written, in the form of TRL" if pairs else "conversations written, as OpenAI messages"
    print(f"\n{out}: {len(selection.trained):,} {form}.")
    files = iter(beside)
    if selection.split:
        write_conversations(path := next(files), selection.held_out, named=True)
        print(f"{path}: {len(selection.held_out):,} conversations that are held out.")
    if selection.cleaned:
        write_removed(path := next(files), selection.cleaned.removed)
        print(f"{path}: {len(selection.cleaned.removed):,} rows that are left out, each with the reason.")
