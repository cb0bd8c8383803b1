"""Triton kernels compiled for a card that this machine lacks, through the calls that the program makes; none is run.

    python -m tests.support.offline 90 training decoding …
    (prints a line of JSON for each kernel: registers, stack, shared memory, warps, constants)

Triton's interpreter runs code that its compiler refuses, so on a machine without a GPU this is the only proof that a
kernel compiles. Triton gets a driver that reports the wanted card and loads nothing, and Triton's own cuobjdump reads
registers and stack from the machine code. The calls come from the training passes on tensors without contents, and from
a decoding step on small tensors: shapes, strides and alignment, which Triton compiles for, are the real ones. All but
Triton's launchers is in its cache afterwards, as a run on such a card would leave it.
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
SHARED = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}  # bytes that one program may use
UNITS = 132  # multiprocessors of an H100


@dataclass(frozen=True)
class Compiled:
    """What one compiled kernel needs; registers and stack are None without cuobjdump."""

    kernel: str
    registers: int | None  # of a thread
    stack: int | None  # bytes of a thread: registers spill to it
    shared: int  # bytes of a program
    warps: int
    constants: dict[str, Any]


class Card:
    """Triton's driver for a card of compute capability `capability`."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.capability, self.target = capability, GPUTarget("cuda", capability, 32)
        self.compiled: list[Compiled] = []
        limits = {"max_shared_mem": SHARED[capability]}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: limits,
            load_binary=self._load,
            fill_2d_tma_descriptor=lambda *args: None,
        )

    def get_current_device(self) -> int:
        return self.capability  # a key of Triton's caches

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
    """Registers and bytes of stack of a thread, as cuobjdump reads them from machine code."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    if not tool.is_file():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        output = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", output)
    assert match, output
    return int(match[1]), int(match[2])


@contextmanager
def card(capability: int) -> Iterator[Card]:
    """Within it, launching a kernel compiles it for that card, once for each variant, and does nothing else."""
    from triton.runtime import driver

    from train.model import int4_linear
    from train.ops import attention, gptq, kernels
    from train.ops.kernels import fp8, gptq_tiles

    faked = Card(capability)
    fakes: list[tuple[Any, str, Any]] = [
        (kernels, "usable", lambda device: True),
        (kernels, "generation", lambda device: capability // 10),
        (gptq_tiles, "multiprocessors", lambda device: UNITS),
        (gptq_tiles, "tensor_cores", lambda x: capability >= 80),
        (fp8, "_capability", lambda device: divmod(capability, 10)),
        (attention, "use_own_kernels", lambda q: capability == 90 and q.dtype != torch.float32),
        (attention, "use_torch_flash", lambda q: capability >= 80),
        (gptq, "dequantize", kernels.dequantize),  # the real one takes the kernel for tensors on a GPU only
        (int4_linear, "dequantize", kernels.dequantize),
    ]
    driver.set_active(faked)
    try:
        with ExitStack() as stack:
            for place, name, fake in fakes:
                stack.enter_context(patch.object(place, name, fake))
            yield faked
    finally:
        driver.reset_active()


# What the program launches


def half_dtype(capability: int) -> torch.dtype:
    """The 16-bit dtype that the program takes on that card."""
    return torch.bfloat16 if capability >= 80 else torch.float16


def training(
    capability: int, batch: int, length: int, checkpointing: str = "off", dropout: float = 0.0, rank: int = 64,
    model: str = "1.8b", biased: bool = False, in_order: bool = True, layers: int = 0, fp8: bool = False,
) -> None:  # fmt: skip
    """The passes of a training step.

    biased: q, k and v have a bias. in_order: the groups are; else there is an activation order. layers: 0 for the
    model's number.
    """
    from tests.bench import shapes
    from train.config.recipe import Recipe
    from train.model import int4_linear, lora
    from train.ops import attention
    from train.training import fused_linear, graph_step, step_sizes

    dtype, shape = half_dtype(capability), shapes.SHAPES[model]
    shape = replace(shape, layers=layers or shape.layers)

    def bias(linear: Any) -> Tensor | None:
        return torch.empty(linear.out_features, device=META) if biased and len(linear.base_layers) == 3 else None

    fakes: list[tuple[Any, str, Any]] = [
        (fused_linear.FusedLinear, "_concatenated_bias", bias),
        (int4_linear, "groups_in_order", lambda g_idx, groups: in_order),
        (attention, "_masked_attention", lambda q, k, v, tokens: q + 0 * (k.sum() + v.sum())),
        (graph_step, "logits_rows", lambda hidden: step_sizes.logits_rows(len(hidden))),
    ]
    with ExitStack() as stack:
        for place, name, fake in fakes:
            stack.enter_context(patch.object(place, name, fake))
        base = shapes.random_decoder(shapes.decoder_config(shape), META, dtype)
        wrapped = lora.attach(base, Recipe(rank=rank, dropout=dropout))
        names = {p: name for name, p in lora.trainable(wrapped).items()}
        step = graph_step.GraphStep(base, names, length, graphs=False, fp8=fp8)
        step.vector.data = step.vector.data.to(dtype)
        step.bind()
        base.set_checkpointing("on" if checkpointing == "on" else "off")
        ids = torch.ones(batch, length, dtype=torch.long)
        step({"input_ids": ids, "labels": ids}).backward()


def decoding(
    capability: int, batch: int, adapter: bool, model: str = "1.8b", splits: int = 0, prompt: int = 128, layers: int = 1
) -> None:
    """A decoding step, and the pass over the prompts if they are short; with a small vocabulary.

    splits: the parts that attention splits the keys into; 0 for the program's choice.
    """
    from tests.bench import shapes
    from train.config.recipe import Recipe
    from train.inference.decode_graph import DecodeSession
    from train.inference.decode_layers import DecodeLayers
    from train.model import lora
    from train.ops.kernels.gptq_tiles import MAX_BATCH

    shape = replace(shapes.SHAPES[model], layers=layers, vocabulary=512)
    base = shapes.random_decoder(shapes.decoder_config(shape), torch.device("cpu"), half_dtype(capability)).eval()
    wrapped: Any = lora.attach(base, Recipe(rank=64, dropout=0.0)).eval() if adapter else base
    session = DecodeSession(DecodeLayers(base), batch, 512)
    session.splits = splits or session.splits
    ids = torch.ones(batch, prompt, dtype=torch.long)
    if ids.numel() <= MAX_BATCH:  # longer ones multiply with a float copy, on a CPU for minutes
        session.start(wrapped, ids, torch.ones_like(ids))
    session.step()


def formats(capability: int) -> None:
    """Every format of packed weights, dequantised and multiplied."""
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
                for dtype in (half_dtype(capability), torch.float32):
                    dequantize(qweight, qzeros, scales, g_idx, bits, dtype)
            if bits == 2:
                continue
            for batch, perm in ((1, None), (1, order), (32, None), (32, order)):
                x = torch.empty(batch, 2048, dtype=half_dtype(capability), device=META)
                bias = torch.empty(2048, dtype=torch.float16, device=META)
                product(x, PackedWeight(qweight, qzeros, scales, bits, bias, perm), tile=Tile(128 * bits // 32))


def loaded(capability: int) -> None:
    """The weights of a float checkpoint that is quantised when it is loaded."""
    from train.ops.kernels import dequantize_eight_bit, dequantize_four_bit

    words, absmax = (torch.empty(2048 // part, 2048, dtype=dtype, device=META) for part, dtype in (
        (8, torch.int32), (64, torch.uint8),
    ))  # fmt: skip
    scales, mean, values, absmax_values, largest = (torch.empty(n, device=META) for n in (256, 1, 16, 256, 2048))
    codes = torch.empty(2048, 2048, dtype=torch.int8, device=META)
    for dtype in (half_dtype(capability), torch.float32):
        dequantize_four_bit(words, absmax, scales, mean, values, absmax_values, dtype)
        dequantize_eight_bit(codes, largest, dtype)


def attention(capability: int) -> None:
    """Attention's own kernels for long and short rows, grouped heads and different head sizes, on every card."""
    from train.ops import attention as ops

    dtype = half_dtype(capability)
    for row_length, heads, keys, size in ((2048, 16, 16, 128), (512, 16, 16, 128), (2048, 14, 2, 64), (512, 14, 2, 64)):
        offsets = {
            name: torch.empty(4096, dtype=torch.int32, device=META) for name in ("cu_seqlens", "seq_start", "seq_end")
        }
        segment_ids = torch.empty(4096 // row_length, row_length, dtype=torch.int64, device=META)
        seed, positions = (torch.empty(n, dtype=torch.int64, device=META) for n in (1, 4096))
        t = ops.Tokens(positions=positions, segment_ids=segment_ids, seed=seed, **offsets)
        q, grad = (torch.empty(4096, heads, size, dtype=dtype, device=META) for _ in range(2))
        k, v = (torch.empty(4096, keys, size, dtype=dtype, device=META) for _ in range(2))
        grad_qkv = torch.empty(4096, (heads + 2 * keys) * size, dtype=dtype, device=META)
        tables = torch.empty(row_length, size // 2, device=META), torch.empty(row_length, size // 2, device=META)
        with patch.object(ops, "use_own_kernels", lambda q: True):
            out, state = ops.attend(q, k, v, t)
            ops.attend_backward(grad, q, k, v, out, state, t, tables, grad_qkv)


def rest(capability: int) -> None:
    """Other variants: small and large ranks, activation order, few tokens, short prompts, split keys, grouped heads."""
    training(capability, 1, 512, rank=16, in_order=False, layers=2)
    training(capability, 2, 2048, "on", rank=128, model="7b", layers=1)
    decoding(capability, 1, adapter=True, prompt=64)  # a short prompt
    decoding(capability, 1, adapter=False, splits=4)
    decoding(capability, 3, adapter=False, model="0.5b", splits=1)


def full(capability: int) -> None:
    """The kernels for many tokens: by rank, dropout, length of rows, head size, and grouping of heads."""
    training(capability, 4, 2048, rank=128, layers=1)
    training(capability, 4, 2048, rank=8, dropout=0.05, layers=1)
    training(capability, 8, 512, layers=1)
    training(capability, 1, 8192, layers=1)
    training(capability, 4, 2048, model="0.5b", layers=1)
    with patch.dict(globals(), half_dtype=lambda capability: torch.float16):
        training(capability, 4, 2048, dropout=0.05, layers=1)


def steps(capability: int) -> None:
    """Training steps that together launch every kernel of training."""
    training(capability, 4, 2048, layers=2)
    training(capability, 8, 512, "on", dropout=0.05, biased=True, layers=2)
    training(capability, 2, 512, model="qwen3-0.6b", layers=2)  # norms of each head
    loaded(capability)


def tokens(capability: int) -> None:
    """Decoding steps that together launch every kernel of decoding."""
    decoding(capability, 1, adapter=True, prompt=300)
    decoding(capability, 32, adapter=True)
    decoding(capability, 1, adapter=False, model="qwen3-0.6b", prompt=64)


def fp8(capability: int) -> None:
    """Products in fp8 with and without an adapter, and the rounding of their factors; there are none below 89."""
    from train.ops import fp8 as ops

    if capability < 89:
        return
    training(capability, 4, 2048, layers=3, fp8=True)
    dtype = half_dtype(capability)
    weight = torch.empty(2048, 6144, dtype=dtype, device=META)
    by_output = ops.quantize_with(weight.t(), torch.empty(6144, device=META))  # a base in floats
    left, A = (torch.empty(*shape, dtype=dtype, device=META) for shape in ((8192, 64), (1, 64, 6144)))
    rows = ops.quantize_rows(torch.empty(8192, 2048, dtype=dtype, device=META))
    for low_rank in (None, ops.LowRankProduct(left, A)):  # with dropout; of the gradient
        ops.product(rows, by_output, dtype, low_rank)


GROUPS: dict[str, Callable[[int], None]] = {
    "training": steps, "decoding": tokens, "formats": formats, "attention": attention, "rest": rest, "full": full,
    "fp8": fp8,
}  # fmt: skip


def main(arguments: list[str]) -> int:
    capability = int(arguments[0])
    os.environ.setdefault("TRITON_STORE_BINARY_ONLY", "1")
    for name in arguments[1:] or GROUPS:
        with card(capability) as faked:
            start = time.perf_counter()
            GROUPS[name](capability)
            seconds = time.perf_counter() - start
        for kernel in faked.compiled:
            print(json.dumps({"group": name, **asdict(kernel)}, default=str))
        print(f"sm_{capability} {name}: {len(faked.compiled)} kernels, {seconds:.1f} s", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
