"""Tensors of a training step in the host's memory instead of the GPU's: the inputs of blocks, and the embedding table.

Knows tensors and streams; nothing of a model. The input of a block is copied to the host while the block computes, and
back while the block after it computes its backward pass. The copies run on a stream of their own, which forks from the
computing stream and joins it again, so both directions can be captured in CUDA graphs; for the same reason the memory
on the host is allocated once and kept. This costs pinned memory and PCIe bandwidth, and changes no bit of the result.
On a CPU the same copies run in line.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CopyStream:
    """Copies that run beside the computation; on a CPU within it."""

    def __init__(self, device: torch.device) -> None:
        # torch hands its streams out in turn, by priority; nothing else here asks for one of high priority, so this is
        # never the stream that computes or captures
        self.stream: Any = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy after all work queued so far on the computing stream. Both tensors must stay alive until `join`."""
        if self.stream is None:
            target.copy_(source)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)

    def join(self) -> None:
        """Let the computing stream wait for all copies before any work queued from here on."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)


class PinnedBuffer:
    """Pinned host memory for the inputs of one batch's blocks, used by batches of all shapes in turn.

    It grows when a larger batch comes. The smaller buffer stays alive as long as a captured graph uses it.
    """

    def __init__(self, device: torch.device) -> None:
        self.memory, self.copies = torch.empty(0), CopyStream(device)

    def slots(self, count: int, like: Tensor) -> Tensor:
        """[count, *like.shape]. To be called outside a capture first: memory cannot be pinned within one."""
        size = count * like.numel()
        if self.memory.dtype != like.dtype or self.memory.numel() < size:
            self.memory = torch.empty(size, dtype=like.dtype, pin_memory=like.is_cuda)
        return self.memory[:size].view(count, *like.shape)


class ActivationStack:
    """A stack of the inputs [M, H] of `count` blocks, used as a list; all but the last block's are kept on the host.

    The last block's input is needed first in the backward pass, so it stays on the device, as does anything pushed
    after it. Of the others at most two are on the device: the one in use and the one being copied.
    """

    def __init__(self, buffer: PinnedBuffer, count: int, like: Tensor) -> None:
        self.copies, self.slots = buffer.copies, buffer.slots(count - 1, like)
        self.device, self.size = like.device, 0
        self.on_device: list[Tensor] = []
        self.in_flight: Tensor | None = None  # the tensor on the device that is being copied from or to

    def append(self, x: Tensor) -> None:
        """Push x, which the caller may still read. The copy of the previous tensor has ended, and its memory is free."""
        self._join()
        if self.size < len(self.slots):
            self.copies.copy(self.slots[self.size], x)
            self.in_flight = x
        else:
            self.on_device.append(x)
        self.size += 1

    def pop(self) -> Tensor:
        """The newest tensor; the copy of the one below it starts."""
        x = self.on_device.pop() if self.on_device else self._join()
        assert x is not None, "pop from an empty ActivationStack"
        self.size -= 1
        if not self.on_device and self.size:
            self.in_flight = torch.empty(self.slots[0].shape, dtype=x.dtype, device=self.device)
            self.copies.copy(self.in_flight, self.slots[self.size - 1])
        return x

    def _join(self) -> Tensor | None:
        """The tensor that was in flight: from now on the computing stream may read it, or reuse its memory.

        Without one there is no join: a capturing stream must not wait for a stream that has no work in this capture.
        """
        if self.in_flight is not None:
            self.copies.join()
        copied, self.in_flight = self.in_flight, None
        return copied


class HostEmbedding(nn.Module):
    """An embedding whose table [V, H] stays on the CPU wherever the model moves; only the rows that are used move."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight.detach()  # not a parameter: those are moved, cast and sent to other processes

    def rows(self, ids: Tensor) -> Tensor:
        """ids on the CPU, of any shape -> [..., H] on the CPU."""
        return F.embedding(ids, self.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """ids on any device -> [..., H] on that device."""
        return self.rows(ids.cpu()).to(ids.device)
