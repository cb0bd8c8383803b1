"""Questions for tests of near duplicates: distinct ones in Chinese and English, and small edits of a question."""

import random
import unicodedata
from collections.abc import Callable

from train.data.checked.conversations import Conversation
from train.data.rows.formats import Turn

ZH = {
    "who": [
        "我的孩子",
        "七十岁的母亲",
        "一位年轻的司机",
        "邻居家的老人",
        "刚毕业的学生",
        "怀孕的妻子",
        "退休的教师",
        "夜班护士",
        "田里的农民",
        "新来的同事",
    ],
    "what": [
        "总是头疼",
        "夜里咳嗽",
        "膝盖发软",
        "一吃辣就胃胀",
        "手指发麻",
        "眼睛干涩",
        "睡得很浅",
        "皮肤起红点",
        "走路气喘",
        "耳朵嗡嗡响",
    ],
    "when": [
        "下雨之后",
        "每到春天",
        "从上个月起",
        "跑完步以后",
        "换了新药以来",
        "冬天一到",
        "坐飞机回来",
        "搬进新房子后",
        "喝过咖啡",
        "熬夜之后",
    ],
    "ask": ["应该先做哪项检查", "平时要注意些什么", "能不能喝绿茶", "需要去哪个科室", "会自己慢慢好吗", "怎样才能缓解"],
}
EN = {
    "who": [
        "my younger brother",
        "an old sailor",
        "the baker next door",
        "our tired dog",
        "a careful pilot",
        "her grandmother",
    ],
    "what": [
        "forgets the keys",
        "paints small boats",
        "counts the stars",
        "repairs old radios",
        "grows tomatoes",
        "sings too loudly",
    ],
    "when": [
        "before breakfast",
        "on rainy Sundays",
        "after the long trip",
        "while the train waits",
        "under a full moon",
    ],
    "ask": [
        "what would you say to them",
        "how can I help with that",
        "is there a better habit",
        "which book explains it",
    ],
}
EDITS: dict[str, Callable[[str, random.Random], str]] = {
    "punctuation": lambda text, _: text.replace("？", "!!").replace("?", " ...").replace("，", ", ") + "。",
    "one character": lambda text, chance: _replaced(text, chance.randrange(len(text) - 1)),
    "full width": lambda text, _: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text),
    "请问": lambda text, _: f"请问{text}",
    "case": lambda text, _: text.upper(),
}


def questions(count: int, seed: int = 0) -> list[str]:
    """Distinct questions, half Chinese, half English, in random order."""
    chance, made = random.Random(seed), dict[str, None]()
    while len(made) < count:
        pick = {key: chance.choice(words) for key, words in (ZH if len(made) % 2 else EN).items()}
        text = "{when}{who}{what}，{ask}？" if len(made) % 2 else "{who} {what} {when}: {ask}?"
        made[text.format(**pick)] = None
    return list(made)


def _replaced(text: str, at: int) -> str:
    """`text` with another letter at `at`."""
    return f"{text[:at]}{'甲' if unicodedata.category(text[at]) == 'Lo' else 'q'}{text[at + 1 :]}"


def conversation(*texts: str, row: int = 0, system: str | None = None) -> Conversation:
    """Questions and answers in turn."""
    turns = (Turn("assistant" if n % 2 else "user", text) for n, text in enumerate(texts))
    return Conversation(tuple(turns), system, f"data.jsonl:{row + 1}")
