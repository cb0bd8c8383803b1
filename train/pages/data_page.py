"""The page of a data set: `make data DATA=… HTML=1`. Equal data give equal bytes: it has no date.

Knows what the command has found, and the names of the template; nothing of options.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from train.data.checked.checked_data import CheckedData
from train.data.choice.cleaning import STEPS
from train.data.choice.selection import Selection
from train.data.rows.formats import FORMATS
from train.data.rows.problems import Problem
from train.data.tokens.pairs import Pairs
from train.data.tokens.samples import Samples, Summary
from train.data.tokens.settings import SampleSettings
from train.pages import charts, data_facts, page
from train.pages.data_facts import FactSettings
from train.pages.token_text import Decoder

if TYPE_CHECKING:
    from train.data.tokens.encoding import TokenArrays

TEMPLATE = "data.html"
MAX_PROBLEMS = 2000  # on a page; a browser shows no more rows of a table at once


class PageSettings(SampleSettings, FactSettings, Protocol):
    """Keys of a recipe, so that pages/ needs no config/."""

    @property
    def model(self) -> str: ...


def write(
    path: Path,
    name: str,
    checked: CheckedData,
    selection: Selection,
    settings: PageSettings,
    tokens: "tuple[TokenArrays, Samples | Pairs, Summary, Decoder] | None",
    reason: str = "",
) -> None:
    """Write the page of data without problems.

    Args:
        name: of the data, as a person knows it.
        tokens: of all conversations of the data, the samples to train on, their summary, and the tokenizer. None where
            there is no tokenizer, for the `reason`.
    """
    arrays, samples, summary, decoder = tokens or (None, None, None, None)
    facts = data_facts.collect(selection.trained, settings, arrays, samples, selection.trained_rows, decoder)
    lengths = facts.lengths
    page.write(
        path,
        TEMPLATE,
        **_common(name, checked),
        settings=settings,
        reason=reason,
        facts=facts,
        summary=summary,
        chart_of_lengths=None if lengths is None else charts.histogram(lengths, settings.length),
        exact=_exact_copies(checked, selection),
        cleaned=_steps(selection),
        split=selection.split,
        problems=[],
    )


def write_problems(path: Path, name: str, checked: CheckedData) -> None:
    """Write the page of data that is refused: what is wrong, and where."""
    problems = checked.problems
    more = max(0, len(problems) - MAX_PROBLEMS)
    shown = [_problem(one) for one in problems[:MAX_PROBLEMS]]
    examples = FORMATS if any("four formats" in one["expected"] for one in shown) else {}
    common = _common(name, checked)
    page.write(path, TEMPLATE, **common, facts=None, problems=shown, more_problems=more, examples=examples)


def _common(name: str, checked: CheckedData) -> dict[str, Any]:
    return {
        "name": name,
        "read": checked.counts.conversations,
        "formats": dict(checked.formats.most_common()),
        "parts": checked.parts if len(checked.parts) > 1 else [],
        "notices": checked.notices(),
    }


def _exact_copies(checked: CheckedData, selection: Selection) -> int | None:
    """Copies among all conversations; None if cleaning has chosen among them, and its counts say it."""
    return None if selection.cleaned else checked.counts.duplicates()


def _steps(selection: Selection) -> list[tuple[str, str, int]]:
    """(step, what it leaves out, rows that it took) of each cleaning step."""
    if not selection.cleaned:
        return []
    counts = selection.cleaned.counts
    return [(step, STEPS[step], counts.get(step, 0)) for step in selection.cleaned.steps]


def _problem(problem: Problem) -> dict[str, str]:
    where = problem.cell or f"{problem.line}:{problem.column}"
    return {
        "where": f"{Path(problem.file).name}: {where}" if problem.cell else f"{Path(problem.file).name}:{where}",
        "found": problem.found,
        "expected": problem.expected,
        "remedy": problem.remedy,
    }
