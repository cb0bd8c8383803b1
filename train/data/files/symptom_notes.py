"""Notes of symptoms as beginners collect them: the name of an illness, and lines such as 症状：… and 治疗：….

Each line of a note becomes a question about the name with that line as its answer. The words of the questions are in
QUESTIONS; `make data DATA=notes.txt OUT=notes.jsonl` writes them to a file that can be corrected by hand.
"""

import re
from collections.abc import Iterator, Sequence

from train.data.files.text_lines import HEADING, SEPARATOR, Line, Lines, Part, numbered, problem_row, row_of, stray
from train.data.rows.data_row import DataFile, DataRow

QUESTIONS = {  # label of a line -> the question that it answers
    **dict.fromkeys(("症状", "症候", "表现", "临床表现", "主要症状"), "{name}有哪些症状？"),
    **dict.fromkeys(("治疗", "治疗方法", "疗法", "治法", "处理", "怎么治", "治疗方案"), "{name}怎么治疗？"),
    **dict.fromkeys(("病因", "原因", "发病原因"), "{name}的病因是什么？"),
    **dict.fromkeys(("预防", "预防方法", "预防措施"), "怎么预防{name}？"),
    **dict.fromkeys(("诊断", "检查"), "{name}怎么诊断？"),
    **dict.fromkeys(("用药", "药物", "药", "方药", "处方", "方剂"), "{name}用什么药？"),
    **dict.fromkeys(("饮食", "忌口"), "得了{name}，饮食要注意什么？"),
    **dict.fromkeys(("注意", "注意事项", "护理", "建议"), "得了{name}，要注意什么？"),
    **dict.fromkeys(("symptom", "symptoms", "signs"), "What are the symptoms of {name}?"),
    **dict.fromkeys(("treatment", "treatments", "therapy"), "How is {name} treated?"),
    **dict.fromkeys(("cause", "causes"), "What causes {name}?"),
    "prevention": "How is {name} prevented?",
    "diagnosis": "How is {name} diagnosed?",
    **dict.fromkeys(("medicine", "medication", "drugs"), "Which medicine helps with {name}?"),
    "advice": "What should one know about {name}?",
}
NAMES = ("疾病", "病名", "病症", "名称", "disease", "illness", "name", "condition")  # labels of the name itself
FIELD = re.compile(
    r"\s*(?:[-*•]\s*)?(?:\*\*|【)?\s*([A-Za-z]{1,12}|[\u4e00-\u9fff]{1,6})\s*(?:(?:\*\*|】)\s*[:：]?|[:：]\s*(?:\*\*)?)\s*(.*)"
)


def is_form(head: Sequence[Line]) -> bool:
    """Two lines or more with labels of notes, and a name before the first."""
    fields = [index for index, line in enumerate(head) if _field(line.text)[0] in QUESTIONS]
    before = [line for line in head[: fields[0]] if not line.blank] if fields else []
    return len(fields) > 1 and bool(before)


def read(file: DataFile, lines: Lines) -> Iterator[DataRow]:
    """A row for each line of each note."""
    note, after_blank = _Note(file), True
    for line in lines:
        key, text = _field(line.text)
        title = _title(line, lines, after_blank or note.field is None, note.keys)
        if title or key in NAMES:
            yield from note.end(line.share)
            note = _Note(file, Part("user", line.number, [title or text]))
            if not (title or text).strip():
                yield stray(file, line)
        elif key in QUESTIONS and note.name is None:
            yield stray(file, line)
        elif key in QUESTIONS:
            yield from note.begin_field(key, Part("assistant", line.number, [text], line.share))
        elif note.field:
            note.field[1].lines.append(line.text)
        elif not line.blank and not SEPARATOR.fullmatch(line.text):
            yield stray(file, line)
        after_blank = line.blank
    yield from note.end(1.0)


class _Note:
    """A name, the labels below it so far, and the one whose lines are being gathered."""

    def __init__(self, file: DataFile, name: Part | None = None) -> None:
        self.file, self.name = file, name
        self.keys: set[str] = set()
        self.field: tuple[str, Part] | None = None

    def begin_field(self, key: str, part: Part) -> Iterator[DataRow]:
        yield from self._row(part.share)
        if key in self.keys:
            found, remedy = (
                f'"{key}" a second time for one name',
                "write the name of the other illness above it, or join them",
            )
            yield problem_row(self.file, part.line, found, "each label once below a name", remedy)
        self.keys.add(key)
        self.field = (key, part)

    def end(self, share: float) -> Iterator[DataRow]:
        yield from self._row(share)
        if self.name and not self.keys:
            found = "a name without lines below it"
            yield problem_row(
                self.file, self.name.line, found, "症状：… or 治疗：… below it", "add them, or delete the name"
            )

    def _row(self, share: float) -> Iterator[DataRow]:
        if self.name and self.field:
            key, answer = self.field
            question = Part("user", self.name.line, [QUESTIONS[key].format(name=self.name.text)])
            yield row_of(self.file, [question, answer], share)
        self.field = None


def _field(text: str) -> tuple[str, str]:
    """(label in small letters, the text after it), or ("", "")."""
    match = FIELD.fullmatch(text)
    return (match[1].lower(), match[2]) if match else ("", "")


def _title(line: Line, lines: Lines, may_begin: bool, keys: set[str]) -> str:
    """The name that a line is the title of a note with; "" for other lines.

    The line after a title has a label. Above the title is a blank line, or the label is there again.

    Args:
        keys: the labels of the note so far.
    """
    if line.blank or SEPARATOR.fullmatch(line.text):
        return ""
    next_key, heading = _field(lines.next_text())[0], HEADING.fullmatch(line.text)
    own_label = _field(line.text)[0] in (*QUESTIONS, *NAMES) and not heading
    if next_key not in QUESTIONS or own_label or not (heading or may_begin or next_key in keys):
        return ""
    text = heading[1] if heading else numbered(line.text)[1] or line.text
    return text.strip().strip("【】[]*").rstrip(":：").strip()
