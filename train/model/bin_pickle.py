"""What a .bin file of torch.save says of its tensors: the pickle in it, read by an interpreter that can run nothing.

A pickle is a program for a small machine with a stack. This one knows the instructions that torch.save writes for a
dictionary of tensors, and three kinds of names: OrderedDict, the storage of each dtype, and
torch._utils._rebuild_tensor_v2. None of them is imported or called: a name becomes a note, and a tensor a description.
Any other instruction or name ends the reading. It imports no torch.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from train.model.bin_archive import UnreadableBinError

STORAGES = {  # class in torch -> (dtype, bytes of an element)
    "DoubleStorage": ("float64", 8),
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
}
REBUILD, DICT = "torch._utils._rebuild_tensor_v2", "collections.OrderedDict"
NAMES = {REBUILD, DICT, *(f"torch.{name}" for name in STORAGES)}
MAX_DIMENSIONS = 8
LARGEST = 1 << 62  # of a size, stride or offset: what torch keeps in 64 bits
DAMAGED = "its description of the tensors is damaged"


@dataclass(frozen=True)
class Storage:
    """The bytes that tensors are views of: the member data/KEY of the archive."""

    key: str
    dtype: str
    itemsize: int  # bytes
    numel: int


@dataclass(frozen=True)
class StoredTensor:
    """A view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Name:
    text: str


def read_descriptions(program: bytes) -> dict[str, StoredTensor]:
    """Name of each tensor -> its description, every view within the elements that its storage has by the program.

    Raises:
        UnreadableBinError: a damaged program, or one that holds anything else than tensors by name.
    """
    state = _Machine(program).run()
    if not isinstance(state, dict) or not all(isinstance(value, StoredTensor) for value in state.values()):
        raise UnreadableBinError("it does not hold tensors by name")
    _check_storages(state.values())
    return state


def _check_storages(tensors: Any) -> None:
    storages: dict[str, Storage] = {}
    for tensor in tensors:
        if storages.setdefault(tensor.storage.key, tensor.storage) != tensor.storage:
            raise UnreadableBinError(f"storage {tensor.storage.key!r:.80} is given two sizes or dtypes")


class _Machine:
    """The stack, the marks in it, and the memo of a pickle (protocol 2)."""

    def __init__(self, program: bytes) -> None:
        self.program, self.position = program, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The value that the program ends with."""
        while (opcode := self.take(1)) != b".":
            if opcode not in INSTRUCTIONS:
                raise UnreadableBinError(f"its instruction {opcode!r} is not one that tensors need")
            INSTRUCTIONS[opcode](self)
        return self.pop()

    def take(self, size: int) -> bytes:
        """The next bytes of the program."""
        taken = self.program[self.position : self.position + size]
        if len(taken) < size:
            raise UnreadableBinError(f"{DAMAGED}: it ends too early")
        self.position += size
        return taken

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        end = self.program.find(b"\n", self.position)
        text = self.take(max(end - self.position, 0) + 1)
        return text[:-1].decode("utf-8", "replace") if end >= 0 else ""

    def text(self, size: int) -> str:
        try:
            return self.take(size).decode("utf-8")
        except UnicodeDecodeError:
            raise UnreadableBinError(f"{DAMAGED}: a text that is not UTF-8") from None

    # the stack

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise UnreadableBinError(f"{DAMAGED}: its stack is empty")
        return self.stack.pop()

    def pop_marked(self) -> list[Any]:
        """All values above the last mark."""
        if not self.marks:
            raise UnreadableBinError(f"{DAMAGED}: a mark is missing")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def top(self, kind: type) -> Any:
        value = self.pop()
        if not isinstance(value, kind):
            raise UnreadableBinError(f"{DAMAGED}: a {kind.__name__} is missing")
        self.push(value)
        return value

    def tuple(self, size: int) -> None:
        values = [self.pop() for _ in range(size)]
        self.push(tuple(reversed(values)))

    def put(self, index: int) -> None:
        value = self.pop()
        self.push(value)
        self.memo[index] = value

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise UnreadableBinError(f"{DAMAGED}: it refers to a value that is not there")
        self.push(self.memo[index])

    # what values are made of

    def set_items(self, values: list[Any]) -> None:
        target = self.top(dict)
        if len(values) % 2 or not all(isinstance(key, str) for key in values[::2]):
            raise UnreadableBinError("it does not hold tensors by name")
        target.update(zip(values[::2], values[1::2], strict=True))

    def append(self, values: list[Any]) -> None:
        self.top(list).extend(values)

    def name(self) -> None:
        name = f"{self.line()}.{self.line()}"
        if name not in NAMES:
            raise UnreadableBinError(f"it names {name!r:.80}, and only tensors are read: code of a file is never run")
        self.push(_Name(name))

    def build(self) -> None:
        """The attributes of an OrderedDict (_metadata of a module's state): nothing that is a weight."""
        if not isinstance(self.pop(), dict):
            raise UnreadableBinError(f"{DAMAGED}: attributes are missing")
        self.top(dict)

    def persistent(self) -> None:
        self.push(_storage(self.pop()))

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(arguments, tuple) or not isinstance(function, _Name):
            raise UnreadableBinError(f"{DAMAGED}: a call of what is no function")
        self.push(_called(function.text, arguments))


def _called(name: str, arguments: tuple[Any, ...]) -> Any:
    if name == REBUILD:
        return _tensor(arguments)
    if name == DICT and arguments == ():
        return {}
    raise UnreadableBinError(f"it calls {name} in a way that torch.save does not")


def _storage(identity: Any) -> Storage:
    """("storage", class, key, device, number of elements), as torch.save refers to a storage."""
    if not isinstance(identity, tuple) or len(identity) != 5 or not isinstance(identity[1], _Name):
        raise UnreadableBinError(f"{DAMAGED}: a storage is missing")
    word, kind, key, device, numel = identity
    dtype = STORAGES.get(kind.text.removeprefix("torch."))
    if not isinstance(word, str) or word != "storage" or dtype is None or not isinstance(device, str):
        raise UnreadableBinError(f"{DAMAGED}: a storage is missing")
    if not isinstance(key, str) or not _is_count(numel):
        raise UnreadableBinError(f"{DAMAGED}: a storage without name or size")
    return Storage(key, *dtype, numel)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST


def _tensor(arguments: tuple[Any, ...]) -> StoredTensor:
    """(storage, offset, shape, stride, requires_grad, hooks), as torch.save describes a tensor."""
    if len(arguments) not in (6, 7) or not isinstance(arguments[0], Storage) or not _is_count(arguments[1]):
        raise UnreadableBinError(f"{DAMAGED}: a tensor without storage")
    storage, offset, shape, stride, grad, hooks, *more = arguments
    if not isinstance(grad, bool) or hooks != {} or any(value is not None and value != {} for value in more):
        raise UnreadableBinError("a tensor has hooks or other attributes, which are not read")
    for values in (shape, stride):
        if not isinstance(values, tuple) or len(values) > MAX_DIMENSIONS or not all(map(_is_count, values)):
            raise UnreadableBinError(f"{DAMAGED}: a tensor with a negative or missing size or stride")
    if len(shape) != len(stride):
        raise UnreadableBinError(f"{DAMAGED}: a tensor with {len(shape)} sizes and {len(stride)} strides")
    _check_view(storage, offset, shape, stride)
    return StoredTensor(storage, offset, shape, stride)


def _check_view(storage: Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    """Check that a view stays within its storage, and has no more elements than it: one element is no large tensor."""
    count = 1
    for size in shape:
        count *= size
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    end = last + 1 if count else offset
    if end > storage.numel or count > storage.numel:
        raise UnreadableBinError(
            f"a tensor of shape {list(shape)} reaches outside its storage {storage.key!r:.80} of {storage.numel:,} elements"
        )


INSTRUCTIONS: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": lambda m: _check_protocol(m.take(1)[0]),
    b"(": lambda m: m.marks.append(len(m.stack)),
    b"}": lambda m: m.push({}),
    b"]": lambda m: m.push([]),
    b")": lambda m: m.push(()),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.take(1)[0]),
    b"M": lambda m: m.push(m.number("<H")),
    b"J": lambda m: m.push(m.number("<i")),
    b"\x8a": lambda m: m.push(int.from_bytes(m.take(m.take(1)[0]), "little", signed=True)),
    b"G": lambda m: m.push(m.number(">d")),
    b"X": lambda m: m.push(m.text(m.number("<I"))),
    b"t": lambda m: m.push(tuple(m.pop_marked())),
    b"\x85": lambda m: m.tuple(1),
    b"\x86": lambda m: m.tuple(2),
    b"\x87": lambda m: m.tuple(3),
    b"q": lambda m: m.put(m.take(1)[0]),
    b"r": lambda m: m.put(m.number("<I")),
    b"h": lambda m: m.get(m.take(1)[0]),
    b"j": lambda m: m.get(m.number("<I")),
    b"s": lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    b"u": lambda m: m.set_items(m.pop_marked()),
    b"a": lambda m: m.append([m.pop()]),
    b"e": lambda m: m.append(m.pop_marked()),
    b"c": _Machine.name,
    b"b": _Machine.build,
    b"Q": _Machine.persistent,
    b"R": _Machine.reduce,
}


def _check_protocol(number: int) -> None:
    if number != 2:
        raise UnreadableBinError(
            f"a pickle of protocol {number}, expected 2, which torch.save writes unless told otherwise"
        )
