"""One conversation as ids, and which of them are learnt: ChatML as Qwen publishes it, or plain Instruction/Input/Answer.

Refuses to know files, batches and lengths. Each part is encoded alone (role, text, line ends), as in Qwen-1's published training
and chat code: what stands in one turn never changes the ids of another, and a prompt is always the beginning of the whole.
Trade-off: a text that begins with line ends has other ids than a template rendered to one string first would give it.

chatml:  <|im_start|>system⏎{system}<|im_end|>⏎<|im_start|>user⏎{text}<|im_end|>⏎<|im_start|>assistant⏎{text}<|im_end|>⏎
plain:   {system}⏎Instruction: {first line}⏎Input: {other lines}⏎Answer: {text}<|endoftext|>Instruction: …
         (no system line without a system message, no Input line if the question is a single line)
"""

import json
from collections.abc import Iterator, Sequence
from typing import Protocol

from train.common.errors import UserError
from train.data.conversations import Conversation
from train.data.formats import Turn

DEFAULT_SYSTEM = "You are a helpful assistant."


CHAT_TEMPLATE = (  # what chatml.render writes, for tools that read tokenizer_config.json
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


def chat_template(system: str, template: str = "chatml") -> str:
    """What chatml.render writes as a template of transformers, with `system` where no system message is given."""
    written = {"chatml": CHAT_TEMPLATE, "plain": PLAIN_TEMPLATE}[template]
    return "{% set SYSTEM = " + json.dumps(system) + " %}" + written


Part = tuple[list[int], bool]  # ids, and whether they are learnt


class Encoder(Protocol):
    """What is asked of a tokenizer here: ours, or a stock one in stock.py."""

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
    """Ids of the whole conversation, and for each 1 if it is learnt, else 0.

    Args:
        mask: "assistant": the text of each answer and the token that ends it. "published": what Qwen's own script learns: the same,
            and <|im_start|>, <|im_end|> and the last newline of every turn, the system's and the user's too.
        system: for conversations whose own is None; "" = none.
    Raises:
        UserError: an unknown template or mask, or mask=published with template=plain.
    """
    if (template, mask) not in (("chatml", "assistant"), ("chatml", "published"), ("plain", "assistant")):
        raise UserError(
            f"template={template} with mask={mask}: expected template=chatml with mask=assistant or published, or template=plain with mask=assistant."
        )
    own = system if conversation.system is None else conversation.system
    ids: list[int] = []
    learnt: list[int] = []
    for part, learn in _parts(conversation.turns, tokenizer, template, mask == "published", own):
        ids += part
        learnt += [int(learn)] * len(part)
    return ids, learnt


def prompt(
    turns: Sequence[Turn], tokenizer: Encoder, system: str = DEFAULT_SYSTEM, template: str = "chatml"
) -> list[int]:
    """Ids of `turns` (the last is the user's) up to where the answer starts; what `render` gives begins with them."""
    ids = [number for part, _ in _parts(turns, tokenizer, template, False, system) for number in part]
    if template == "plain":
        return ids
    return [*ids, tokenizer.im_start, *tokenizer.encode("assistant"), *tokenizer.encode("\n")]


def _parts(turns: Sequence[Turn], tokenizer: Encoder, template: str, frame: bool, system: str) -> Iterator[Part]:
    if template == "plain":
        yield from _plain(turns, tokenizer, system)
        return
    if system:
        yield from _turn("system", system, tokenizer, frame)
    for turn in turns:
        yield from _turn(turn.role, turn.text, tokenizer, frame)


def _turn(role: str, text: str, tokenizer: Encoder, frame: bool) -> Iterator[Part]:
    """One ChatML turn; `frame`: learn <|im_start|>, <|im_end|> and the last newline of whichever role."""
    answer, newline = role == "assistant", tokenizer.encode("\n")
    yield [tokenizer.im_start], frame
    yield tokenizer.encode(role) + newline, False
    yield tokenizer.encode(text), answer
    yield [tokenizer.im_end], answer or frame
    yield newline, frame


def _plain(turns: Sequence[Turn], tokenizer: Encoder, system: str) -> Iterator[Part]:
    if system:
        yield tokenizer.encode(f"{system}\n"), False
    for turn in turns:
        if turn.role == "assistant":
            yield [*tokenizer.encode(turn.text), tokenizer.endoftext], True
        else:
            first, _, rest = turn.text.partition("\n")
            yield tokenizer.encode(f"Instruction: {first}\n" + (f"Input: {rest}\n" if rest else "") + "Answer: "), False
