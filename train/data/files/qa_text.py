"""Questions and answers in plain text (.txt, .md): labels, numbers, paragraphs, or notes of symptoms.

The form is told from the beginning of the file and said; a line that does not fit it is a problem, never left out. One
conversation is in memory at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from train.data.files import symptom_notes
from train.data.files.text_encoding import Encoding, detect, open_text
from train.data.files.text_lines import (
    HEADING,
    SEPARATOR,
    Line,
    Lines,
    Part,
    label,
    numbered,
    problem_row,
    row_of,
    stray,
)
from train.data.rows.data_row import DataFile, DataRow, ReadOptions, only_problem
from train.data.rows.problems import Problem

HEAD = 5000  # lines that the form is told from
LINES_PER_LOOK = 200  # at how much of the file is read
Form = Callable[[DataFile, Lines], Iterator[DataRow]]
UNKNOWN = (
    "text in no form that is known here",
    "questions and answers with labels (问：…, 答：…; Q: …, A: …), numbers (1. …), or a blank line between pairs",
    "write 问： or Q: before each question, 答： or A: before each answer",
)


def read(file: DataFile, options: ReadOptions) -> Iterator[DataRow]:
    """The conversations of a text file."""
    encoding = detect(file)
    if isinstance(encoding, Problem):
        yield only_problem(file, encoding)
        return
    head = list(islice(_lines(file, encoding), HEAD))
    if not any(not line.blank for line in head):
        return
    name, form = form_of(head)
    if form is None:
        first = next(line.number for line in head if not line.blank)
        yield problem_row(file, first, *UNKNOWN)
        return
    count, lines = 0, Lines(_lines(file, encoding))
    for row in form(file, lines):
        count += sum(message["role"] == "assistant" for message in row.value["messages"]) if row.readable else 0
        yield row
    notes = [encoding.note] if encoding.note else []
    notes.append(f"{file.name} is read as {name}: {count:,} pair{'' if count == 1 else 's'}")
    if lines.titles:
        notes.append(
            f"{file.name}: {lines.titles:,} title{'' if lines.titles == 1 else 's'} (#) between questions left out"
        )
    yield DataRow(f"{file.name}:1", file=file.name, share=1.0, notes=tuple(notes))


def _lines(file: DataFile, encoding: Encoding) -> Iterator[Line]:
    text, raw = open_text(file, encoding)
    share = 0.0
    with text:
        for number, line in enumerate(text, 1):
            if number % LINES_PER_LOOK == 0:
                share = min(raw.tell() / max(file.size, 1), 1.0)
            yield Line(number, line.rstrip("\n"), share)


# Which form


def form_of(head: Sequence[Line]) -> tuple[str, Form | None]:
    """The form that these first lines are in, and its name for the user; None if they are in none."""
    roles = {label(line.text)[0] for line in head}
    marks = [index for index, line in enumerate(head) if SEPARATOR.fullmatch(line.text)]
    separated = any(_is_separator(head[index], Lines(head[index + 1 :])) for index in marks)
    if {"user", "assistant"} <= roles:
        if separated:
            return "conversations with labels, a separator line (---) between each two", _separated
        return "questions and answers with labels (each pair is a conversation of its own)", _labelled
    if symptom_notes.is_form(head):
        return "notes of symptoms: a name, and lines such as 症状：…", symptom_notes.read
    if _is_numbered(head):
        return "numbered questions, each with its answer in the lines below", _numbered
    if name := _paragraph_form(head):
        return name, _by_question_marks if "question mark" in name else _by_two_lines
    return "", None


def _is_separator(line: Line, rest: Lines) -> bool:
    return bool(SEPARATOR.fullmatch(line.text)) and label(rest.next_text())[0] in ("user", "system")


def _is_numbered(head: Sequence[Line]) -> bool:
    """Numbers from 1 without a gap, text between each two, and nothing before the first."""
    numbers = [(index, numbered(line.text)[0]) for index, line in enumerate(head) if numbered(line.text)[0]]
    if not numbers or [number for _, number in numbers] != list(range(1, len(numbers) + 1)):
        return False
    ends = [index for index, _ in numbers[1:]] + [len(head)]
    answered = [any(not line.blank for line in head[index + 1 : end]) for (index, _), end in zip(numbers, ends)]
    return sum(answered) > len(answered) / 2


def _paragraphs(lines: Lines) -> Iterator[list[Line]]:
    paragraph: list[Line] = []
    for line in lines:
        if not line.blank:
            paragraph.append(line)
        elif paragraph:
            yield paragraph
            paragraph = []
    if paragraph:
        yield paragraph


def _paragraph_form(head: Sequence[Line]) -> str:
    paragraphs = [p for p in _paragraphs(Lines(head)) if not (len(p) == 1 and HEADING.fullmatch(p[0].text))]
    if paragraphs and _asks(paragraphs[0][0]) and (len(paragraphs) > 1 or len(paragraphs[0]) > 1):
        return "paragraphs: one that begins with a question mark at the end of its line is a question"
    if len(paragraphs) > 1 and all(len(paragraph) == 2 for paragraph in paragraphs[:-1]):
        return "paragraphs of two lines: a question, and its answer"
    return ""


def _asks(line: Line) -> bool:
    return line.text.rstrip().endswith(("?", "？"))


# Labels


def _labelled(file: DataFile, lines: Lines) -> Iterator[DataRow]:
    """Each question with its answer; a system message counts for the pairs after it."""
    system: list[Part] = []
    question: Part | None = None
    for part in _parts(file, lines):
        if isinstance(part, DataRow):
            yield part
        elif part.role == "system":
            system = [part]
        elif part.role == "user":
            if question:
                yield _lonely(file, question)
            question = part
        elif question is None:
            yield _lonely(file, part)
        else:
            yield row_of(file, [*system, question, part], part.share)
            question = None
    if question:
        yield _lonely(file, question)


def _lonely(file: DataFile, part: Part) -> DataRow:
    if part.role == "user":
        return problem_row(file, part.line, "a question without an answer", "an answer below it", "add it")
    found = "an answer without a question of its own"
    return problem_row(file, part.line, found, "a question above it", "add it, or join the two answers into one")


def _separated(file: DataFile, lines: Lines) -> Iterator[DataRow]:
    """All turns between two separator lines are a conversation."""
    turns: list[Part] = []
    for part in _parts(file, lines):
        if isinstance(part, DataRow):
            yield part
        elif part.role != "end":
            turns.append(part)
        elif turns:
            yield row_of(file, turns, turns[-1].share)
            turns = []
    if turns:
        yield row_of(file, turns, 1.0)


def _parts(file: DataFile, lines: Lines) -> Iterator[Part | DataRow]:
    """The parts of a text with labels; a separator line is a part of role "end"; stray lines are problems."""
    part: Part | None = None
    for line in lines:
        role, text = label(line.text)
        if role:
            if part:
                yield part
            part = Part(role, line.number, [text], line.share)
        elif _is_separator(line, lines) or _is_title(line, lines, part is None):
            if part:
                yield part
            part = None
            if not HEADING.fullmatch(line.text):
                yield Part("end", line.number, [])
            lines.titles += bool(HEADING.fullmatch(line.text))
        elif part:
            part.lines.append(line.text)
        elif not line.blank and not SEPARATOR.fullmatch(line.text):
            yield stray(file, line)
    if part:
        yield part


def _is_title(line: Line, lines: Lines, between: bool) -> bool:
    """A heading of Markdown before a question; inside an answer it belongs to the answer."""
    return bool(HEADING.fullmatch(line.text)) and (between or label(lines.next_text())[0] in ("user", "system"))


# Numbers and paragraphs


def _numbered(file: DataFile, lines: Lines) -> Iterator[DataRow]:
    question: Part | None = None
    answer: Part | None = None
    expected = 1
    for line in lines:
        number, text = numbered(line.text)
        if number == expected:
            yield from _pair(file, question, answer, line.share)
            question, answer, expected = Part("user", line.number, [text]), None, expected + 1
        elif number and question:
            found = f"the number {number} in place of {expected}"
            remedy = "number the questions from 1 without a gap, and use - for lists in answers; or write 问： and 答："
            yield problem_row(file, line.number, found, f"question {expected}, or the text of an answer", remedy)
        elif question and not line.blank and answer is None:
            answer = Part("assistant", line.number, [line.text])
        elif answer:
            answer.lines.append(line.text)
        elif HEADING.fullmatch(line.text):
            lines.titles += 1
        elif not line.blank:
            yield stray(file, line)
    yield from _pair(file, question, answer, 1.0)


def _pair(file: DataFile, question: Part | None, answer: Part | None, share: float) -> Iterator[DataRow]:
    if question and answer:
        yield row_of(file, [question, answer], share)
    elif question:
        yield _lonely(file, question)


def _by_question_marks(file: DataFile, lines: Lines) -> Iterator[DataRow]:
    question: Part | None = None
    answer: Part | None = None
    for paragraph in _paragraphs(lines):
        first = paragraph[0]
        if _asks(first):
            yield from _pair(file, question, answer, first.share)
            question, answer, paragraph = Part("user", first.number, [first.text]), None, paragraph[1:]
        elif question is None and HEADING.fullmatch(first.text):
            lines.titles += 1
        elif question is None:
            yield stray(file, first)
        texts = [line.text for line in paragraph]
        if question and answer is None and texts:
            answer = Part("assistant", paragraph[0].number, texts)
        elif answer:
            answer.lines += ["", *texts]
    yield from _pair(file, question, answer, 1.0)


def _by_two_lines(file: DataFile, lines: Lines) -> Iterator[DataRow]:
    for paragraph in _paragraphs(lines):
        if len(paragraph) == 2:
            first, second = paragraph
            parts = [Part("user", first.number, [first.text]), Part("assistant", second.number, [second.text])]
            yield row_of(file, parts, second.share)
        elif len(paragraph) == 1 and HEADING.fullmatch(paragraph[0].text):
            lines.titles += 1
        else:
            found = f"a paragraph of {len(paragraph)} line{'' if len(paragraph) == 1 else 's'}"
            remedy = (
                "write a question and its answer in a line each, with a blank line after them; or write 问： and 答："
            )
            yield problem_row(file, paragraph[0].number, found, "two lines, as in the paragraphs before", remedy)
