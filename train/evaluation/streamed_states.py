"""parity.answer_states for a model of any size: all rows go through one block before the next is loaded.

A BlockStream gives the blocks. Each is read once for all rows, as in a pass through the whole model; the price is that
the hidden states of all rows are on the device, 4 KB to 32 KB a token.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from train.evaluation.parity import AnswerStates, MaskedRow, pack, shared_tokens
from train.model.block_stream import BlockStream
from train.model.decoder import AttentionInputs, Cache, rope_tables, sdpa_mask, token_positions


@dataclass
class _Pass:
    """Rows side by side between two blocks: hidden [1, T, H], what their attention reads, labelled [T] bools."""

    hidden: Tensor
    tables: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    labelled: Tensor

    def through(self, block: nn.Module, past: Cache | None) -> Cache:
        """Take the rows through a block; its keys and values."""
        inputs: AttentionInputs = (*self.tables, past)
        self.hidden, cache = block(self.hidden, inputs)
        return cache  # type: ignore[no-any-return]


class _Rows:
    """All rows between two blocks. What they begin with is computed once, as in parity.answer_states."""

    def __init__(self, model: BlockStream, rows: Sequence[MaskedRow]) -> None:
        shared = shared_tokens(rows, model.model.config.seq_length)
        self.start = _begin(model, [(rows[0][0][:shared], [0] * shared)], 0) if shared else None
        self.groups = pack([(ids[shared:], mask[shared:]) for ids, mask in rows])
        self.passes = [_begin(model, group, shared) for group in self.groups]

    def through(self, block: nn.Module) -> None:
        past = self.start.through(block, None) if self.start else None
        for one in self.passes:
            one.through(block, past)

    def answers(self, norm: nn.Module, head: Tensor) -> AnswerStates:
        """The states that predict the answer tokens, after the last block."""
        found = [norm(one.hidden)[0, :-1][one.labelled[1:]] for one in self.passes]
        return AnswerStates(torch.cat(found) if found else head[:0], head)


def _begin(model: BlockStream, group: Sequence[MaskedRow], shared: int) -> _Pass:
    """Embeddings of rows that share a pass and follow `shared` tokens of a cache; segment ids keep them apart."""
    c, device = model.model.config, model.device
    ids = torch.tensor([[i for row, _ in group for i in row]])  # [1, T]
    labelled = torch.tensor([n for _, mask in group for n in (0, *mask[1:])], device=device).bool()
    segments = torch.tensor([[n for n, (row, _) in enumerate(group, 1) for _ in row]], device=device)
    positions = token_positions(None, segments, 0, segments) + shared
    alpha = None if shared else model.backbone.ntk_alpha(segments, None, segments, None)
    cos, sin = rope_tables(positions, c.head_dim, c.rope_theta, None if alpha is None else alpha.expand_as(positions))
    allowed = sdpa_mask(None, segments, ids.shape[1], shared + ids.shape[1], device)
    return _Pass(model.embedded(ids), (cos, sin, model.backbone.logn_factors(positions), allowed), labelled)


@torch.inference_mode()
def streamed_states(
    model: BlockStream,
    rows: Sequence[MaskedRow],
    without_adapter: int = 0,
    known_head: Tensor | None = None,
    on_rows: Callable[[int], None] = lambda count: None,
) -> tuple[AnswerStates, AnswerStates]:
    """The states that predict the answer tokens of all rows; and of the first `without_adapter` rows without the adapter.

    known_head: of a model that this one is compared with; an equal one is not in memory twice.
    on_rows: called with the number of rows that are done, a part of them after each block, so that the sum is theirs.
    """
    of_all = _Rows(model, rows)
    of_base = _Rows(model, rows[:without_adapter])
    shares = _shares(len(rows) + len(rows[:without_adapter]), model.model.config.num_hidden_layers)
    for block, adapted in model.blocks():  # without enumerate, which would keep a block until it has the next
        of_all.through(block)
        with adapted.disable_adapter() if adapted else nullcontext():
            of_base.through(block)
        on_rows(next(shares))
        del block, adapted  # frees the block before the next is loaded
    norm, head = model.norm(), model.head(known_head)
    return of_all.answers(norm, head), of_base.answers(norm, head)


def _shares(total: int, parts: int) -> Iterator[int]:
    """`total` in whole parts of nearly the same size."""
    return (total * (n + 1) // parts - total * n // parts for n in range(parts))
