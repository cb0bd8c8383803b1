"""Answers: batches of greedy ones, or one as a stream of text.

One loop over a model with a key/value cache serves both; it works on the decoder, with or without an adapter, and on any causal
model of transformers. Our decoder on a GPU goes through decoding.py instead, one step ahead of what is read here, so that the GPU never waits
for the host: the step after the last is thrown away. Refuses to know files and terminals. Trade-off: a plain loop instead of transformers'
generate, which computes logits of whole prompts, hides where the context ends, and cannot be stopped between two tokens.
"""

import codecs
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from train.common.errors import UserError
from train.data.chat_template import DEFAULT_SYSTEM, prompt
from train.data.formats import Turn
from train.inference import decode_graph, sessions
from train.inference.sampling import Choose, Sampling, chooser
from train.model.decoder import Decoder
from train.model.tokenizer import Tokenizer


def notice(text: str) -> None:
    """Say `text` where it is not taken for an answer."""
    print(text, file=sys.stderr, flush=True)


def context_of(model: nn.Module) -> int:
    """Tokens that the model was made for, prompt and answer together: max_position_embeddings, else seq_length."""
    config: Any = model.config
    return getattr(config, "max_position_embeddings", None) or config.seq_length


def answers(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str] | Sequence[Sequence[Turn]],
    system: str = DEFAULT_SYSTEM,
    max_new_tokens: int = 128,
    batch: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
    template: str = "chatml",
    cut: str = "",
) -> list[str]:
    """The likeliest answer to each prompt (a question, or turns that end with the user's), in their order.

    Args:
        batch: prompts computed at once, left-padded; those of like length go together. No answer depends on it, but for rounding.
        on_progress: called with (answered, all) after each batch.
        cut: what is put behind an answer that ends because of `max_new_tokens` or of the context.
    Raises:
        UserError: a prompt that fills the context.
    """
    rows = [prompt([Turn("user", p)] if isinstance(p, str) else p, tokenizer, system, template) for p in prompts]
    order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
    texts: dict[int, str] = {}
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        texts |= zip(some, _answer([rows[n] for n in some], model, tokenizer, max_new_tokens, cut))
        if on_progress:
            on_progress(len(texts), len(rows))
    sessions.forget(model)
    return [texts[n] for n in range(len(rows))]


def _answer(rows: list[list[int]], model: nn.Module, tokenizer: Tokenizer, max_new_tokens: int, cut: str) -> list[str]:
    width = max(map(len, rows))
    steps = room(width, max_new_tokens, model)
    padding = [width - len(row) for row in rows]
    ids = torch.tensor([[tokenizer.pad] * pad + row for pad, row in zip(padding, rows)])  # [B, T]
    mask = torch.tensor([[0] * pad + [1] * len(row) for pad, row in zip(padding, rows)])
    stop = torch.tensor(tokenizer.stop_ids)
    taken: list[Tensor] = []
    ended = torch.zeros(len(rows), dtype=torch.bool)
    for step in tokens(model, ids, mask, Sampling(), steps):
        taken.append(step.cpu())
        ended |= torch.isin(taken[-1], stop)
        if ended.all():
            break
    if steps < max_new_tokens and not ended.all():
        notice(f"{int((~ended).sum())} answers end where the model's context of {context_of(model)} tokens ends.")
    said = [_until(row, tokenizer.stop_ids) for row in torch.stack(taken, dim=1).tolist()]
    return [tokenizer.decode(ids) + (cut if len(ids) == len(taken) else "") for ids in said]


def _until(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    return ids[: next((n for n, number in enumerate(ids) if number in stop_ids), len(ids))]


def stream(
    model: nn.Module,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    max_new_tokens: int = 512,
    sampling: Sampling | None = None,
    notify: Callable[[str], None] = notice,
) -> Iterator[str]:
    """The answer to the prompt `ids`, piece by piece, each of whole characters; equal sampling and seed give equal answers.

    Says through `notify` when the answer ends because of `max_new_tokens` or of the model's context.
    Raises UserError at the first piece if the prompt fills the context.
    """
    steps = room(len(ids), max_new_tokens, model)
    text = codecs.getincrementaldecoder("utf-8")("replace")  # holds back the bytes of half a character
    row = torch.tensor([list(ids)])
    full = True
    for step in tokens(model, row, torch.ones_like(row), sampling or Sampling(), steps):
        number = int(step)
        if number in tokenizer.stop_ids:
            full = False
            break
        if not tokenizer.is_control(number) and (piece := text.decode(tokenizer.bytes_of(number))):
            yield piece
    if tail := text.decode(b"", final=True):
        yield tail
    if full and steps < max_new_tokens:
        notify(f"(stopped: the model's context of {context_of(model)} tokens is full)")
    elif full:
        notify(f"(stopped: {max_new_tokens} tokens, the most that were asked for)")


def room(width: int, max_new_tokens: int, model: nn.Module) -> int:
    """How many of `max_new_tokens` the context has room for after a prompt of `width` tokens; UserError if none."""
    left = context_of(model) - width
    if left < 1:
        raise UserError(
            f"the prompt has {width} tokens, the model's context {context_of(model)}: nothing is left for an answer. Shorten it."
        )
    return min(left, max_new_tokens)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def tokens(model: nn.Module, ids: Tensor, mask: Tensor, sampling: Sampling, steps: int) -> Iterator[Tensor]:
    """The next id of each row, `steps` times. ids and mask [B, T], padding (mask 0) on the left; yields [B]."""
    device = _device(model)
    ids, mask, choose = ids.to(device), mask.to(device), chooser(sampling, device)
    with sessions.leased(model, ids.shape[0], ids.shape[1] + steps) as static:
        if static is None:
            yield from _one_by_one(model, ids, mask, choose, steps)
        else:
            greedy = sampling.temperature == 0 and sampling.repetition_penalty == 1.0
            yield from _ahead(static, model, ids, mask, None if greedy else choose, steps)


def _one_by_one(model: nn.Module, ids: Tensor, mask: Tensor, choose: Choose, steps: int) -> Iterator[Tensor]:
    """By the model's own cache, which grows; yields on the model's device."""
    base = sessions.decoder_of(model)
    frugal = {"last_only": True} if isinstance(base, Decoder) else {}
    now, past = ids, None
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # from zero at each row's first token
    for _ in range(steps):
        with torch.inference_mode():
            out = model(
                input_ids=now,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=past,
                use_cache=True,
                **frugal,
            )
            chosen = choose(ids, out.logits[:, -1].float())
        yield chosen
        now, past, positions = chosen[:, None], out.past_key_values, positions[:, -1:] + 1
        ids = torch.cat([ids, now], dim=1)
        mask = torch.cat([mask, torch.ones_like(now)], dim=1)


def _ahead(
    static: decode_graph.Static, model: nn.Module, ids: Tensor, mask: Tensor, choose: Choose | None, steps: int
) -> Iterator[Tensor]:
    """By a cache of constant size: step n + 1 is under way when the tokens of step n are read. choose None: the likeliest. Yields on the host."""
    width, cuda = ids.shape[1], ids.is_cuda
    said = torch.empty(steps, len(ids), dtype=torch.int64, pin_memory=cuda)
    there = [torch.cuda.Event() for _ in range(steps if cuda else 0)]
    with torch.inference_mode():
        row = torch.cat([ids, ids.new_zeros(len(ids), steps)], dim=1)  # prompts and what was chosen
    chosen: Tensor | None = None
    for n in range(steps + 1):
        if n < steps:
            with torch.inference_mode():
                logits = static.step(chosen) if n else static.start(model, ids, mask)
                chosen = choose(row[:, : width + n], logits) if choose else None
                row[:, width + n] = static.token if chosen is None else chosen
                said[n].copy_(row[:, width + n], non_blocking=True)
            if cuda:
                there[n].record()
        if n:
            if cuda:
                there[n - 1].synchronize()
            yield said[n - 1]
