"""A conversation as token ids, and which of them are trained on: ChatML as published by Qwen, with or without the
<think> blocks of Qwen3, or a plain template.

This module does not know files, batches and lengths. Each part (role, text, line end) is encoded separately, as in the
published training and chat code of Qwen-1. So the text of one turn never changes the ids of another, and the ids of a
prompt are always the beginning of the ids of the whole conversation. The trade-off: a text that begins with line ends
gets other ids than if the whole conversation were rendered to one string first.

chatml:  <|im_start|>system⏎{system}<|im_end|>⏎<|im_start|>user⏎{text}<|im_end|>⏎<|im_start|>assistant⏎{text}<|im_end|>⏎
plain:   {system}⏎Instruction: {first line}⏎Input: {other lines}⏎Answer: {text}<|endoftext|>Instruction: …
         (without a system message no system line; for a question of one line no Input line)
qwen3, qwen3_thinking:  chatml with the <think> blocks of Qwen3's published template; see thinking.py
"""

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from train.common.errors import UserError
from train.data.checked.conversations import Conversation
from train.data.rows.formats import Turn
from train.data.tokens import thinking

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


TEMPLATES = {"chatml": CHAT_TEMPLATE, "plain": PLAIN_TEMPLATE} | {
    name: thinking.jinja(name) for name in thinking.TEMPLATES
}


def chat_template(system: str, template: str = "chatml") -> str:
    """The Jinja template for transformers that writes what `render` encodes.

    Args:
        system: the system message of conversations that have none.
    """
    return "{% set SYSTEM = " + json.dumps(system) + " %}" + TEMPLATES[template]


Part = tuple[tuple[str | int, ...], bool]  # texts, each encoded alone, and control tokens; are they trained on?


class Encoder(Protocol):
    """What this module needs of a tokenizer: ours (model/tokenizer.py), or a stock one (inference/stock.py)."""

    im_start: int
    im_end: int
    endoftext: int

    def encode(self, text: str) -> list[int]: ...


class BatchEncoder(Encoder, Protocol):
    """A tokenizer that also encodes many texts at once, each to the ids that `encode` gives it."""

    def encode_batch(self, texts: Sequence[str]) -> list[bytes]:
        """The ids (int32) of each text, as bytes."""


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
        UserError: an unknown template or mask, or mask=published with a template other than chatml.
    """
    _check(template, mask)
    ids: list[int] = []
    labelled: list[int] = []
    for pieces, is_labelled in _conversation(conversation, tokenizer, template, mask, system):
        before = len(ids)
        ids += _ids(pieces, tokenizer)
        labelled += [int(is_labelled)] * (len(ids) - before)
    return ids, labelled


def render_batch(
    conversations: Sequence[Conversation], tokenizer: BatchEncoder, template: str, mask: str, system: str
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """What `render` gives for each conversation, one after another: (tokens of each, ids int32 [sum], mask uint8 [sum]).

    Arguments and errors as of `render`.
    """
    _check(template, mask)
    parts = [list(_conversation(c, tokenizer, template, mask, system)) for c in conversations]
    pieces = dict.fromkeys([piece for one in parts for texts, _ in one for piece in texts])
    texts = [piece for piece in pieces if isinstance(piece, str)]
    encoded: dict[str | int, bytes] = {n: n.to_bytes(4, sys.byteorder) for n in pieces if isinstance(n, int)}
    encoded |= zip(texts, tokenizer.encode_batch(texts), strict=True)
    rows = [[b"".join([encoded[piece] for piece in texts]) for texts, _ in one] for one in parts]
    runs = [len(part) // 4 for row in rows for part in row]
    flags = np.array([is_labelled for one in parts for _, is_labelled in one], np.uint8)
    ids = np.frombuffer(b"".join([part for row in rows for part in row]), np.int32)
    return [sum(map(len, row)) // 4 for row in rows], ids, np.repeat(flags, runs)


def prompt(
    turns: Sequence[Turn], tokenizer: Encoder, system: str = DEFAULT_SYSTEM, template: str = "chatml"
) -> list[int]:
    """Ids of `turns` (the last is a question) up to where the answer starts: the beginning of what `render` returns.

    Raises:
        UserError: an unknown template, as a damaged record may name.
    """
    if template not in TEMPLATES:
        raise UserError(f"template={template}: expected {' or '.join(TEMPLATES)}.")
    parts = _parts(turns, tokenizer, template, False, system)
    ids = [token for pieces, _ in parts for token in _ids(pieces, tokenizer)]
    return ids if template == "plain" else [*ids, *answer_start(tokenizer, template)]


def answer_start(tokenizer: Encoder, template: str) -> list[int]:
    """The ids after the last question that the answer follows, in any template but plain."""
    pieces = ("assistant", "\n", *(_think_block("", tokenizer) if template == "qwen3" else ()))
    return [tokenizer.im_start, *_ids(pieces, tokenizer)]


def _check(template: str, mask: str) -> None:
    if template not in TEMPLATES or (mask != "assistant" and (template, mask) != ("chatml", "published")):
        raise UserError(
            f"template={template} with mask={mask}: expected template=chatml with mask=assistant or published, or "
            f"template={', '.join(name for name in TEMPLATES if name != 'chatml')} with mask=assistant."
        )


def _ids(pieces: Sequence[str | int], tokenizer: Encoder) -> list[int]:
    return [token for p in pieces for token in ([p] if isinstance(p, int) else tokenizer.encode(p))]


def _conversation(
    conversation: Conversation, tokenizer: Encoder, template: str, mask: str, system: str
) -> Iterator[Part]:
    system = system if conversation.system is None else conversation.system
    return _parts(conversation.turns, tokenizer, template, mask == "published", system)


def _parts(turns: Sequence[Turn], tokenizer: Encoder, template: str, label_frame: bool, system: str) -> Iterator[Part]:
    if template == "plain":
        yield from _plain(turns, tokenizer, system)
        return
    if system:
        yield from _turn("system", system, tokenizer, label_frame)
    for n, turn in enumerate(turns):
        if template in thinking.TEMPLATES and turn.role == "assistant":
            yield from _thinking_answer(turns, n, tokenizer, template)
        else:
            yield from _turn(turn.role, turn.text, tokenizer, label_frame and turn.trained, turn.trained)


def _thinking_answer(turns: Sequence[Turn], index: int, tokenizer: Encoder, template: str) -> Iterator[Part]:
    """The answer at `index` with its <think> block where the published template writes one.

    The block is trained on where the model has to write it: always in qwen3_thinking, and with reasoning in qwen3, whose
    prompt ends with the empty block. Not trained on are answers whose reasoning is left out, and in qwen3_thinking all
    without a block: the model would learn to answer at once where it should think first.
    """
    thought, text = thinking.split(turns[index].text)
    has_block, trained = thinking.has_block(turns, index), turns[index].trained
    trained = trained and (has_block or (not thought and template == "qwen3"))
    text = text.lstrip("\n") if has_block else text
    yield (tokenizer.im_start,), False
    yield ("assistant", "\n"), False
    if has_block:
        yield _think_block(thought, tokenizer), trained and (bool(thought) or template == "qwen3_thinking")
    yield (text, tokenizer.im_end), trained
    yield ("\n",), False


def _think_block(thought: str, tokenizer: Encoder) -> tuple[str | int, ...]:
    marks: dict[str, int] = getattr(tokenizer, "control", {})
    first, last = (marks.get(mark, mark) for mark in (thinking.OPEN, thinking.CLOSE))
    return thinking.block(thought, first, last)


def _turn(role: str, text: str, tokenizer: Encoder, label_frame: bool, trained: bool = True) -> tuple[Part, ...]:
    """One ChatML turn.

    Args:
        label_frame: train on <|im_start|>, <|im_end|> and the last newline, whatever the role.
        trained: False: an answer that is read but not learnt.
    """
    is_answer = role == "assistant" and trained
    if not label_frame:
        return ((tokenizer.im_start, role, "\n"), False), ((text, tokenizer.im_end), is_answer), (("\n",), False)
    frame, head = ((tokenizer.im_start,), True), ((role, "\n"), False)
    return frame, head, ((text,), is_answer), ((tokenizer.im_end,), True), (("\n",), True)


def _plain(turns: Sequence[Turn], tokenizer: Encoder, system: str) -> Iterator[Part]:
    if system:
        yield (f"{system}\n",), False
    for turn in turns:
        if turn.role == "assistant":
            yield (turn.text, tokenizer.endoftext), turn.trained
        else:
            first, _, rest = turn.text.partition("\n")
            yield (f"Instruction: {first}\n" + (f"Input: {rest}\n" if rest else "") + "Answer: ",), False
