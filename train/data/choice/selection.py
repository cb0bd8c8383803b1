"""Which conversations of a data set are trained on: what cleaning leaves, without the questions that are held out.

`data`, `doctor` and `train` take the same rows, and say the same about them.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from train.common.progress import bar
from train.data.checked.conversations import Conversation
from train.data.choice.cleaning import Cleaned, CleaningSettings, CountTokens, OnProgress, clean, named_steps
from train.data.choice.held_out import Split, check_held_out, split
from train.data.streams.streamed import take
from train.data.tokens import chat_template
from train.data.tokens.settings import TemplateSettings

if TYPE_CHECKING:
    from train.data.tokens.chat_template import Encoder

LARGE = 20_000  # rows from which progress is shown


class SelectionSettings(CleaningSettings, Protocol):
    """Keys of a recipe, so that data/ needs no config/."""

    @property
    def held_out(self) -> float: ...


@dataclass(frozen=True)
class Selection:
    """The conversations on both sides, in the order of the data. cleaned, split: None where nothing was asked for."""

    trained: Sequence[Conversation]
    held_out: Sequence[Conversation]
    cleaned: Cleaned | None = None
    split: Split | None = None

    def notes(self) -> list[str]:
        """What was decided, a sentence each, for the person who asked for it."""
        notes = [f"cleaned: {self.cleaned}."] if self.cleaned else []
        if self.split:
            notes.append(f"held out: {self.split}; neither they nor near duplicates of their questions are trained on.")
        return notes

    @property
    def trained_rows(self) -> np.ndarray | None:
        """Positions in the data of `trained`, int64; None: all."""
        return self._rows(self.split.trained if self.split else None)

    @property
    def held_out_rows(self) -> np.ndarray:
        """Positions in the data of `held_out`, int64."""
        rows = self._rows(self.split.held_out if self.split else [])
        assert rows is not None
        return rows

    def _rows(self, chosen: Sequence[int] | None) -> np.ndarray | None:
        """Positions in the data of the rows `chosen` of what cleaning leaves; None: of all."""
        if not self.cleaned:
            return None if chosen is None else np.array(chosen, np.int64)
        kept = np.array(self.cleaned.kept, np.int64)
        return kept if chosen is None else kept[np.array(chosen, np.int64)]

    def digest(self) -> str:
        """A hash of which rows are on which side; empty if all are trained on."""
        if not (self.cleaned or self.split):
            return ""
        rows = [self.cleaned and self.cleaned.kept, self.split and self.split.held_out]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def check_settings(settings: SelectionSettings) -> None:
    """Raises UserError for keys that contradict each other, before anything is read."""
    named_steps(settings)
    check_held_out(settings.held_out)


def keeps_empty(clean: str) -> bool:
    """Whether rows with an empty text are to be read, because the step `empty` takes them."""
    return "empty" in clean.split(",")


def token_counter(tokenizer: "Encoder", settings: TemplateSettings) -> CountTokens:
    """The number of tokens of a conversation as the model reads it, before any is cut; of two answers with the longer."""

    def count(conversation: Conversation) -> int:
        keys = (settings.template, settings.mask, settings.system)
        return max(len(chat_template.render(one, tokenizer, *keys)[0]) for one in conversation.sequences)

    return count


def select(
    conversations: Sequence[Conversation],
    settings: SelectionSettings,
    count_tokens: CountTokens | None,
    show_progress: bool = False,
) -> Selection:
    """Clean the data, then set questions aside; without either key all conversations are trained on.

    Args:
        count_tokens: needed for the step `tokens` alone.
    Raises:
        UserError: keys that contradict each other, or nothing is left to train on.
    """
    cleaned = divided = None
    with _bars(len(conversations), show_progress) as on_progress:
        check_settings(settings)
        if settings.clean:
            cleaned = clean(conversations, settings, count_tokens, on_progress)
            conversations = take(conversations, cleaned.kept)
        if not settings.held_out:
            return Selection(conversations, [], cleaned)
        divided = split(conversations, settings.held_out, settings.near, on_progress)
    trained, held_out = (take(conversations, rows) for rows in (divided.trained, divided.held_out))
    return Selection(trained, held_out, cleaned, divided)


@contextmanager
def _bars(rows: int, shown: bool) -> Iterator[OnProgress | None]:
    """Yield on_progress, which draws one bar for each thing that is under way; None for little data."""
    if not shown or rows < LARGE:
        yield None
        return
    with ExitStack() as stack:
        title, done, advance = "", 0, lambda amount: None

        def on_progress(now: str, row: int) -> None:
            nonlocal title, done, advance
            if now != title:
                stack.close()
                title, done, advance = now, 0, stack.enter_context(bar(now, rows, "rows"))
            advance(row - done)
            done = row

        yield on_progress
