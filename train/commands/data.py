"""Check a data set and print its summary; with OUT=, also write it as OpenAI messages. With FIX=1, mend broken JSON.

make data DATA=file-or-folder [RECIPE=name] [MODEL=base] [OUT=new.jsonl] [ARGS="length=1024 overlong=skip …"]
make data DATA=broken.json FIX=1 [OUT=broken.fixed.jsonl] [PARTIAL=1] [OVERWRITE=1]

Data with a mistake is refused with a list of all mistakes by file, line and column, and status 2. Tokens are counted
with the tokenizer of the base and the template of the recipe. Without the base on this machine only these numbers are
missing.

FIX=1 corrects every mistake that can be corrected in one way only, into a new file, and shows each kind of change. The
original stays as it is. What only a person can tell is listed by line and column, with status 2; then nothing is
written, or with PARTIAL=1 all rows but these.
"""

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from train.common.errors import UserError
from train.common.files import write_lines
from train.common.terminal import understands_escapes
from train.config.options import RecipeOptions, build_with_overrides, describe, option
from train.config.recipe import Recipe, load_recipe, read_data
from train.data import chat_template, repair, repair_report, training_set
from train.data.conversations import CheckedData, Conversation, ProblemsError
from train.data.counts import Counts
from train.data.data_row import ReadOptions
from train.data.sources import sources
from train.model.folder import resolve
from train.runs.folder import TOKENS

if TYPE_CHECKING:
    from train.data.samples import Summary
    from train.model.tokenizer import Tokenizer

__doc__ = f"{__doc__}\nEvery key of the recipe can be given too:\n{describe(Recipe)}\n\nKeys of this command:"

MAX_SHOWN = 1500  # characters of the example


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
    if options.fix:
        return _fix(options, recipe)
    if options.out:
        _check_out(Path(options.out), options.data)
    tokenizer, reason = _tokenizer(recipe, Path(options.models))
    read_options = ReadOptions(recipe.columns, seed=recipe.seed)

    # --- count tokens -----------------------------------------------------------------------------------------------
    with _hint_of_fix(options.data):
        if tokenizer:
            cache = Path(options.runs, TOKENS)
            checked, _, summary = training_set.load_samples(options.data, tokenizer, recipe, cache, read_options)
            tokens = _tokens(summary, recipe)
        else:
            checked = training_set.read(options.data, read_options)
            tokens = {"tokens": f"not counted, that needs the base. {reason}"}
    rows = {"conversations": f"{len(checked.conversations):,} ({_formats(checked)})", **_parts(checked)}
    rows |= _words(checked.counts) | tokens | _notices(checked)

    # --- print, convert ---------------------------------------------------------------------------------------------
    print(f"{options.data}: no mistakes.")
    _print_table(rows)
    if tokenizer:
        _print_example(checked.conversations[0], tokenizer, recipe)
    if options.out:
        _convert(checked.conversations, options)


# Reading


@contextmanager
def _hint_of_fix(data: str) -> Iterator[None]:
    """Name FIX=1 below the report of problems, if they are in a text."""
    try:
        yield
    except ProblemsError as error:
        if error.problems[0].cell:
            raise
        hint = f"What has one correction only: make data DATA={shlex.quote(data)} FIX=1"
        raise UserError(f"{error}\n{hint}") from error


def _tokenizer(recipe: Recipe, models: Path) -> "tuple[Tokenizer | None, str]":
    """The tokenizer of the base, or None and the reason."""
    from train.model.tokenizer import load_tokenizer

    try:
        return load_tokenizer(resolve(recipe.model, models)), ""
    except UserError as error:
        return None, str(error).replace("\n", " ")


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


def _words(counts: Counts) -> dict[str, str]:
    chinese = counts.chinese / counts.conversations
    several = f"{counts.several:,} conversations have several, at most {counts.most}"
    return {
        "turns": f"{counts.turns // 2:,} questions and answers; {several}",
        "languages": f"answers roughly {chinese:.0%} Chinese, {1 - chinese:.0%} other",
    }


def _tokens(s: "Summary", recipe: Recipe) -> dict[str, str]:
    mode = "packed" if recipe.pack else "one conversation per row"
    spread = f"min {s.tokens_min:,}, median {s.tokens_median:,}, p95 {s.tokens_p95:,}, max {s.tokens_max:,}"
    real = f"{s.efficiency:.1%} of their positions are real tokens"
    rows = {
        "tokens": f"{s.tokens:,}; per conversation: {spread}",
        "trained on": f"{s.label_tokens:,} tokens",
        "too long": s.overlong_text,
        "an epoch": f"{s.rows:,} rows of at most {s.length} tokens, {mode}: {real}",
    }
    if s.unlearnable:
        listed = ", ".join(s.unlearnable[:5]) + (", …" if len(s.unlearnable) > 5 else "")
        rows["left out"] = f"{len(s.unlearnable):,}, no answer within the length: {listed}"
    return rows


def _notices(checked: CheckedData) -> dict[str, str]:
    rows = {}
    if count := checked.counts.duplicates():
        rows["notice"] = f"{count:,} conversations are exact copies of an earlier one; they are kept"
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
    ids, mask = chat_template.render(conversation, tokenizer, recipe.template, recipe.mask, recipe.system)
    print(f"\n{conversation.location} as the model reads it, {before}trained on{after}:")
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


# Converting


def _check_out(out: Path, data: str) -> None:
    """Refuse what would overwrite something else than an older result.

    Raises:
        UserError: a file that is read, a folder, a device, or a file in a folder that does not exist.
    """
    if out.resolve() in {path.resolve() for path in sources(data)}:
        raise UserError(f"out={out} is a file that was read: give another name, so that the original stays.")
    if out.is_dir():
        raise UserError(f"out={out}: this is a folder. Give the name of a file: OUT={out / 'messages.jsonl'}")
    if out.exists() and not out.is_file():
        raise UserError(f"out={out}: this is a device. Give the name of a file: OUT=messages.jsonl")
    if not out.parent.is_dir():
        raise UserError(
            f"out={out}: there is no folder {out.parent}. Make it first: mkdir -p {shlex.quote(str(out.parent))}"
        )


def _convert(checked: Sequence[Conversation], options: Options) -> None:
    out = Path(options.out)
    write_lines(out, map(as_messages, checked))
    print(f"\n{out}: {len(checked):,} conversations written, as OpenAI messages.")


def as_messages(conversation: Conversation) -> str:
    """One line of OpenAI messages; it is read back as the same conversation."""
    system = conversation.system
    messages: list[dict[str, str | int]] = [] if system is None else [{"role": "system", "content": system}]
    for turn in conversation.turns:
        messages.append({"role": turn.role, "content": turn.text} | ({} if turn.trained else {"weight": 0}))
    return json.dumps({"messages": messages}, ensure_ascii=False)
