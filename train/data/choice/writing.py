"""Conversations and lists of rows as lines of JSON: what the program writes of a data set."""

import json
from collections.abc import Iterable
from pathlib import Path

from train.common.files import write_lines
from train.data.checked.conversations import Conversation
from train.data.choice.cleaning import Removed


def as_messages(conversation: Conversation, name: str = "") -> str:
    """One line of OpenAI messages, or of preference data; it is read back as the same. name: becomes its "id"."""
    system = conversation.system
    messages: list[dict[str, str | int]] = [] if system is None else [{"role": "system", "content": system}]
    for turn in conversation.turns:
        messages.append({"role": turn.role, "content": turn.text} | ({} if turn.trained else {"weight": 0}))
    row: dict[str, object] = {"messages": messages}
    if conversation.rejected is not None:
        rejected = [{"role": "assistant", "content": conversation.rejected}]
        row = {"prompt": messages[:-1], "chosen": messages[-1:], "rejected": rejected}
    return json.dumps(({"id": name} if name else {}) | row, ensure_ascii=False)


def write_conversations(path: Path, conversations: Iterable[Conversation], named: bool = False) -> None:
    """A data file. named: each row gets the place that it is from as its "id"."""
    write_lines(path, (as_messages(one, one.location if named else "") for one in conversations))


def write_removed(path: Path, removed: Iterable[Removed]) -> None:
    """The rows that cleaning took, a line each, with the step and the reason."""
    write_lines(path, (json.dumps(one.as_json(), ensure_ascii=False) for one in removed))
