"""The conversation in the terminal, with a fake model."""

from collections.abc import Callable, Iterator

import pytest

from train.data.rows.formats import Turn
from train.inference.chat import Chat, ChatModel


def echo(context: int = 60) -> ChatModel:
    """A model that answers with the number of turns in the prompt; a prompt has a token for each character."""

    def encode(turns: list[Turn], system: str) -> list[int]:
        return [len(turns)] * sum(len(text) for text in (system, *(turn.text for turn in turns)))

    def answer(ids: list[int], notify: Callable[[str], None]) -> Iterator[str]:
        yield f"seen {ids[-1]}"
        yield "."

    return ChatModel(encode, answer, context)


def converse(model: ChatModel, *lines: str, system: str = "s") -> Chat:
    chat = Chat(model, system, max_tokens=10)
    chat.run(iter(lines))
    return chat


def test_a_chat_remembers_until_it_is_cleared(capsys: pytest.CaptureFixture[str]) -> None:
    chat = converse(echo(), "a", "", "b", "/clear", "c", "/quit", "d")
    assert capsys.readouterr().out == "seen 1.\nseen 3.\nseen 1.\n"
    assert chat.turns == [Turn("user", "c"), Turn("assistant", "seen 1.")]


def test_commands_answer_on_the_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    chat = converse(echo(), "/system Be brief.", "/system", "/system none", "/help", "/nonsense")
    out, err = capsys.readouterr()
    assert (out, chat.system) == ("", "")
    assert err.count("(system message: Be brief.)") == 2
    assert "(system message: none)" in err
    assert "(unknown command /nonsense)" in err
    assert err.count("/clear        forget") == 2


def test_the_oldest_turns_are_forgotten_with_a_notice(capsys: pytest.CaptureFixture[str]) -> None:
    # a question with its answer has 17 tokens; 10 are kept free
    chat = converse(echo(context=60), *("abcdefghij" for _ in range(4)))
    assert "(the oldest 1 of the questions are forgotten: the context holds 60 tokens)" in capsys.readouterr().err
    assert [turn.text for turn in chat.turns[1::2]] == ["seen 3.", "seen 5.", "seen 5."]


def test_a_question_that_cannot_fit_is_refused_and_the_chat_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    chat = converse(echo(), "x" * 60, "a")
    out, err = capsys.readouterr()
    assert "this question has 61 tokens with its system message, the context holds 60" in err
    assert out == "seen 1.\n"
    assert len(chat.turns) == 2


def test_ctrl_c_stops_the_answer_and_keeps_what_was_printed(capsys: pytest.CaptureFixture[str]) -> None:
    model = echo()

    def interrupted(ids: list[int], notify: Callable[[str], None]) -> Iterator[str]:
        if len(ids) > 2:
            yield "half"
        raise KeyboardInterrupt

    chat = converse(ChatModel(model.encode, interrupted, 60), "a", "abc")
    assert chat.turns == [Turn("user", "abc"), Turn("assistant", "half")]
    out, err = capsys.readouterr()
    assert err.count("(stopped)") == 2
    assert out == "half\n"
