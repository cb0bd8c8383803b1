"""What a card does while something is measured on it: clocks, power, temperature, and what holds its clocks back.

Read from NVIDIA's management library, which is part of every driver, by direct calls: no package, and no process beside
the measured one. A thread reads twenty times a second; a reading takes some tens of microseconds. In addition a matrix
product of fixed size is timed, which shows how fast the card is at that moment whatever the library reports: rows of
one program are comparable if the product was equally fast, and only then.
"""

import ctypes
import statistics
import threading
from dataclasses import dataclass
from typing import Any, Protocol

import torch

EVERY = 0.05  # seconds between two readings
# Bits of nvmlDeviceGetCurrentClocksThrottleReasons. Its bit 0, an idle card, holds nothing back
REASONS = {
    1: "clocks set",
    2: "power cap",
    3: "hardware slowdown",
    4: "sync boost",
    5: "heat",
    6: "heat (hardware)",
    7: "power brake",
}
SIDE = 8192  # of the product's square matrices


@dataclass(frozen=True)
class Reading:
    """The card at one moment."""

    sm_mhz: int
    memory_mhz: int
    watts: float
    celsius: int
    reasons: int  # the bits of REASONS


class Sensor(Protocol):
    def read(self) -> Reading: ...


class NvmlSensor:
    """One card, read through libnvidia-ml.

    Raises:
        OSError: the library is missing or refuses.
    """

    def __init__(self, index: int) -> None:
        """index: torch's number of the card."""
        self.library = ctypes.CDLL("libnvidia-ml.so.1")
        self._call("nvmlInit_v2")
        self.handle = ctypes.c_void_p()
        name = f"GPU-{str(torch.cuda.get_device_properties(index).uuid).removeprefix('GPU-')}".encode()
        self._call("nvmlDeviceGetHandleByUUID", name, ctypes.byref(self.handle))

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self.library, name)(*arguments):
            raise OSError(f"{name}: status {status}")

    def _number(self, name: str, *arguments: Any, ctype: Any = ctypes.c_uint) -> int:
        value = ctype()
        self._call(name, self.handle, *arguments, ctypes.byref(value))
        return int(value.value)

    def read(self) -> Reading:
        reasons = self._number("nvmlDeviceGetCurrentClocksThrottleReasons", ctype=ctypes.c_ulonglong)
        sm, memory = (self._number("nvmlDeviceGetClockInfo", domain) for domain in (1, 2))
        watts = self._number("nvmlDeviceGetPowerUsage") / 1000
        return Reading(sm, memory, watts, self._number("nvmlDeviceGetTemperature", 0), reasons)


def sensor_of(device: torch.device) -> Sensor | str:
    """The sensor of a device, or why it has none."""
    if device.type != "cuda":
        return "no card"
    try:
        sensor = NvmlSensor(device.index if device.index is not None else torch.cuda.current_device())
        sensor.read()
    except (OSError, AttributeError) as error:
        return f"not readable: {error}"
    return sensor


class Watch:
    """Reads a sensor as long as its block runs."""

    def __init__(self, sensor: Sensor | str) -> None:
        self.sensor, self.readings, self.over = sensor, list[Reading](), threading.Event()

    def __enter__(self) -> "Watch":
        self.thread = threading.Thread(target=self._read, daemon=True)
        if not isinstance(self.sensor, str):
            self.thread.start()
        return self

    def __exit__(self, *args: Any) -> None:
        self.over.set()
        if self.thread.ident:
            self.thread.join()

    def _read(self) -> None:
        assert not isinstance(self.sensor, str)
        while not self.over.wait(EVERY):
            self.readings.append(self.sensor.read())

    def summary(self) -> dict[str, Any]:
        """For a row of results: minimum, median and maximum of each value; the reasons that held clocks back.

        A reason comes with the share of readings that it was in.
        """
        if isinstance(self.sensor, str) or not self.readings:
            return {"seen": self.sensor if isinstance(self.sensor, str) else "too short to be seen"}
        row: dict[str, Any] = {"looks": len(self.readings)}
        for name in ("sm_mhz", "memory_mhz", "watts", "celsius"):
            values = [getattr(reading, name) for reading in self.readings]
            row[name] = [round(n) for n in (min(values), statistics.median(values), max(values))]
        held = {reason: sum(reading.reasons >> bit & 1 for reading in self.readings) for bit, reason in REASONS.items()}
        return {**row, "held_back": {reason: round(n / len(self.readings), 2) for reason, n in held.items() if n}}


def product_tflops(device: torch.device, seconds: float = 0.05) -> float | None:
    """TFLOP/s of a large bfloat16 product of random values, now; None without a card or without memory for it."""
    if device.type != "cuda":
        return None
    try:
        a, b = (torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
        out = a @ b
    except torch.OutOfMemoryError:
        return None
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = max(1, round(seconds / 0.0015))
    start.record()
    for _ in range(times):
        torch.mm(a, b, out=out)
    end.record()
    torch.cuda.synchronize()
    return round(times * 2 * SIDE**3 / start.elapsed_time(end) / 1e9, 1)
