"""Which column is the question and which the answer: guessed, told, or an error that shows the option."""

import pytest

from train.common.errors import UserError
from train.data.rows import columns
from train.data.rows.columns import ColumnError


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("question,answer", "question=question,answer=answer"),
        ("id,Prompt , RESPONSE", "question=Prompt ,answer= RESPONSE"),
        ("instruction,input,output", "question=instruction,input=input,answer=output"),
        ("input,output", "question=input,answer=output"),
        ("department,title,ask,answer", "question=ask,answer=answer"),
        ("问题,答案,系统", "question=问题,answer=答案,system=系统"),
        ("提问,回复", "question=提问,answer=回复"),
        ("problem,target,history", "question=problem,answer=target,history=history"),
        ("id,messages,question", "messages=messages"),
        ("conversations,system", "system=system,messages=conversations"),
    ],
)
def test_guessed(header: str, expected: str) -> None:
    of_role = columns.guess(header.split(",")).of_role
    assert dict(of_role) == dict(pair.split("=") for pair in expected.split(","))


@pytest.mark.parametrize(
    ("header", "found", "remedy"),
    [
        (
            "question,answer,reply",
            '2 columns that could be the answer: "answer" and "reply"',
            "columns=question:question,answer:answer",
        ),
        ("question,prompt,answer", "2 columns that could be the question", "columns=question:question,answer:answer"),
        (
            "question,comment",
            'no column for the answer among "question", "comment"',
            "columns=question:question,answer:comment",
        ),
        ("症状说明,建议", "no column for the question and the answer", "columns=question:症状说明,answer:建议"),
        ("a,b,c", "no column for the question and the answer", "columns=question:NAME,answer:NAME"),
        ("question,answer,answer", 'two columns named "answer"', "rename"),
        ("question,what, or why", "no column for the answer", "columns=question:question,answer:NAME"),
    ],
)
def test_not_guessed(header: str, found: str, remedy: str) -> None:
    with pytest.raises(ColumnError) as raised:
        columns.guess(header.split(","))
    assert found in raised.value.found and remedy in raised.value.remedy


def test_told() -> None:
    assert columns.parse("") is None
    told = columns.parse('question:症状, answer:建议,"system:a, b"')
    assert told is not None and dict(told.of_role) == {"question": "症状", "answer": "建议", "system": "a, b"}
    assert columns.parse("messages：turns") == columns.Columns({"messages": "turns"})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("症状,建议", "'症状' is no ROLE:NAME"),
        ("prompt:a,answer:b", "no role 'prompt'. Did you mean question:a?"),
        ("question:a", "no answer"),
        ("answer:a", "no question"),
        ("question:a,question:b,answer:c", "question is given twice"),
        ("question:a,answer:", "'answer:' is no ROLE:NAME"),
    ],
)
def test_told_wrongly(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match="columns=") as raised:
        columns.parse(text)
    assert sentence in str(raised.value)
