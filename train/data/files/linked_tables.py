"""Questions and answers in two tables that are joined by ids, as cMedQA publishes them (question.csv, answer.csv).

Each answer becomes a row with its question, so a question with several answers gives several rows. A list of candidates
(train_candidates.txt) chooses the questions, if there is one list; evaluation lists beside it are not read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from train.data.files import csv_table, tables
from train.data.files.tables import BadCell, Table, TableRow
from train.data.files.text_encoding import detect
from train.data.rows.data_row import DataFile, DataRow, only_problem
from train.data.rows.problems import Problem

QUESTION_ID, ANSWER_ID = ("question_id", "que_id", "q_id"), ("ans_id", "answer_id")
TEXT = ("content", "text")
BOTH = "give both tables: DATA=question.csv,answer.csv, or the folder or archive with both"


def role_of(file: DataFile) -> str:
    """ "questions", "answers" or "candidates" by the first line of a table; "" for any other file."""
    with file.open() as stream:
        line = stream.read(4096).decode("utf-8-sig", "replace").partition("\n")[0]
    names = {name.strip(' "\r').lower() for name in line.split(",")}
    if not names & {*QUESTION_ID}:
        return ""
    if "pos_ans_id" in names or {"ans_id", "label"} <= names:
        return "candidates"
    if not names & {*TEXT}:
        return ""
    return "answers" if names & {*ANSWER_ID} else "questions" if len(names) == 2 else ""


def read(file: DataFile, role: str, others: Sequence[DataFile]) -> Iterator[DataRow]:
    """The rows of a table of answers; the other tables have none of their own.

    Args:
        role: of `file`. others: all files of DATA, those in archives too.
    """
    by_role: dict[str, list[DataFile]] = {"questions": [], "answers": [], "candidates": []}
    for other in others:
        if other.base_name.endswith((".csv", ".txt")) and (found := role_of(other)):
            by_role[found].append(other)
    if role != "answers":
        yield _read_with_answers(file, role, by_role["answers"])
    elif len(by_role["questions"]) != 1:
        found = (
            "answers without their questions"
            if not by_role["questions"]
            else "answers beside several tables of questions"
        )
        yield only_problem(file, file.problem(found, "one table of questions with the same ids", BOTH))
    else:
        yield from _join(file, by_role["questions"][0], by_role["candidates"])


def _read_with_answers(file: DataFile, role: str, answers: Sequence[DataFile]) -> DataRow:
    if answers:
        return DataRow(f"{file.name}:1", file=file.name, read_elsewhere=True)
    found = "questions without their answers" if role == "questions" else "a list of candidates without its answers"
    return only_problem(file, file.problem(found, "a table of answers with the same ids", BOTH))


@dataclass(frozen=True)
class _Linked:
    """A table, and where its columns are."""

    table: Table
    index: dict[str, int]
    count: int  # of columns


def _open(file: DataFile, candidates: bool = False) -> _Linked | Problem:
    encoding = detect(file)
    if isinstance(encoding, Problem):
        return encoding
    table = csv_table.table_of(file, encoding, None)
    header = next(table.rows, None)
    names = [str(name).strip().lower() for name in header.cells] if header else []
    roles = {"question": QUESTION_ID, "answer": ANSWER_ID, "text": TEXT}
    index = {role: n for role, known in roles.items() for n, name in enumerate(names) if name in known}
    if not {"question", "text"} <= index.keys() and not (candidates and "question" in index):
        return file.problem(
            "a header that is broken", "columns question_id and content", "write them in the first line"
        )
    return _Linked(table, index, len(names))


def _join(file: DataFile, questions_file: DataFile, candidates: Sequence[DataFile]) -> Iterator[DataRow]:
    answers, questions = _open(file), _open(questions_file)
    for problem in (answers, questions):
        if isinstance(problem, Problem):
            yield only_problem(file, problem)
            return
    assert isinstance(answers, _Linked) and isinstance(questions, _Linked)
    texts: dict[str, str] = {}
    yield from _gather(questions, texts)
    chosen = _chosen(candidates[0]) if len(candidates) == 1 else None
    counts = {"rows": 0, "left": 0}
    used: set[str] = set()
    for row in answers.table.rows:
        if problems := list(tables.shape_problems(answers.table, row, answers.count)):
            yield DataRow(_location(answers, row), problems=tuple(problems), file=file.name)
            continue
        question = str(row.cells[answers.index["question"]]).strip()
        if chosen is not None and question not in chosen:
            counts["left"] += 1
            continue
        used.add(question)
        counts["rows"] += 1
        yield _row(answers, row, question, texts)
    yield DataRow(
        f"{file.name}:1",
        file=file.name,
        share=1.0,
        notes=_notes(file, questions_file, counts, len(texts), used, candidates),
    )


def _notes(
    file: DataFile,
    questions: DataFile,
    counts: dict[str, int],
    known: int,
    used: set[str],
    candidates: Sequence[DataFile],
) -> tuple[str, ...]:
    notes = [f"{file.name}: {counts['rows']:,} answers joined with {len(used):,} questions of {questions.name}"]
    if counts["left"]:
        notes.append(f"{counts['left']:,} answers left out: their questions are not in {candidates[0].name}")
    elif known > len(used):
        notes.append(f"{questions.name}: {known - len(used):,} questions have no answer, and are not used")
    if len(candidates) > 1:
        listed = ", ".join(other.name for other in candidates)
        notes.append(f"not read: {listed}; give one of them beside the two tables to use its questions alone")
    return tuple(notes)


def _location(linked: _Linked, row: TableRow) -> str:
    return f"{linked.table.file.name}: {tables.place(linked.table, row, None).cell}"


def _problem(linked: _Linked, row: TableRow, column: str, bad: BadCell) -> DataRow:
    problem = tables.cell_problem(linked.table, row, linked.index[column], bad)
    return DataRow(_location(linked, row), problems=(problem,), file=linked.table.file.name)


def _gather(questions: _Linked, texts: dict[str, str]) -> Iterator[DataRow]:
    """Fill `texts` with id -> question; the rows are problems."""
    for row in questions.table.rows:
        if problems := list(tables.shape_problems(questions.table, row, questions.count)):
            yield DataRow(_location(questions, row), problems=tuple(problems), file=questions.table.file.name)
            continue
        name, text = (str(row.cells[questions.index[column]]) for column in ("question", "text"))
        if name.strip() in texts:
            bad = BadCell(
                f"the id {name.strip()} a second time", "each id once", "delete one of the two rows", "id twice"
            )
            yield _problem(questions, row, "question", bad)
        elif not text.strip():
            yield _problem(
                questions, row, "text", BadCell("an empty question", "a text", "write it, or delete the row")
            )
        texts.setdefault(name.strip(), text)


def _row(answers: _Linked, row: TableRow, question: str, texts: dict[str, str]) -> DataRow:
    if question not in texts:
        remedy = "delete the row, or add the question"
        bad = BadCell(
            f"the id {question or '(empty)'}, which no question has", "the id of a question", remedy, "missing id"
        )
        return _problem(answers, row, "question", bad)
    at = tables.place(answers.table, row, answers.index["text"])
    value = {"instruction": texts[question], "output": row.cells[answers.index["text"]]}
    file = answers.table.file.name
    return DataRow(_location(answers, row), value, True, (), lambda path: at, file=file, format="CSV", share=row.share)


def _chosen(candidates: DataFile) -> set[str]:
    """The ids of the questions in a list of candidates."""
    linked = _open(candidates, candidates=True)
    if isinstance(linked, Problem):
        return set()
    at = linked.index["question"]
    return {str(row.cells[at]).strip() for row in linked.table.rows if len(row.cells) > at}
