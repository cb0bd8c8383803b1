"""Preference data: a row is a question with a chosen and a rejected answer, in the forms of TRL, LLaMA-Factory and others.

A row is read as two rows of the four formats, one for each answer, by the reader of all other rows; their problems are
told at the places of the row as it was written. This module does not know files.

text         {"prompt": "q", "chosen": "a", "rejected": "b"}; for "prompt" also "question", "instruction" and "input"
a list       {"instruction": "q", "output": ["a", "b"]}, the chosen one first
turns        {"prompt" or "messages" or "conversations": [turns up to a question], "chosen": {an answer}, "rejected": …}
whole turns  {"chosen": [turns up to the answer], "rejected": [the same turns, another answer]}
ms-swift     {"messages": [turns up to the answer], "rejected_response": "b"}
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from train.data.rows import columns
from train.data.rows.formats import ROLES, ParsedRow
from train.data.rows.other_rows import CHOSEN, REJECTED, TURN_KEYS
from train.data.rows.problems import KeyPath, ValueProblem

PROMPTS = ("prompt", *columns.NAMES["messages"])  # keys of a question that may be a list of turns
REMEDY = "conversations with one answer are trained on with loss=sft (RECIPE=qlora)"


@dataclass(frozen=True)
class _Side:
    """The row with one of its answers, in one of the four formats."""

    row: dict[str, Any]
    original: Callable[[KeyPath], KeyPath]  # the path of a value in the row as it was written
    problem: ValueProblem | None = None

    def parse(self) -> ParsedRow:
        parsed = ParsedRow(self.row)
        parsed.problems = [replace(one, path=self.original(one.path)) for one in parsed.problems]
        if self.problem:
            parsed.problems = [self.problem]
        return parsed


def parse(row: Any) -> ParsedRow:
    """The conversation that ends with the chosen answer, and the `rejected` one; or everything that is wrong with it."""
    if not isinstance(row, dict):
        return ParsedRow(row)
    keys = _answer_keys(row)
    if isinstance(keys, ValueProblem):
        parsed = ParsedRow({})
        parsed.problems = [keys]
        return parsed
    rest = {key: value for key, value in row.items() if key not in (keys[0][0], keys[1][0])}
    if keys[0][0] == "messages":
        rest["messages"] = row["messages"][:-1]
    one, other = (_side(rest, path, row[path[0]] if len(path) == 1 else row[path[0]][path[1]]) for path in keys)
    return _joined(one.parse(), other.parse(), keys[1])


def _answer_keys(row: dict[str, Any]) -> tuple[KeyPath, KeyPath] | ValueProblem:
    """Where the chosen and the rejected answer are."""
    rejected = next((key for key in REJECTED if key in row), "")
    chosen = next((key for key in CHOSEN if key in row), "")
    if chosen and rejected:
        return (chosen,), (rejected,)
    answers = row.get("output")
    if not (chosen or rejected) and isinstance(answers, list) and len(answers) == 2:
        return ("output", 0), ("output", 1)
    turns = row.get("messages")
    if rejected and isinstance(turns, list) and turns:  # ms-swift: the last turn is the chosen answer
        return ("messages", len(turns) - 1), (rejected,)
    if rejected and isinstance(answers, str):
        return ("output",), (rejected,)
    lacking = [name for name, key in (("chosen", chosen), ("rejected", rejected)) if not key]
    named = " and ".join(f'"{name}"' for name in lacking)
    found = f"a row without {named} among the keys {columns.listed(list(row))}"
    return ValueProblem(
        (),
        found,
        '"chosen" and "rejected": two answers to one question',
        f"add the answer that is missing, or delete the row; {REMEDY}",
        f"without {named}",
    )


def _side(rest: dict[str, Any], path: KeyPath, value: Any) -> _Side:
    """The row with the answer `value`, which is at `path`. rest: the row without both answers."""
    if _is_whole(value):
        return _whole(rest, path, value)
    answer, inner, problem = _text(path, value)
    prompt = next((key for key in PROMPTS if isinstance(rest.get(key), list)), "")
    if prompt:
        return _after_turns(rest, prompt, answer, (*path, *inner), problem)
    row = {**rest, "output": answer}
    if not {"question", "input"} & {columns.role_of(name) for name in rest}:
        found = f'no "prompt" beside the answers, among the keys {columns.listed(list(rest))}'
        problem = ValueProblem((), found, '"prompt": the question', 'add "prompt"', "no prompt")
    return _Side(row, lambda at: (*path, *inner) if at[:1] == ("output",) else at, problem)


def _is_whole(value: Any) -> bool:
    """Whether an answer is a whole conversation: turns that begin with those of the question."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and ROLES.get(str(first.get("role", first.get("from")))) in ("user", "system")


def _whole(rest: dict[str, Any], path: KeyPath, turns: list[Any]) -> _Side:
    key = columns.list_key(turns)
    texts = [turn.get("content", turn.get("value")) for turn in turns if isinstance(turn, dict)]
    problem = None
    if isinstance(prompt := rest.get("prompt"), str) and prompt not in texts:
        expected, remedy = "the question of these turns", 'delete "prompt", or correct it'
        problem = ValueProblem(("prompt",), "a prompt that no turn of the answers has", expected, remedy)
    row = {name: value for name, value in rest.items() if name not in PROMPTS} | {key: turns}
    return _Side(row, lambda at: (*path, *at[1:]) if at[:1] == (key,) else at, problem)


def _after_turns(rest: dict[str, Any], prompt: str, answer: Any, path: KeyPath, problem: ValueProblem | None) -> _Side:
    """The turns at the key `prompt`, and the answer, whose text is at `path`, as one turn more."""
    turns = rest[prompt]
    key = columns.list_key(turns)
    role, text = ("from", "value") if key == "conversations" else ("role", "content")
    turn = {role: "gpt" if key == "conversations" else "assistant", text: answer}
    row = {name: value for name, value in rest.items() if name not in (prompt, key)} | {key: [*turns, turn]}

    def original(at: KeyPath) -> KeyPath:
        if at[:1] != (key,):
            return at
        return path if at[1:2] == (len(turns),) else (prompt, *at[1:])

    return _Side(row, original, problem)


def _text(path: KeyPath, value: Any) -> tuple[Any, KeyPath, ValueProblem | None]:
    """(the text of an answer, the path to it below `path`, what is wrong with what is around it)"""
    inner: KeyPath = ()
    if isinstance(value, list) and value and isinstance(value[0], dict) and not value[0].get("type"):
        if len(value) > 1:
            remedy = "move the turns before the last answer into the prompt"
            return "", (), ValueProblem(path, f"{len(value)} turns", "one answer", remedy)
        value, inner = value[0], (0,)
    if not isinstance(value, dict):
        return value, inner, None
    role_key = next((key for key in TURN_KEYS if key in value), "role")
    role, text_key = value.get(role_key), TURN_KEYS[role_key]
    if text_key not in value:
        found = f'no "{text_key}" among the keys {columns.listed(list(value))}'
        return "", inner, ValueProblem((*path, *inner), found, f'"{text_key}": the answer', f'add "{text_key}"')
    if role is not None and ROLES.get(str(role)) != "assistant":
        at, remedy = (*path, *inner, role_key), f'write "{"gpt" if role_key == "from" else "assistant"}"'
        return "", inner, ValueProblem(at, f'the role "{role}"', "an answer of the assistant", remedy)
    return value[text_key], (*inner, text_key), None


def _joined(chosen: ParsedRow, rejected: ParsedRow, path: KeyPath) -> ParsedRow:
    """The chosen side with the answer of the other. path: of the rejected answer."""
    found = {one.path for one in chosen.problems}
    chosen.problems += [one for one in rejected.problems if one.path not in found]
    chosen.format = f"preference, {chosen.format}"
    if chosen.problems:
        return chosen
    if (chosen.turns[:-1], chosen.system) != (rejected.turns[:-1], rejected.system):
        found_text, expected = 'other turns before the answer than "chosen" has', "the same question for both"
        chosen.problems = [ValueProblem(path, found_text, expected, "correct one of them, or delete the row")]
    elif chosen.turns[-1].text == rejected.turns[-1].text:
        expected, remedy = "two different answers", "correct one of them, or delete the row"
        chosen.problems = [ValueProblem(path, "the same answer twice: chosen and rejected", expected, remedy)]
    chosen.rejected = rejected.turns[-1].text
    chosen.unused_keys |= rejected.unused_keys
    return chosen
