"""Ask the base and the trained model the same questions; show the answers side by side, and how much they differ.

Measured of both: the loss on what was held out, with an interval; the loss on a general text, which shows what was
forgotten; BLEU, chrF and ROUGE-L of the answers to held-out questions; how long the answers are, how many are lists, how
much they repeat. Greedy answers, so the same command shows the same tables. After an export the merged model answers,
before it the adapter on its base. Writes answers.jsonl, scores.json, loss.png, report.md and the page report.html into
the run's folder.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train.common.errors import UserError
from train.common.names import below
from train.common.progress import bar
from train.config.options import option
from train.config.recipe import Recipe
from train.data.checked.conversations import Conversation
from train.evaluation import scores, text_scores
from train.evaluation.answers import (
    ModelPair,
    answer_questions,
    answered_questions,
    comparison_inputs,
    find_pair,
    find_questions,
    held_out_conversations,
    load_model,
    read_answers,
    read_losses,
    write_answers,
)
from train.evaluation.report import AnsweredQuestion, legend, plot, smoothed
from train.evaluation.scores import Measured
from train.evaluation.text_scores import WORDS
from train.evaluation.token_loss import conversation_rows, text_losses, text_rows
from train.inference.generate import CUT
from train.model.folder import resolve
from train.model.loading import read_folder_config
from train.model.tokenizer import load_tokenizer
from train.pages import run_page
from train.runs.folder import read_run
from train.runs.losses import held_out

MAX_ROWS = 8  # held-out questions in the table of the terminal
MAX_WIDTH = 160  # columns of the table
MAX_TORN_WORD = 16  # letters left out at most, so that a cut falls between two words


@dataclass(frozen=True)
class Options:
    """The same questions before and after."""

    run: str = option("", "name of a finished run below runs/")
    questions: str = option(
        "",
        "file, one question a line (or .jsonl); empty: the first held out, then DATA_questions.txt beside the data, or "
        "the data's first",
    )
    held_out: int = option(8, "held-out questions to ask; BLEU, chrF and ROUGE-L are of these", interval="[1, 1000000]")
    words: str = option("characters", "what ROUGE-L counts in Chinese; jieba has to be installed by hand", WORDS)
    max_tokens: int = option(64, "longest answer; a longer one is cut off and ends in …", interval="[1, 1048576]")
    batch: int = option(8, "questions answered at once", interval="[1, 4096]")
    models: str = option("models", "folder of the models")
    runs: str = option("runs", "folder of the runs")


def run(options: Options) -> None:
    # the questions, and the models that answer
    if not options.run:
        raise UserError("which run? RUN= names a folder below runs/. Example: make compare RUN=demo")
    folder = below(options.runs, options.run, "run")
    record = read_run(folder)
    text_scores.check_words(options.words)
    questions, source = find_questions(options.questions, record, folder, options.held_out)
    recipe = Recipe.from_record(record["recipe"])
    pair = find_pair(folder, resolve(recipe.model, Path(options.models)), recipe.load_as)
    inputs = comparison_inputs(pair, questions, options.max_tokens, options.words)

    # before and after, unless these very answers are kept already
    kept = read_answers(folder, inputs)
    if kept is not None:
        print(f"{folder}: nothing to do, these questions were answered before.")
        answered, found = kept
    else:
        print(f"Asking {len(questions)} questions ({source}): {pair.base.name}, then {pair.trained_name}")
        aside = held_out_conversations(record, folder)
        before, after = (_measure(title, options, record, pair, questions, aside) for title in ("before", "after"))
        answered = answered_questions(questions, before.answers, after.answers, record, folder)
        found = scores.scores(questions, scores.references_of(aside), before, after, options.words)
        write_answers(folder, record, answered, found, pair, inputs)
    page = run_page.write(folder)
    _show(folder, answered, found, read_losses(folder, record), page)


def _measure(
    title: str,
    options: Options,
    record: dict[str, Any],
    pair: ModelPair,
    questions: list[str],
    aside: Sequence[Conversation],
) -> Measured:
    """What the base ("before") or the trained model ("after") answers, and its losses; it is loaded for this call only."""
    recipe = asdict(Recipe.from_record(record["recipe"]))
    tokenizer = load_tokenizer(pair.base)
    context = read_folder_config(pair.base)[0].max_position_embeddings
    held_out = conversation_rows(aside, tokenizer, recipe, context)
    general = text_rows(scores.general_texts(), tokenizer, context)
    model = load_model(pair, title == "after")
    with bar(title, len(questions), "answers") as advance:
        replies = answer_questions(model, tokenizer, questions, recipe, options.max_tokens, options.batch, advance)
    with bar(f"loss {title}", len(held_out) + len(general), "texts") as advance:
        return Measured(replies, text_losses(model, held_out, advance), text_losses(model, general, advance))


def _show(
    folder: Path, answered: Sequence[AnsweredQuestion], found: dict[str, Any], rows: list[dict[str, Any]], page: Path
) -> None:
    """Print the tables, the loss as a plot, and where the files are."""
    from rich.console import Console

    console = Console(highlight=False)
    console.width = min(console.width, MAX_WIDTH)
    console.print()
    shown = first_shown(answered)
    console.print(table(shown, console.width))
    for mark, meaning in legend(shown).items():
        console.print(f"{mark} {meaning}", style="dim")
    if len(shown) < len(answered):
        console.print(f"{len(answered) - len(shown)} more held-out questions are in the files.", style="dim")
    console.print(score_table(found))
    for remark in scores.remarks(found):
        console.print(remark, style="dim")
    values = smoothed([row["loss"] for row in rows])
    console.print(f"\nloss of {len(values)} steps, running mean: {values[0]:.2f} → {values[-1]:.2f}")
    if points := held_out(rows):
        console.print("held-out loss: " + ", ".join(f"{loss:.2f} after step {step}" for step, loss in points[-8:]))
    lines = plot(values, width=min(64, console.width - 10))
    for label, line in zip([f"{max(values):.2f}", *[""] * (len(lines) - 2), "0"], lines, strict=True):
        console.print(f"{label:>6} [cyan]{line}[/cyan]")
    console.print(
        f"\n{page}, {folder / 'report.md'}, {folder / 'loss.png'}, {folder / 'answers.jsonl'}", soft_wrap=True
    )


def first_shown(answered: Sequence[AnsweredQuestion]) -> list[AnsweredQuestion]:
    """Without the held-out questions after the first MAX_ROWS."""
    later = [one for one in answered if one.held_out][MAX_ROWS:]
    return [one for one in answered if one not in later]


def score_table(found: dict[str, Any]) -> Any:
    """What was measured, in how many texts, before, after, and the change with its interval."""
    from rich import box
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, header_style="bold", border_style="bright_black")
    (measured, _), *numbers = scores.HEAD
    grid.add_column(measured, no_wrap=True)
    for (title, _), style in zip(numbers, ("bright_black", "yellow", "green", ""), strict=True):
        grid.add_column(title, justify="right", style=style)
    for row in scores.rows(found):
        grid.add_row(scores.name(row), str(row.count), row.before, row.after, row.change)
    return grid


def table(answered: Sequence[AnsweredQuestion], width: int) -> Any:
    """question | before | after, `width` cells wide; a long answer is cut with … (the files hold all of it)."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shares = (width - 10) * 28 // 100, (width - 10) * 38 // 100, (width - 10) * 34 // 100
    grid = Table(box=box.ROUNDED, show_lines=True, header_style="bold", border_style="bright_black", width=width)
    for name, share, style in zip(("question", "before", "after"), shares, ("", "yellow", "green"), strict=True):
        grid.add_column(name, width=share, style=style, overflow="fold")
    for one in answered:
        cells = (
            shorten(one.question, 3 * shares[0]) + one.mark,
            shorten(one.before, 4 * shares[1]),
            shorten(one.after, 6 * shares[2]),
        )
        grid.add_row(*map(Text, cells))
    return grid


def shorten(text: str, cells: int) -> str:
    """`text` on one line, at most `cells` columns wide (a Chinese character takes two), cut with …

    Control characters are left out, because an answer must not control the terminal.
    """
    from rich.cells import cell_len

    line = "".join(c for c in " ".join(text.split()) if unicodedata.category(c) != "Cc")
    if cell_len(line) <= cells:
        return line
    while cell_len(line) > cells - 1:
        line = line[: len(line) - max(1, (cell_len(line) - cells) // 2)]
    words, _, torn_word = line.rpartition(" ")
    return (words if words and len(torn_word) < MAX_TORN_WORD else line).rstrip(" ,.:;，。：；…") + CUT
