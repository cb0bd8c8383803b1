"""Answers: batches of them, or one as a stream of text.

Both use `tokens`, one loop over a model with a key/value cache: our decoder with or without an adapter, or any causal
model of transformers. On a GPU our decoder goes through a decoding session (decode_graph.py), one step ahead of what is
read here, so that the GPU never waits for the host; the step after the last is discarded. Files and terminals are not
its concern. Trade-off: a plain loop instead of transformers' generate, which computes logits for whole prompts, does
not say where the context ends, and cannot be stopped between two tokens.
"""

import codecs
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from train.common.errors import UserError
from train.data.rows.formats import Turn
from train.data.tokens.chat_template import DEFAULT_SYSTEM, prompt
from train.inference import sessions
from train.inference.decode_graph import DecodeSession
from train.inference.prompt_graph import padded_width
from train.inference.sampling import Choose, Sampling, chooser
from train.model.decoder import Decoder
from train.model.tokenizer import Tokenizer

CUT = "…"  # ends an answer that was cut off


def notice(text: str) -> None:
    """Print `text` on the standard error, apart from answers."""
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
    name_too_long: bool = False,
) -> list[str]:
    """The likeliest answer to each prompt (a question, or turns that end with the user's), in the order of the prompts.

    Args: see answer_rows.
    """
    turns = [[Turn("user", p)] if isinstance(p, str) else p for p in prompts]
    rows = [prompt(conversation, tokenizer, system, template) for conversation in turns]
    found = answer_rows(model, tokenizer, rows, Sampling(), max_new_tokens, batch, on_progress, cut, name_too_long)
    sessions.release(model)
    return found


def answer_rows(
    model: nn.Module,
    tokenizer: Tokenizer,
    rows: Sequence[Sequence[int]],
    sampling: Sampling,
    max_new_tokens: int = 128,
    batch: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
    cut: str = "",
    name_too_long: bool = False,
    first: int = 0,
) -> list[str]:
    """The answer to each prompt, in the order of the prompts. The model's decoding session is kept for the next call.

    Args:
        rows: the ids of each prompt.
        batch: prompts computed at once, left-padded, those of similar length together; it changes answers by rounding
            only.
        on_progress: called with (answered, all) after each batch.
        cut: appended to an answer that ends because of `max_new_tokens` or of the context.
        name_too_long: the answer to a prompt that fills the context is a sentence that says so.
        first: the number of the first prompt among all that are asked, for the draws of `sampling`.
    Raises:
        UserError: a prompt that fills the context, without `name_too_long`.
    """
    texts = {n: _no_room(len(row), model) for n, row in enumerate(rows) if len(row) >= context_of(model)}
    if texts and not name_too_long:
        raise UserError(f"the prompt has {texts[min(texts)]}. Shorten it.")
    texts = {n: f"(not asked: the prompt has {text})" for n, text in texts.items()}
    order = sorted(set(range(len(rows))) - texts.keys(), key=lambda n: len(rows[n]))
    for chosen in _batches(order, rows, batch, context_of(model) - max_new_tokens):
        numbers = [first + n for n in chosen]
        found = _answer_batch([rows[n] for n in chosen], model, tokenizer, sampling, numbers, max_new_tokens, cut)
        texts |= zip(chosen, found)
        if on_progress:
            on_progress(len(texts), len(rows))
    return [texts[n] for n in range(len(rows))]


def _batches(order: Sequence[int], rows: Sequence[Sequence[int]], batch: int, limit: int) -> Iterator[Sequence[int]]:
    """`order` in batches. A prompt of more than `limit` tokens is alone: it would shorten the answers beside it."""
    whole = sum(len(rows[n]) <= limit for n in order)  # the shortest are first
    for start in range(0, whole, batch):
        yield order[start : min(start + batch, whole)]
    yield from ([n] for n in order[whole:])


def _answer_batch(
    rows: Sequence[Sequence[int]],
    model: nn.Module,
    tokenizer: Tokenizer,
    sampling: Sampling,
    numbers: Sequence[int],
    max_new_tokens: int,
    cut: str,
) -> list[str]:
    found = batch_tokens(rows, model, tokenizer, sampling, numbers, max_new_tokens)
    answer_ids = [_until_stop(row, tokenizer.stop_ids) for row in found]
    return [tokenizer.decode(ids) + (cut if len(ids) == len(row) else "") for ids, row in zip(answer_ids, found)]


def batch_tokens(
    rows: Sequence[Sequence[int]],
    model: nn.Module,
    tokenizer: Tokenizer,
    sampling: Sampling,
    numbers: Sequence[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """The new ids of each prompt, computed at once until all have a stop token: equally many, with what follows a stop.

    Args: see answer_rows; numbers: of the prompts, for the draws of `sampling`.
    """
    width = max(map(len, rows))
    steps = room(width, max_new_tokens, model)
    padding = [width - len(row) for row in rows]
    ids = torch.tensor([[tokenizer.pad] * pad + list(row) for pad, row in zip(padding, rows)])  # [B, T]
    mask = torch.tensor([[0] * pad + [1] * len(row) for pad, row in zip(padding, rows)])
    stop = torch.tensor(tokenizer.stop_ids)
    new_tokens: list[Tensor] = []
    ended = torch.zeros(len(rows), dtype=torch.bool)
    for token in tokens(model, ids, mask, sampling, steps, numbers):
        new_tokens.append(token.cpu())
        ended |= torch.isin(new_tokens[-1], stop)
        if ended.all():
            break
    if steps < max_new_tokens and not ended.all():
        notice(f"{int((~ended).sum())} answers end where the model's context of {context_of(model)} tokens ends.")
    found: list[list[int]] = torch.stack(new_tokens, dim=1).tolist()
    return found


def _until_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    return ids[: next((n for n, token in enumerate(ids) if token in stop_ids), len(ids))]


def stream(
    model: nn.Module,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    max_new_tokens: int = 512,
    sampling: Sampling | None = None,
    notify: Callable[[str], None] = notice,
) -> Iterator[str]:
    """The answer to the prompt `ids` in pieces of whole characters. Equal sampling with an equal seed gives equal
    answers.

    Args:
        notify: called with the reason when the answer ends because of `max_new_tokens` or of the model's context.
    Raises:
        UserError: at the first piece, if the prompt fills the context.
    """
    steps = room(len(ids), max_new_tokens, model)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # keeps the bytes of an unfinished character
    row = torch.tensor([list(ids)])
    cut_off = True
    for step in tokens(model, row, torch.ones_like(row), sampling or Sampling(), steps):
        token = int(step)
        if token in tokenizer.stop_ids:
            cut_off = False
            break
        if not tokenizer.is_hidden(token) and (piece := decoder.decode(tokenizer.bytes_of(token))):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest
    if cut_off and steps < max_new_tokens:
        notify(f"(stopped: the model's context of {context_of(model)} tokens is full)")
    elif cut_off:
        notify(f"(stopped: {max_new_tokens} tokens, the most that were asked for)")


def _no_room(width: int, model: nn.Module) -> str:
    return f"{width} tokens, the model's context {context_of(model)}: no room is left for an answer"


def room(width: int, max_new_tokens: int, model: nn.Module) -> int:
    """How many of `max_new_tokens` fit into the context after a prompt of `width` tokens.

    Raises:
        UserError: none.
    """
    left = context_of(model) - width
    if left < 1:
        raise UserError(f"the prompt has {_no_room(width, model)}. Shorten it.")
    return min(left, max_new_tokens)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def tokens(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor,
    sampling: Sampling,
    steps: int,
    numbers: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """The next token of each row, `steps` times. ids and mask [B, T], padding (mask 0) on the left; yields [B].

    Args:
        numbers: of each row, for its own draws; None: one generator for all rows.
    """
    device = _device(model)
    ids, mask = ids.to(device), mask.to(device)
    choose = chooser(sampling, device, (mask == 0).sum(1), numbers)
    with sessions.borrow(model, ids.shape[0], padded_width(ids.shape[1], ids.shape[0]) + steps) as session:
        if session is None:
            yield from _by_growing_cache(model, ids, mask, choose, steps)
        else:
            yield from _by_session(session, model, ids, mask, None if sampling.likeliest else choose, steps)


def _by_growing_cache(model: nn.Module, ids: Tensor, mask: Tensor, choose: Choose, steps: int) -> Iterator[Tensor]:
    """With the model's own cache, which grows; yields on the model's device."""
    last_only = {"last_only": True} if isinstance(sessions.decoder_of(model), Decoder) else {}
    step_ids, past = ids, None
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # from zero at each row's first token
    for _ in range(steps):
        with torch.inference_mode():
            out = model(
                input_ids=step_ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=past,
                use_cache=True,
                **last_only,
            )
            chosen = choose(ids, out.logits[:, -1].float())
        yield chosen
        step_ids, past, positions = chosen[:, None], out.past_key_values, positions[:, -1:] + 1
        ids = torch.cat([ids, step_ids], dim=1)
        mask = torch.cat([mask, torch.ones_like(step_ids)], dim=1)


def _by_session(
    session: DecodeSession, model: nn.Module, ids: Tensor, mask: Tensor, choose: Choose | None, steps: int
) -> Iterator[Tensor]:
    """With a session's cache of constant size; yields on the host. choose: None takes the likeliest.

    Step n + 1 is under way when the tokens of step n are read.
    """
    width, cuda = ids.shape[1], ids.is_cuda
    on_host = torch.empty(steps, len(ids), dtype=torch.int64, pin_memory=cuda)
    copied = [torch.cuda.Event() for _ in range(steps if cuda else 0)]
    with torch.inference_mode():
        rows = torch.cat([ids, ids.new_zeros(len(ids), steps)], dim=1)  # prompts and the tokens chosen so far
    chosen: Tensor | None = None
    for n in range(steps + 1):
        if n < steps:
            with torch.inference_mode():
                logits = session.step(chosen) if n else session.start(model, ids, mask, steps)
                chosen = choose(rows[:, : width + n], logits) if choose else None
                rows[:, width + n] = session.token if chosen is None else chosen
                on_host[n].copy_(rows[:, width + n], non_blocking=True)
            if cuda:
                copied[n].record()
        if n:
            if cuda:
                copied[n - 1].synchronize()
            yield on_host[n - 1]
