"""Ask the base and the trained model the same questions, and show the answers side by side.

Greedy answers, so the same command shows the same table. After an export the merged model answers, before it the
adapter on its base. Writes answers.jsonl, loss.png, report.md and the page
report.html into the run's folder.
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
from train.evaluation.answers import (
    ModelPair,
    answer_questions,
    answered_questions,
    comparison_inputs,
    find_pair,
    find_questions,
    read_answers,
    read_losses,
    write_answers,
)
from train.evaluation.report import AnsweredQuestion, legend, plot, smoothed
from train.inference.generate import CUT
from train.model.folder import resolve
from train.pages import run_page
from train.runs.folder import read_run
from train.runs.losses import held_out

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
    questions, source = find_questions(options.questions, record, folder)
    pair = find_pair(folder, resolve(Recipe.from_record(record["recipe"]).model, Path(options.models)))
    inputs = comparison_inputs(pair, questions, options.max_tokens)

    # before and after, unless these very answers are kept already
    answered = read_answers(folder, inputs)
    if answered is not None:
        print(f"{folder}: nothing to do, these questions were answered before.")
    else:
        print(f"Asking {len(questions)} questions ({source}): {pair.base.name}, then {pair.trained_name}")
        before, after = (_answers(title, options, record, pair, questions) for title in ("before", "after"))
        answered = answered_questions(questions, before, after, record, folder)
        write_answers(folder, record, answered, pair, inputs)
    page = run_page.write(folder)
    _show(folder, answered, read_losses(folder, record), page)


def _answers(title: str, options: Options, record: dict[str, Any], pair: ModelPair, questions: list[str]) -> list[str]:
    recipe = asdict(Recipe.from_record(record["recipe"]))
    with bar(title, len(questions), "answers") as advance:
        return answer_questions(pair, title == "after", questions, recipe, options.max_tokens, options.batch, advance)


def _show(folder: Path, answered: Sequence[AnsweredQuestion], rows: list[dict[str, Any]], page: Path) -> None:
    """Print the table, the loss as a plot, and where the files are."""
    from rich.console import Console

    console = Console(highlight=False)
    console.width = min(console.width, MAX_WIDTH)
    console.print()
    console.print(table(answered, console.width))
    for mark, meaning in legend(answered).items():
        console.print(f"{mark} {meaning}", style="dim")
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
