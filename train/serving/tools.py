"""Tools as Qwen2.5's published template writes them, and the calls in an answer.

The text is that of the template in its tokenizer_config.json; the template itself is never run. <tool_call> in what
the program writes is the control token of the checkpoint; in what a user writes it is text.
"""

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

HEAD = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)
CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)
OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Call:
    """A function that the model wants to be called. arguments: JSON."""

    name: str
    arguments: str

    def as_json(self, index: int | None = None) -> dict[str, Any]:
        place = {} if index is None else {"index": index}
        function = {"name": self.name, "arguments": self.arguments}
        return {**place, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def instructions(tools: Sequence[dict[str, Any]]) -> str:
    """What follows the system message."""
    lines = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
    return HEAD + lines + TAIL


def written_call(name: str, arguments: str) -> str:
    """A call in an earlier answer, as the model wrote it."""
    try:
        values = json.loads(arguments)
    except ValueError:
        values = arguments
    return f'{OPEN}\n{{"name": {json.dumps(name)}, "arguments": {json.dumps(values, ensure_ascii=False)}}}\n{CLOSE}'


def response(text: str) -> str:
    """What a tool gave back; several stand in one turn of the user."""
    return f"<tool_response>\n{text}\n</tool_response>"


def _sendable(text: str) -> str:
    """`text` without halves of characters, which no UTF-8 can hold and a model may write as escapes."""
    return text.encode("utf-8", "replace").decode()


def find_calls(text: str) -> tuple[str, list[Call]]:
    """(the text before the first call, the calls). A call that is no sound JSON stays text."""
    calls = []
    for match in CALL.finditer(text):
        try:
            value = json.loads(match[1].strip())
            arguments = value.get("arguments", {})
            written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            calls.append(Call(_sendable(str(value["name"])), _sendable(written)))
        except (ValueError, KeyError, AttributeError, RecursionError):
            return text, []
    return (text[: text.index(OPEN)].rstrip(), calls) if calls else (text, [])
