"""Activations and the embedding table in the host's memory: the stack, its copies, and the embedding."""

import torch
from torch import Tensor

from train.ops import offload
from train.ops.offload import ActivationStack, HostEmbedding, PinnedBuffer


class LateCopies(offload.CopyStream):
    """Copies on the CPU that happen as late as they may: in `join`."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.waiting: list[tuple[Tensor, Tensor]] = []

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.waiting.append((target, source))

    def join(self) -> None:
        assert len(self.waiting) == 1, "a join without a copy, which no capture allows, or with two"
        for target, source in self.waiting:
            target.copy_(source)
        self.waiting.clear()


def test_an_activation_stack_has_at_most_two_tensors_on_the_device() -> None:
    buffer = PinnedBuffer(torch.device("cpu"))
    buffer.copies = LateCopies()
    stack, inputs = ActivationStack(buffer, 5, torch.empty(3, 2)), [torch.full((3, 2), float(n)) for n in range(6)]
    for x in inputs:
        stack.append(x.clone())
        assert stack.in_flight is None or not stack.on_device
    assert buffer.memory.numel() == 4 * 6  # all but the last block's input, and what was pushed after it
    for x in reversed(inputs):
        assert len(stack.on_device) + (stack.in_flight is not None) <= 2
        assert torch.equal(stack.pop(), x)
    assert stack.size == 0
    assert stack.in_flight is None


def test_a_single_block_needs_no_host_memory() -> None:
    buffer = PinnedBuffer(torch.device("cpu"))
    stack = ActivationStack(buffer, 1, torch.empty(3, 2))
    stack.append(torch.zeros(3, 2))
    stack.append(torch.ones(3, 2))
    assert (float(stack.pop().sum()), float(stack.pop().sum()), buffer.memory.numel()) == (6.0, 0.0, 0)


def test_a_larger_batch_leaves_the_memory_of_the_smaller_alone() -> None:
    """Graphs go on using the memory that they were captured with."""
    buffer = PinnedBuffer(torch.device("cpu"))
    small = buffer.slots(2, torch.empty(4, 2))
    small.fill_(1)
    large = buffer.slots(2, torch.empty(8, 2))
    assert large.data_ptr() != small.data_ptr()
    assert buffer.slots(2, torch.empty(4, 2)).data_ptr() == large.data_ptr()
    assert float(small.sum()) == 16.0


def test_the_table_of_a_host_embedding_does_not_move() -> None:
    """Moving the model moves everything else; the embeddings are where the ids are."""
    table = torch.randn(10, 4)
    model = torch.nn.Sequential(HostEmbedding(table), torch.nn.Linear(4, 2)).to("meta")
    assert model[0].weight.device.type == "cpu"
    assert model[1].weight.device.type == "meta"
    assert list(model[0].parameters()) == []
    assert torch.equal(model[0](torch.tensor([[3, 1]])), table[[3, 1]][None])
