"""A conversation as token ids, and which of them are trained on: ChatML as published by Qwen, or a plain template.

This module does not know files, batches and lengths. Each part (role, text, line end) is encoded separately, as in the
published training and chat code of Qwen-1. So the text of one turn never changes the ids of another, and the ids of a
prompt are always the beginning of the ids of the whole conversation. The trade-off: a text that begins with line ends
gets other ids than if the whole conversation were rendered to one string first.

chatml:  <|im_start|>system⏎{system}<|im_end|>⏎<|im_start|>user⏎{text}<|im_end|>⏎<|im_start|>assistant⏎{text}<|im_end|>⏎
plain:   {system}⏎Instruction: {first line}⏎Input: {other lines}⏎Answer: {text}<|endoftext|>Instruction: …
         (without a system message no system line; for a question of one line no Input line)
"""

import json
from collections.abc import Iterator, Sequence
from typing import Protocol

from train.common.errors import UserError
from train.data.conversations import Conversation
from train.data.formats import Turn

DEFAULT_SYSTEM = "You are a helpful assistant."

CHAT_TEMPLATE = (  # Jinja for the chat_template of tokenizer_config.json: the text whose ids `render` returns
    "{% if messages[0]['role'] != 'system' and SYSTEM %}<|im_start|>system\n{{ SYSTEM }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}{% if message['role'] != 'system' or message['content'] %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

PLAIN_TEMPLATE = (  # the same for template=plain
    "{% if messages[0]['role'] != 'system' and SYSTEM %}{{ SYSTEM }}\n{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] }}<|endoftext|>"
    "{% elif message['role'] == 'system' %}{% if message['content'] %}{{ message['content'] }}\n{% endif %}"
    "{% else %}{% set lines = message['content'].split('\n', 1) %}Instruction: {{ lines[0] }}\n"
    "{% if lines[1] %}Input: {{ lines[1] }}\n{% endif %}Answer: {% endif %}{% endfor %}"
)


TEMPLATES = {"chatml": CHAT_TEMPLATE, "plain": PLAIN_TEMPLATE}


def chat_template(system: str, template: str = "chatml") -> str:
    """The Jinja template for transformers that writes what `render` encodes.

    Args:
        system: the system message of conversations that have none.
    """
    return "{% set SYSTEM = " + json.dumps(system) + " %}" + TEMPLATES[template]


Part = tuple[list[int], bool]  # ids, and whether they are trained on


class Encoder(Protocol):
    """What this module needs of a tokenizer: ours (model/tokenizer.py), or a stock one (inference/stock.py)."""

    im_start: int
    im_end: int
    endoftext: int

    def encode(self, text: str) -> list[int]: ...


def render(
    conversation: Conversation,
    tokenizer: Encoder,
    template: str = "chatml",
    mask: str = "assistant",
    system: str = DEFAULT_SYSTEM,
) -> tuple[list[int], list[int]]:
    """(ids, mask) of the whole conversation, both of T entries; the mask is 1 for ids that are trained on, else 0.

    Args:
        mask: "assistant": the text of each answer and the token that ends it. "published", as in Qwen's finetune.py:
            these, and <|im_start|>, <|im_end|> and the last newline of every turn, also of system and user.
        system: the system message of a conversation whose own is None; "" = none.
    Raises:
        UserError: an unknown template or mask, or mask=published with template=plain.
    """
    if (template, mask) not in (("chatml", "assistant"), ("chatml", "published"), ("plain", "assistant")):
        raise UserError(
            f"template={template} with mask={mask}: expected template=chatml with mask=assistant or published, or "
            "template=plain with mask=assistant."
        )
    system = system if conversation.system is None else conversation.system
    ids: list[int] = []
    labelled: list[int] = []
    for part, is_labelled in _parts(conversation.turns, tokenizer, template, mask == "published", system):
        ids += part
        labelled += [int(is_labelled)] * len(part)
    return ids, labelled


def prompt(
    turns: Sequence[Turn], tokenizer: Encoder, system: str = DEFAULT_SYSTEM, template: str = "chatml"
) -> list[int]:
    """Ids of `turns` (the last is a question) up to where the answer starts: the beginning of what `render` returns.

    Raises:
        UserError: an unknown template, as a damaged record may name.
    """
    if template not in TEMPLATES:
        raise UserError(f"template={template}: expected {' or '.join(TEMPLATES)}.")
    ids = [token for part, _ in _parts(turns, tokenizer, template, False, system) for token in part]
    if template == "plain":
        return ids
    return [*ids, tokenizer.im_start, *tokenizer.encode("assistant"), *tokenizer.encode("\n")]


def _parts(turns: Sequence[Turn], tokenizer: Encoder, template: str, label_frame: bool, system: str) -> Iterator[Part]:
    if template == "plain":
        yield from _plain(turns, tokenizer, system)
        return
    if system:
        yield from _turn("system", system, tokenizer, label_frame)
    for turn in turns:
        yield from _turn(turn.role, turn.text, tokenizer, label_frame and turn.trained, turn.trained)


def _turn(role: str, text: str, tokenizer: Encoder, label_frame: bool, trained: bool = True) -> Iterator[Part]:
    """One ChatML turn.

    Args:
        label_frame: train on <|im_start|>, <|im_end|> and the last newline, whatever the role.
        trained: False: an answer that is read but not learnt.
    """
    is_answer, newline = role == "assistant" and trained, tokenizer.encode("\n")
    yield [tokenizer.im_start], label_frame
    yield tokenizer.encode(role) + newline, False
    yield tokenizer.encode(text), is_answer
    yield [tokenizer.im_end], is_answer or label_frame
    yield newline, label_frame


def _plain(turns: Sequence[Turn], tokenizer: Encoder, system: str) -> Iterator[Part]:
    if system:
        yield tokenizer.encode(f"{system}\n"), False
    for turn in turns:
        if turn.role == "assistant":
            yield [*tokenizer.encode(turn.text), tokenizer.endoftext], turn.trained
        else:
            first, _, rest = turn.text.partition("\n")
            yield tokenizer.encode(f"Instruction: {first}\n" + (f"Input: {rest}\n" if rest else "") + "Answer: "), False
