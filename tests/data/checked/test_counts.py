"""What is counted of conversations while they pass."""

import random

from train.data.checked import counts
from train.data.checked.conversations import Conversation
from train.data.rows.formats import Turn


def test_languages() -> None:
    def chinese(answer: str) -> bool:
        turns = (Turn("user", "q"), Turn("assistant", answer))
        return counts.is_chinese(Conversation(turns, None, "f:1"))

    assert (
        chinese("用 items[::-1] 反转列表，很简单。") and not chinese("In Chinese: 石子") and not chinese("これは石です")
    )


def test_the_language_is_told_as_by_the_patterns_themselves() -> None:
    draw, alphabet = random.Random(7), "abé12_ 中文的かカー,。\ud800\U0001f600豈\u3400한"
    for _ in range(5000):
        text = "".join(draw.choices(draw.sample(alphabet, 4), k=draw.randrange(12)))
        han, letters = (sum(map(len, pattern.findall(text))) for pattern in (counts.HAN, counts.LETTER))
        expected = not counts.KANA.search(text) and han > 0.3 * letters
        turns = (Turn("user", "?"), Turn("assistant", text))
        assert counts.is_chinese(Conversation(turns, None, "f:1")) == expected, text
