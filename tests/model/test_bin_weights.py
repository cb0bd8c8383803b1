"""The reader of .bin files: equal to torch.load for good ones; for any other the project's own error, or right.

`oracle` reads a file a second time, with Python's own unpickler, zipfile and numpy; `check_addresses` compares where the
bytes of a tensor lie with what the operating system says of the memory map.
"""

import io
import os
import pickle
import random
import struct
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from train.common.errors import UserError
from train.model import bin_archive
from train.model.bin_weights import read_bin

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32),
    *(torch.int16, torch.int8, torch.uint8, torch.bool),
)


def good() -> dict[str, Tensor]:
    """Every dtype, shared and overlapping storages, transposed, scalar, empty, expanded within its storage's size."""
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(12, 7, generator=draw)
    state = {str(dtype): (torch.randn(5, 9, generator=draw) * 3).to(dtype) for dtype in DTYPES}
    state |= {"shared": base, "tied": base, "transposed": base.t(), "part": base[2:9, 1:5], "overlap": base[4:, 3]}
    state |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "steps": base.flatten()[5::3]}
    return state


def saved(path: Path, state: Any) -> bytes:
    torch.save(state, path)
    return path.read_bytes()


# Equal to torch.load


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_good_files_are_read_as_torch_reads_them(tmp_path: Path, kind: type) -> None:
    saved(path := tmp_path / "m.bin", kind(good()))
    read, expected = read_bin(path), torch.load(path, weights_only=True)
    assert list(read) == list(expected)
    for name, tensor in expected.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape), name
        assert tensor.dtype == torch.bool or read[name].stride() == tensor.stride(), name
        assert torch.equal(read[name], tensor), name
    assert read["tied"].data_ptr() == read["shared"].data_ptr() == read["transposed"].data_ptr()
    check_addresses(path, read)


def test_the_state_of_a_module_is_read(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3)).half()
    saved(path := tmp_path / "m.bin", module.state_dict())  # with _metadata
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in read_bin(path).items())


def test_a_tensor_that_is_written_to_does_not_change_the_file(tmp_path: Path) -> None:
    before = saved(path := tmp_path / "m.bin", {"a": torch.ones(5)})
    read_bin(path)["a"].zero_()
    assert path.read_bytes() == before and read_bin(path)["a"].sum() == 5


# Hostile programs: an archive around a pickle that a test writes


def archive(path: Path, program: bytes, members: dict[str, bytes] | None = None, folder: str = "m") -> Path:
    with zipfile.ZipFile(path, "w") as out:
        for name, content in {"data.pkl": program, **(members or {"data/0": bytes(24)})}.items():
            out.writestr(f"{folder}/{name}", content)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a" + bytes([9]) + value.to_bytes(9, "little", signed=True)


def storage(kind: str = "FloatStorage", key: str = "0", numel: int = 6) -> bytes:
    return b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(numel) + b"tQ"


def tensor(kept: bytes, offset: int = 0, shape: tuple[int, ...] = (2, 3), stride: tuple[int, ...] = (3, 1)) -> bytes:
    sizes = b"(" + b"".join(map(number, shape)) + b"t(" + b"".join(map(number, stride)) + b"t"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n(" + kept + number(offset) + sizes
    return rebuild + b"\x89ccollections\nOrderedDict\n)RtR"


def program(*values: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(text(f"t{n}") + value for n, value in enumerate(values)) + b"u."


def test_the_programs_of_these_tests_are_as_torch_writes_them(tmp_path: Path) -> None:
    members = {"data/0": np.arange(6, dtype="<f4").tobytes(), "version": b"3\n", "byteorder": b"little"}
    path = archive(tmp_path / "m.bin", program(tensor(storage())), members)
    expected = torch.load(path, weights_only=True)["t0"]
    assert torch.equal(read_bin(path)["t0"], expected) and expected[1, 2] == 5


VIEWS = {
    "a storage cut short": tensor(storage(numel=7), shape=(7,), stride=(1,)),
    "a storage that is larger than it says": tensor(storage(numel=5), shape=(5,), stride=(1,)),
    "another dtype of double size": tensor(storage("DoubleStorage")),
    "another dtype of half size": tensor(storage("HalfStorage")),
    "a view past the end": tensor(storage(), offset=1),
    "a negative offset": tensor(storage(), offset=-1),
    "a negative stride": tensor(storage(), stride=(-3, 1)),
    "a negative size": tensor(storage(), shape=(-2, -3)),
    "a stride past the end": tensor(storage(), stride=(4, 1)),
    "more strides than sizes": tensor(storage(), stride=(3, 1, 1)),
    "one element as a terabyte": tensor(storage(), shape=(1 << 40,), stride=(0,)),
    "sizes whose product leaves 64 bits": tensor(storage(), shape=(1 << 32, 1 << 32), stride=(0, 0)),
    "an offset that leaves 64 bits": tensor(storage(), offset=(1 << 63) - 1),
    "an empty view that starts outside": tensor(storage(), offset=99, shape=(0,), stride=(1,)),
    "forty dimensions": tensor(storage(), shape=(1,) * 40, stride=(1,) * 40),
    "a storage that is not there": tensor(storage(key="1")),
    "a storage that is the program": tensor(storage(key="../data.pkl")),
    "a negative storage": tensor(storage(numel=-6)),
    "two dtypes for a storage": tensor(storage()) + text("t") + tensor(storage("IntStorage")),
    "two sizes for a storage": tensor(storage()) + text("t") + tensor(storage(numel=3), shape=(3,), stride=(1,)),
    "a storage of no dtype": tensor(storage("UntypedStorage")),
    "no storage": tensor(b"K\x01"),
}
CALLS = {
    "os.system": b"cos\nsystem\n" + text("touch ran") + b"\x85R",
    "posix.system": b"cposix\nsystem\n" + text("touch ran") + b"\x85R",
    "eval": b"cbuiltins\neval\n" + text("open('ran', 'w')") + b"\x85R",
    "exec in Python 2": b"c__builtin__\nexec\n" + text("open('ran', 'w')") + b"\x85R",
    "getattr": b"cbuiltins\ngetattr\n(ctorch\nFloatStorage\n" + text("__init__") + b"tR",
    "an instance": b"(ios\nsystem\n",
    "an object": b"(cos\nsystem\n" + text("touch ran") + b"o",
    "a name by the stack": text("os") + text("system") + b"\x93" + text("touch ran") + b"\x85R",
    "an extension": b"\x82\x01",
    "torch's own loader": b"ctorch.storage\n_load_from_bytes\nC\x03abc\x85R",
    "a parameter": b"ctorch._utils\n_rebuild_parameter\n(" + tensor(storage()) + b"\x88NtR",
    "a new object": b"ccollections\nOrderedDict\n)\x81",
    "a call of a text": text("os.system") + b")R",
    "OrderedDict of pairs": b"ccollections\nOrderedDict\n](((tttR",
    "attributes of a text": text("a") + b"}b",
    "a memo that is not there": b"h\x07",
    "pop below the bottom": b"\x87",
    "a mark that is missing": b"ttt",
    "a thousand nested lists": b"]" * 1000 + b"a" * 999,
    "a hundred thousand nested tuples": b")" + b"\x85" * 100_000,
    "a key of nested tuples": b")" + b"2\x86" * 40 + b"}" + b"N" * 2 + b"s",
    "a number of a megabyte": b"\x8b" + struct.pack("<I", 1 << 20) + bytes(1 << 20),
    "a text of four gigabytes": b"X\xff\xff\xff\xff",
    "memo places far away": b"Nr\xff\xff\xff\xff",
}


@pytest.mark.parametrize("name", [*VIEWS, *CALLS])
def test_hostile_programs_are_refused_and_nothing_runs(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = archive(tmp_path / "m.bin", program({**VIEWS, **CALLS}[name]))
    with pytest.raises(UserError, match=r"m\.bin: not read: "):
        read_bin(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.bin"]


def test_memory_of_a_program_is_bounded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.pkl has 4,194,305 bytes, expected 4,194,304 at most"):
        read_bin(archive(tmp_path / "m.bin", b"}" * (bin_archive.MAX_PROGRAM + 1)))


def test_objects_as_torch_saves_them_are_refused(tmp_path: Path) -> None:
    class Shell:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path}/ran",)

    for value in (Shell(), {"a": Shell()}, torch.nn.Linear(2, 2), {"a": torch.nn.Parameter(torch.ones(2))}):
        torch.save(value, path := tmp_path / "m.bin") if not isinstance(value, torch.nn.Module) else archive(
            path := tmp_path / "m.bin", pickle.dumps(value, 2)
        )
        with pytest.raises(UserError, match="not read: it names"):
            read_bin(path)
    assert not (tmp_path / "ran").exists()


# Hostile archives


def zipped(path: Path, edit: Any, **keys: Any) -> Path:
    content = program(tensor(storage()))
    with zipfile.ZipFile(path, "w", **keys) as out:
        edit(out, content)
    return path


def test_hostile_archives_are_refused(tmp_path: Path) -> None:
    def twice(out: zipfile.ZipFile, content: bytes) -> None:
        for value in (content, content):
            out.writestr("m/data.pkl", value)
        out.writestr("m/data/0", bytes(24))

    def plain(out: zipfile.ZipFile, content: bytes) -> None:
        out.writestr("m/data.pkl", content)
        out.writestr("m/data/0", bytes(24))

    def two(out: zipfile.ZipFile, content: bytes) -> None:
        plain(out, content)
        out.writestr("n/data.pkl", content)

    def bomb(out: zipfile.ZipFile, content: bytes) -> None:
        out.writestr("m/data.pkl", program(tensor(storage(numel=1 << 26), shape=(1 << 26,), stride=(1,))))
        out.writestr("m/data/0", bytes(1 << 28), compress_type=zipfile.ZIP_DEFLATED)

    with pytest.warns(UserWarning, match="Duplicate name"):
        path = zipped(tmp_path / "twice.bin", twice)
    with pytest.raises(UserError, match="two members are named"):
        read_bin(path)
    with pytest.raises(UserError, match=r"2 data\.pkl in it"):
        read_bin(zipped(tmp_path / "two.bin", two))
    with pytest.raises(UserError, match="is compressed"):
        read_bin(zipped(tmp_path / "bomb.bin", bomb))
    with pytest.raises(UserError, match=r"no data\.pkl"):
        read_bin(zipped(tmp_path / "none.bin", lambda out, content: out.writestr("data.pkl", content)))
    whole = zipped(tmp_path / "m.bin", plain).read_bytes()
    local, central = whole.index(b"m/data/0"), whole.rindex(b"m/data/0")
    cases = {
        "there is no": whole[:local] + b"m/data/1" + whole[local + 8 :],
        "protected by a password": whole[: central - 38] + b"\x01" + whole[central - 37 :],
        "overlaps": whole[: central - 4] + bytes(4) + whole[central:],  # starts where data.pkl does
        "cut off": whole[: central - 4] + b"\xff\xff\xff\x7f" + whole[central:],
        "not a whole": whole[:-30],
    }
    for message, content in cases.items():
        (tmp_path / "m.bin").write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_bin(tmp_path / "m.bin")


def test_an_archive_of_zip64_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.bin", "w") as out:
        for name, content in {
            "data.pkl": program(tensor(storage())),
            "data/0": np.arange(6, dtype="<f4").tobytes(),
        }.items():
            with out.open(f"m/{name}", "w", force_zip64=True) as member:
                member.write(content)
    assert read_bin(tmp_path / "m.bin")["t0"].flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_another_byte_order_is_refused(tmp_path: Path) -> None:
    members = {"data/0": bytes(24), "byteorder": b"big"}
    with pytest.raises(UserError, match="not little-endian"):
        read_bin(archive(tmp_path / "m.bin", program(tensor(storage())), members))


def test_bytes_that_are_not_aligned_are_right(tmp_path: Path) -> None:
    values = np.arange(6, dtype="<f4").tobytes()
    starts = set()
    for shift in range(4):
        path = archive(tmp_path / "m.bin", program(tensor(storage())), {"data/0": values}, folder="m" * (shift + 1))
        starts.add(bin_archive.find_members(path)["data/0"].start % 4)
        read = read_bin(path)
        assert read["t0"].flatten().tolist() == [0, 1, 2, 3, 4, 5]
        check_addresses(path, read)
    assert len(starts) > 1


# Cut and mutated files


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    whole = saved(path := tmp_path / "m.bin", good())
    for end in sorted({*range(0, len(whole), 97), *range(len(whole) - 60, len(whole))}):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError):
            read_bin(path)


def test_a_member_cut_short_inside_a_whole_archive_is_refused(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole.bin", good())
    with zipfile.ZipFile(io.BytesIO(whole)) as archive_in:
        contents = {info.filename: archive_in.read(info) for info in archive_in.infolist()}
    storages = [name for name in contents if "/data/" in name and contents[name]]
    for name in storages:
        for content in (contents[name][:-1], contents[name][: len(contents[name]) // 2], b"", contents[name] + b"\0"):
            with zipfile.ZipFile(tmp_path / "m.bin", "w") as out:
                for other, value in contents.items():
                    out.writestr(other, content if other == name else value)
            with pytest.raises(UserError, match="cut off or damaged"):
                read_bin(tmp_path / "m.bin")
    assert len(storages) >= 10


class _Oracle(pickle.Unpickler):
    """Python's own unpickler with stand-ins for the names: what a tensor is, as plain tuples."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *values: values
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name.endswith("Storage"):
            return name
        raise ValueError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return pid


WIDTHS = {"Double": "<f8", "Float": "<f4", "Half": "<f2", "BFloat16": "<u2", "Long": "<i8", "Int": "<i4"}
WIDTHS |= {"Short": "<i2", "Char": "i1", "Byte": "u1", "Bool": "u1"}


def oracle(path: Path) -> dict[str, np.ndarray]:
    """Every tensor's elements; the bytes of each member as the directory of the archive and its own header have them."""
    whole, contents = path.read_bytes(), {}
    with zipfile.ZipFile(path) as members:
        for info in members.infolist():
            name_size, extra_size = struct.unpack_from("<HH", whole, info.header_offset + 26)
            start = info.header_offset + 30 + name_size + extra_size
            contents[info.filename] = whole[start : start + info.file_size]
    prefix = next(name for name in contents if name.endswith("/data.pkl") and name.count("/") == 1)[:-8]
    state = _Oracle(io.BytesIO(contents[f"{prefix}data.pkl"])).load()
    arrays = {}
    for name, (kept, offset, shape, stride, *_) in state.items():
        _, kind, key, _, numel = kept
        flat = np.frombuffer(contents[f"{prefix}data/{key}"], WIDTHS[kind.removesuffix("Storage")])
        assert len(flat) == numel
        index = np.full(shape, offset)
        for axis, step in enumerate(stride):
            index += np.arange(shape[axis]).reshape([-1 if a == axis else 1 for a in range(len(shape))]) * step
        assert index.size == 0 or (index.min() >= 0 and index.max() < numel)
        arrays[name] = flat[index] != 0 if kind == "BoolStorage" else flat[index]
    return arrays


def check_addresses(path: Path, state: dict[str, Tensor]) -> None:
    """Every tensor lies in the memory map of this file, before the file's end, or in memory of its own."""
    size, maps = path.stat().st_size, []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            maps.append((start, min(end, start + size - int(line.split()[2], 16))))
    for name, value in state.items():
        kept = value.untyped_storage()
        last = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) if value.numel() else -1
        first = value.storage_offset()
        assert first >= 0 and (first + last + 1) * value.itemsize <= kept.nbytes(), name
        inside = [(start, end) for start, end in maps if start <= kept.data_ptr() < end]
        assert all(kept.data_ptr() + kept.nbytes() <= end for _, end in inside), name


def mutated(whole: bytes, draw: random.Random) -> bytes:
    """The file with a few bytes changed, taken out, put in or moved, mostly where its structure is."""
    data = bytearray(whole)
    marks = [
        match
        for word in (b"data.pkl", b"PK\x01\x02", b"PK\x03\x04", b"storage", b"PK\x05\x06")
        for match in find(whole, word)
    ]
    for _ in range(draw.choice([1, 1, 2, 5])):
        near = draw.choice(marks) + draw.randrange(-8, 80)
        at = min(max(near if draw.random() < 0.8 else draw.randrange(len(data)), 0), len(data) - 1)
        kind = draw.randrange(6)
        if kind <= 2:
            data[at] = draw.choice([0, 1, 255, data[at] ^ (1 << draw.randrange(8)), draw.randrange(256)])
        elif kind == 3:
            del data[at : at + draw.choice([1, 4, 64])]
        elif kind == 4:
            data[at:at] = draw.randbytes(draw.choice([1, 4, 64]))
        else:
            other = draw.randrange(len(data))
            data[at : at + 16] = data[other : other + 16]
    return bytes(data)


def find(whole: bytes, word: bytes) -> list[int]:
    found, at = [], whole.find(word)
    while at >= 0:
        found.append(at)
        at = whole.find(word, at + 1)
    return found


def test_four_thousand_mutated_files_are_refused_or_right(tmp_path: Path) -> None:
    small = {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.arange(5).half(), "c": torch.tensor([True, False])}
    wholes = [saved(tmp_path / "s.bin", small), archive(tmp_path / "s.bin", program(tensor(storage()))).read_bytes()]
    draw, outcomes, path = random.Random(3), Counter[str](), tmp_path / "m.bin"
    for turn in range(4000):
        path.unlink(missing_ok=True)
        path.write_bytes(mutated(wholes[turn % 2], draw))
        try:
            read = read_bin(path)
        except UserError:
            outcomes["refused"] += 1
            continue
        check_addresses(path, read)
        expected = oracle(path)
        assert list(read) == list(expected)
        for name, value in read.items():
            plain = value.view(torch.uint16).numpy() if value.dtype == torch.bfloat16 else value.numpy()
            assert plain.shape == expected[name].shape and plain.tobytes() == expected[name].tobytes(), (turn, name)
        outcomes["right"] += 1
    assert min(outcomes.values()) > 400, outcomes
