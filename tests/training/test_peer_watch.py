"""What is said of a process of another machine that is gone, and what is none: an end in order, a pause."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue

import pytest

from train.common.errors import UserError
from train.training import distributed, launchers, peer_watch
from train.training.distributed import RankInfo
from train.training.peer_watch import ALIVE, PeerWatch, watching
from train.training.signals import EXIT_INTERRUPTED

BEAT = 0.05
Reports = Queue[tuple[str, str]]


class World:
    """Watches of rank 0 and of two others, connected as on three machines, and what each of them reports."""

    def __init__(self, watched: int) -> None:
        self.reports: list[Reports] = [Queue() for _ in range(3)]
        self.pairs = {rank: socket.socketpair() for rank in (1, 2)}
        self.watches = {0: self._watch(0, {f"process {rank}": one for rank, (one, _) in self.pairs.items()})}
        for rank in range(1, watched):
            self.watches[rank] = self._watch(rank, {"process 0": self.pairs[rank][1]})

    def _watch(self, rank: int, peers: dict[str, socket.socket]) -> PeerWatch:
        return PeerWatch(peers, lambda name, why: self.reports[rank].put((name, why)), BEAT)

    def nothing_reported(self, seconds: float) -> bool:
        try:
            self.reports[0].get(timeout=seconds)
        except Empty:
            return True
        return False


@pytest.fixture
def world() -> Iterator[World]:
    made = World(watched=2)  # the socket of process 2 is the test's own
    yield made
    for watch in made.watches.values():
        watch.close()


def test_a_silent_process_is_lost_after_its_beats_and_the_others_are_told(world: World) -> None:
    assert world.reports[0].get(timeout=10) == ("process 2", f"nothing was heard of it for {8 * BEAT:g} s")
    assert world.reports[1].get(timeout=10) == ("process 2", "another process has lost it")


def test_a_process_that_sends_now_and_then_is_not_lost(world: World) -> None:
    for _ in range(6):
        world.pairs[2][1].send(ALIVE)
        assert world.nothing_reported(4 * BEAT)


def test_a_closed_connection_is_a_loss_at_once(world: World) -> None:
    world.pairs[2][1].close()
    assert world.reports[0].get(timeout=10)[0] == "process 2"
    assert world.reports[1].get(timeout=10)[0] == "process 2"


def test_an_end_in_order_is_no_loss() -> None:
    world = World(watched=3)
    world.watches.pop(2).close()
    assert world.nothing_reported(12 * BEAT)
    for watch in world.watches.values():
        watch.close()


def test_eight_beats_of_five_seconds_are_within_a_minute() -> None:
    assert (peer_watch.SILENT_BEATS + 1) * peer_watch.BEAT <= 45


# --- who connects to whom ---------------------------------------------------------------------------------------------


def watch_as(rank: int, gathered: list[object], monkeypatch: pytest.MonkeyPatch, machines: int = 2) -> RankInfo:
    """all_gather as of two processes, whose other one says what `gathered` holds."""
    answers = iter(gathered)

    def all_gather(value: object) -> list[object]:
        if isinstance(value, tuple) and isinstance(value[0], str):
            return [(f"host{n}", "boot") for n in range(machines)] + [("host0", "boot")] * (2 - machines)
        other = next(answers)
        return [value, other] if rank == 0 else [other, value]

    monkeypatch.setattr(distributed, "all_gather", all_gather)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    return RankInfo(rank, 0, 2)


def test_processes_of_one_machine_are_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    with watching(watch_as(0, [], monkeypatch, machines=1)), watching(RankInfo()):
        assert threading.active_count() == before


def test_rank_0_knows_the_others_by_a_token(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stranger's connection is closed; a process that cannot come is named in a note."""
    monkeypatch.setattr(peer_watch, "CONNECT_SECONDS", 1.0)
    server = peer_watch._listen()
    with server:
        address = ("127.0.0.1", server.getsockname()[1])
        stranger, friend = socket.create_connection(address), socket.create_connection(address)
        stranger.sendall(b"x" * peer_watch.TOKEN_BYTES + bytes(4))
        friend.sendall(b"t" * peer_watch.TOKEN_BYTES + (3).to_bytes(4, "big"))
        found = peer_watch._accept(server, b"t" * peer_watch.TOKEN_BYTES, 2)
    assert [*found] == [3]
    assert "1 of 2 other processes could not connect" in capsys.readouterr().err
    for one in (stranger, friend, *found.values()):
        one.close()


@pytest.mark.parametrize(("error", "told"), [(UserError("all have it"), True), (RuntimeError("only here"), False)])
def test_an_error_that_only_one_process_has_leaves_without_a_farewell(
    error: Exception, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_watch, "ERROR_WAIT", 0.1)
    monkeypatch.setattr(peer_watch, "_end", lambda *_: None)  # it would end the tests
    token = b"t" * peer_watch.TOKEN_BYTES
    with peer_watch._listen() as server:
        offer = (server.getsockname()[1], token)
        rank_info = watch_as(1, [offer, "process 0 on host0"], monkeypatch)
        accepted: list[socket.socket] = []

        def fail() -> None:
            with watching(rank_info):
                accepted.extend(peer_watch._accept(server, token, 1).values())
                raise error

        with pytest.raises(type(error), match=str(error)):
            fail()
        (one,) = accepted
        one.settimeout(1)
        received = b""
        while peer_watch.BYE not in received and told:
            received += one.recv(16)
        if not told:
            received = one.recv(4096)
        one.close()
        for thread in threading.enumerate():  # before the tests could be ended by it
            if thread.name == "peers":
                thread.join(10)
    assert (peer_watch.BYE in received) == told


@pytest.mark.parametrize("local_rank", [0, 1])
def test_the_first_process_of_each_machine_says_what_to_do(
    local_rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    peer_watch._end(RankInfo(3, local_rank, 4), "process 0 on host0", "it ended without saying so")
    said = capsys.readouterr().err
    assert statuses == [EXIT_INTERRUPTED]
    assert ("process 0 on host0 is gone: it ended without saying so. Start the same command" in said) == (
        not local_rank
    )


# --- the device between machines --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "device"),
    [
        ({}, None),
        ({"MASTER_ADDR": "127.0.0.1"}, None),
        ({"MASTER_ADDR": "nohost.invalid"}, None),
        ({"MASTER_ADDR": "10.0.0.7"}, "ib0"),
        ({"MASTER_ADDR": "10.0.0.7", "GLOO_SOCKET_IFNAME": "eth1"}, "eth1"),
    ],
)
def test_gloo_takes_the_device_on_the_way_to_the_first_machine(
    given: dict[str, str], device: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    def source(target: str) -> str:
        if target == "nohost.invalid":
            raise OSError
        return "10.0.0.9"

    class Address:
        def __init__(self, address: str) -> None:
            self.address = address

    env = dict(given)
    monkeypatch.setattr(os, "environ", env)
    monkeypatch.setattr(launchers, "source_address", source)
    devices = {"lo": [Address("127.0.0.1")], "ib0": [Address("fe80::1"), Address("10.0.0.9")]}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: devices)
    launchers.use_route_interface()
    assert env.get("GLOO_SOCKET_IFNAME") == device


def test_the_address_on_the_way_to_this_machine_is_its_loopback() -> None:
    assert launchers.source_address("127.0.0.1") == "127.0.0.1"
    with pytest.raises(socket.gaierror):
        launchers.source_address("nohost.invalid")
    assert Path("/proc/sys/kernel/random/boot_id").exists() and len(set(peer_watch._machine())) == 2
