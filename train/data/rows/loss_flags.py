"""Which answers are learnt: what a turn's "weight", "loss" or "train" says, and a row's "loss_mask".

Only answers are ever learnt, so a flag can take an answer out, and never put a question in.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from train.data.rows.other_rows import SEEN
from train.data.rows.problems import KeyPath, ValueProblem

if TYPE_CHECKING:
    from train.data.rows.formats import Turn

EMPTY: tuple[Any, ...] = (None, "", [], {})


def read_turn(
    message: dict[str, Any], path: KeyPath, role: str, known: Sequence[str]
) -> tuple[bool, list[str], list[ValueProblem]]:
    """(whether the turn is learnt, keys that are not read, problems) of a turn.

    Args:
        role: user, assistant or system.
        known: the keys of role and text.
    """
    trained, unused, problems = True, [], []
    for key, value in message.items():
        if key in SEEN and value is not None:
            if value not in (0, 1):  # True and False are 1 and 0
                remedy = "write 1 to learn this turn, 0 not to: other weights cannot be trained on here"
                expected = "0, 1, true or false"
                problems.append(ValueProblem((*path, key), f'"{key}" that is neither', expected, remedy))
            elif value == 0:
                trained = role != "assistant"
            elif role != "assistant":
                unused.append(key)
        elif key not in (*known, "id") and value not in EMPTY:
            unused.append(key)
    return trained, unused, problems


def masked(mask: Any, turns: "tuple[Turn, ...]", count: int) -> "tuple[Turn, ...] | ValueProblem":
    """The turns of a row with `loss_mask`: a 0 or 1 for each turn, or for each answer.

    Args:
        count: turns in the row, with the system message if it is one of them.
    """
    answers = [n for n, turn in enumerate(turns) if turn.role == "assistant"]
    per_turn: dict[int, int] = {}
    if isinstance(mask, list) and all(value in (0, 1) for value in mask):
        if len(mask) == count:
            per_turn = dict(enumerate(mask[count - len(turns) :]))
        elif len(mask) == len(answers):
            per_turn = dict(zip(answers, mask))
    if not per_turn:
        expected = f"a list of {count} values of 0 or 1, one for each turn"
        remedy = 'write it so, or give turns "weight": 0 or 1'
        return ValueProblem(("loss_mask",), "another loss mask", expected, remedy)
    return tuple(
        replace(turn, trained=turn.trained and (turn.role == "user" or bool(per_turn.get(n, 1))))
        for n, turn in enumerate(turns)
    )
