"""Rows that are no conversation to learn from: preference data, rejected answers, pictures, text without a question.

Each function names what the row is and the one thing to do. This module does not know files, lines and columns, and
nothing of the four formats but the keys that carry a conversation.
"""

from collections.abc import Iterable
from typing import Any

from train.data.rows.problems import KeyPath, ValueProblem

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
REJECTED = ("rejected", "rejected_response", "response_rejected", "rejected_answer")
CHOSEN = ("chosen", "chosen_response", "response_chosen", "accepted", "chosen_answer")
KTO = ("label", "kto_tag")  # true: a good answer, false: a rejected one (TRL, LLaMA-Factory)
SEEN = ("weight", "loss", "train")  # whether something is learnt (OpenAI; ms-swift; Axolotl): 0 or false means no
CALLS = ("tool_calls", "function_call")  # keys of an answer that calls a tool
TOOL_ROLES = ("tool", "function", "function_call", "observation", "tool_call", "tool_response")
ODD_KEYS = {*MEDIA, *REJECTED, *CHOSEN, *KTO, *SEEN}  # a row without them may only have several answers in a list
TURN_KEYS = {"from": "value", "role": "content"}  # key of the role -> key of the text


def other_kind(row: dict[str, Any]) -> list[ValueProblem]:
    """What makes `row` something else than a conversation to learn from; empty for most rows."""
    if ODD_KEYS.isdisjoint(row) and not isinstance(row.get("output"), list):
        return []
    return [*_preference(row), *_rejected(row), *_media(row)]


def _preference(row: dict[str, Any]) -> Iterable[ValueProblem]:
    answers = row.get("output")
    if good_and_bad := [key for key in (*CHOSEN, *REJECTED) if key in row and row.keys() & {*REJECTED}]:
        keys, remedy = " and ".join(f'"{key}"' for key in good_and_bad), "keep the good answer alone"
        good = next((key for key in good_and_bad if key in CHOSEN), "")
        if good:
            remedy = f'train on both with RECIPE=dpo (loss=dpo); or keep the answer of "{good}" alone, as "output"'
        yield ValueProblem((), f"preference data: {keys} in a row", "one answer a row", remedy, "preference")
    elif isinstance(answers, list) and len(answers) > 1 and all(isinstance(one, str) for one in answers):
        remedy = "keep the best of them (often the first) as a text"
        yield ValueProblem(
            ("output",), "preference data: several answers in a list", "one answer", remedy, "preference"
        )


def _rejected(row: dict[str, Any]) -> Iterable[ValueProblem]:
    for key in KTO:
        if row.get(key) is False:
            remedy = f'delete the rows with "{key}": false, so that only good answers are learnt'
            yield ValueProblem((key,), "a rejected answer (KTO data)", "a good answer", remedy, f"rejected {key}")
    for key in SEEN:
        if row.get(key) is False or (row.get(key) == 0 and type(row.get(key)) in (int, float)):
            remedy = "delete these rows: nothing in them is to be learnt"
            yield ValueProblem((key,), f'a row with "{key}" 0 or false', "a row to learn from", remedy, f"row {key}")


def _media(row: dict[str, Any]) -> Iterable[ValueProblem]:
    for key in MEDIA:
        if row.get(key):
            remedy = "delete these rows: the answers speak of what the model cannot see"
            yield ValueProblem((key,), f'"{key}" in a row', "text alone", remedy, f"media {key}")


def not_an_object(row: Any, type_name: str) -> ValueProblem:
    """The problem of a row that is a text, a number or a list."""
    expected, remedy, kind = "a row in one of the four formats", "make it an object in { }", ""
    found = type_name
    if isinstance(row, list) and row and all(isinstance(turn, dict) for turn in row):
        found, kind = "a list of turns in place of a row", "list of turns"
        remedy = f"give each list a name: {_named_list(row[0])}"
    elif isinstance(row, str) or (isinstance(row, list) and row and all(isinstance(text, str) for text in row)):
        found, kind = f"{'a list of texts' if isinstance(row, list) else 'a text'} in place of a row", type_name
        remedy = 'write each question and answer as {"instruction": "the question", "output": "the answer"}'
    return ValueProblem((), found, expected, remedy, kind)


def _named_list(turn: dict[str, Any]) -> str:
    return '{"conversations": [ … ]}' if "from" in turn else '{"messages": [ … ]}'


def turn_as_row(row: dict[str, Any]) -> ValueProblem | None:
    """The problem of a row that is a single turn of a conversation, if it is one."""
    for role, text in TURN_KEYS.items():
        if {role, text} <= row.keys():
            remedy = f"put the turns of a conversation into one row: {_named_list(row)}"
            found = f'a turn ("{role}", "{text}") in place of a row'
            return ValueProblem((), found, "one of the four formats", remedy, "turn as row")
    if list(row) == ["text"]:
        remedy = "write questions and answers: text without a question (for pretraining) is not learnt here"
        return ValueProblem((), 'a row with "text" alone', "one of the four formats", remedy, "text alone")
    return None


def other_turns(key: str, role_key: str, text_key: str, turns: Any) -> ValueProblem | None:
    """The problem of a list whose turns have the keys of the other list, judged by its first turn."""
    turn = turns[0] if isinstance(turns, list) and turns else None
    other, other_role = ("messages", "role") if key == "conversations" else ("conversations", "from")
    if not isinstance(turn, dict) or turn.keys() & {role_key, text_key}:
        return None
    if not {other_role, TURN_KEYS[other_role]} <= turn.keys():
        return None
    found = f'"{key}" whose turns have the keys of "{other}" ("{other_role}", "{TURN_KEYS[other_role]}")'
    expected = f'turns with "{role_key}" and "{text_key}"'
    return ValueProblem((key,), found, expected, f'rename "{key}" to "{other}" in every row', f"turns of {other}")


def joined_parts(value: list[Any]) -> str | None:
    """The text of content in parts, [{"type": "text", "text": "…"}, …], as chat templates join it; None if not all are."""
    if not value or not all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        return None
    texts = [part.get("text") for part in value]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None


def tools_in(key: str, role_key: str, turns: Any) -> ValueProblem | None:
    """The problem of a conversation in which a tool is called (OpenAI, ShareGPT), at its first call or answer."""
    remedy = (
        "delete these rows: the prompt that is trained on and exported here does not list tools, so the model would call "
        "what nobody offers"
    )
    for n, turn in enumerate(turns if isinstance(turns, list) else ()):
        role = turn.get(role_key) if isinstance(turn, dict) else None
        call = next((name for name in CALLS if isinstance(turn, dict) and turn.get(name) and role == "assistant"), "")
        if call or role in TOOL_ROLES:
            found = f'a call of a tool ("{call}")' if call else f'a turn of a tool (the role "{role}")'
            path = (key, n, call or role_key)
            return ValueProblem(path, found, "questions and answers in text", remedy, "tools")
    return None


def no_text(value: Any, path: KeyPath, type_name: str, meaning: str) -> ValueProblem:
    """The problem of a value that is not a text: content in parts, a call of a tool, or something else."""
    expected, remedy, kind, found = f"text: {meaning}", "write a text in double quotes", "", type_name
    if isinstance(value, int | float) and not isinstance(value, bool):
        remedy = "put it in double quotes"
    elif isinstance(value, list) and value and all(isinstance(part, dict) and "type" in part for part in value):
        kinds = sorted({str(part["type"]) for part in value} - {"text"})
        found, kind = "content in parts", f"parts {kinds}"
        remedy = f'write the text itself: "{path[-1]}": "…"'
        if kinds:
            found, remedy = f"content in parts ({', '.join(kinds)})", "delete these rows: only text can be trained on"
    return ValueProblem(path, found, expected, remedy, kind)
