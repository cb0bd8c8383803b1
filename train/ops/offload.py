"""What a training step may keep in the host's memory instead of the card's: the inputs of blocks, and the embedding's table.

Knows tensors and streams, and nothing of a model. Inputs leave while their block computes and come back while the block after it
computes backwards, on a stream of their own that forks from the computing one and joins it again: so both ways may be captured in CUDA
graphs, which is why the room on the host is made once and kept. It costs pinned memory and the bus, and changes no bit. On a CPU
the same copies are plain ones.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Lane:
    """Copies beside the computing; on a CPU in line with it."""

    def __init__(self, device: torch.device) -> None:
        # from the pool of urgent streams, of which nobody else takes any: never the one that computes or captures
        self.stream: Any = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def copy(self, to: Tensor, x: Tensor) -> None:
        """After all that was asked of the computing stream; both tensors must stay until `join`."""
        if self.stream is None:
            to.copy_(x)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            to.copy_(x, non_blocking=True)

    def join(self) -> None:
        """What is asked of the computing stream from here on comes after all copies."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)


class Host:
    """Room for the inputs of one batch's blocks, which batches of all shapes take in turn. It grows, and what captured graphs know of
    the smaller one stays theirs."""

    def __init__(self, device: torch.device) -> None:
        self.room, self.lane = torch.empty(0), Lane(device)

    def places(self, count: int, like: Tensor) -> Tensor:
        """[count, *like.shape]. A graph must find it made: pinning memory cannot be captured."""
        size = count * like.numel()
        if self.room.dtype != like.dtype or self.room.numel() < size:
            self.room = torch.empty(size, dtype=like.dtype, pin_memory=like.is_cuda)
        return self.room[:size].view(count, *like.shape)


class Shelf:
    """A stack of the inputs [M, H] of `count` blocks, used as a list: all but the last block's stand on the host.

    The last block's, needed first and at once, stays on the device, and so does what is put on top of it. Of the others there are
    never more than two on the device: the one that is computed with, and the one that is on its way.
    """

    def __init__(self, host: Host, count: int, like: Tensor) -> None:
        self.lane, self.away = host.lane, host.places(count - 1, like)
        self.device, self.size = like.device, 0
        self.here: list[Tensor] = []
        self.moving: Tensor | None = None  # on the device while its copy is under way

    def append(self, x: Tensor) -> None:
        """Whoever computes with x goes on at once; the one before has left by now, and its memory is free after this."""
        self._join()
        if self.size < len(self.away):
            self.lane.copy(self.away[self.size], x)
            self.moving = x
        else:
            self.here.append(x)
        self.size += 1

    def pop(self) -> Tensor:
        """The newest; the one below it sets out."""
        x = self.here.pop() if self.here else self._join()
        assert x is not None, "popped from an empty shelf"
        self.size -= 1
        if not self.here and self.size:
            self.moving = torch.empty(self.away[0].shape, dtype=x.dtype, device=self.device)
            self.lane.copy(self.moving, self.away[self.size - 1])
        return x

    def _join(self) -> Tensor | None:
        """The tensor that was under way, which the computing stream may now use, or whose memory it may use again.

        A stream that captures must not wait for one that nothing was asked of since the capture began.
        """
        if self.moving is not None:
            self.lane.join()
        moved, self.moving = self.moving, None
        return moved


class HostEmbedding(nn.Module):
    """An embedding whose table [V, H] stays where it is, wherever the model moves to; the rows go where the ids are."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight.detach()  # no parameter: those are moved, cast and sent to other processes

    def rows(self, ids: Tensor) -> Tensor:
        """ids on the CPU, of any shape -> [..., H] there."""
        return F.embedding(ids, self.weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows(ids.cpu()).to(ids.device)
