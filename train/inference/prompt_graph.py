"""The reading of a prompt as a CUDA graph, one for each of a few widths.

The first prompt of a width runs kernel by kernel, since recording a graph takes longer than that: a single question
loses nothing. From the second prompt on the width has a graph, and the host issues one call instead of a thousand.
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTHS = (32, 64, 128, 256, 512)  # tokens; a prompt is padded on the left to the next of them
MAX_TOKENS = 2048  # of all rows; above it the GPU computes longer than the host takes to issue its work


def padded_width(width: int, batch: int = 1) -> int:
    """The width that a graph for `batch` prompts of `width` tokens has; `width` itself where there is none."""
    return next((w for w in WIDTHS if width <= w and w * batch <= MAX_TOKENS), width)


def pad_left(ids: Tensor, mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """ids and mask [B, T], with padding (mask 0) on the left to `width`."""
    more = width - ids.shape[1]
    return F.pad(ids, (more, 0)), F.pad(mask, (more, 0))


def prompt_mask(mask: Tensor) -> Tensor:
    """Which keys each token of prompts with mask [B, T] may attend to: bools [B, 1, T, T].

    A padding token attends to itself, so that its softmax has a term. `sdpa_mask` of model/decoder.py without its
    question whether there is padding, for which the host would have to wait.
    """
    index = torch.arange(mask.shape[1], device=mask.device)
    earlier, itself = index[None] <= index[:, None], index[None] == index[:, None]
    return (mask.bool()[:, None] & earlier | itself)[:, None]


class PromptGraphs:
    """Runs `read(ids, mask)`, which writes its results into tensors of its own, as a graph where that pays.

    read: must be free of host decisions that depend on values; its kernels are compiled by its first run.
    """

    def __init__(self, read: Callable[[Tensor, Tensor], None], batch: int) -> None:
        self.read, self.batch = read, batch
        self.has_memory = True  # for more graphs
        self.seen: set[int] = set()
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def __call__(self, ids: Tensor, mask: Tensor) -> None:
        """ids and mask [B, T] on the GPU, T one of WIDTHS or any other width."""
        width = ids.shape[1]
        graph_pays = width in WIDTHS and width * self.batch <= MAX_TOKENS
        if width not in self.seen or not graph_pays:
            self.seen.add(width)
            self.read(ids, mask)
            return
        if width not in self.graphs and not self._add_graph(ids, mask):
            self.read(ids, mask)
            return
        graph, own_ids, own_mask = self.graphs[width]
        own_ids.copy_(ids)
        own_mask.copy_(mask)
        graph.replay()

    def _add_graph(self, ids: Tensor, mask: Tensor) -> bool:
        """Record the graph of this width; False where its memory is not there, which is said once."""
        if not self.has_memory:
            return False
        try:
            self.graphs[ids.shape[1]] = self._record(ids, mask)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            self.has_memory = False
            torch.cuda.empty_cache()
            print(
                "There is no memory for a CUDA graph of prompts: their reading takes a little longer.", file=sys.stderr
            )
        return self.has_memory

    def _record(self, ids: Tensor, mask: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        own_ids, own_mask = ids.clone(), mask.clone()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            self.read(own_ids, own_mask)
        return graph, own_ids, own_mask


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was the reason: the end of a broken recording may raise an error of its own on top of it."""
    cause = error.__cause__ or error.__context__
    return isinstance(error, torch.OutOfMemoryError) or (cause is not None and _is_out_of_memory(cause))
