"""A passport of an export: do training's forward pass, `infer` at any batch and other programs give its very tokens?

The export answers prompts of the run's own data, one at a time. `infer` answers them again in batches; the trained model
(the adapter on its base) reads the answers in training's packed forward pass, without a cache, and must prefer each of
their tokens; other programs (readers.py) answer the prompts from the files. Takes loaded models one after the other;
knows neither options nor how an export is written. Trade-off: the answers are short and the prompts few, so that a
passport costs a fraction of the comparison in verify.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from train.common.device import dtype_name
from train.data.checked.conversations import Conversation, training_data
from train.data.rows.formats import Turn
from train.data.tokens.chat_template import prompt
from train.evaluation import parity
from train.export import readers
from train.export.readers import Question
from train.inference import sessions
from train.inference.generate import batch_tokens
from train.inference.sampling import Sampling
from train.model.tokenizer import Tokenizer

PASSPORT = "passport.json"
NEW_TOKENS = 32  # of an answer, at most
BATCHES = (1, 8, 64)  # the first gives the answers that all others are compared with
TRAINING = "training's forward pass"
Rows = list[list[int]]


@dataclass(frozen=True)
class Prompts:
    """Ids of each prompt, the same as messages, and the name of the data that they are from."""

    rows: Rows
    messages: list[list[dict[str, str]]]
    data: str
    tokenizer: Tokenizer


def choose_prompts(
    record: dict[str, Any], tokenizer: Tokenizer, template: str, system: str, context: int, count: int
) -> Prompts:
    """At most `count` prompts of the run's own data, if that is unchanged, or else built-in questions.

    A prompt is a conversation up to its first answer. One without room for an answer is left out.

    Args:
        record: the run's run.json. context: tokens that the model was made for.
    """
    trained, name = training_data(record)
    longest = min(parity.MAX_ROW_TOKENS, context) - NEW_TOKENS
    for source, data in ((trained, name), (parity.builtin_conversations(), "the built-in list")):
        asked = ((_prompt_ids(one, tokenizer, template, system), one) for one in source[: 4 * count])
        if chosen := [(ids, one) for ids, one in asked if ids and len(ids) <= longest][:count]:
            return Prompts([ids for ids, _ in chosen], [_messages(one) for _, one in chosen], data, tokenizer)
    return Prompts([], [], "", tokenizer)


def _question(conversation: Conversation) -> list[Turn]:
    """The turns before the first answer."""
    return list(takewhile(lambda turn: turn.role != "assistant", conversation.turns))


def _messages(conversation: Conversation) -> list[dict[str, str]]:
    """The turns before the first answer as other programs take them; a system message only where it is its own."""
    own = [] if conversation.system is None else [{"role": "system", "content": conversation.system}]
    return [*own, *({"role": turn.role, "content": turn.text} for turn in _question(conversation))]


def _prompt_ids(conversation: Conversation, tokenizer: Tokenizer, template: str, system: str) -> list[int]:
    """Ids of the conversation up to where its first answer starts; none if it begins with an answer."""
    turns = _question(conversation)
    own = system if conversation.system is None else conversation.system
    return prompt(turns, tokenizer, own, template) if turns else []


def issue(
    exported: Callable[[], nn.Module],
    trained: Callable[[], nn.Module],
    prompts: Prompts,
    on_answers: Callable[[int], None] = lambda count: None,
    others: Mapping[str, Callable[[Question], dict[str, Any]]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Load and ask both models and the others, one in memory at a time; the passport.

    Args:
        exported: loads the export from its files. trained: loads the adapter on its base.
        others: name of another program -> its reply (see readers.py).
        on_answers: called with the number of answers just computed; passes(prompts) of them in all.
    """
    model = exported()
    answers = {size: _answers(model, prompts, size, on_answers) for size in BATCHES}
    sessions.release(model)
    first = answers[BATCHES[0]]
    rows = [(p + a, [0] * len(p) + [1] * len(a)) for p, a in zip(prompts.rows, first, strict=True)]
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    of_export = parity.answer_states(model, rows, on_answers)
    del model  # freed before the next is loaded
    question = Question(prompts.messages, prompts.rows, NEW_TOKENS)
    told = [readers.compare(name, question, first, of_export, reply(question)) for name, reply in others.items()]
    of_training = parity.answer_states(trained(), rows, on_answers)
    found = [{"reader": f"infer at batch {size}", **_agreement(first, answers[size])} for size in BATCHES[1:]]
    read = preferred(of_training, [len(answer) for answer in first])
    found.append({"reader": TRAINING, **_agreement(first, read)})
    return {
        "prompts": len(first),
        "data": prompts.data,
        "new_tokens": NEW_TOKENS,
        "computed_in": dtype_name(dtype),
        "compared_with": "infer at batch 1",
        "readers": [*found, *told],
        "logits": {"between": f"{TRAINING} and the export", **parity.compare(of_training, of_export).to_json()},
    }


def passes(prompts: Prompts) -> int:
    """Answers that `issue` computes in all."""
    return len(prompts.rows) * (len(BATCHES) + 2)


@torch.inference_mode()
def preferred(states: parity.AnswerStates, lengths: Sequence[int]) -> Rows:
    """The likeliest token at each place of answers of these lengths, as the model sees it that read them."""
    parts = states.hidden.split(parity.CHUNK_TOKENS)
    chosen = torch.cat([nn.functional.linear(part, states.head).argmax(-1) for part in parts])
    return [part.tolist() for part in chosen.split(list(lengths))]


def _answers(model: nn.Module, prompts: Prompts, batch: int, on_answers: Callable[[int], None]) -> Rows:
    """The answers' ids, each with the token that ends it, of `batch` prompts at a time."""
    found: Rows = []
    for start in range(0, len(prompts.rows), batch):
        rows = prompts.rows[start : start + batch]
        numbers = range(start, start + len(rows))
        new = batch_tokens(rows, model, prompts.tokenizer, Sampling(), numbers, NEW_TOKENS)
        found += [_with_stop(row, prompts.tokenizer.stop_ids) for row in new]
        on_answers(len(rows))
    return found


def _with_stop(row: list[int], stops: Sequence[int]) -> list[int]:
    return row[: next((n + 1 for n, token in enumerate(row) if token in stops), len(row))]


def _agreement(expected: Rows, found: Rows) -> dict[str, Any]:
    """How many answers are equal, and where each of the others differs first; prompts and tokens count from 1."""
    places = [_first_difference(one, other) for one, other in zip(expected, found, strict=True)]
    different = [{"prompt": n, "token": place} for n, place in enumerate(places, 1) if place]
    return {"equal_answers": len(expected) - len(different), "first_differences": different}


def _first_difference(one: list[int], other: list[int]) -> int:
    """The number, from 1, of the first token that differs; 0 if none does."""
    if one == other:
        return 0
    return 1 + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def in_words(passport: dict[str, Any]) -> str:
    """The passport as one line, for the model card and the terminal."""
    count, logits = passport["prompts"], parity.Parity.from_json(passport["logits"])
    results = [_result(one, count) for one in passport["readers"]]
    return (
        f"greedy answers to prompts of {passport['data']}, equal to those of {passport['compared_with']}: "
        f"{', '.join(results)}; {logits}"
    )


def _result(one: dict[str, Any], count: int) -> str:
    if "error" in one:
        return f"{one['reader']} does not read it ({one['error']})"
    answers = f"{one['reader']} {one['equal_answers']} of {count}"
    if "logits" not in one:
        return answers
    logits = f"mean KL {one['logits']['divergence']:.1e} nats"
    other = count - one["equal_prompts"]  # the answers are to our ids, so they would not show it
    return f"{answers} ({logits}" + (f"; it makes other ids of {other} of the {count} prompts)" if other else ")")
