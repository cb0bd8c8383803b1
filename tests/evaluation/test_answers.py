"""Files of questions; what else answers.py does is tested by the command, in tests/commands/test_compare.py."""

from pathlib import Path

import pytest

from train.common.errors import UserError
from train.evaluation.answers import read_questions


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.txt", None, "no such file"),
        ("q.txt", b"\n \n", "no questions"),
        ("q.txt", b"\xff\xfe?", "UTF-8"),
        ("q.jsonl", b"{'question': 1}\n", "expected UTF-8, and in .jsonl"),
        ("q.jsonl", b'{"text": "?"}\n', "expected UTF-8, and in .jsonl"),
        ("q.jsonl", b"[1]\n", "expected UTF-8, and in .jsonl"),
    ],
)
def test_unreadable_questions_are_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_questions(tmp_path / name)
