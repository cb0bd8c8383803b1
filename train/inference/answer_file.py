"""A file of answers that grows as they come, and is continued after an interruption: no question is answered twice.

Beside the answers, NAME.record.json says what they were made from, how many there are, and at which byte the last one
ends: what a killed process wrote after that is cut off. An Excel workbook and a JSON array cannot grow, so their rows
are kept in NAME.part.jsonl until the last one is there.
"""

import csv
import fcntl
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from train.common.errors import UserError
from train.common.files import read_json, read_json_lines, sync, write_json, write_text
from train.data.files.questions import Question, QuestionFile

KINDS = {".txt": "text", ".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".xlsx": "xlsx"}
WHOLE = ("json", "xlsx")  # kinds that are written when all answers are there
MAX_ROWS, MAX_CELL = 1_048_575, 32_767  # of a sheet of Excel below its header; characters of a cell
UTF8_MARK = b"\xef\xbb\xbf"  # Excel takes a CSV file without it for one in the encoding of its language


def default_path(questions: QuestionFile) -> Path:
    """NAME_answers beside the questions, of their kind."""
    suffix = next(suffix for suffix, kind in KINDS.items() if kind == questions.kind)
    return questions.path.with_name(f"{questions.path.stem}_answers{suffix}")


class AnswerFile:
    """The answers to the questions of a file, in their order.

    answered: how many of them are in the file.
    """

    def __init__(self, path: Path, questions: QuestionFile, inputs: dict[str, Any]) -> None:
        """Nothing is written yet.

        Args:
            inputs: what the answers depend on, as JSON has it; kept, and compared when they are continued.
        Raises:
            UserError: `path` is no file of answers, is the file of questions, or holds answers of other inputs.
        """
        kind = KINDS.get(path.suffix.lower())
        if kind is None:
            raise UserError(f"answers={path}: expected a name that ends in {', '.join(KINDS)}.")
        if path.resolve() == questions.path.resolve():
            raise UserError(f"answers={path} are the questions themselves. Give another name.")
        if kind == "xlsx" and len(questions.questions) > MAX_ROWS:
            raise UserError(f"answers={path}: a sheet of Excel has {MAX_ROWS:,} rows at most. Write a .csv file.")
        self.path, self.kind, self.questions, self.inputs = path, kind, questions, inputs
        self._record = path.with_name(f"{path.name}.record.json")
        self._growing = path.with_name(f"{path.name}.part.jsonl") if kind in WHOLE else path
        self._delimiter = questions.delimiter if kind == questions.kind == "csv" else "\t" if kind == "tsv" else ","
        self._columns = _columns(questions)
        kept = self._kept()
        self.answered, self._bytes, self.complete = kept["answered"], kept["bytes"], kept["complete"]

    def _kept(self) -> dict[str, Any]:
        """The record of an earlier start; or of none."""
        new = {"answered": 0, "bytes": 0, "complete": False}
        if not self._record.exists():
            if self.path.exists():
                raise UserError(f"answers={self.path} exists, and nothing says how it was made. Give another name.")
            return new
        record = _read_record(self._record)
        if changed := _changes(record["inputs"], self.inputs):
            raise UserError(
                f"answers={self.path} was made with other inputs ({changed}). "
                f"Give another name, or delete it with {self._record.name} to answer again."
            )
        present = self._growing.stat().st_size if self._growing.exists() else 0
        finished = record["complete"] and self.path.exists()
        if finished and self.kind in WHOLE:
            return record
        if present < record["bytes"]:
            raise UserError(
                f"{self._growing} is missing or shorter than it was. Delete {self._record} to answer again, "
                "or restore the file from a copy."
            )
        return record

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Append to the file as long as the block runs. At the end of all answers it is completed.

        Raises:
            UserError: another process appends to it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write_record()
        with self._growing.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process writes answers to {self.path}. Wait for it, or stop it.") from None
            file.truncate(self._bytes)
            self._file: BinaryIO = file
            yield
            if self.answered == len(self.questions.questions):
                self._complete()

    def append(self, answers: Sequence[str]) -> None:
        """The answers to the next questions. They are on the disk when this returns."""
        asked = self.questions.questions[self.answered : self.answered + len(answers)]
        text = "".join(self._lines(question, answer) for question, answer in zip(asked, answers, strict=True))
        head = b"" if self._bytes else self._head()
        self._bytes += self._file.write(head + text.encode("utf-8"))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.answered += len(answers)
        self._write_record()

    def _write_record(self) -> None:
        kept = {"answered": self.answered, "bytes": self._bytes, "complete": self.complete}
        write_json(self._record, {"inputs": self.inputs, "questions": len(self.questions.questions), **kept})

    # Rows

    def _row(self, question: Question, answer: str) -> dict[str, Any]:
        """The row of the question, or of a line of text its question, and the answer."""
        return {**(question.row or {"question": question.first}), _answer_column(self.questions): answer}

    def _lines(self, question: Question, answer: str) -> str:
        if self.kind == "text":
            return f"Q: {question.turns[-1].text}\nA: {answer}\n\n"
        row = self._row(question, answer)
        if self.kind in ("csv", "tsv"):
            return self._csv([_cell(row.get(name, "")) for name in self._columns])
        return json.dumps(row, ensure_ascii=False) + "\n"

    def _csv(self, cells: Sequence[str]) -> str:
        text = io.StringIO()
        csv.writer(text, delimiter=self._delimiter, lineterminator="\n").writerow(cells)
        return text.getvalue()

    def _head(self) -> bytes:
        """What a new file begins with."""
        if self.kind not in ("csv", "tsv"):
            return b""
        return (UTF8_MARK if self.kind == "csv" else b"") + self._csv(self._columns).encode("utf-8")

    # The whole file

    def _complete(self) -> None:
        if self.kind in WHOLE:
            rows = read_json_lines(self._growing)
            if self.kind == "json":
                write_text(self.path, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
            else:
                _write_workbook(self.path, self._columns, rows)
        self.complete = True
        self._write_record()
        if self.kind in WHOLE:
            self._growing.unlink()


def _read_record(path: Path) -> dict[str, Any]:
    """A record that this program wrote.

    Raises:
        UserError: damaged.
    """
    with suppress(ValueError, RecursionError, OSError):
        record = read_json(path)
        types = {"inputs": dict, "answered": int, "bytes": int, "complete": bool}
        if isinstance(record, dict) and all(type(record.get(key)) is kind for key, kind in types.items()):
            return record
    raise UserError(f"{path} is damaged. Delete it and the answers beside it to answer again.")


def _changes(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What differs, in words."""
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{key}: {_short(old.get(key))}, now {_short(new.get(key))}" for key in keys)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "…"


def _columns(questions: QuestionFile) -> list[str]:
    """Of a table of the answers: all keys of the rows in their order, then the answer."""
    keys = questions.columns or dict.fromkeys(key for one in questions.questions for key in one.row)
    return [*(keys or ["question"]), _answer_column(questions)]


def _answer_column(questions: QuestionFile) -> str:
    """ "answer", or with a number where the questions have such a column: nothing of theirs is replaced."""
    used = {*questions.columns, *(questions.questions[0].row if questions.questions else ())}
    names = ("answer", *(f"answer_{n}" for n in range(2, len(used) + 3)))
    return next(name for name in names if name not in used)


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def _write_workbook(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """A workbook with one sheet, all cells of it texts: an answer that begins with = is no formula."""
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    book = Workbook(write_only=True)
    sheet = book.create_sheet("answers")
    for texts in (list(columns), *([_cell(row.get(name, "")) for name in columns] for row in rows)):
        cells = [WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("", text)[:MAX_CELL]) for text in texts]
        for cell in cells:
            cell.data_type = "s"
        sheet.append(cells)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        book.save(aside)
        sync(aside)
        aside.replace(path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)
