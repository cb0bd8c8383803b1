"""Chats with the base and the tuned model side by side, kept in files below runs/.studio/chats/, and their votes.

Knows messages and files; nothing of widgets and HTTP.
"""

import json
import secrets
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from train.common.files import make_folder, read_json, read_json_lines, write_text

VOTES = "votes.jsonl"
EQUAL = -1  # a vote for neither side
MOST_SHOWN = 50  # earlier chats in a list
MOST_TITLE = 60  # characters


@dataclass
class Answer:
    """One side's answer. state: streaming, done, stopped or failed; `text` grows while it streams."""

    text: str = ""
    state: str = "streaming"
    error: str = ""


@dataclass
class Turn:
    """A message and the answer of each side. vote: the better side, EQUAL, or None before it was given."""

    message: str
    answers: list[Answer]
    vote: int | None = None


@dataclass
class Chat:
    """A conversation with two models at once. sides: names of the models from left to right, as the server has them."""

    id: str
    run: str
    base: str
    sides: list[str]
    blind: bool = False
    system: str = ""
    temperature: float = 0.0
    top_p: float = 0.8
    max_tokens: int = 256
    turns: list[Turn] = field(default_factory=list)

    @property
    def title(self) -> str:
        return self.turns[0].message[:MOST_TITLE] if self.turns else ""

    @property
    def is_streaming(self) -> bool:
        return any(answer.state == "streaming" for turn in self.turns for answer in turn.answers)

    def messages(self, side: int) -> list[dict[str, str]]:
        """What a side is asked: the messages so far with its own answers; the last one is still to be answered."""
        found = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            found.append({"role": "user", "content": turn.message})
            if turn is not self.turns[-1]:
                found.append({"role": "assistant", "content": turn.answers[side].text})
        return found

    def request(self, side: int) -> dict[str, Any]:
        """The body of the request for a side's next answer."""
        return {
            "model": self.sides[side],
            "messages": self.messages(side),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "stream": True,
        }


class ChatStore:
    """The chats of one studio."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Chat] = {}

    def new(self, run: str, base: str, tuned: str, blind: bool) -> Chat:
        """An empty chat; a blind one has its sides in a random order."""
        sides = [base, tuned]
        if blind and secrets.randbelow(2):
            sides.reverse()
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        chat = self._open[name] = Chat(name, run, base, sides, blind)
        return chat

    def get(self, name: str) -> Chat | None:
        """A chat by its name; an answer that was cut off by the end of the studio counts as stopped."""
        if name in self._open:
            return self._open[name]
        if not name or not name.replace("-", "").isalnum() or not name.isascii():
            return None
        with suppress(OSError, ValueError, TypeError, KeyError):
            values = read_json(self.folder / f"{name}.json")
            turns = [Turn(t["message"], [Answer(**a) for a in t["answers"]], t["vote"]) for t in values.pop("turns")]
            chat = Chat(**values, turns=turns)
            for answer in (answer for turn in turns for answer in turn.answers if answer.state == "streaming"):
                answer.state = "stopped"
            self._open[name] = chat
            return chat
        return None

    def save(self, chat: Chat) -> None:
        make_folder(self.folder)
        write_text(self.folder / f"{chat.id}.json", json.dumps(asdict(chat), ensure_ascii=False))

    def latest(self) -> list[Chat]:
        """The newest chats that have a message."""
        names = sorted((path.stem for path in self.folder.glob("*-*-*.json")), reverse=True)[:MOST_SHOWN]
        found = (self.get(name) for name in names)
        return [chat for chat in found if chat is not None and chat.turns]

    def vote(self, chat: Chat, turn: int, side: int) -> None:
        """Write down which side was better; a second vote on the same turn does not count."""
        one = chat.turns[turn]
        if one.vote is not None:
            return
        one.vote = side
        self.save(chat)
        better = "equal" if side == EQUAL else "base" if chat.sides[side] == chat.base else "tuned"
        row = {"chat": chat.id, "run": chat.run, "turn": turn, "better": better, "blind": chat.blind}
        with (self.folder / VOTES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def votes(self, run: str) -> dict[str, int]:
        """tuned, base, equal -> votes about a run."""
        counts = {"tuned": 0, "base": 0, "equal": 0}
        with suppress(OSError, ValueError):
            for row in read_json_lines(self.folder / VOTES):
                if row.get("run") == run and row.get("better") in counts:
                    counts[row["better"]] += 1
        return counts
