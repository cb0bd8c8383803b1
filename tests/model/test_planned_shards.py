"""Files that are written tensor by tensor have the very bytes of those that safetensors writes at once."""

from pathlib import Path

import pytest
import torch

from tests.support.exports import hashes
from train.model.folder import ShardWriter
from train.model.planned_shards import PlannedShards


@pytest.mark.parametrize("limit", [1, 400, 1000, 1 << 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_bytes_are_those_of_the_plain_writer(tmp_path: Path, dtype: torch.dtype, limit: int) -> None:
    shapes = {"b.10.w": (7, 9), "b.9.w": (5,), "a": (3, 1, 2), "é": (1,), "Z": (100,)}
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    plain, planned = tmp_path / "plain", tmp_path / "planned"
    for folder in (plain, planned):
        folder.mkdir()
    writer = ShardWriter(plain, limit)
    shards = PlannedShards(planned, [(name, t.shape) for name, t in tensors.items()], dtype, limit)
    for name in tensors:
        writer.add(name, tensors[name])
    for name in reversed(tensors):
        shards.write(name, tensors[name])
    writer.close()
    shards.close()
    assert hashes(planned) == hashes(plain)


def test_a_tensor_that_was_not_planned_or_not_written_is_an_error(tmp_path: Path) -> None:
    shards = PlannedShards(tmp_path, [("a", torch.Size([2])), ("b", torch.Size([2]))], torch.float32, 1 << 20)
    with pytest.raises(AssertionError, match="a"):
        shards.write("a", torch.zeros(3))
    shards.write("a", torch.zeros(2))
    with pytest.raises(KeyError):
        shards.write("a", torch.zeros(2))
    with pytest.raises(AssertionError, match="not written"):
        shards.close()
