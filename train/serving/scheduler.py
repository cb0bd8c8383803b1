"""Which requests work in the next step: who gets a slot, whose prompt is read on, whose next token is computed.

Pure logic, without torch, threads and time. First come, first served. A prompt is read in pieces that begin at
multiples of CHUNK, whoever else is there, so that its numbers are always the same; `budget` tokens of prompts in a step
at most, so that running answers go on beside long prompts.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from train.serving.request import Request

CHUNK = 512  # tokens of a prompt that are read at once, as inference/slot_session.py has it


@dataclass(frozen=True)
class Reading:
    """Tokens start … end of the prompt of `request`."""

    request: Request
    start: int
    end: int

    @property
    def is_last(self) -> bool:
        return self.end == len(self.request.ids)


@dataclass(frozen=True)
class Plan:
    """The work of one step: prompts, and the requests that get a token, in groups of one model."""

    readings: list[Reading] = field(default_factory=list)
    groups: list[list[Request]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.readings or self.groups)


class Scheduler:
    """The requests that wait, and those that have one of `slots`."""

    def __init__(self, slots: int, queue: int, budget: int = 2 * CHUNK) -> None:
        """queue: requests that may wait. budget: tokens of prompts in a step."""
        self.free = list(range(slots))[::-1]  # the last is taken first: slot 0
        self.slots, self.queue, self.budget = slots, queue, budget
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in the order in which they came

    @property
    def room(self) -> int:
        """How many more requests may come."""
        return self.queue + len(self.free) - len(self.waiting)

    def add(self, request: Request) -> None:
        """Let it wait for a slot."""
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Its answer is complete, or nobody wants it any more. Removing it again does nothing."""
        request.done = True
        if request in self.running:
            self.running.remove(request)
            self.free.append(request.slot)
        elif request in self.waiting:
            self.waiting.remove(request)

    def plan(self) -> Plan:
        """The next step, which counts as begun: what it reads and issues is noted in the requests."""
        while self.waiting and self.free:
            request = self.waiting.popleft()
            request.slot = self.free.pop()
            self.running.append(request)
        groups: dict[str, list[Request]] = {}
        for request in self.running:
            if request.has_read and request.issued < request.max_tokens:
                groups.setdefault(request.model, []).append(request)
        for group in groups.values():
            for request in group:
                request.issued += 1
        return Plan(list(self._readings()), list(groups.values()))

    def _readings(self) -> Iterator[Reading]:
        left = self.budget
        for request in self.running:
            while not request.has_read:
                end = min(request.read + CHUNK, len(request.ids))
                if end - request.read > left:
                    return
                left -= end - request.read
                reading = Reading(request, request.read, end)
                request.read = end
                request.issued += int(reading.is_last)
                yield reading
