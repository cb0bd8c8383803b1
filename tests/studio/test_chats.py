"""Chats: what each side is asked, what survives a restart, votes that count once."""

from pathlib import Path

import pytest

from train.studio.chats import EQUAL, Answer, ChatStore, Turn


@pytest.fixture
def store(tmp_path: Path) -> ChatStore:
    return ChatStore(tmp_path / "chats")


def test_each_side_sees_its_own_answers_only(store: ChatStore) -> None:
    chat = store.new("run", "base", "tuned", blind=False)
    chat.system = "Be brief."
    chat.turns = [
        Turn("Hi", [Answer("base hi", "done"), Answer("tuned hi", "done")]),
        Turn("Bye", [Answer(), Answer()]),
    ]
    assert [m["content"] for m in chat.messages(0)] == ["Be brief.", "Hi", "base hi", "Bye"]
    assert [m["content"] for m in chat.messages(1)] == ["Be brief.", "Hi", "tuned hi", "Bye"]
    assert chat.request(1)["model"] == "tuned" and chat.request(1)["stream"] is True


def test_a_chat_survives_a_restart_and_what_was_cut_off_is_stopped(store: ChatStore) -> None:
    chat = store.new("run", "base", "tuned", blind=True)
    chat.turns = [Turn("<b>Hi</b>", [Answer("half", "streaming"), Answer("whole", "done")])]
    store.save(chat)
    found = ChatStore(store.folder).get(chat.id)
    assert found is not None and found.turns[0].message == "<b>Hi</b>" and found.sides == chat.sides
    assert [answer.state for answer in found.turns[0].answers] == ["stopped", "done"]
    assert [one.id for one in ChatStore(store.folder).latest()] == [chat.id]


@pytest.mark.parametrize("name", ["", "../votes", "..", "a/b", "x.json", "é", "\0"])
def test_a_name_that_leads_elsewhere_is_no_chat(store: ChatStore, name: str) -> None:
    assert store.get(name) is None


def test_a_vote_counts_for_the_model_and_once(store: ChatStore) -> None:
    chat = store.new("run", "base", "tuned", blind=True)
    chat.turns = [Turn("Hi", [Answer("a", "done"), Answer("b", "done")]) for _ in range(2)]
    store.vote(chat, 0, chat.sides.index("tuned"))
    store.vote(chat, 0, chat.sides.index("base"))
    store.vote(chat, 1, EQUAL)
    assert store.votes("run") == {"tuned": 1, "base": 0, "equal": 1}
    assert store.votes("other") == {"tuned": 0, "base": 0, "equal": 0}


def test_blind_sides_are_in_either_order(store: ChatStore) -> None:
    orders = {tuple(store.new("run", "base", "tuned", blind=True).sides) for _ in range(60)}
    assert orders == {("base", "tuned"), ("tuned", "base")}
    assert {tuple(store.new("run", "base", "tuned", blind=False).sides) for _ in range(20)} == {("base", "tuned")}
