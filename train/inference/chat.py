"""A conversation with a model in the terminal: answers as they come, commands, and forgetting when the context is full.

Answers go to the standard output, all else to the standard error. Which model answers, and how it is loaded, is not its
concern: it is given a `ChatModel`.
"""

import locale
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from train.common.terminal import readable
from train.data.rows.formats import Turn
from train.data.tokens.chat_template import prompt
from train.inference.generate import context_of, notice, room, stream
from train.inference.sampling import Sampling
from train.inference.stock import stock_stream

HELP = """/clear        forget the conversation
/system TEXT  another system message (/system alone shows it, /system none removes it)
/quit         end (so does Ctrl-D); Ctrl-C stops an answer"""


@dataclass(frozen=True)
class ChatModel:
    """A loaded model as a chat needs it.

    encode: turns and the system message -> ids of the prompt.
    answer: ids, and a function that is called with the reason if the answer is cut off -> pieces of text.
    context: tokens of prompt and answer together.
    """

    encode: Callable[[list[Turn], str], list[int]]
    answer: Callable[[list[int], Callable[[str], None]], Iterator[str]]
    context: int


def chat_model(model: Any, tokenizer: Any, template: str, max_tokens: int, sampling: Sampling) -> ChatModel:
    """Our decoder, with or without an adapter."""
    return ChatModel(
        encode=lambda turns, system: prompt(turns, tokenizer, system, template),
        answer=lambda ids, notify: stream(model, tokenizer, ids, max_tokens, sampling, notify),
        context=context_of(model),
    )


def stock_chat_model(model: Any, tokenizer: Any, template: str, max_tokens: int, sampling: Sampling) -> ChatModel:
    """A model and a tokenizer of stock.load_stock."""

    def answer(ids: list[int], notify: Callable[[str], None]) -> Iterator[str]:
        return stock_stream(model, tokenizer, ids, room(len(ids), max_tokens, model), sampling, notify)

    return ChatModel(lambda turns, system: prompt(turns, tokenizer, system, template), answer, context_of(model))


def print_answer(model: ChatModel, ids: list[int], pieces: list[str] | None = None) -> None:
    """Print the answer to `ids` as it comes, a line end, and the reason if it was cut off.

    What was printed is appended to `pieces`, also if an exception ends the answer.
    """
    pieces = [] if pieces is None else pieces
    notes: list[str] = []
    answer = model.answer(ids, notes.append)
    try:
        for piece in answer:
            print(piece, end="", flush=True)
            pieces.append(piece)
    except BaseException:
        print(end="\n" if pieces else "", flush=True)
        raise
    finally:
        answer.close()  # type: ignore[attr-defined]
    print(flush=True)
    for note in notes:
        notice(note)


def typed_lines() -> Iterator[str]:
    """What the user types, line by line, with line editing; without a terminal the lines of the standard input.

    GBK and UTF-8 are read whatever the locale is; a line that is neither is left out, and this is said.
    """
    if sys.stdin is None:  # closed before the start
        return
    for line in _raw_lines():
        text = readable(line, sys.stdin.encoding or "utf-8")
        if text is None:
            notice("(this line is left out: it is neither UTF-8 nor GB18030 text)")
        else:
            yield text


def _raw_lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    may_lose_bytes = _edit_lines()
    notice("Type a question, or /help. Ctrl-D ends.")
    while True:
        try:
            line = input("\nyou> ")
        except KeyboardInterrupt:
            notice("\n(Ctrl-D or /quit ends)")
            continue
        except EOFError:
            notice("")
            return
        if may_lose_bytes and any("\udc80" <= character <= "\udcff" for character in line):
            may_lose_bytes = False
            _edit_bytes()
            notice("(what this terminal sends is not UTF-8, and some of it may be lost: please type the line again)")
            continue
        yield line


def _edit_lines() -> bool:
    """Give input() arrow keys and history; whether it drops bytes of text that is not UTF-8 (as readline does).

    readline reads the locale's encoding. Where that is ASCII (LC_ALL=C), it would take the bytes of UTF-8 for commands
    to itself, and the question would be another one: it gets the C locale's UTF-8.
    """
    ascii_only = locale.nl_langinfo(locale.CODESET) in ("ANSI_X3.4-1968", "US-ASCII")
    if ascii_only:
        os.environ["LC_ALL"] = "C.UTF-8"  # readline sets its locale from the environment for each line
    try:
        import readline
    except ImportError:
        notice("(no line editing: this Python has no readline)")
        return False
    for setting in ("input-meta on", "output-meta on", "convert-meta off"):  # where there is no C.UTF-8
        readline.parse_and_bind(f"set {setting}")
    return ascii_only or locale.nl_langinfo(locale.CODESET).upper() == "UTF-8"


def _edit_bytes() -> None:
    """Let readline keep every byte; it then moves and deletes by bytes, not by characters."""
    import readline

    readline.parse_and_bind("set byte-oriented on")


class Chat:
    """A conversation in progress: its turns and its system message."""

    def __init__(self, model: ChatModel, system: str, max_tokens: int) -> None:
        self.model, self.system, self.turns = model, system, list[Turn]()
        self.reserve = min(max_tokens, model.context // 2)  # tokens kept free for the answer

    def run(self, lines: Iterator[str]) -> None:
        """Answer each line, or obey it if it begins with a slash, until /quit or the last line."""
        for line in lines:
            if line.strip() == "/quit":
                return
            if line.startswith("/"):
                self.command(*line[1:].strip().partition(" ")[::2])
            elif line.strip():
                self.answer(line)

    def command(self, name: str, text: str = "") -> None:
        if name == "clear":
            self.turns.clear()
            notice("(the conversation is forgotten)")
        elif name == "system":
            if text:
                self.system = "" if text == "none" else text
            notice(f"(system message: {self.system or 'none'})")
        else:
            notice(HELP if name == "help" else f"(unknown command /{name})\n{HELP}")

    def answer(self, question: str) -> None:
        """Print the answer as it comes. After Ctrl-C the conversation keeps what was printed, if anything was."""
        ids = self.fit(question)
        if ids is None:
            return
        pieces: list[str] = []
        try:
            print_answer(self.model, ids, pieces)
        except KeyboardInterrupt:
            notice("(stopped)")
        self.turns += [Turn("user", question), Turn("assistant", "".join(pieces))] if pieces else []

    def fit(self, question: str) -> list[int] | None:
        """Ids of the conversation with `question`, without as many of its oldest turns as the context demands.

        Prints how many were forgotten. None, with a notice, if the question alone fills the context.
        """
        forgotten = 0
        while True:
            ids = self.model.encode([*self.turns, Turn("user", question)], self.system)
            if len(ids) + self.reserve <= self.model.context or not self.turns:
                break
            del self.turns[:2]
            forgotten += 1
        if forgotten:
            notice(
                f"(the oldest {forgotten} of the questions are forgotten: "
                f"the context holds {self.model.context:,} tokens)"
            )
        if len(ids) < self.model.context:
            return ids
        notice(
            f"(this question has {len(ids):,} tokens with its system message, "
            f"the context holds {self.model.context:,}: shorten it)"
        )
        return None
