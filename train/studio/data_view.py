"""What the data page shows of a file: the mistakes by line, or counts, lengths and conversations with their mask.

Knows no widgets. Texts of the data are texts to the end: what is returned is shown as text, never as HTML.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from train.common.errors import UserError
from train.config.recipe import Recipe
from train.data.checked.conversations import CheckedData, ProblemsError
from train.data.rows.data_row import ReadOptions
from train.data.tokens import training_set
from train.data.tokens.pairs import examples_of
from train.model.folder import resolve
from train.pages import charts, data_facts
from train.pages.page import visible
from train.pages.token_text import Shown
from train.runs.folder import TOKENS
from train.studio.folders import Folders

MOST_PROBLEMS = 200


@dataclass(frozen=True)
class Mistake:
    """A line of the table of mistakes."""

    where: str
    found: str
    expected: str
    remedy: str


@dataclass(frozen=True)
class DataView:
    """Of a file. mistakes: the first MOST_PROBLEMS of `problems`. error: why it could not be read at all.

    counts: (key of texts.py, number). reason: why tokens are not counted. tokens: of all conversations; 0 if not
    counted.
    """

    problems: int = 0
    mistakes: Sequence[Mistake] = ()
    can_mend: bool = False
    error: str = ""
    counts: Sequence[tuple[str, int]] = ()
    lengths: charts.Chart | None = None
    samples: Sequence[Shown] = ()
    reason: str = ""
    tokens: int = 0


def look(path: Path, recipe: Recipe, folders: Folders) -> DataView:
    """Read and check a file as `data` does. It takes as long as reading the file.

    Args:
        recipe: whose template, length and base count the tokens.
    """
    try:
        return _sound(path, recipe, folders)
    except ProblemsError as error:
        return _broken(error.checked)
    except UserError as error:
        return DataView(error=visible(str(error)))


def _broken(checked: CheckedData) -> DataView:
    shown = [
        Mistake(
            visible(one.cell or f"{one.line}:{one.column}"),
            visible(one.found),
            visible(one.expected),
            visible(one.remedy),
        )
        for one in checked.problems[:MOST_PROBLEMS]
    ]
    return DataView(problems=len(checked.problems), mistakes=shown, can_mend=not checked.problems[0].cell)


def _sound(path: Path, recipe: Recipe, folders: Folders) -> DataView:
    from train.model.tokenizer import load_tokenizer  # seconds

    options = ReadOptions(recipe.columns, seed=recipe.seed, pairs=recipe.loss == "dpo")
    try:
        tokenizer = load_tokenizer(resolve(recipe.model, folders.models))
    except UserError as error:
        checked = training_set.read(str(path), options)
        facts = data_facts.collect(checked.conversations, recipe)
        return DataView(counts=_counts(checked), samples=facts.samples, reason=visible(str(error)))
    checked, tokens = training_set.load_tokens(str(path), tokenizer, recipe, folders.runs / TOKENS, options)
    samples, summary = examples_of(tokens, recipe)
    facts = data_facts.collect(checked.conversations, recipe, tokens, samples, None, tokenizer)
    assert facts.lengths is not None  # there are tokens
    counts = [*_counts(checked), ("tokens", summary.tokens), ("learnt tokens", summary.label_tokens)]
    chart = charts.histogram(facts.lengths, recipe.length)
    return DataView(counts=counts, lengths=chart, samples=facts.samples, tokens=summary.tokens)


def _counts(checked: CheckedData) -> list[tuple[str, int]]:
    counts = checked.counts
    return [
        ("conversations", counts.conversations),
        ("questions", counts.turns // 2),
        ("chinese", counts.chinese),
        ("copies", counts.duplicates()),
    ]


def mended_name(name: str) -> str:
    """Where FIX=1 writes what it mends of the file `name`: beside it."""
    path = Path(name)
    return path.with_name(f"{path.stem}.fixed.jsonl").as_posix()
