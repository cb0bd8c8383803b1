"""Trains runs of the train command in 1, 2, 4 … forked processes of one start: the imports of seconds are made once.

python -m tests.support.forked_worlds '[[processes, {key: value, …}], …]'        in the folder of a workspace

Each run is `train` with these keys, under the variables that torchrun sets. Two more keys: fused=1 computes with the
passes of a GPU, signal_at=N sends SIGTERM at the end of step N. Ends with status 1 where a process fails.
"""

import json
import os
import signal
import sys
import traceback

import pytest

import train.training.train_one  # noqa: F401  before the forks
from tests.support import tiny_training
from train.training import deepspeed_engine
from train.training.distributed import free_port
from train.training.signals import EXIT_INTERRUPTED


def main(runs: list[tuple[int, dict[str, str]]]) -> int:
    deepspeed_engine.import_deepspeed()
    for processes, keys in runs:
        expected = EXIT_INTERRUPTED if "signal_at" in keys else 0
        port = free_port()
        children = [_fork(rank, processes, port, dict(keys)) for rank in range(processes)]
        ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if ended != [expected] * processes:
            print(f"{keys}: {ended}", file=sys.stderr)
            return 1
    return 0


def _fork(rank: int, processes: int, port: int, keys: dict[str, str]) -> int:
    if child := os.fork():
        return child
    try:
        _train(rank, processes, port, keys)
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)


def _train(rank: int, processes: int, port: int, keys: dict[str, str]) -> None:
    if processes > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in {**ranks, **meeting}.items()})
    with pytest.MonkeyPatch.context() as patch:
        if keys.pop("fused", ""):
            tiny_training.use_fused_path(patch)
        if step := keys.pop("signal_at", ""):
            tiny_training.signal_at_step(int(step), signal.SIGTERM, patch)
        tiny_training.train(**keys)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
