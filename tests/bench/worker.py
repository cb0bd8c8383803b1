"""One arm in a process of its own: builds it as it is ordered, times steps, writes a line of JSON for each order.

    python -m tests.bench.worker ORDERS ROWS      (tests/bench/crew.py starts it, one for each arm)

ORDERS is a file to which the parent adds a line at a time, so that several processes of one arm read the same ones; an
empty line ends the worker. What does not fit is a row that says so, and ends the process: after running out of memory,
what another shape would find is no clean card. So does memory that a shape leaves behind. The parent starts another
worker for the rest.
"""

import gc
import json
import os
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.bench import card, shapes
from tests.bench.arms import ARMS, Arm, join
from tests.bench.spec import Spec
from train.training.distributed import World

LEFT_BEHIND = 256 << 20  # bytes still allocated after a shape, from which on the next one gets a process of its own
AGAIN = 3  # exit status: start another worker for what is left
LEAST = 1.5  # seconds that the counted steps take at least: a card's clocks and power follow within tenths of one
MOST = 200  # and steps at most


def main(orders: Path, rows: Path) -> int:
    device, kept, place = torch.device("cpu"), None, None
    for spec in follow(orders):
        if place is None:
            device = torch.device(spec.device)
            place = join(device)
            sensor = card.sensor_of(device)
        if not spec.again:
            if kept is not None:
                kept.close()
            kept = None
            if left(device) > LEFT_BEHIND:
                write(rows, place, None)  # not begun: the parent asks another worker
                return AGAIN
        try:
            warm = 2 if kept else spec.warm
            arm = kept or build(spec, place, device)
            found = measure(arm, spec, warm, place, device, sensor)
        except Exception as error:
            traceback.print_exc()
            write(rows, place, spec.row(skipped=reason(error)))
            return AGAIN
        write(rows, place, spec.row(gpus=place.size, **found))
        kept = arm if spec.keep else None
        if kept is None:
            arm.close()
        del arm
        left(device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()
    return 0


def follow(path: Path) -> Iterator[Spec]:
    """Orders as they come; the end is an empty line, or that the parent is gone."""
    read, parent = 0, os.getppid()
    while os.getppid() == parent:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[read:]
        for line in (line for line in lines if line.endswith("\n")):
            if not line.strip():
                return
            read += 1
            yield Spec.load(line)
        time.sleep(0.02)


def reason(error: Exception) -> str:
    """One line: out of memory as such, anything else by its name."""
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
        total = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0.0
        return f"does not fit: out of memory ({total:.1f} GiB)"
    return f"failed: {type(error).__name__}: {error!s:.200}".replace("\n", " ")


def build(spec: Spec, place: World, device: torch.device) -> Arm:
    torch.manual_seed(0)
    return ARMS[spec.arm](spec, place, device)


def measure(
    arm: Arm, spec: Spec, warm: int, place: World, device: torch.device, sensor: card.Sensor | str
) -> dict[str, Any]:  # fmt: skip
    """Medians over `counted` steps or more after `warm`; the peak from the first step on, for graphs are captured in
    it."""
    c = shapes.config(spec.model)
    watch, seconds = Stopwatch(device), []

    def step() -> None:
        ids = torch.randint(0, c.vocab_size - 256, spec.shape)  # on the CPU, as a collated batch is
        watch.start()
        found["loss"] = round(float(arm.step(ids)), 3)
        seconds.append(watch.stop())

    found: dict[str, Any] = {}
    for _ in range(warm):
        step()
    # as many steps in every process: each does what the slowest of the warm ones says
    count = min(MOST, max(spec.counted, agreed(round(LEAST / max(seconds[-1], 1e-4)), place, device)))
    seconds.clear()
    with card.Watch(sensor) as seen:
        for _ in range(count):
            step()
    rate = spec.batch * spec.length * place.size / statistics.median(seconds)
    flops = 4 * shapes.weights(c)  # a token: forward, and the gradient of the input; the base is frozen
    found |= {"tokens_per_s": round(rate), "peak_gib": round(watch.peak_gib(), 2), "steps": count}
    found |= {"ms": [round(1000 * n, 2) for n in (min(seconds), statistics.median(seconds), max(seconds))]}
    found |= {"tflops": round(flops * rate / place.size / 1e12, 1), **watch.memory(spec.alone)}
    return {
        **found,
        "card": {**seen.summary(), "product_tflops": card.product_tflops(device)},
        "at": time.strftime("%H:%M:%S"),
    }


def agreed(number: int, place: World, device: torch.device) -> int:
    """The least of all processes' numbers."""
    if place.size == 1:
        return number
    told = torch.tensor(number, device=device)
    dist.all_reduce(told, dist.ReduceOp.MIN)
    return int(told)


class Stopwatch:
    """Time and memory of a device from the moment it is made."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.at_rest = torch.cuda.memory_allocated() / 2**30

    def start(self) -> None:
        self._settle()
        self.began = time.perf_counter()

    def stop(self) -> float:
        """Seconds since `start`, the device's work included."""
        self._settle()
        return time.perf_counter() - self.began

    def _settle(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def peak_gib(self) -> float:
        """What torch had allocated at most; on a CPU what the whole process had."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def memory(self, alone: bool) -> dict[str, float]:
        """GiB before the first step, at most held by torch's allocator, and the CUDA context's own beside it."""
        if not self.cuda:
            return {}
        found = {"at_rest": self.at_rest, "reserved": torch.cuda.max_memory_reserved() / 2**30}
        if alone:
            free, total = torch.cuda.mem_get_info()
            found["outside"] = (total - free - torch.cuda.memory_reserved()) / 2**30
        return {f"{name}_gib": round(value, 2) for name, value in found.items()}


def left(device: torch.device) -> int:
    """Bytes that are still allocated once nothing should be."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def write(rows: Path, place: World, row: dict[str, Any] | None) -> None:
    if place.rank == 0:
        with rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
