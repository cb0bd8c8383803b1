"""The scheduler alone: no torch, no threads."""

from train.serving.request import Piece, Request
from train.serving.scheduler import CHUNK, Scheduler


def nobody(request: Request, piece: Piece) -> None: ...


def request(length: int, max_tokens: int = 4, model: str = "base") -> Request:
    return Request([1] * length, model, max_tokens, nobody)


def pieces(scheduler: Scheduler) -> list[tuple[int, int, int]]:
    """(slot, start, end) of what the next step reads."""
    return [(r.request.slot, r.start, r.end) for r in scheduler.plan().readings]


def test_requests_get_slots_in_their_order_and_the_next_when_one_leaves() -> None:
    scheduler = Scheduler(slots=2, queue=2)
    first, second, third = (request(3) for _ in range(3))
    for one in (first, second, third):
        scheduler.add(one)
    assert pieces(scheduler) == [(0, 0, 3), (1, 0, 3)]
    assert third.slot == -1
    scheduler.remove(first)
    plan = scheduler.plan()
    assert [r.request for r in plan.readings] == [third]
    assert third.slot == 0
    assert plan.groups == [[second]]


def test_a_request_gets_as_many_tokens_as_it_may() -> None:
    scheduler = Scheduler(slots=1, queue=0)
    one = request(3, max_tokens=3)
    scheduler.add(one)
    assert len(scheduler.plan().readings) == 1  # its first token comes with the prompt
    assert [scheduler.plan().groups for _ in range(3)] == [[[one]], [[one]], []]


def test_long_prompts_are_read_in_pieces_beside_running_answers() -> None:
    scheduler = Scheduler(slots=3, queue=0, budget=CHUNK)
    running, long, short = request(2, 99), request(2 * CHUNK + 5), request(7)
    scheduler.add(running)
    scheduler.plan()
    scheduler.add(long)
    scheduler.add(short)
    read = []
    for _ in range(4):
        plan = scheduler.plan()
        assert [running] in plan.groups or any(running in group for group in plan.groups)
        read += [(r.request, r.start, r.end) for r in plan.readings]
    assert read == [(long, 0, CHUNK), (long, CHUNK, 2 * CHUNK), (long, 2 * CHUNK, 2 * CHUNK + 5), (short, 0, 7)]


def test_pieces_begin_at_the_same_places_whoever_else_is_there() -> None:
    for others in range(4):
        scheduler = Scheduler(slots=8, queue=0, budget=CHUNK + 100)
        for _ in range(others):
            scheduler.add(request(300))
        one = request(2 * CHUNK + 1)
        scheduler.add(one)
        read = [r for _ in range(9) for r in scheduler.plan().readings if r.request is one]
        assert [r.start for r in read] == [0, CHUNK, 2 * CHUNK]


def test_those_of_one_model_share_a_step() -> None:
    scheduler = Scheduler(slots=4, queue=0)
    a, b, c = request(1, model="a"), request(1, model="b"), request(1, model="a")
    for one in (a, b, c):
        scheduler.add(one)
    scheduler.plan()
    assert scheduler.plan().groups == [[a, c], [b]]


def test_room_counts_slots_and_queue_and_removing_twice_frees_one_slot() -> None:
    scheduler = Scheduler(slots=2, queue=1)
    assert scheduler.room == 3
    ones = [request(1) for _ in range(3)]
    for one in ones:
        scheduler.add(one)
    assert scheduler.room == 0
    scheduler.plan()
    assert scheduler.room == 0
    for one in (ones[0], ones[0], ones[2], ones[1]):
        scheduler.remove(one)
    assert scheduler.room == 3
    assert sorted(scheduler.free) == [0, 1]
    assert not scheduler.running
    assert not scheduler.waiting
