"""Writes a float checkpoint whose names and shapes are known before: each tensor goes to its place in its file at once.

The bytes are those of ShardWriter, which keeps all tensors of a file in memory until it is full, as safetensors' own
save_file needs them: with files of 4 GB these are 4 GB. Here no tensor is kept.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from train.common.files import write_json
from train.model.folder import INDEX, shard_name

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # as safetensors calls them
ALIGNMENT = 8  # bytes, of a header


class PlannedShards:
    """Files of at most `limit` bytes (one tensor at least) in an empty folder, and their index if they are several."""

    def __init__(self, folder: Path, planned: Iterable[tuple[str, torch.Size]], dtype: torch.dtype, limit: int) -> None:
        """planned: name and shape of each tensor. Those of a file follow each other in this order."""
        self.folder, self.dtype = folder, dtype
        self._shapes = dict(planned)
        shards = self._split(limit)
        self._places: dict[str, tuple[Path, int]] = {}  # where the bytes of a tensor begin
        names: dict[str, str] = {}
        for number, shard in enumerate(shards):
            file = shard_name(number, len(shards))
            self._begin(folder / file, shard)
            names |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            total = sum(map(self._bytes, self._shapes))
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": names})

    def _bytes(self, name: str) -> int:
        return self._shapes[name].numel() * self.dtype.itemsize

    def _split(self, limit: int) -> list[list[str]]:
        """The names of each file."""
        shards: list[list[str]] = []
        size = limit + 1
        for name in self._shapes:
            if not shards or size + self._bytes(name) > limit:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += self._bytes(name)
        return shards

    def _begin(self, path: Path, names: list[str]) -> None:
        """Write the header of a file, with the tensors in the order of their names as in save_file."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets, end = dict[str, int](), 0
        for name in sorted(names, key=str.encode):
            begin, end = end, end + self._bytes(name)
            shape = list(self._shapes[name])
            header[name] = {"dtype": DTYPES[self.dtype], "shape": shape, "data_offsets": [begin, end]}
            offsets[name] = begin
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        self._places |= {name: (path, 8 + len(text) + offset) for name, offset in offsets.items()}

    def write(self, name: str, tensor: Tensor) -> int:
        """Write one of the planned tensors, on the CPU and of the planned shape; each once. Returns its bytes."""
        assert (tensor.shape, tensor.dtype) == (self._shapes[name], self.dtype), (name, tensor.shape, tensor.dtype)
        path, offset = self._places.pop(name)
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
        return tensor.nbytes

    def write_all(self, tensors: dict[str, Tensor]) -> int:
        """Write several, and drop each from `tensors` when it is written. Returns their bytes."""
        return sum(self.write(name, tensors.pop(name)) for name in list(tensors))

    def close(self) -> None:
        """Check that every tensor was written."""
        assert not self._places, f"not written: {sorted(self._places)}"
