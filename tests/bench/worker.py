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
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        at_rest = torch.cuda.memory_allocated() / 2**30
    seconds = []
    for _ in range(spec.warm + spec.counted):
        ids = torch.randint(0, c.vocab_size - 256, shape, device=device)
        _settle(cuda)
        began = time.perf_counter()
        loss = arm.step(ids)
        _settle(cuda)
        seconds.append(time.perf_counter() - began)
    rate = shape[0] * shape[1] * place.size / statistics.median(seconds[spec.warm :])
    found = {"tokens_per_s": round(rate), "peak_gib": round(_peak(cuda), 2), "loss": round(float(loss), 3)}
    spread = [round(1000 * s, 2) for s in (min(seconds[spec.warm :]), max(seconds[spec.warm :]))]
    found |= {"ms": spread, "tflops": round(4 * shapes.weights(c) * rate / place.size / 1e12, 1)}
    if cuda:
        found |= {"at_rest_gib": round(at_rest, 2), "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2)}
    return found


def _settle(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def _peak(cuda: bool) -> float:
    """GiB: what torch had allocated at most; on a CPU the whole process."""
    if cuda:
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


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
