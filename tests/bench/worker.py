"""One arm in a process of its own: builds it for each shape, times steps, writes a line of JSON a shape.

    python -m tests.bench.worker SPEC      (tests/bench/__main__.py starts it)

A shape that does not fit is a row that says so, and ends the process: after running out, what another shape would find is no clean
card. So does memory that a shape leaves behind. The parent starts another worker for the rest.
"""

import gc
import json
import resource
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.bench import shapes
from tests.bench.arms import ARMS, Arm, join
from tests.bench.spec import Shape, Spec
from train.world import World

LEFT_BEHIND = 256 << 20  # bytes still allocated after a shape, from which on the next one gets a process of its own
AGAIN = 3  # exit status: start another worker for the shapes that are left


def main(text: str) -> int:
    spec = Spec.load(text)
    device = torch.device(spec.device)
    torch.manual_seed(0)
    place = join(device)
    for shape in spec.shapes:
        try:
            found = measure(spec, shape, place, device)
        except Exception as error:
            traceback.print_exc()
            write(spec, place, spec.row(shape, skipped=reason(error)))
            return AGAIN
        write(spec, place, spec.row(shape, gpus=place.size, **found))
        if left(device) > LEFT_BEHIND:
            return AGAIN
    if dist.get_world_size() > 1:
        dist.destroy_process_group()
    return 0


def reason(error: Exception) -> str:
    """One line: out of memory as such, anything else by its name."""
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
        total = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0.0
        return f"does not fit: out of memory ({total:.1f} GiB)"
    return f"failed: {type(error).__name__}: {error!s:.200}".replace("\n", " ")


def measure(spec: Spec, shape: Shape, place: World, device: torch.device) -> dict[str, Any]:
    """Medians over `counted` steps after `warm`; the peak from the first step on, for graphs are captured in it."""
    arm: Arm = ARMS[spec.arm](spec, shape, place, device)
    c = shapes.config(spec.model)
    watch, seconds = Stopwatch(device), []
    for _ in range(spec.warm + spec.counted):
        ids = torch.randint(0, c.vocab_size - 256, shape)  # on the CPU, as a collated batch is
        watch.start()
        loss = arm.step(ids)
        seconds.append(watch.stop())
    counted = seconds[spec.warm :]
    rate = shape[0] * shape[1] * place.size / statistics.median(counted)
    tflops = (
        4 * shapes.weights(c) * rate / place.size / 1e12
    )  # forward, and the gradient of the input: the base is frozen
    found = {"tokens_per_s": round(rate), "peak_gib": round(watch.peak_gib(), 2), "loss": round(float(loss), 3)}
    found |= {"ms": [round(1000 * min(counted), 2), round(1000 * max(counted), 2)], "tflops": round(tflops, 1)}
    return found | watch.memory()


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

    def memory(self) -> dict[str, float]:
        """GiB before the first step, at most held by torch's allocator, and the CUDA context's own beside it."""
        if not self.cuda:
            return {}
        free, total = torch.cuda.mem_get_info()
        outside = total - free - torch.cuda.memory_reserved()
        found = {
            "at_rest": self.at_rest,
            "reserved": torch.cuda.max_memory_reserved() / 2**30,
            "outside": outside / 2**30,
        }
        return {f"{name}_gib": round(value, 2) for name, value in found.items()}


def left(device: torch.device) -> int:
    """Bytes that are still allocated once nothing should be."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def write(spec: Spec, place: World, row: dict[str, Any]) -> None:
    if place.rank == 0:
        with Path(spec.rows).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
