"""A conversation, and what is known of all conversations of a data set when they have been read once."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from train.common.errors import UserError
from train.data.checked.counts import Counts
from train.data.checked.notices import notices
from train.data.rows.data_row import DataRow
from train.data.rows.formats import FORMATS, ParsedRow, Turn
from train.data.rows.problems import Problem, ValueProblem

MAX_LISTED = 50  # problems that a report lists
COUNTERS = ("formats", "unused_keys", "unused_turn_keys")  # of CheckedData

Parse = Callable[[Any], ParsedRow]  # what a row means


@dataclass(frozen=True)
class Conversation:
    """Turns that alternate user, assistant, …, assistant."""

    turns: tuple[Turn, ...]
    system: str | None  # the system message; None = the recipe's, "" = none
    location: str  # "file:line"
    rejected: str | None = None  # of preference data: a worse answer than that of the last turn

    @property
    def all_turns(self) -> tuple[Turn, ...]:
        """Its turns, and the rejected answer as one more."""
        return self.turns if self.rejected is None else (*self.turns, Turn("assistant", self.rejected))

    @property
    def sequences(self) -> "tuple[Conversation, ...]":
        """What the model reads: the conversation itself; or of preference data one with the chosen and one with the
        rejected answer, and only that answer is trained on."""
        if self.rejected is None:
            return (self,)
        before = tuple(replace(turn, trained=False) for turn in self.turns[:-1])
        answers = (self.turns[-1].text, self.rejected)
        return tuple(Conversation((*before, Turn("assistant", text)), self.system, self.location) for text in answers)


@dataclass(frozen=True)
class PartCount:
    """How many rows of a part of DATA were read, and how many of them are used: the same, unless it is drawn from."""

    text: str  # the part, as a person writes it
    read: int
    used: int


@dataclass
class CheckedData:
    """What was read from one or several files. Use `conversations` only if there are no `problems`."""

    conversations: Sequence[Conversation] = ()  # of large data they are read again each time: see streamed.py
    problems: list[Problem] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)  # of the conversations
    formats: Counter[str] = field(default_factory=Counter)  # name in FORMATS -> rows
    unused_keys: Counter[str] = field(default_factory=Counter)  # key that no format has -> rows
    unused_turn_keys: Counter[str] = field(default_factory=Counter)  # key of turns that is not read -> turns
    parts: list[PartCount] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # how files were read: columns, encoding, sheet; a sentence each
    read_elsewhere: bool = False  # a file has no rows of its own: they are joined with those of another
    keep_empty: bool = False  # rows with an empty text are among the conversations

    def notices(self) -> list[str]:
        """What a person should know of this data, one sentence each (see notices.py)."""
        return self.notes + notices(self.counts, self.unused_keys, self.unused_turn_keys)

    def add(self, row: DataRow, file: str, parse: Parse = ParsedRow) -> Conversation | None:
        """Count a row and note its problems; returns its conversation if it has none.

        Args:
            file: where it is, for a row that does not say so itself.
        """
        self.notes += row.notes
        self.read_elsewhere |= row.read_elsewhere
        problems = list(row.problems)
        if row.readable:
            parsed = parse(row.value)
            only_empty = self.keep_empty and all(p.is_empty_text for p in parsed.problems)
            wrong = [] if only_empty else parsed.problems
            if not problems and not wrong:
                conversation = Conversation(parsed.turns, parsed.system, row.location, parsed.rejected)
                return self._add_sound(conversation, parsed, row.format)
            problems += _wrong_values(row, wrong, file)
        self.problems += problems
        return None

    def _add_sound(self, conversation: Conversation, parsed: ParsedRow, format_name: str) -> Conversation:
        self.counts.add(conversation)
        self.formats[format_name or parsed.format] += 1
        if parsed.unused_keys:
            self.unused_keys.update(parsed.unused_keys)
        if parsed.unused_turn_keys:
            self.unused_turn_keys.update(parsed.unused_turn_keys)
        return conversation

    def merge(self, later: "CheckedData") -> None:
        """Add what was found in a later part of the data; its conversations are left out."""
        self.problems += later.problems
        self.counts.merge(later.counts)
        for name in COUNTERS:
            getattr(self, name).update(getattr(later, name))
        self.parts += later.parts
        self.notes += later.notes
        self.read_elsewhere |= later.read_elsewhere

    def to_json(self) -> dict[str, Any]:
        """What was counted, without conversations and problems."""
        counters = {name: dict(getattr(self, name)) for name in COUNTERS}
        parts = [asdict(part) for part in self.parts]
        return {"counts": self.counts.to_json(), **counters, "parts": parts, "notes": self.notes}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "CheckedData":
        """What `to_json` gave."""
        counters: dict[str, Any] = {name: Counter(values[name]) for name in COUNTERS}
        parts = [PartCount(**part) for part in values["parts"]]
        return cls(counts=Counts.from_json(values["counts"]), **counters, parts=parts, notes=values["notes"])


class ProblemsError(UserError):
    """The report of problems in data files. checked: all that was found there."""

    def __init__(self, checked: CheckedData) -> None:
        super().__init__(report(checked.problems))
        self.problems = checked.problems
        self.checked = checked


def report(problems: list[Problem], limit: int = MAX_LISTED) -> str:
    """The first `limit` problems, the number of the others, and an example of each format if a row has none of them."""
    files = list(dict.fromkeys(p.file for p in problems))
    noun = "problem" if len(problems) == 1 else "problems"
    lines = [f"{len(problems)} {noun} in {', '.join(files)}; nothing was changed.", *map(str, problems[:limit])]
    if len(problems) > limit:
        lines.append(f"… and {len(problems) - limit} more.")
    if any("four formats" in p.expected for p in problems):
        lines += ["The four formats, one row each:", *(f"    {name + ':':10}{line}" for name, line in FORMATS.items())]
    return "\n".join(lines)


def _wrong_values(row: DataRow, wrong: Sequence[ValueProblem], file: str) -> list[Problem]:
    """The values of a row that its format does not allow, with their places."""
    problems = []
    reported = {(p.line, p.column) for p in row.problems}  # a mistake in the text of a value is not also a wrong value
    for p in wrong:
        place = row.place_of(p.path)
        if (place.line, place.column) not in reported:
            where = (row.file or file, place.line, place.column)
            problems.append(Problem(*where, p.found, p.expected, p.remedy, place.cell, p.kind))
    return problems
