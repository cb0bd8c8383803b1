"""What a repair changed and what it left, as lines for a person: each kind of change once, with its first examples."""

from collections.abc import Sequence

from train.data.checked import conversations
from train.data.mending.repair import EXAMPLES, Change, Repair
from train.data.rows.problems import visible

MAX_SHOWN = 48  # characters of an example
RED, GREEN, PLAIN = "\033[31m", "\033[32m", "\033[0m"
SIGNS = str.maketrans({"\n": "↵", "\r": "␍", "\t": "⇥"})


def lines(repair: Repair, colour: bool) -> list[str]:
    """The summary of a file, and its changes.

    Args:
        colour: for a terminal: before in red, after in green.
    """
    kinds: dict[str, list[Change]] = {}
    for change in repair.changes:
        kinds.setdefault(change.name, []).append(change)
    found = [_summary(repair)]
    for name, changes in kinds.items():
        found.append(f"  {name}: {len(changes):,}")
        shown = [change for change in changes if change.before or change.after] or changes
        found += [_example(change, colour) for change in shown[:EXAMPLES]]
    return found


def _summary(repair: Repair) -> str:
    left = f"; {counted(repair.left_rows, 'other')} left for you" if repair.left_rows else ""
    if not repair.changes and not repair.left:
        return f"{repair.path}: no mistakes, nothing to mend."
    return f"{repair.path}: {counted(len(repair.rows), 'row')}, {repair.mended:,} of them mended{left}."


def _example(change: Change, colour: bool) -> str:
    place = f"{change.line}:{change.column}"
    if not change.before and not change.after:
        return f"      {place}"
    before, after = _shown(change.before), _shown(change.after)
    if colour:
        before, after = f"{RED}{before}{PLAIN}", f"{GREEN}{after}{PLAIN}"
    return f"      {place:9} {before}  →  {after}"


def _shown(text: str) -> str:
    short = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
    return visible(short.translate(SIGNS))


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def refusal(repairs: Sequence[Repair]) -> str:
    """What is left to a person, where nothing was written for that reason."""
    advice = "Correct these by hand and run it again, or write all other rows: PARTIAL=1"
    return f"{_left(repairs)}; nothing was written.\n{_listed(repairs)}\n{advice}"


def left_out(repairs: Sequence[Repair]) -> str:
    """What is left to a person, where the other rows were written."""
    return f"{_left(repairs)} and not among the rows that were written.\n{_listed(repairs)}"


def _left(repairs: Sequence[Repair]) -> str:
    rows, problems = sum(repair.left_rows for repair in repairs), sum(len(repair.left) for repair in repairs)
    what = counted(rows, "row") if rows else counted(problems, "problem")
    return f"{what} {'is' if what.startswith('1 ') else 'are'} left that only a person can mend"


def _listed(repairs: Sequence[Repair]) -> str:
    return conversations.report([problem for repair in repairs for problem in repair.left]).partition("\n")[2]
