"""Notices within a minute that another machine of the run is gone, and ends this process with what to do.

A machine that loses its power or its network closes no connection: torch waits half an hour for it. So each process has
a connection to that of rank 0, sends a byte every BEAT seconds, and counts the beats in which nothing came. What rank 0
loses, it tells the others. Only runs on several machines are watched: on one, the launcher sees its processes end.

Knows sockets and ranks; nothing of training. A thread does it all, because the main one may wait inside torch for ever.
"""

import os
import secrets
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from train.common.errors import UserError
from train.training import distributed
from train.training.distributed import RankInfo
from train.training.signals import EXIT_INTERRUPTED

BEAT = 5.0  # seconds
SILENT_BEATS = 8  # counted, not timed: for a process that was stopped and goes on, only one has passed
CONNECT_SECONDS = 20.0
ERROR_WAIT = 15.0  # after an error, for the watch to find that a machine is its cause
ALIVE, BYE, GONE = b".", b"=", b"!"  # GONE: the name of a process and a line feed follow
TOKEN_BYTES = 16
Lost = Callable[[str, str], None]


class PeerWatch:
    """Watches connections to other processes in a thread of its own."""

    def __init__(self, peers: dict[str, socket.socket], on_lost: Lost, beat: float = BEAT) -> None:
        """
        Args:
            peers: a connection to each, by the name of its process.
            on_lost: called once, in the thread, with the name of a process that is gone, and why.
        """
        self.peers, self.on_lost, self.beat = dict(peers), on_lost, beat
        self.silent = dict.fromkeys(peers, 0)  # beats since its last byte
        self._closing, self._closed = socket.socketpair()
        for connection in peers.values():
            connection.settimeout(beat)
        self.thread = threading.Thread(target=self._run, name="peers", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Tell the others that this process ends in order, and stop."""
        self._closing.send(BYE)
        self.thread.join()
        self._send(BYE)
        for connection in (*self.peers.values(), self._closing, self._closed):
            connection.close()

    def _run(self) -> None:
        next_beat = time.monotonic()
        while True:
            wait = max(0.0, next_beat - time.monotonic())
            readable, _, _ = select.select([*self.peers.values(), self._closed], [], [], wait)
            if self._closed in readable:
                return
            lost = next(
                filter(None, [self._read(name) for name, one in list(self.peers.items()) if one in readable]), None
            )
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + self.beat
                self._send(ALIVE)
                lost = lost or self._count_silence()
            if lost:
                self._send(GONE + lost[0].encode() + b"\n")
                self.on_lost(*lost)
                return

    def _send(self, message: bytes) -> None:
        for connection in self.peers.values():
            with suppress(OSError):  # reading from it says what is wrong
                connection.sendall(message)

    def _read(self, name: str) -> tuple[str, str] | None:
        """Read what a peer has sent: who is gone and why, or None."""
        try:
            received = self.peers[name].recv(4096)
        except OSError as error:
            return name, error.strerror or str(error)
        self.silent[name] = 0
        _, gone, other = received.partition(GONE)
        if gone:
            return other.partition(b"\n")[0].decode(errors="replace"), "another process has lost it"
        if BYE in received:
            self.peers.pop(name).close()
        elif not received:
            return name, "it ended without saying so"
        return None

    def _count_silence(self) -> tuple[str, str] | None:
        for name in self.peers:
            self.silent[name] += 1
            if self.silent[name] > SILENT_BEATS:
                return name, f"nothing was heard of it for {SILENT_BEATS * self.beat:g} s"
        return None


# --- who is connected to whom


@contextmanager
def watching(rank_info: RankInfo) -> Iterator[None]:
    """While the block runs on several machines, a machine that is gone ends this process with EXIT_INTERRUPTED.

    Every process enters it, once it has joined the process group.
    """
    if rank_info.world_size == 1 or len(set(distributed.all_gather(_machine()))) == 1:
        yield
        return
    watch = PeerWatch(_connect(rank_info), lambda name, why: _end(rank_info, name, why))
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        watch.close()
        raise
    except BaseException:  # perhaps torch's, because a machine is gone: then the watch ends this process
        watch.thread.join(ERROR_WAIT)
        raise
    watch.close()


def _machine() -> tuple[str, str]:
    """What tells machines apart: containers of several may have one host name."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname(), boot_id.read_text() if boot_id.exists() else ""


def _connect(rank_info: RankInfo) -> dict[str, socket.socket]:
    """The connections of this process by name: of rank 0 those to all others, of another that to rank 0."""
    server = _listen() if rank_info.rank == 0 else None
    offer = (server.getsockname()[1], secrets.token_bytes(TOKEN_BYTES)) if server else None
    port, token = distributed.all_gather(offer)[0]
    names = distributed.all_gather(f"process {rank_info.rank} on {socket.gethostname()}")
    if server is not None:
        with server:
            return {names[rank]: one for rank, one in _accept(server, token, rank_info.world_size - 1).items()}
    with suppress(OSError):  # rank 0 says so
        one = socket.create_connection((os.environ["MASTER_ADDR"], port), CONNECT_SECONDS)
        one.sendall(token + rank_info.rank.to_bytes(4, "big"))
        return {names[0]: one}
    return {}


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # no IPv6 in this kernel
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
    return socket.create_server(("", 0), backlog=128)


def _accept(server: socket.socket, token: bytes, count: int) -> dict[int, socket.socket]:
    """Connections by the rank at the other end, which knows the token; says so if fewer than `count` come."""
    found: dict[int, socket.socket] = {}
    deadline = time.monotonic() + CONNECT_SECONDS
    while len(found) < count and (left := deadline - time.monotonic()) > 0:
        server.settimeout(left)
        with suppress(OSError):
            one, _ = server.accept()
            one.settimeout(CONNECT_SECONDS)
            greeting = one.recv(TOKEN_BYTES + 4, socket.MSG_WAITALL)
            if secrets.compare_digest(greeting[:TOKEN_BYTES], token):
                found[int.from_bytes(greeting[TOKEN_BYTES:], "big")] = one
            else:
                one.close()
    if len(found) < count:
        print(
            f"{count - len(found)} of {count} other processes could not connect to port {server.getsockname()[1]} of "
            f"{socket.gethostname()}: if their machine fails, it is noticed late. See that no firewall is between them.",
            file=sys.stderr,
        )
    return found


def _end(rank_info: RankInfo, name: str, why: str) -> None:
    """End this process; the first one of each machine says why."""
    if rank_info.local_rank == 0:
        print(
            f"stopped on {socket.gethostname()}: {name} is gone: {why}. Start the same command on the machines that are "
            "left, or on all once it is back: it continues from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
    os._exit(EXIT_INTERRUPTED)
