"""Starts a run in several processes under torchrun, and passes signals on to them."""

import os
import signal
import subprocess
import sys

from train.training.distributed import SPAWNED
from train.training.signals import CUT_OFF, follow, hand_down, pass_signals_on


def spawn(words: list[str], processes: int, cuda: bool) -> int:
    """Run `python -m train train WORDS` in `processes` processes under torchrun; returns its exit status.

    A signal to this process reaches the workers themselves, so that they may write a checkpoint and end as they wish.
    """
    launcher = [sys.executable, "-c", "from train.training.launch import launch; launch()"]
    options = ["--standalone", f"--nproc_per_node={processes}", "-m", "train", "train"]
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    env = {"OMP_NUM_THREADS": str(threads), **os.environ} if not cuda else dict(os.environ)
    with pass_signals_on() as (launchers, passed):  # before there is one: a signal in between would leave it behind
        child = subprocess.Popen([*launcher, *options, *words], env={**env, SPAWNED: "1"}, start_new_session=True)
        launchers.append(child.pid)
        if passed:
            child.terminate()
        status = child.wait()
    status = status if status >= 0 else 128 - status
    return (
        CUT_OFF if signal.SIGTERM in passed and status == 128 + signal.SIGTERM else status
    )  # before they could answer


def launch() -> None:
    """torchrun without its own log: a worker has said what is wrong, and its status is the launcher's.

    Its own answer to a signal is to kill the workers after 30 seconds. Slurm and systemd signal every process of a job, this one too,
    and a step and a save may take longer: here it hands the signal down, and waits.
    """
    import logging

    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    logging.disable(logging.CRITICAL)
    follow()
    api._terminate_process_handler = hand_down  # type: ignore[assignment]
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"error: process {rank} was ended by {failure.signal_name()}.", file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode)
    except SignalException as error:
        sys.exit(128 + error.sigval)
