"""What is counted of conversations while they pass."""

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
