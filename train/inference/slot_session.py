"""Decoding of requests that come and go: a static cache in slots, and steps over any of them.

A `SlotSession` holds the keys and values of `slots` conversations, each of up to `capacity` tokens from position 0 on.
`read_prompt` fills a slot with a piece of a prompt; `step` gives the next token of any set of slots. On a GPU a step is
a CUDA graph for a fixed number of rows; rows that are not wanted work on a spare slot. What a row computes depends on
its own slot and on the number of rows alone, so who else is in the batch changes nothing. On a CPU the same functions
run without a graph. Several adapters share the cache: every call names the layers that it uses.

It knows ids and slots, and neither texts nor requests. Trade-off: memory for `capacity` tokens of every slot is taken
at the start, as one block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from train.inference.decode_graph import DecodeSession
from train.inference.decode_layers import DecodeLayers
from train.model.decoder import ntk_alpha, rope_tables, rotate_heads
from train.ops import decode_step, kernels
from train.ops.kernels import overlap

CHUNK = 512  # tokens of a prompt that are read at once; capacities are multiples of it
WIDTHS = (32, 64, 128, 256, CHUNK)  # of the graphs that read the first chunk of a prompt: padded on the right
ROWS = (1, 4, 8, 16, 32, 48, 64)  # of the graphs of a step


@dataclass(frozen=True)
class PromptPiece:
    """Tokens start … start + len(ids) of the prompt in `slot`, which has `length` tokens in all."""

    slot: int
    ids: Sequence[int]
    start: int
    length: int


@dataclass
class _Graph:
    """A captured graph and the tensors that it reads."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]


def bytes_per_token(layers: DecodeLayers) -> int:
    """Memory that a token takes in the cache."""
    c = layers.config
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * layers.dtype.itemsize


class SlotSession(DecodeSession):
    """The cache, and what is known of every slot on the device: `token` [slots + 1], the input of its next step;
    `position` [slots + 1], where that goes. The last slot is the spare one.
    """

    @torch.inference_mode()
    def __init__(self, layers: DecodeLayers, slots: int, capacity: int) -> None:
        assert capacity % CHUNK == 0, capacity
        super().__init__(layers, slots + 1, capacity, use_graph=False)
        device = layers.device
        self.slots = slots
        self.use_graphs = device.type == "cuda" and kernels.usable(device)
        self.position = torch.zeros(slots + 1, dtype=torch.int32, device=device)
        rows = self.rows_for(slots)
        self.no_pads = torch.zeros(rows, dtype=torch.int32, device=device)
        self.logits = torch.zeros(rows, layers.config.vocab_size, device=device)
        self.arrivals = torch.zeros(rows, self.heads, dtype=torch.int32, device=device)
        self.prompt_logits = torch.zeros(1, layers.config.vocab_size, device=device)
        self.graphs: dict[tuple[int, str, int], _Graph] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.use_graphs else None

    # --- a step

    @torch.inference_mode()
    def step_slots(self, layers: DecodeLayers, slots: Sequence[int]) -> Tensor:
        """One token for each of `slots`; returns their logits [rows, V] float32, until the next call.

        The likeliest token of each is in `token` already, as the input of its next step.
        """
        self.layers = layers
        rows = self.rows_for(len(slots))
        numbers = torch.tensor([*slots, *[self.slots] * (rows - len(slots))])
        if not self.use_graphs:
            return self._step_rows(numbers.to(self.layers.device))[: len(slots)]
        key = (id(layers), "step", rows)
        if key not in self.graphs:
            inputs = (numbers.to(self.layers.device),)
            self.graphs[key] = overlap.recorded(partial(self._capture_graph, inputs, self._step_rows))
        return self._replay(key, (numbers,), self.logits)[: len(slots)]

    def rows_for(self, count: int) -> int:
        """Rows of the step for so many slots."""
        return next((rows for rows in ROWS if rows >= count), count) if self.use_graphs else count

    def _step_rows(self, slots: Tensor) -> Tensor:
        """The step for slots [rows] int64, on the device."""
        rows = len(slots)
        positions, cache_rows = self.position[slots], slots.to(torch.int32)
        splits = self._splits_of(rows)

        def attend(qkv: Tensor, n: int) -> Tensor:
            cache = (self.keys[n], self.values[n])
            return decode_step.attend(
                qkv, *self.rope, self.logn, self.no_pads[:rows], positions, *cache, self.heads, splits,
                self.arrivals[:rows], cache_rows,
            )  # fmt: skip

        h = self._blocks(F.embedding(self.token[slots], self.layers.embed), attend)
        logits = self.logits[:rows]
        logits.copy_(self.layers.head(h))
        self.token.index_copy_(0, slots, logits.argmax(-1))
        self.position.index_copy_(0, slots, positions + 1)
        self.position[self.slots :].zero_()  # the spare slot never grows
        return logits

    def _splits_of(self, rows: int) -> int:
        """`_attention_splits` for a batch of `rows`."""
        whole, self.batch = self.batch, rows
        try:
            return self._attention_splits()
        finally:
            self.batch = whole

    # --- prompts

    @torch.inference_mode()
    def read_prompt(self, layers: DecodeLayers, piece: PromptPiece, every: bool = False) -> Tensor:
        """Read a piece of a prompt, whose earlier pieces have been read.

        Returns:
            The logits float32 after its last token [1, V], or with `every` after each of its tokens [T, V], until the
            next call. The likeliest next token is the input of the slot's next step.
        """
        self.layers = layers
        if piece.start == 0:
            self._set_alpha(piece)
        device = layers.device
        ids, slot = torch.tensor(list(piece.ids)), torch.tensor([piece.slot])
        last, end = torch.tensor([len(piece.ids) - 1]), torch.tensor([piece.start + len(piece.ids)])
        if every or piece.start or not self.use_graphs:
            ids, slot, last, end = (t.to(device, non_blocking=True) for t in (ids, slot, last, end))
            return self._read(ids, slot, last, end, piece.start, every)
        width = next(w for w in WIDTHS if w >= len(piece.ids))
        inputs = (F.pad(ids, (0, width - len(ids))), slot, last, end)
        key = (id(layers), "prompt", width)
        if key not in self.graphs:
            self.graphs[key] = self._capture_graph(tuple(t.to(device) for t in inputs), self._read)
        return self._replay(key, inputs, self.prompt_logits)

    def _read(
        self, ids: Tensor, slot: Tensor, last: Tensor, end: Tensor, start: int = 0, every: bool = False
    ) -> Tensor:
        """ids [T], of which those after `last` [1] are padding; slot, end [1]."""
        c, width = self.layers.config, len(ids)
        tables = [table[slot if len(table) > 1 else slice(0, 1), start : start + width] for table in self.rope]
        cos, sin = (torch.cat([table] * 2, dim=-1) for table in tables)  # [1, T, D]
        logn = None if self.logn is None else self.logn[start : start + width]
        allowed = self._allowed(start, width) if start else None

        def attend(qkv: Tensor, n: int) -> Tensor:
            by_head = qkv.sum(0).to(self.keys.dtype).view(1, width, -1, c.head_dim).transpose(1, 2)  # [1, H, T, D]
            q, k, v = by_head.split([self.heads, c.num_key_value_heads, c.num_key_value_heads], dim=1)
            q, k = rotate_heads(q, cos, sin), rotate_heads(k, cos, sin)
            self.keys[n, :, :, start : start + width].index_copy_(0, slot, k)
            self.values[n, :, :, start : start + width].index_copy_(0, slot, v)
            if start:
                k = self.keys[n, :, :, : start + width].index_select(0, slot)
                v = self.values[n, :, :, : start + width].index_select(0, slot)
            if logn is not None:
                q = q * logn[None, None, :, None].to(q.dtype)
            k, v = (t.repeat_interleave(self.heads // c.num_key_value_heads, dim=1) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=allowed is None and width > 1)
            return y.transpose(1, 2).reshape(width, -1)

        h = self._blocks(F.embedding(ids, self.layers.embed), attend)
        logits: Tensor = self.layers.head(h if every else h[last]).float()
        self.prompt_logits.copy_(logits[-1:])
        self.token.index_copy_(0, slot, logits[-1:].argmax(-1))
        self.position.index_copy_(0, slot, end.to(torch.int32))
        self.position[self.slots :].zero_()  # the spare slot, which warm_up fills to its end
        return logits

    def _allowed(self, start: int, width: int) -> Tensor:
        """Which of the first `start` + `width` keys each of the last `width` tokens attends to: [T, S]."""
        index = torch.arange(start + width, device=self.layers.device)
        return index[None] <= index[start:, None]

    def _set_alpha(self, piece: PromptPiece) -> None:
        """The rotary tables of a slot, where dynamic NTK gives every prompt a base of its own."""
        if not self.rope_by_row:
            return
        c, device = self.layers.config, self.layers.device
        alpha = ntk_alpha(torch.tensor([[piece.length]], device=device), c.seq_length)
        positions = torch.arange(self.capacity, device=device)[None]
        tables = rope_tables(positions, c.head_dim, c.rope_theta, alpha.expand_as(positions))
        for table, values in zip(self.rope, tables):
            table[piece.slot] = values[0, :, : c.head_dim // 2]

    # --- graphs

    def warm_up(self, layers: DecodeLayers) -> None:
        """Compile all kernels and capture all graphs: later, a capture would make every running answer wait."""
        if self.use_graphs:
            for rows in (rows for rows in ROWS if rows <= self.rows_for(self.slots)):
                self.step_slots(layers, [self.slots] * rows)
            for width in WIDTHS:
                self.read_prompt(layers, PromptPiece(self.slots, [0] * width, 0, width))
            torch.cuda.synchronize()

    def _capture_graph(self, inputs: tuple[Tensor, ...], function: Callable[..., Tensor]) -> _Graph:
        """A graph of `function` on `inputs`. The runs that compile its kernels work on the spare slot."""
        slots = min(len(inputs) - 1, 1)  # the only input of a step, the second of a prompt
        on_spare = [torch.full_like(t, self.slots) if n == slots else t for n, t in enumerate(inputs)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                function(*on_spare)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            function(*inputs)
        return _Graph(graph, inputs)

    def _replay(self, key: tuple[int, str, int], inputs: tuple[Tensor, ...], result: Tensor) -> Tensor:
        captured = self.graphs[key]
        for target, source in zip(captured.inputs, inputs):
            target.copy_(source.pin_memory(), non_blocking=True)
        captured.graph.replay()
        return result
