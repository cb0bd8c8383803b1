"""The tensors of a .bin file of torch.save, without torch.load.

torch below 2.10 reads memory that is not the file's where a storage is cut short, even with weights_only. Here a tensor
is made from plain bytes of the file, after its sizes were compared with the bytes that are there, and nothing of the
file is ever run. The bytes stay on the disk until they are used.
"""

import mmap
from pathlib import Path

import torch
from torch import Tensor

from train.model.base_files import DamagedFileError
from train.model.bin_archive import PROGRAM, Member, UnreadableBinError, find_members
from train.model.bin_pickle import Storage, StoredTensor, read_descriptions


def read_bin(path: Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU, views of a private memory map of the file; those that shared bytes share them here.

    Raises:
        UserError: cut off, damaged, of the form before torch 1.6, or with anything else in it than tensors by name.
    """
    members = find_members(path)
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # writable, as torch wants it; never written
        program = members[PROGRAM]
        described = read_descriptions(content[program.start : program.start + program.size])
        _check_byte_order(content, members.get("byteorder"))
        storages = {tensor.storage.key: tensor.storage for tensor in described.values()}
        flat = {key: _flat(content, storage, members.get(f"data/{key}")) for key, storage in storages.items()}
    except UnreadableBinError as error:
        raise DamagedFileError(path, f"not read: {error}") from None
    return {name: _view(flat[tensor.storage.key], tensor) for name, tensor in described.items()}


def _check_byte_order(content: mmap.mmap, member: Member | None) -> None:
    if member is not None and content[member.start : member.start + min(member.size, 16)] != b"little":
        raise UnreadableBinError("its numbers are not little-endian: it was written on another kind of machine")


def _flat(content: mmap.mmap, storage: Storage, member: Member | None) -> Tensor:
    """All elements of a storage, [numel]; booleans as bytes, of which any value may be there."""
    expected = storage.numel * storage.itemsize
    if member is None or member.size != expected:
        present = "is missing" if member is None else f"has {member.size:,} bytes"
        raise UnreadableBinError(
            f"storage {storage.key!r:.80} {present}, expected {expected:,} bytes: cut off or damaged"
        )
    dtype = torch.uint8 if storage.dtype == "bool" else getattr(torch, storage.dtype)
    if not storage.numel:
        return torch.empty(0, dtype=dtype)
    if member.start % storage.itemsize:  # torch.save aligns to 64; the processor may not read others in place
        return torch.frombuffer(bytearray(content[member.start : member.start + member.size]), dtype=dtype)
    return torch.frombuffer(content, dtype=dtype, count=storage.numel, offset=member.start)


def _view(flat: Tensor, tensor: StoredTensor) -> Tensor:
    view = flat.as_strided(tensor.shape, tensor.stride, tensor.offset)
    return view != 0 if tensor.storage.dtype == "bool" else view
