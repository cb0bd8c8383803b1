"""Conversations as pages show them: tokens, characters of several tokens, what is trained on, what is left out."""

from train.data.checked.checked_data import Conversation
from train.data.rows.formats import Turn
from train.pages.token_text import Shown, Stretch, of_texts, of_tokens


class Bytes:
    """Each id is a byte; 300 is a control token."""

    def bytes_of(self, token_id: int) -> bytes:
        return b"<|end|>" if token_id == 300 else bytes([token_id])


def shown(ids: list[int], mask: list[int], limit: int = 99) -> Shown:
    return of_tokens("a.jsonl:1", ids, mask, Bytes(), limit)


def test_stretches_are_what_is_trained_on_and_what_is_not() -> None:
    one = shown([65, 66, 67, 300], [0, 0, 1, 1])
    assert one.stretches == [Stretch(False, ["A", "B"]), Stretch(True, ["C", "<|end|>"])]
    assert (one.tokens, one.trained, one.left) == (4, 2, 0)


def test_tokens_of_one_character_stay_together() -> None:
    ids = [*"你".encode(), 65, *"🙂".encode()]
    assert shown(ids, [0] * len(ids)).stretches == [Stretch(False, ["你", "A", "🙂"])]


def test_bytes_that_are_no_character_are_marked() -> None:
    assert shown([0xFF, 65], [0, 0]).stretches == [Stretch(False, ["\ufffd", "A"])]
    assert shown([0xE4, 0xBD, 65], [0, 0, 0]).stretches == [Stretch(False, ["\ufffdA"])]
    assert shown([0xE4], [0]).stretches == [Stretch(False, ["\ufffd"])]


def test_a_long_one_is_cut_and_says_so() -> None:
    one = shown([65] * 10, [1] * 10, limit=3)
    assert one.stretches == [Stretch(True, ["A"] * 3)] and (one.tokens, one.trained, one.left) == (10, 10, 7)


def test_without_tokens_the_answers_that_are_learnt_are_marked() -> None:
    turns = (Turn("user", "q"), Turn("assistant", "a" * 3000), Turn("user", "r"), Turn("assistant", "b", False))
    one = of_texts(Conversation(turns, None, "x:1"), "sys")
    assert [s.pieces[0] for s in one.stretches if s.trained] == ["a" * 2000] and one.left == 1000
    assert "".join(p for s in one.stretches for p in s.pieces).startswith("system: sys\nuser: q\nassistant: aaa")
    assert of_texts(Conversation(turns, "", "x:1"), "sys").stretches[0].pieces == ["user: "]
