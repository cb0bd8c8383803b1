"""Triton kernels compiled for a card that is not here, through the very calls that the program makes: what is launched
is only compiled.

    python -m tests.support.offline 90 training decoding …      (one line of JSON a kernel: registers, stack, shared memory, seconds)

The interpreter runs what the compiler refuses, so this is what a machine without a GPU can know of a kernel before a
GPU sees it. Triton is given a driver that reports the wanted card, loads nothing, and asks Triton's own cuobjdump what
the machine code takes. The calls come from the passes on tensors without contents, and from a decoding step on small
ones: shapes, strides and alignment, which Triton compiles for, are those of the real thing. It leaves Triton's cache
filled as a run on such a card would find it, bar launchers.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

META = torch.device("meta")
SHARED = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}  # bytes that one program may have
UNITS = 132  # multiprocessors of an H100


@dataclass(frozen=True)
class Compiled:
    """A kernel as it came out: registers and bytes of stack a thread (spills go there; None: nobody to ask), bytes of
    shared memory a program."""

    kernel: str
    registers: int | None
    stack: int | None
    shared: int
    warps: int
    constants: dict[str, Any]


class Card:
    """Triton's driver for a card of compute capability `capability`."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.capability, self.target = capability, GPUTarget("cuda", capability, 32)
        self.compiled: list[Compiled] = []
        limits = {"max_shared_mem": SHARED[capability]}
        self.utils = SimpleNamespace(get_device_properties=lambda device: limits, load_binary=self._load)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it compiled by this number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        self.source, self.metadata = source, metadata
        return lambda *args: None

    def _load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int]:
        registers, stack = usage(binary)
        names = self.source.fn.arg_names
        constants = {names[path[0]]: value for path, value in self.source.constants.items() if value is not None}
        self.compiled.append(Compiled(name, registers, stack, shared, self.metadata.num_warps, constants))
        return 1, 1, registers or 0, stack or 0


def usage(binary: bytes) -> tuple[int | None, int | None]:
    """Registers and bytes of stack a thread, as cuobjdump reads them off machine code."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    if not tool.is_file():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found, said
    return int(found[1]), int(found[2])


@contextmanager
def card(capability: int) -> Iterator[Card]:
    """Within it every launch of a kernel compiles it for that card, once for each way of calling, and does nothing
    else."""
    from triton.runtime import driver

    from train.model import int4_linear
    from train.ops import attention, gptq, kernels
    from train.ops.kernels import gptq_tiles

    there = Card(capability)

    def hopper(q: Tensor) -> bool:  # attention.hopper, of a tensor on that card
        return capability == 90 and q.dtype != torch.float32

    driver.set_active(there)
    try:
        with ExitStack() as stack:
            fakes: list[tuple[Any, str, Any]] = [(kernels, "usable", lambda device: True)]
            fakes += [(kernels, "generation", lambda device: capability // 10)]
            fakes += [
                (gptq_tiles, "units", lambda device: UNITS),
                (gptq_tiles, "tensor_cores", lambda x: capability >= 80),
            ]
            fakes += [(attention, "hopper", hopper), (attention, "flash", lambda q: capability >= 80)]
            fakes += [
                (place, "dequantize", kernels.dequantize) for place in (gptq, int4_linear)
            ]  # which asks for a GPU's tensor
            for place, name, fake in fakes:
                stack.enter_context(patch.object(place, name, fake))
            yield there
    finally:
        driver.reset_active()


# What the program launches


def sixteen(capability: int) -> torch.dtype:
    return torch.bfloat16 if capability >= 80 else torch.float16


def training(
    capability: int, batch: int, length: int, checkpointing: str = "off", dropout: float = 0.0, rank: int = 64,
    model: str = "1.8b", biased: bool = False, in_order: bool = True, layers: int = 0,
) -> None:  # fmt: skip
    """A training step's passes. biased: q, k, v have a bias. layers: fewer than the model's, or 0."""
    from tests.bench import shapes
    from train.config.recipe import Recipe
    from train.model import int4_linear, lora
    from train.ops import attention
    from train.ops.cross_entropy import CHUNK_FAST
    from train.training import fused_decoder, graph_step

    dtype, shape = sixteen(capability), shapes.SHAPES[model]
    shape = replace(shape, layers=layers or shape.layers)

    def bias(projection: Any) -> Tensor | None:
        return torch.empty(projection.outputs, device=META) if biased and len(projection.bases) == 3 else None

    fakes: list[tuple[Any, str, Any]] = [
        (fused_decoder.Projection, "_bias", bias),
        (int4_linear, "grouped", lambda *given: in_order),
    ]
    fakes += [(attention, "_plain", lambda q, k, v, t: q + 0 * (k.sum() + v.sum()))]
    fakes += [(graph_step, "chunk_of", lambda hidden: CHUNK_FAST if len(hidden) > 4096 else CHUNK_FAST // 2)]
    with ExitStack() as stack:
        for place, name, fake in fakes:
            stack.enter_context(patch.object(place, name, fake))
        base = shapes.random_decoder(shapes.decoder_config(shape), META, dtype)
        wrapped = lora.attach(base, Recipe(rank=rank, dropout=dropout))
        taken = graph_step.Step(base, {p: n for n, p in lora.trainable(wrapped).items()}, length, graphs=False)
        taken.vector.data = taken.vector.data.to(dtype)
        taken.bind()
        base.set_checkpointing("on" if checkpointing == "on" else "off")
        ids = torch.ones(batch, length, dtype=torch.long)
        taken({"input_ids": ids, "labels": ids}).backward()


def decoding(
    capability: int, batch: int, adapter: bool, model: str = "1.8b", splits: int = 0, prompt: int = 128, layers: int = 1
) -> None:
    """A decoding step, and where the prompts are short what comes before it; a small vocabulary. splits: attention's
    parts, or 0."""
    from tests.bench import shapes
    from train.config.recipe import Recipe
    from train.inference.decode_graph import SHORT_PROMPT, DecodeSession
    from train.inference.decode_layers import DecodeLayers
    from train.model import lora

    shape = replace(shapes.SHAPES[model], layers=layers, vocabulary=512)
    base = shapes.random_decoder(shapes.decoder_config(shape), torch.device("cpu"), sixteen(capability)).eval()
    wrapped: Any = lora.attach(base, Recipe(rank=64, dropout=0.0)).eval() if adapter else base
    session = DecodeSession(DecodeLayers(base), batch, 512)
    session.splits = splits or session.splits
    ids = torch.ones(batch, prompt, dtype=torch.long)
    if ids.numel() <= SHORT_PROMPT:
        session.start(wrapped, ids, torch.ones_like(ids))
    session.step()


def formats(capability: int) -> None:
    """Every kind of packed weight as floats, and as a product."""
    from train.ops.kernels import dequantize
    from train.ops.kernels.gptq_matmul import PackedWeight, product
    from train.ops.kernels.gptq_tiles import Tile

    for bits in (2, 4, 8):
        for group in (128, 32):
            words, per = 2048 * bits // 32, 32 // bits
            qweight = torch.empty(words, 2048, dtype=torch.int32, device=META)
            qzeros = torch.empty(2048 // group, 2048 // per, dtype=torch.int32, device=META)
            scales = torch.empty(2048 // group, 2048, dtype=torch.float16, device=META)
            order = torch.empty(2048, dtype=torch.int32, device=META)
            for g_idx in (None, order):
                for dtype in (sixteen(capability), torch.float32):
                    dequantize(qweight, qzeros, scales, g_idx, bits, dtype)
            if bits == 2:
                continue
            for many, perm in ((1, None), (1, order), (32, None), (32, order)):
                x = torch.empty(many, 2048, dtype=sixteen(capability), device=META)
                bias = torch.empty(2048, dtype=torch.float16, device=META)
                product(x, PackedWeight(qweight, qzeros, scales, bits, bias, perm), tile=Tile(128 * bits // 32))


def attention(capability: int) -> None:
    """Our attention for long and short rows, heads that share keys, and the sizes of heads that it takes; wherever it is used."""
    from train.ops import attention as taken

    dtype = sixteen(capability)
    for width, heads, keys, size in ((2048, 16, 16, 128), (512, 16, 16, 128), (2048, 14, 2, 64), (512, 14, 2, 64)):
        numbers = {name: torch.empty(4096, dtype=torch.int32, device=META) for name in ("bounds", "starts", "ends")}
        segments = torch.empty(4096 // width, width, dtype=torch.int64, device=META)
        seed, positions = (torch.empty(n, dtype=torch.int64, device=META) for n in (1, 4096))
        t = taken.Tokens(positions=positions, segments=segments, seed=seed, **numbers)
        q, slope = (torch.empty(4096, heads, size, dtype=dtype, device=META) for _ in range(2))
        k, v = (torch.empty(4096, keys, size, dtype=dtype, device=META) for _ in range(2))
        into = torch.empty(4096, (heads + 2 * keys) * size, dtype=dtype, device=META)
        turns = torch.empty(width, size // 2, device=META), torch.empty(width, size // 2, device=META)
        with patch.object(taken, "hopper", lambda q: True):
            out, kept = taken.attend(q, k, v, t)
            taken.attend_backward(slope, q, k, v, out, kept, t, turns, into)


def rest(capability: int) -> None:
    """Other ways through the same kernels: small ranks, act-order, few tokens, short prompts, attention's parts, heads
    that share keys."""
    training(capability, 1, 512, rank=16, in_order=False, layers=2)
    training(capability, 2, 2048, "on", rank=128, model="7b", layers=1)
    decoding(capability, 1, adapter=True)  # a short prompt
    decoding(capability, 1, adapter=False, splits=4)
    decoding(capability, 3, adapter=False, model="0.5b", splits=1)


def full(capability: int) -> None:
    """What serves many tokens, by rank, by dropout, by length of rows, by the size of heads and how they are shared."""
    training(capability, 4, 2048, rank=128, layers=1)
    training(capability, 4, 2048, rank=8, dropout=0.05, layers=1)
    training(capability, 8, 512, layers=1)
    training(capability, 1, 8192, layers=1)
    training(capability, 4, 2048, model="0.5b", layers=1)
    with patch.dict(globals(), sixteen=lambda capability: torch.float16):
        training(capability, 4, 2048, dropout=0.05, layers=1)


def steps(capability: int) -> None:
    """Training steps that among them take every kernel of training."""
    training(capability, 4, 2048, layers=2)
    training(capability, 8, 512, "on", dropout=0.05, biased=True, layers=2)


def tokens(capability: int) -> None:
    """Decoding steps likewise."""
    decoding(capability, 1, adapter=True, prompt=300)
    decoding(capability, 32, adapter=True)


GROUPS: dict[str, Callable[[int], None]] = {
    "training": steps, "decoding": tokens, "formats": formats, "attention": attention, "rest": rest, "full": full
}  # fmt: skip


def main(words: list[str]) -> int:
    capability = int(words[0])
    os.environ.setdefault("TRITON_STORE_BINARY_ONLY", "1")
    for name in words[1:] or GROUPS:
        with card(capability) as there:
            began = time.perf_counter()
            GROUPS[name](capability)
            took = time.perf_counter() - began
        for found in there.compiled:
            print(json.dumps({"group": name, **asdict(found)}, default=str))
        print(f"sm_{capability} {name}: {len(there.compiled)} kernels, {took:.1f} s", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
