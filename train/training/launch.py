"""Starts a run in several processes under torchrun, and forwards signals to them."""

import os
import signal
import subprocess
import sys
from typing import Any
from uuid import uuid4

from train.common import cores
from train.training.distributed import SPAWNED
from train.training.signals import EXIT_INTERRUPTED, forward_signals, terminate_with_parent, terminate_workers


def spawn(arguments: list[str], processes: int, cuda: bool) -> int:
    """Run `python -m train train ARGUMENTS` in `processes` processes under torchrun; returns the exit status.

    A signal to this process is forwarded to the workers, which write a checkpoint before they end.
    """
    launcher = [sys.executable, "-c", "from train.training.launch import run_torchrun; run_torchrun()"]
    options = [*meet_on_this_machine(), f"--nproc_per_node={processes}", "-m", "train", "train"]
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    env = (
        {"OMP_NUM_THREADS": str(threads), **cores.environment(processes)} if not cuda else cores.environment(processes)
    )
    env[SPAWNED] = str(os.getpid())
    with forward_signals() as (launchers, received):  # entered first: no signal may find a launcher without a handler
        child = subprocess.Popen([*launcher, *options, *arguments], env=env, start_new_session=True)
        launchers.append(child.pid)
        if received:
            child.terminate()
        status = child.wait()
    status = status if status >= 0 else 128 - status
    ending = {signal.SIGTERM, signal.SIGHUP}
    ended_before_its_handler = bool(ending & {*received}) and status - 128 in ending
    return EXIT_INTERRUPTED if ended_before_its_handler else status


def meet_on_this_machine() -> list[str]:
    """Options of torchrun for processes that are all here.

    --standalone would look up this machine's host name, which resolves neither in many containers nor on many laptops:
    torchrun then waits for eleven minutes and fails.
    """
    return ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", f"--rdzv-id={uuid4()}", "--local-addr=127.0.0.1"]


def run_torchrun() -> None:
    """torchrun without its own log: a worker has printed what is wrong, and its status becomes the launcher's.

    On a signal torchrun kills its workers after 30 seconds; a step and a checkpoint may take longer. Slurm and systemd
    signal every process of a job, this one too, so the handler here sends SIGTERM to the workers and waits for them.
    """
    command = os.environ.get(SPAWNED)
    terminate_with_parent(int(command) if command else None)  # before torch is imported, which takes seconds
    import logging

    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    logging.disable(logging.CRITICAL)
    api._terminate_process_handler = terminate_workers  # type: ignore[assignment]
    _keep_ignored()
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"error: process {rank} was ended by {failure.signal_name()}.", file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode)
    except SignalException as error:
        sys.exit(128 + error.sigval)


def _keep_ignored() -> None:
    """What was ignored when torchrun began stays so, in the workers too: nohup ignores SIGHUP.

    torchrun installs handlers before it starts its workers, and a program begins with the default action of what had a
    handler: SIGHUP would end it.
    """
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    handled = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    ignored = [number for number in handled if signal.getsignal(number) == signal.SIG_IGN]
    start = SubprocessHandler._popen

    def start_worker(self: SubprocessHandler, *arguments: Any) -> "subprocess.Popen[bytes]":
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
        return start(self, *arguments)

    SubprocessHandler._popen = start_worker  # type: ignore[assignment, method-assign]
