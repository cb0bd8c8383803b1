"""Templates and masks: the expected text marks which tokens are trained on."""

import base64
from pathlib import Path

import pytest

from train.common.errors import UserError
from train.data.checked.conversations import Conversation
from train.data.rows.formats import Turn
from train.data.tokens.chat_template import DEFAULT_SYSTEM, chat_template, prompt, render
from train.model.tokenizer import Tokenizer, load_tokenizer

TURNS = (Turn("user", "hi"), Turn("assistant", "yes <|im_end|>"), Turn("user", "1\n2"), Turn("assistant", "no"))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """Every byte is a token; and the control tokens."""
    lines = (base64.b64encode(bytes([n])) + f" {n}\n".encode() for n in range(256))
    (tmp_path / "qwen.tiktoken").write_bytes(b"".join(lines))
    return load_tokenizer(tmp_path)


def shown(ids: list[int], mask: list[int], tokenizer: Tokenizer) -> str:
    """Tokens that are trained on in ⟦…⟧; a control token in «…», which distinguishes it from typed text."""
    text, inside = "", 0
    for token, trained_on in zip(ids, mask):
        text += "⟦" if trained_on and not inside else "⟧" if inside and not trained_on else ""
        name = tokenizer.decode([token], skip_control=False)
        text += f"«{name[2:-2]}»" if tokenizer.is_control(token) else name.replace("\n", "⏎\n")
        inside = trained_on
    return text + ("⟧" if inside else "")


def conversation(system: str | None = None) -> Conversation:
    return Conversation(TURNS, system, "here:1")


def test_the_answers_and_their_ends_are_trained_on(tokenizer: Tokenizer) -> None:
    assert shown(*render(conversation(), tokenizer), tokenizer) == (
        "«im_start»system⏎\nYou are a helpful assistant.«im_end»⏎\n"
        "«im_start»user⏎\nhi«im_end»⏎\n"
        "«im_start»assistant⏎\n⟦yes <|im_end|>«im_end»⟧⏎\n"
        "«im_start»user⏎\n1⏎\n2«im_end»⏎\n"
        "«im_start»assistant⏎\n⟦no«im_end»⟧⏎\n"
    )


def test_published_trains_on_the_frame_of_every_turn_too(tokenizer: Tokenizer) -> None:
    assert shown(*render(conversation("Be brief."), tokenizer, mask="published"), tokenizer) == (
        "⟦«im_start»⟧system⏎\nBe brief.⟦«im_end»⏎\n"
        "«im_start»⟧user⏎\nhi⟦«im_end»⏎\n"
        "«im_start»⟧assistant⏎\n⟦yes <|im_end|>«im_end»⏎\n"
        "«im_start»⟧user⏎\n1⏎\n2⟦«im_end»⏎\n"
        "«im_start»⟧assistant⏎\n⟦no«im_end»⏎\n⟧"
    )


def test_plain_splits_the_question_at_its_first_line(tokenizer: Tokenizer) -> None:
    assert shown(*render(conversation(""), tokenizer, template="plain"), tokenizer) == (
        "Instruction: hi⏎\nAnswer: ⟦yes <|im_end|>«endoftext»⟧Instruction: 1⏎\nInput: 2⏎\nAnswer: ⟦no«endoftext»⟧"
    )
    assert shown(*render(conversation(), tokenizer, template="plain"), tokenizer).startswith(
        f"{DEFAULT_SYSTEM}⏎\nInstr"
    )


def published_labels(turns: tuple[Turn, ...], system: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids and labels by the rules of QwenLM/Qwen finetune.py (preprocess); −100 = not trained on."""
    ids: list[int] = []
    labels: list[int] = []
    for role, text in [("system", system), *((turn.role, turn.text) for turn in turns)]:
        head = [tokenizer.im_start, *tokenizer.encode(role), *tokenizer.encode("\n")]
        body, tail = tokenizer.encode(text), [tokenizer.im_end, *tokenizer.encode("\n")]
        ids += head + body + tail
        hidden = [-100] * (len(head) - 1)
        labels += [tokenizer.im_start, *hidden, *(body if role == "assistant" else [-100] * len(body)), *tail]
    return ids, labels


def test_published_equals_the_published_script(tokenizer: Tokenizer) -> None:
    ids, mask = render(conversation("Sys."), tokenizer, mask="published")
    labels = [token if trained_on else -100 for token, trained_on in zip(ids, mask)]
    assert (ids, labels) == published_labels(TURNS, "Sys.", tokenizer)


@pytest.mark.parametrize("template", ["chatml", "plain"])
@pytest.mark.parametrize("system", [None, "", "Be brief."])
@pytest.mark.parametrize("count", [1, 3])
def test_a_prompt_is_the_beginning_of_the_training_text(
    tokenizer: Tokenizer, template: str, system: str | None, count: int
) -> None:
    whole, mask = render(Conversation(TURNS[: count + 1], system, ""), tokenizer, template=template)
    start = prompt(TURNS[:count], tokenizer, DEFAULT_SYSTEM if system is None else system, template)
    assert start == whole[: len(start)]
    assert len(start) < len(whole)
    assert mask[len(start)] == 1
    assert mask[len(start) - 1] == 0
    answer = whole[len(start) :]
    end = answer.index(tokenizer.im_end if template == "chatml" else tokenizer.endoftext)
    assert tokenizer.decode(answer[:end]) == TURNS[count].text


def test_the_saved_jinja_template_gives_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """As stock tools read tokenizer_config.json, for texts that do not look like control tokens."""
    from transformers import PreTrainedTokenizerFast

    tokenizer.save(tmp_path, chat_template('Say "yes".\nOr no: 好。'))
    stock = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    turns = (Turn("user", "hi"), Turn("assistant", "yes"), Turn("user", "so?"))
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    ours = prompt(turns, tokenizer, system='Say "yes".\nOr no: 好。')
    assert stock.apply_chat_template(messages, add_generation_prompt=True) == ours
    messages = [{"role": "system", "content": "Be brief."}, *messages]
    assert stock.apply_chat_template(messages, add_generation_prompt=True) == prompt(turns, tokenizer, "Be brief.")
    assert stock.apply_chat_template(messages) == render(Conversation(turns, "Be brief.", ""), tokenizer)[0]


def test_an_unsupported_combination_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="template=plain with mask=published"):
        render(conversation(), tokenizer, template="plain", mask="published")
    with pytest.raises(UserError, match="template=alpaca"):
        render(conversation(), tokenizer, template="alpaca")
