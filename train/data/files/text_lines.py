"""What the forms of questions and answers in plain text share: numbered lines, labels, and rows made of parts."""

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from train.data.rows.data_row import DataFile, DataRow
from train.data.rows.problems import KeyPath, Place

QUESTION = (
    *("问", "问题", "提问", "题目", "用户", "患者", "病人"),
    *("q", "question", "user", "human", "prompt", "patient", "instruction"),
)
ANSWER = (
    *("答", "回答", "答案", "回复", "解答", "助手", "医生"),
    *("a", "answer", "assistant", "ai", "bot", "gpt", "response", "doctor"),
)
SYSTEM = ("系统", "system")
ROLE_OF = {**dict.fromkeys(QUESTION, "user"), **dict.fromkeys(ANSWER, "assistant"), **dict.fromkeys(SYSTEM, "system")}
LABEL = re.compile(
    r"\s*(?:[-*>#]+\s+)?(?:[(（]?\d{1,6}[.、)）]\s*)?(?:\*\*|【|\[)?\s*([A-Za-z]{1,11}|[\u4e00-\u9fff]{1,6})\s*\d{0,6}"
    r"\s*(?:(?:\*\*|】|\])\s*[:：]?|[:：]\s*(?:\*\*)?)\s*(.*)",
    re.DOTALL,
)
HAS_LABEL_END = re.compile(r"[:：】\]]|\*\*")
NUMBERED = re.compile(r"\s*(?:[(（](\d{1,6})[)）]|第?(\d{1,6})(?:[.、)）]|题[:：.、]?))\s*(\S.*)", re.DOTALL)
SEPARATOR = re.compile(r"\s*(?:-{3,}|={3,}|\*{3,}|_{3,})\s*")
HEADING = re.compile(r"\s*#{1,6}\s*(\S.*)")


@dataclass(frozen=True)
class Line:
    """A line of a text without its end."""

    number: int  # from 1
    text: str
    share: float = 0.0  # of the file that is read after it

    @property
    def blank(self) -> bool:
        return not self.text.strip()


@dataclass
class Part:
    """A question, an answer or a system message, as it is gathered line by line."""

    role: str
    line: int  # where it begins
    lines: list[str]
    share: float = 0.0  # of the file that is read

    @property
    def text(self) -> str:
        return "\n".join(self.lines).strip()


class Lines:
    """Lines one by one, and a look at those that follow."""

    def __init__(self, source: Iterable[Line]) -> None:
        self.source = iter(source)
        self.ahead: deque[Line] = deque()
        self.titles = 0  # lines that are a title between questions, and are left out

    def __iter__(self) -> Iterator[Line]:
        while (line := self.ahead.popleft() if self.ahead else next(self.source, None)) is not None:
            yield line

    def next_text(self) -> str:
        """The next line that is not blank; "" at the end."""
        for line in self.ahead:
            if not line.blank:
                return line.text
        for line in self.source:
            self.ahead.append(line)
            if not line.blank:
                return line.text
        return ""


def label(text: str) -> tuple[str, str]:
    """("user", "assistant" or "system"; the text after it) of a line that begins with a label; else ("", "")."""
    if not HAS_LABEL_END.search(text, 0, 64):  # most lines: spare them the whole expression
        return "", ""
    match = LABEL.fullmatch(text)
    role = ROLE_OF.get(match[1].lower(), "") if match else ""
    return (role, match[2]) if match and role else ("", "")


def numbered(text: str) -> tuple[int, str]:
    """(number, the text after it) of a line such as "3. How …" or "3、怎么…"; else (0, "")."""
    match = NUMBERED.fullmatch(text)
    return (int(match[1] or match[2]), match[3]) if match else (0, "")


def row_of(file: DataFile, parts: Sequence[Part], share: float) -> DataRow:
    """A conversation of these parts."""

    def place_of(path: KeyPath) -> Place:
        part = parts[path[1]] if len(path) > 1 and isinstance(path[1], int) else parts[0]
        return Place(part.line, 1)

    value = {"messages": [{"role": part.role, "content": part.text} for part in parts]}
    location = f"{file.name}:{parts[0].line}"
    return DataRow(location, value, True, place_of=place_of, file=file.name, format="text", share=share)


def problem_row(file: DataFile, line: int, found: str, expected: str, remedy: str) -> DataRow:
    """A line that belongs to no question and no answer, or a part that is missing."""
    return DataRow(
        f"{file.name}:{line}", problems=(file.problem(found, expected, remedy, Place(line, 1)),), file=file.name
    )


def stray(file: DataFile, line: Line) -> DataRow:
    shown = line.text.strip()[:24]
    remedy = "delete the line, or write # before a title"
    return problem_row(file, line.number, f"{shown!r}, which belongs to no question", "a question first", remedy)
