"""What may be sent of an answer, and when."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.serving.text_stream import TextStream


def pieces(data: bytes, stop: tuple[str, ...] = (), size: int = 1) -> list[str]:
    stream = TextStream(stop)
    found = [stream.push(data[n : n + size]) for n in range(0, len(data), size)]
    return [*found, stream.close()]


def test_half_characters_wait_for_the_rest() -> None:
    assert pieces("好a".encode()) == ["", "", "好", "a", ""]
    assert pieces("好".encode()[:2]) == ["", "", "\ufffd"]


def test_what_may_become_a_stop_text_waits() -> None:
    assert pieces(b"a##b", ("###",)) == ["a", "", "", "##b", ""]
    assert pieces(b"a##", ("###",)) == ["a", "", "", "##"]
    stream = TextStream(("###",))
    assert [stream.push(b) for b in (b"a#", b"#", b"#c", b"d")] == ["a", "", "", ""]
    assert stream.stopped
    assert stream.close() == ""


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_first_stop_text_ends_it(size: int) -> None:
    assert "".join(pieces("one 好 two three".encode(), ("three", "好"), size)) == "one "


@given(st.text("ab好", max_size=30), st.lists(st.text("ab好", min_size=1, max_size=4), max_size=3), st.integers(1, 5))
def test_what_is_sent_is_the_text_before_the_first_stop(text: str, stops: list[str], size: int) -> None:
    places = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    first = min(places)[1] if places else len(text)  # the stop text that is complete first
    assert "".join(pieces(text.encode(), tuple(stops), size)) == text[:first]
