"""What a card does while something is measured on it: clocks, power, temperature, and what holds it back.

By NVIDIA's management library, which comes with every driver, called directly: no package, no process beside the
measured one. A thread asks it twenty times a second, each time for some tens of microseconds. And a product of fixed
size, timed, says what the card is worth at that moment, whatever the library answers: rows of one program at one speed
of the product can be compared, others cannot.
"""

import ctypes
import statistics
import threading
from dataclasses import dataclass
from typing import Any, Protocol

import torch

EVERY = 0.05  # seconds between two looks
# bits of nvmlDeviceGetCurrentClocksThrottleReasons; idle, the first, holds nothing back
REASONS = {
    1: "clocks set",
    2: "power cap",
    3: "hardware slowdown",
    4: "sync boost",
    5: "heat",
    6: "heat (hardware)",
    7: "power brake",
}
SIDE = 8192  # of the product's matrices


@dataclass(frozen=True)
class Look:
    """The card at one moment."""

    sm_mhz: int
    memory_mhz: int
    watts: float
    celsius: int
    reasons: int


class Eye(Protocol):
    """Whoever can look."""

    def look(self) -> Look: ...


class Library:
    """One card through libnvidia-ml; OSError where it is not or refuses."""

    def __init__(self, index: int) -> None:
        """index: torch's of the card."""
        self.library = ctypes.CDLL("libnvidia-ml.so.1")
        self._call("nvmlInit_v2")
        self.handle = ctypes.c_void_p()
        name = f"GPU-{str(torch.cuda.get_device_properties(index).uuid).removeprefix('GPU-')}".encode()
        self._call("nvmlDeviceGetHandleByUUID", name, ctypes.byref(self.handle))

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self.library, name)(*arguments):
            raise OSError(f"{name}: status {status}")

    def _number(self, name: str, *arguments: Any, kind: Any = ctypes.c_uint) -> int:
        found = kind()
        self._call(name, self.handle, *arguments, ctypes.byref(found))
        return int(found.value)

    def look(self) -> Look:
        reasons = self._number("nvmlDeviceGetCurrentClocksThrottleReasons", kind=ctypes.c_ulonglong)
        clocks = [self._number("nvmlDeviceGetClockInfo", domain) for domain in (1, 2)]  # of multiprocessors, of memory
        watts = self._number("nvmlDeviceGetPowerUsage") / 1000
        return Look(clocks[0], clocks[1], watts, self._number("nvmlDeviceGetTemperature", 0), reasons)


def eye_on(device: torch.device) -> Eye | str:
    """Who looks at the device, or why nobody can."""
    if device.type != "cuda":
        return "no card"
    try:
        eye = Library(device.index if device.index is not None else torch.cuda.current_device())
        eye.look()
    except (OSError, AttributeError) as error:
        return f"not to be seen: {error}"
    return eye


class Watch:
    """Looks all the while that its block runs."""

    def __init__(self, eye: Eye | str) -> None:
        self.eye, self.looks, self.over = eye, list[Look](), threading.Event()

    def __enter__(self) -> "Watch":
        self.thread = threading.Thread(target=self._look, daemon=True)
        if not isinstance(self.eye, str):
            self.thread.start()
        return self

    def __exit__(self, *given: Any) -> None:
        self.over.set()
        if self.thread.ident:
            self.thread.join()

    def _look(self) -> None:
        assert not isinstance(self.eye, str)
        while not self.over.wait(EVERY):
            self.looks.append(self.eye.look())

    def found(self) -> dict[str, Any]:
        """For a row: least, median and most of each; what held the clocks back, and in which part of the looks."""
        if isinstance(self.eye, str) or not self.looks:
            return {"seen": self.eye if isinstance(self.eye, str) else "too short to be seen"}
        row: dict[str, Any] = {"looks": len(self.looks)}
        for name in ("sm_mhz", "memory_mhz", "watts", "celsius"):
            values = [getattr(look, name) for look in self.looks]
            row[name] = [round(n) for n in (min(values), statistics.median(values), max(values))]
        held = {word: sum(look.reasons >> bit & 1 for look in self.looks) for bit, word in REASONS.items()}
        return {**row, "held_back": {word: round(n / len(self.looks), 2) for word, n in held.items() if n}}


def worth(device: torch.device, seconds: float = 0.05) -> float | None:
    """TFLOP/s of a large bfloat16 product on random numbers, now; None where there is no card or no room."""
    if device.type != "cuda":
        return None
    try:
        a, b = (torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
        out = a @ b
    except torch.OutOfMemoryError:
        return None
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = max(1, round(seconds / 0.0015))
    begin.record()
    for _ in range(times):
        torch.mm(a, b, out=out)
    end.record()
    torch.cuda.synchronize()
    return round(times * 2 * SIDE**3 / begin.elapsed_time(end) / 1e9, 1)
