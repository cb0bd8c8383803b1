"""Qwen3's <think> blocks: the texts of its published template, our Jinja, our ids and masks, and how a prompt ends."""

import base64
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import pytest

from train.common.errors import UserError
from train.data.checked.conversations import Conversation
from train.data.rows.formats import Turn
from train.data.tokens.chat_template import chat_template, prompt, render, render_batch
from train.model.tokenizer import Tokenizer, load_tokenizer

THOUGHT, PLAIN = "<think>\nhm.\n\n</think>\n\nYes.", "No."
EMPTY = "<think>\n\n</think>\n\n"


def turns(*texts: str) -> tuple[Turn, ...]:
    return tuple(Turn("assistant" if n % 2 else "user", text) for n, text in enumerate(texts))


CASES = [  # turns -> the answers as the published template writes them
    (turns("a?", PLAIN), [EMPTY + "No."]),
    (turns("a?", THOUGHT), ["<think>\nhm.\n</think>\n\nYes."]),
    (turns("a?", "\n" + PLAIN), [EMPTY + "No."]),
    (turns("a?", THOUGHT, "b?", PLAIN), ["Yes.", EMPTY + "No."]),
    (turns("a?", PLAIN, "b?", THOUGHT), ["No.", "<think>\nhm.\n</think>\n\nYes."]),
    ((*turns("a?", THOUGHT), Turn("assistant", PLAIN)), ["<think>\nhm.\n</think>\n\nYes.", EMPTY + "No."]),
    ((*turns("a?", PLAIN), Turn("assistant", THOUGHT)), ["No.", "<think>\nhm.\n</think>\n\nYes."]),
    ((Turn("assistant", PLAIN),), ["No."]),  # without a question nothing comes after the last one
]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """Every byte is a token; the control tokens of Qwen, and the two marks of Qwen3."""
    lines = (base64.b64encode(bytes([n])) + f" {n}\n".encode() for n in range(256))
    (tmp_path / "qwen.tiktoken").write_bytes(b"".join(lines))
    plain = load_tokenizer(tmp_path)
    return Tokenizer(plain.backend, {**plain.control, "<think>": 600, "</think>": 601})


def expected_text(case: tuple[Turn, ...], answers: list[str], system: str) -> str:
    written, text = iter(answers), f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    for turn in case:
        text += f"<|im_start|>{turn.role}\n{next(written) if turn.role == 'assistant' else turn.text}<|im_end|>\n"
    return text


def by_jinja(case: tuple[Turn, ...], template: str, system: str, **settings: Any) -> str:
    messages = [{"role": turn.role, "content": turn.text} for turn in case]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(chat_template(system, template)).render(messages=messages, **settings)


@pytest.mark.parametrize("template", ["qwen3", "qwen3_thinking"])
@pytest.mark.parametrize("system", ["Be brief.", ""])
@pytest.mark.parametrize(("case", "answers"), CASES)
def test_conversations_are_written_as_published(
    case: tuple[Turn, ...], answers: list[str], system: str, template: str, tokenizer: Tokenizer
) -> None:
    expected = expected_text(case, answers, system)
    assert by_jinja(case, template, system) == expected
    ids, mask = render(Conversation(case, system, "here:1"), tokenizer, template, system=system)
    assert tokenizer.decode(ids, skip_control=False) == expected
    marks = [token for token in ids if token in (600, 601)]
    assert marks == [600, 601] * (expected.count("<think>"))  # never the bytes of their text
    lengths, together, masks = render_batch([Conversation(case, system, "")], tokenizer, template, "assistant", system)
    assert (lengths, together.tolist(), masks.tolist()) == ([len(ids)], ids, mask)


def trained(case: tuple[Turn, ...], template: str, tokenizer: Tokenizer) -> list[str]:
    """The texts that are trained on, one for each run of the mask."""
    ids, mask = render(Conversation(case, "", "here:1"), tokenizer, template, system="")
    edges = [0, *(n for n, (a, b) in enumerate(pairwise(mask), 1) if a != b), len(mask)]
    return [tokenizer.decode(ids[a:b], skip_control=False) for a, b in pairwise(edges) if mask[a]]


@pytest.mark.parametrize(
    ("case", "at_once", "thinking"),
    [
        (turns("a?", PLAIN), ["No.<|im_end|>"], [EMPTY + "No.<|im_end|>"]),
        (
            turns("a?", THOUGHT),
            ["<think>\nhm.\n</think>\n\nYes.<|im_end|>"],
            ["<think>\nhm.\n</think>\n\nYes.<|im_end|>"],
        ),
        (turns("a?", THOUGHT, "b?", PLAIN), ["No.<|im_end|>"], [EMPTY + "No.<|im_end|>"]),
        (
            turns("a?", PLAIN, "b?", THOUGHT),
            ["No.<|im_end|>", "<think>\nhm.\n</think>\n\nYes.<|im_end|>"],
            ["<think>\nhm.\n</think>\n\nYes.<|im_end|>"],
        ),
        ((turns("a?")[0], Turn("assistant", THOUGHT, trained=False)), [], []),
    ],
)
def test_the_mask_has_what_the_model_has_to_write(
    case: tuple[Turn, ...], at_once: list[str], thinking: list[str], tokenizer: Tokenizer
) -> None:
    assert trained(case, "qwen3", tokenizer) == at_once
    assert trained(case, "qwen3_thinking", tokenizer) == thinking


@pytest.mark.parametrize(("template", "end"), [("qwen3", EMPTY), ("qwen3_thinking", "")])
def test_a_prompt_ends_where_the_answer_begins(template: str, end: str, tokenizer: Tokenizer) -> None:
    asked = turns("a?", THOUGHT, "b?")
    ids = prompt(asked, tokenizer, "Hi", template)
    assert tokenizer.decode(ids, skip_control=False) == by_jinja(asked, template, "Hi", add_generation_prompt=True)
    assert tokenizer.decode(ids, skip_control=False).endswith(
        f"Yes.<|im_end|>\n<|im_start|>user\nb?<|im_end|>\n<|im_start|>assistant\n{end}"
    )
    whole, _ = render(Conversation((*asked, Turn("assistant", PLAIN)), "Hi", ""), tokenizer, template)
    assert whole[: len(ids)] == ids


@pytest.mark.parametrize("template", ["qwen3", "qwen3_thinking"])
@pytest.mark.parametrize("thinking", [True, False])
def test_enable_thinking_decides_over_what_was_trained(template: str, thinking: bool) -> None:
    text = by_jinja(turns("a?"), template, "", add_generation_prompt=True, enable_thinking=thinking)
    assert text.endswith("assistant\n" if thinking else f"assistant\n{EMPTY}")


def test_a_tokenizer_without_the_marks_writes_their_text(tokenizer: Tokenizer) -> None:
    control = {name: n for name, n in tokenizer.control.items() if "think" not in name}
    without = Tokenizer(tokenizer.backend, control)
    for conversation in (Conversation(turns("a?", THOUGHT), "", ""), Conversation(turns("a?", PLAIN), "", "")):
        (ids, mask), (plain, plain_mask) = (render(conversation, each, "qwen3") for each in (tokenizer, without))
        assert tokenizer.decode(ids, skip_control=False) == without.decode(plain, skip_control=False)
        assert sum(mask) < sum(plain_mask) or PLAIN in conversation.turns[-1].text


def test_the_marks_in_a_users_text_stay_text(tokenizer: Tokenizer) -> None:
    ids, _ = render(Conversation(turns("<think> a?", PLAIN), "", ""), tokenizer, "qwen3")
    assert ids.count(600) == 1


def test_answers_are_shown_with_their_marks(tokenizer: Tokenizer) -> None:
    ids = [600, *b"\nhm\n", 601, *b"\n\nYes", tokenizer.im_end]
    assert tokenizer.decode(ids) == "<think>\nhm\n</think>\n\nYes"
    assert tokenizer.is_hidden(tokenizer.im_end) and not tokenizer.is_hidden(600) and tokenizer.is_control(600)


def test_masks_of_qwens_own_script_are_for_chatml(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="template=qwen3 with mask=published"):
        render(Conversation(turns("a?", PLAIN), "", ""), tokenizer, "qwen3", "published")
