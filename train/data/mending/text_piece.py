"""A piece of a text that is edited, and still knows where each of its characters was in the original."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from train.data.rows.problems import Edit


@dataclass(frozen=True)
class Segment:
    """Characters copied from the original at `origin`, or written in their place."""

    text: str
    origin: int
    copied: bool = True


class Piece:
    """Segments in order; immutable."""

    def __init__(self, segments: Iterable[Segment]) -> None:
        self.segments = [segment for segment in segments if segment.text]
        self.text = "".join(segment.text for segment in self.segments)
        self._starts = [0, *accumulate(len(segment.text) for segment in self.segments)]

    @classmethod
    def of(cls, text: str, start: int, stop: int) -> "Piece":
        """text[start:stop] as it is."""
        return cls([Segment(text[start:stop], start)])

    @classmethod
    def joined(cls, pieces: "Sequence[Piece | str]") -> "Piece":
        """Pieces one after the other; a str is new text, which has the place of the piece before it."""
        segments: list[Segment] = []
        origin = next((piece.original(0) for piece in pieces if isinstance(piece, Piece)), 0)
        for piece in pieces:
            if isinstance(piece, str):
                segments.append(Segment(piece, origin, copied=False))
            else:
                segments += piece.segments
                origin = piece.original(len(piece.text))
        return cls(segments)

    def original(self, offset: int) -> int:
        """Where the character at `offset` was; of new text, where the text was that it replaces."""
        if not self.segments:
            return 0
        number = min(bisect_right(self._starts, offset), len(self.segments)) - 1
        segment = self.segments[number]
        return segment.origin + (offset - self._starts[number] if segment.copied else 0)

    def cut(self, start: int, stop: int) -> "Piece":
        """The piece from `start` to `stop`."""
        found = []
        for number in range(max(bisect_right(self._starts, start) - 1, 0), len(self.segments)):
            begin, segment = self._starts[number], self.segments[number]
            if begin >= stop:
                break
            low, high = max(start - begin, 0), min(stop - begin, len(segment.text))
            if low < high:
                origin = segment.origin + (low if segment.copied else 0)
                found.append(Segment(segment.text[low:high], origin, segment.copied))
        return Piece(found)

    def edited(self, edits: Iterable[Edit]) -> "Piece":
        """The piece with these edits, whose offsets are those of `text`; one inside another that came before is void."""
        parts: list[Segment] = []
        at = 0
        for edit in sorted(edits, key=lambda edit: (edit.start, edit.stop)):
            if edit.start < at:
                continue
            parts += self.cut(at, edit.start).segments
            parts.append(Segment(edit.text, self.original(edit.start), copied=False))
            at = edit.stop
        return Piece([*parts, *self.cut(at, len(self.text)).segments])
