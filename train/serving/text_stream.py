"""Tokens to the text that may be sent: whole characters, and nothing that may become a stop text."""

import codecs
from collections.abc import Sequence


class TextStream:
    """Takes the bytes of one token after another; `push` and `close` return the text that is certain by now.

    After `push` has found a stop text, `stopped` is True, and nothing more comes.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stop = tuple(text for text in stop if text)
        self.stopped = False
        self.sent = 0  # characters
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # keeps the bytes of an unfinished character
        self._held = ""

    @property
    def seen(self) -> int:
        """Characters that were complete so far, sent or held back."""
        return self.sent + len(self._held)

    def push(self, data: bytes) -> str:
        return self._release(self._decoder.decode(data), final=False)

    def close(self) -> str:
        """The rest: what was held back, and U+FFFD for a character that has no end."""
        return self._release(self._decoder.decode(b"", final=True), final=True)

    def _release(self, new: str, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        # the stop text that is complete first, so that the pieces in which text arrives decide nothing
        found = [(place + len(stop), place) for stop in self.stop if (place := text.find(stop)) >= 0]
        if found:
            at = min(found)[1]
            self.stopped, self._held = True, ""
            return self._count(text[:at])
        kept = 0 if final else max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - kept :]
        return self._count(text[: len(text) - kept])

    def _count(self, text: str) -> str:
        self.sent += len(text)
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins, but not all of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
