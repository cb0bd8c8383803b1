"""One arm in a process of its own: builds what each order asks for, times steps, and writes one line of JSON per order.

    python -m tests.bench.worker ORDERS ROWS      (tests/bench/pool.py starts one for each arm)

ORDERS is a file to which the parent appends a line at a time, so that several processes of one arm read the same
orders; an empty line ends the worker. A shape that does not fit gives a row that says so, and ends the process, because
after running out of memory a card is not clean for the next shape. So does memory that a shape leaves allocated. The
parent starts another worker for the rest.
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
from train.training.distributed import RankInfo

LEAK_BYTES = 256 << 20  # still allocated after a shape: from here on the next shape gets a process of its own
ANOTHER_WORKER = 3  # exit status: the parent starts another worker for the remaining orders
LEAST_SECONDS = 1.5  # that the counted steps take together: a card's clocks and power follow within tenths of a second
MOST_STEPS = 200
PEAKS = ("peak_gib", "at_rest_gib", "reserved_gib", "outside_gib")  # true of an arm that is built for the row only


class Worker:
    """The arm that is built, and the device that it is on."""

    def __init__(self, device: torch.device, rows: Path) -> None:
        self.device, self.rows = device, rows
        self.rank_info = join(device)
        self.sensor = card.sensor_of(device)
        self.kept: Arm | None = None  # built for the last order, for an order that measures it once more

    def do(self, spec: Spec) -> bool:
        """Measure one order and write its row; False if another worker has to do the remaining orders."""
        if not spec.again:
            self._drop_kept()
            if allocated_bytes(self.device) > LEAK_BYTES:
                self._write(None)  # not begun: the parent gives the order to another worker
                return False
        try:
            kept, warm = self.kept, 2 if self.kept else spec.warm
            arm = kept or build(spec, self.rank_info, self.device)
            result = measure(arm, spec, warm, self.rank_info, self.device, self.sensor)
            if kept:  # its graphs were captured in its first measurement, and their memory with them
                result = {name: value for name, value in result.items() if name not in PEAKS}
        except Exception as error:
            traceback.print_exc()
            self._write(spec.row(skipped=describe_error(error)))
            return False
        self._write(spec.row(gpus=self.rank_info.world_size, **result))
        self.kept = arm if spec.keep else None
        if self.kept is None:
            arm.close()
        del arm
        allocated_bytes(self.device)
        return True

    def _drop_kept(self) -> None:
        if self.kept is not None:
            self.kept.close()
        self.kept = None

    def _write(self, row: dict[str, Any] | None) -> None:
        if self.rank_info.rank == 0:
            with self.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def main(orders: Path, rows: Path) -> int:
    worker = None
    for spec in follow(orders):
        worker = worker or Worker(torch.device(spec.device), rows)
        if not worker.do(spec):
            return ANOTHER_WORKER
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()
    return 0


def follow(path: Path) -> Iterator[Spec]:
    """Orders as they are appended, up to an empty line or until the parent process has ended."""
    read, parent = 0, os.getppid()
    while os.getppid() == parent:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[read:]
        for line in (line for line in lines if line.endswith("\n")):
            if not line.strip():
                return
            read += 1
            yield Spec.load(line)
        time.sleep(0.02)


def describe_error(error: Exception) -> str:
    """One line: "does not fit" for out of memory, anything else by its name."""
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
        total = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0.0
        return f"does not fit: out of memory ({total:.1f} GiB)"
    return f"failed: {type(error).__name__}: {error!s:.200}".replace("\n", " ")


def build(spec: Spec, rank_info: RankInfo, device: torch.device) -> Arm:
    torch.manual_seed(0)
    return ARMS[spec.arm](spec, rank_info, device)


def measure(
    arm: Arm, spec: Spec, warm: int, rank_info: RankInfo, device: torch.device, sensor: card.Sensor | str
) -> dict[str, Any]:
    """The measured part of a row: medians over `counted` steps or more, after `warm` steps; loss and norm of the last.

    The peak of memory counts from the first step on, in which graphs are captured.
    """
    c = shapes.config(spec.model)
    stopwatch, seconds = Stopwatch(device), []
    result: dict[str, Any] = {}

    def step() -> None:
        ids = torch.randint(0, c.vocab_size - 256, spec.shape)  # on the CPU, as a collated batch is
        stopwatch.start()
        result["loss"] = round(float(arm.step(ids)), 3)
        seconds.append(stopwatch.stop())
        result["grad_norm"] = None if arm.grad_norm is None else round(arm.grad_norm, 4)

    for _ in range(warm):
        step()
    count = max(spec.counted, smallest(round(LEAST_SECONDS / max(seconds[-1], 1e-4)), rank_info, device))
    seconds.clear()
    with card.Watch(sensor) as watch:
        for _ in range(min(MOST_STEPS, count)):
            step()
    rate = spec.batch * spec.length * rank_info.world_size / statistics.median(seconds)
    flops = 4 * shapes.weights(c)  # a token: forward, and the gradient of the input; the base is frozen
    result |= {"tokens_per_s": round(rate), "peak_gib": round(stopwatch.peak_gib(), 2), "steps": len(seconds)}
    result |= {"ms": [round(1000 * n, 2) for n in (min(seconds), statistics.median(seconds), max(seconds))]}
    result |= {"tflops": round(flops * rate / rank_info.world_size / 1e12, 1), **stopwatch.memory(spec.alone)}
    result |= {"card": {**watch.summary(), "product_tflops": card.product_tflops(device)}}
    return {**result, "at": time.strftime("%H:%M:%S")}


def smallest(number: int, rank_info: RankInfo, device: torch.device) -> int:
    """The least of all processes' numbers: each takes as many steps as the slowest one can in the time."""
    if rank_info.world_size == 1:
        return number
    shared = torch.tensor(number, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MIN)
    return int(shared)


class Stopwatch:
    """Time and memory of a device, from the moment it is made."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.at_rest = torch.cuda.memory_allocated() / 2**30

    def start(self) -> None:
        self._synchronize()
        self.began = time.perf_counter()

    def stop(self) -> float:
        """Seconds since `start`, the device's work included."""
        self._synchronize()
        return time.perf_counter() - self.began

    def _synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def peak_gib(self) -> float:
        """The most that torch had allocated; on a CPU the most that the whole process had."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def memory(self, alone: bool) -> dict[str, float]:
        """GiB before the first step, the most that torch's allocator held, and, if `alone`, what is outside it."""
        if not self.cuda:
            return {}
        sizes = {"at_rest": self.at_rest, "reserved": torch.cuda.max_memory_reserved() / 2**30}
        if alone:
            free, total = torch.cuda.mem_get_info()
            sizes["outside"] = (total - free - torch.cuda.memory_reserved()) / 2**30
        return {f"{name}_gib": round(value, 2) for name, value in sizes.items()}


def allocated_bytes(device: torch.device) -> int:
    """What is still allocated after everything unused is freed; 0 on a CPU."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
