"""What a decoding step of one row takes on this GPU, by the ways in which its kernels follow each other.

    python -m tests.bench.step out.json [--model 1.8b] [--seconds 100] [--compile]

With `--compile` the kernels of all arms are compiled in several processes at once, into Triton's cache on the disk, and
nothing is measured. Else every arm without and with an adapter of rank 64 on every linear, and `before` once more. Then
some choices on top of what the program does, one at a time: the tiles of the products whose parts a norm adds up, and
the norms' warps. A step is the replay of its CUDA graph, from 128 tokens in the cache to 384 as in
tests/bench/decode.py. `error` is the largest difference of the logits of 32 steps from those of `before`, which are fed
the same tokens, by the largest logit. When the seconds are over no further choice is begun; the file is written after
each.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tests.bench import shapes
from tests.bench.decode import DEVICE, NEW, PROMPT, synchronize, with_adapter
from tests.bench.spec import heading
from train.common.files import write_json
from train.inference.decode_graph import DecodeSession
from train.inference.decode_layers import DecodeLayers
from train.ops.kernels import decode_step, gptq_tiles, overlap
from train.ops.kernels.gptq_tiles import Tile

REPEATS, CHECKED = 3, 32  # times STEPS steps that are timed; steps whose logits are compared
STEPS = NEW if DEVICE.type == "cuda" else 2


@dataclass(frozen=True)
class Arm:
    """early: kernels start early (train/ops/kernels/overlap.py). norm_down: norms compute x Aᵀ for their readers."""

    name: str
    early: bool = True
    norm_down: bool = True
    ranks_per_norm: int = decode_step.RANKS_PER_NORM
    columns_per_warp: int = decode_step.COLUMNS_PER_WARP
    tiles: tuple[tuple[tuple[bool, int, int], Tile], ...] = ()

    def patches(self) -> list[Any]:
        """What a session is built and captured under."""
        found: list[Any] = [
            patch.object(overlap, "allowed", self.early),
            patch.object(decode_step, "RANKS_PER_NORM", self.ranks_per_norm),
            patch.object(decode_step, "COLUMNS_PER_WARP", self.columns_per_warp),
            patch.dict(gptq_tiles.MEASURED, dict(self.tiles)),
        ]
        if not self.norm_down:  # the norms' kernel is told of no adapter: the products compute x Aᵀ themselves
            add_norm = decode_step.add_norm
            found.append(patch.object(decode_step, "add_norm", lambda *args: add_norm(*args[:4])))
        return found


BEFORE = Arm("before", early=False, norm_down=False)
SHIPPED = Arm("as the program does it")


def arms(adapter: bool) -> list[Arm]:
    """`before`, each idea alone, both; those without an early start first, which cannot fail."""
    if not adapter:
        return [BEFORE, SHIPPED]
    return [BEFORE, Arm("x A with the norms", early=False), Arm("starts early", norm_down=False), SHIPPED]


def choices(model: str) -> Iterator[Arm]:
    """SHIPPED with one thing changed."""
    config = shapes.config(model)
    for name, size in (("out", config.hidden_size), ("down", config.intermediate_size)):
        shape = (True, size, config.hidden_size)
        base = gptq_tiles.MEASURED.get(shape, Tile())
        tiles = [replace(base, splits=splits) for splits in (2, 4, 6)]
        tiles += [Tile(16, 32, 8, 4, 1), Tile(16, 32, 8, 2, 1), Tile(16, 64, 8, 4, 1), Tile(16, 32, 4, 4, 1)]
        for tile in tiles:
            if tile != base:
                yield replace(SHIPPED, name=f"{name}: {tile}", tiles=((shape, tile),))
    for columns in (256, 512):
        yield replace(SHIPPED, name=f"norm: {columns} columns a warp", columns_per_warp=columns)
    for ranks in (4, 8):
        yield replace(SHIPPED, name=f"norm: {ranks} rows of A", ranks_per_norm=ranks)


def session_of(arm: Arm, layers: DecodeLayers) -> DecodeSession:
    with ExitStack() as stack:
        for changed in arm.patches():
            stack.enter_context(changed)
        session = DecodeSession(layers, 1, 512)
        if session.graph is None:  # without a graph, the kernels are chosen at each step
            session.step()
        return session


def restart(session: DecodeSession, tokens: int) -> None:
    """A cache of `tokens` tokens, zeros."""
    session.keys.zero_()
    session.values.zero_()
    session.slot.fill_(tokens)
    session.token.fill_(1)


def logits_of(session: DecodeSession) -> Tensor:
    """Of CHECKED steps from an empty cache, fed the same tokens in every session: [CHECKED, V]."""
    restart(session, 0)
    tokens = torch.arange(CHECKED, device=DEVICE)[:, None] * 7 + 1
    return torch.stack([session.step(token)[0].clone() for token in tokens])


def milliseconds(session: DecodeSession) -> list[float]:
    """Of a step, each the mean of STEPS of them."""
    found = []
    for _ in range(REPEATS):
        restart(session, PROMPT)
        synchronize()
        start = time.perf_counter()
        for _ in range(STEPS):
            session.step()
        synchronize()
        found.append((time.perf_counter() - start) * 1000 / STEPS)
    return found


@torch.inference_mode()
def measure(arm: Arm, layers: DecodeLayers, expected: Tensor | None) -> tuple[dict[str, Any], Tensor]:
    """A row of the report, and the logits."""
    session = session_of(arm, layers)
    logits = logits_of(session)
    again = torch.equal(logits, logits_of(session))
    error = 0.0 if expected is None else float((logits - expected).abs().max() / expected.abs().max())
    took = milliseconds(session)
    step = statistics.median(took)
    row = {"arm": arm.name, "step_ms": round(step, 4), "least_ms": round(min(took), 4)}
    return row | {"tokens_per_s": round(1000 / step, 1), "error": round(error, 5), "same_again": again}, logits


def rows(model: str, seconds: float) -> Iterator[dict[str, Any]]:
    """All arms without and with an adapter in turns, `before` again, then the choices, as long as there is time."""
    begin = time.perf_counter()
    base: Any = shapes.random_decoder(shapes.config(model), DEVICE, torch.bfloat16).eval()
    layers_of = {False: DecodeLayers(base)}
    layers_of[True] = DecodeLayers(with_adapter(base).get_base_model())
    layers_of[True].refresh()
    expected_of: dict[bool, Tensor] = {}
    both = [(arm, adapter) for adapter in (False, True) for arm in arms(adapter)]
    both.sort(key=lambda case: case[0].early)
    both += [(replace(BEFORE, name="before, again"), adapter) for adapter in (False, True)]
    for arm, adapter in both:
        yield {"adapter": adapter} | _row(arm, layers_of[adapter], expected_of, adapter)
    for arm, adapter in [(arm, adapter) for arm in choices(model) for adapter in (False, True)]:
        if time.perf_counter() - begin > seconds:
            print(f"not begun: {arm.name}, adapter {adapter}", flush=True)
        else:
            yield {"adapter": adapter} | _row(arm, layers_of[adapter], expected_of, adapter)


def compile_arm(arm: Arm, adapter: bool, model: str) -> str:
    """Capture one block of the model; returns why that failed, or nothing."""
    shape = replace(shapes.SHAPES[model], layers=1, vocabulary=512)
    try:
        base: Any = shapes.random_decoder(shapes.decoder_config(shape), DEVICE, torch.bfloat16).eval()
        session_of(arm, DecodeLayers(with_adapter(base).get_base_model() if adapter else base))
        synchronize()
    except Exception as error:
        return f"{arm.name}: {type(error).__name__}: {error!s:.200}"
    return ""


def compile_all(model: str, workers: int) -> None:
    cases = [(arm, adapter, model) for adapter in (True, False) for arm in [*arms(adapter), *choices(model)]]
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        failed = list(filter(None, pool.starmap(compile_arm, cases, chunksize=1)))
    print(f"{len(cases)} arms compiled in {time.perf_counter() - start:.0f} s; failed: {failed}", flush=True)


def _row(arm: Arm, layers: DecodeLayers, expected_of: dict[bool, Tensor], adapter: bool) -> dict[str, Any]:
    try:
        row, logits = measure(arm, layers, expected_of.get(adapter))
    except Exception as error:
        return {"arm": arm.name, "skipped": f"{type(error).__name__}: {error!s:.200}"}
    expected_of.setdefault(adapter, logits)
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="1.8b")
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--workers", type=int, default=12)
    args = parser.parse_args()
    if args.compile:
        compile_all(args.model, args.workers)
        return
    torch.manual_seed(0)
    found: list[dict[str, Any]] = []
    for row in rows(args.model, args.seconds):
        print(json.dumps(row), flush=True)
        found.append(row)
        write_json(args.out, {**heading(), "model": args.model, "rows": found})


if __name__ == "__main__":
    main()
