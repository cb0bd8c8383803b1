"""Read, check and sum up a data set; with OUT=, write it anew as OpenAI messages.

make data DATA=file-or-folder [RECIPE=name] [MODEL=base] [OUT=new.jsonl] [ARGS="length=1024 overlong=skip …"]

A set with a mistake in it is refused with one list of all mistakes by file, line and column, status 2. Tokens are counted with the
base's own tokenizer and in the recipe's template; a base that is not there yet costs only those numbers.
"""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from train.common.errors import UserError
from train.common.files import write_text
from train.common.progress import bar
from train.config.options import RecipeOptions, build_with_overrides, describe, option
from train.config.recipe import Recipe, load_recipe
from train.data import chat_template, conversations
from train.data.conversations import Conversation, Reading
from train.model.folder import resolve

if TYPE_CHECKING:
    from train.data.samples import Summary
    from train.model.tokenizer import Tokenizer

__doc__ = f"{__doc__}\nEvery key of the recipe may be given too:\n{describe(Recipe)}\n\nKeys of this command:"

LARGE = 2_000_000  # bytes from which on progress is shown
SHOWN = 1500  # characters of the example
HAN, KANA, LETTER = re.compile("[\u3400-\u9fff\uf900-\ufaff]"), re.compile("[\u3040-\u30ff]"), re.compile(r"[^\W\d_]")


@dataclass(frozen=True)
class Options(RecipeOptions):
    """What to read, and for which run."""

    data: str = option("", "file, folder of .json and .jsonl files, or several with commas between")
    recipe: str = option(
        "qlora", "a name in train/recipes/, or the path of a .yaml file: template, length, what is learnt"
    )
    model: str = option("", "base whose tokenizer counts; empty: the recipe's")
    out: str = option("", "write the conversations to this file, as OpenAI messages, one a line")
    models: str = option("models", "folder of bases")


def parse(values: dict[str, str]) -> Options:
    """Options from key=value; every key that is not an option is the recipe's."""
    return build_with_overrides(Options, values, Recipe)


def run(options: Options) -> None:
    # --- read and check -----------------------------------------------------------------------------------------------------
    if not options.data:
        raise UserError("data: which file? Example: make data DATA=data/demo.jsonl")
    recipe = load_recipe(options.recipe, options.overrides | ({"model": options.model} if options.model else {}))
    reading = _survey(options.data)
    if reading.problems:
        raise UserError(conversations.report(reading.problems))

    # --- count ---------------------------------------------------------------------------------------------------------------
    lines = {"conversations": f"{len(reading.conversations):,} ({_formats(reading)})", **_words(reading.conversations)}
    tokenizer, missing = _tokenizer(recipe, Path(options.models))
    if tokenizer:
        lines |= _tokens(_encode(reading.conversations, tokenizer, recipe), recipe)
    else:
        lines["tokens"] = f"not counted, that needs the base. {missing}"
    lines |= _notices(reading)

    # --- tell, convert -------------------------------------------------------------------------------------------------------
    print(f"{options.data}: sound.")
    _table(lines)
    if tokenizer:
        _example(reading.conversations[0], tokenizer, recipe)
    if options.out:
        _convert(reading.conversations, options)


# Reading


def _survey(data: str) -> Reading:
    size = sum(path.stat().st_size for path in conversations.sources(data))
    files = len(conversations.sources(data))
    with _progress("reading", files, size) as advance:
        done: dict[str, float] = {}

        def progress(file: str, share: float) -> None:
            advance(share - done.get(file, 0.0))
            done[file] = share

        return conversations.survey(data, progress)


@contextmanager
def _progress(title: str, total: float, size: float) -> Iterator:  # type: ignore[type-arg]
    """A bar if there is much to do, else nothing."""
    if size < LARGE:
        yield lambda amount: None
        return
    with bar(title, total * 100, "%" if total == 1 else "% of a file") as advance:
        yield lambda amount: advance(amount * 100)


def _tokenizer(recipe: Recipe, models: Path) -> "tuple[Tokenizer | None, str]":
    """The base's tokenizer, or None and why not."""
    from train.model.tokenizer import load_tokenizer

    try:
        return load_tokenizer(resolve(recipe.model, models)), ""
    except UserError as error:
        return None, str(error).replace("\n", " ")


def _encode(talks: list[Conversation], tokenizer: "Tokenizer", recipe: Recipe) -> "Summary":
    from train.data.samples import encode

    size = sum(len(turn.text) for talk in talks for turn in talk.turns)
    last = 0
    with _progress("counting tokens", 1, size) as advance:

        def progress(done: int) -> None:
            nonlocal last
            advance((done - last) / len(talks))
            last = done

        summary = encode(talks, tokenizer, recipe, progress)[1]
        progress(len(talks))
    return summary


# Telling


def _formats(reading: Reading) -> str:
    names = reading.formats.most_common()
    return names[0][0] if len(names) == 1 else ", ".join(f"{count:,} {name}" for name, count in names)


def _words(talks: list[Conversation]) -> dict[str, str]:
    turns = [len(talk.turns) // 2 for talk in talks]
    chinese = sum(map(_is_chinese, talks)) / len(talks)
    return {
        "turns": f"{sum(turns):,} questions and answers; {sum(n > 1 for n in turns):,} conversations have several, at most {max(turns)}",
        "languages": f"answers roughly {chinese:.0%} Chinese, {1 - chinese:.0%} other",
    }


def _is_chinese(talk: Conversation) -> bool:
    """A rough guess: three letters in ten of the answers are Han, and there is no kana."""
    text = "".join(turn.text for turn in talk.turns if turn.role == "assistant")[:2000]
    return not KANA.search(text) and len(HAN.findall(text)) > 0.3 * len(LETTER.findall(text))


def _tokens(summary: "Summary", recipe: Recipe) -> dict[str, str]:
    s, mode = summary, "packed" if recipe.pack else "one conversation a row"
    lines = {
        "tokens": f"{s.tokens:,}; a conversation: min {s.tokens_min:,}, median {s.tokens_median:,}, p95 {s.tokens_p95:,}, max {s.tokens_max:,}",
        "learnt": f"{s.labels:,} tokens",
        "too long": s.overlong_text,
        "an epoch": f"{s.rows:,} rows of at most {s.length} tokens, {mode}: {s.efficiency:.1%} of their positions are real tokens",
    }
    if s.unlearnable:
        named = ", ".join(s.unlearnable[:5]) + (", …" if len(s.unlearnable) > 5 else "")
        lines["left out"] = f"{len(s.unlearnable):,}, no answer within the length: {named}"
    return lines


def _notices(reading: Reading) -> dict[str, str]:
    lines = {}
    if same := conversations.duplicates(reading.conversations):
        lines["notice"] = f"{same:,} conversations say exactly what an earlier one says; they are kept"
    if reading.unused:
        keys = ", ".join(f'"{key}" ({count:,} rows)' for key, count in reading.unused.most_common(8))
        lines["not used"] = f"keys that no format has: {keys}"
    return lines


def _table(lines: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 2))
    for name, text in lines.items():
        table.add_row(Text(name, style="bold"), Text(text))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _example(talk: Conversation, tokenizer: "Tokenizer", recipe: Recipe) -> None:
    """The first conversation as the model sees it, what it learns from it marked."""
    before, after = ("\033[1;32m", "\033[0m") if sys.stdout.isatty() else ("⟦", "⟧")
    ids, mask = chat_template.render(talk, tokenizer, recipe.template, recipe.mask, recipe.system)
    print(f"\n{talk.where} as the model reads it, {before}learnt{after}:")
    print(mark(ids[: recipe.length], mask[: recipe.length], tokenizer, before, after))


def mark(ids: list[int], mask: list[int], tokenizer: "Tokenizer", before: str, after: str) -> str:
    """The text of `ids`, control tokens included, with `before` and `after` around each run of learnt ones."""
    text, start = "", 0
    while start < len(ids) and len(text) < SHOWN:
        stop = next((at for at in range(start, len(ids)) if mask[at] != mask[start]), len(ids))
        part = tokenizer.decode(ids[start:stop], skip_control=False)
        text += f"{before}{part}{after}" if mask[start] else part
        start = stop
    return text.rstrip("\n") if start == len(ids) else f"{text}…"


# Converting


def _convert(talks: list[Conversation], options: Options) -> None:
    out = Path(options.out)
    if out.resolve() in {path.resolve() for path in conversations.sources(options.data)}:
        raise UserError(f"out={out} is a file that was read: give another name, so that the original stays.")
    if not out.parent.is_dir():
        raise UserError(f"out={out}: there is no folder {out.parent}. Make it first: mkdir -p {out.parent}")
    write_text(out, "".join(f"{as_messages(talk)}\n" for talk in talks))
    print(f"\n{out}: {len(talks):,} conversations written, as OpenAI messages.")


def as_messages(talk: Conversation) -> str:
    """One line of OpenAI messages; reads back as the same conversation."""
    messages = [] if talk.system is None else [{"role": "system", "content": talk.system}]
    messages += [{"role": turn.role, "content": turn.text} for turn in talk.turns]
    return json.dumps({"messages": messages}, ensure_ascii=False)
