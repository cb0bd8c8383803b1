"""Trains runs of the train command in 1, 2, 4 … forked processes of one start: the imports of seconds are made once.

python -m tests.support.forked_worlds '[[processes, {key: value, …}], …]'        in the folder of a workspace

Each run is `train` with these keys under the variables that torchrun sets. Ends with status 1 where a process fails.
"""

import json
import os
import sys
import traceback

import train.training.loop  # noqa: F401  before the forks
import train.training.train_one  # noqa: F401
from tests.support.tiny_training import train as train_command
from train.training import deepspeed_engine
from train.training.distributed import free_port


def main(runs: list[tuple[int, dict[str, str]]]) -> int:
    deepspeed_engine.import_deepspeed()
    for processes, keys in runs:
        port = free_port()
        children = [_fork(rank, processes, port, keys) for rank in range(processes)]
        failed = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(failed):
            print(f"{keys}: {failed}", file=sys.stderr)
            return 1
    return 0


def _fork(rank: int, processes: int, port: int, keys: dict[str, str]) -> int:
    if child := os.fork():
        return child
    try:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        if processes > 1:
            os.environ |= {name: str(value) for name, value in ranks.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        fused = keys.pop("fused", "")
        if fused:
            deepspeed_engine.FUSED_DEVICES = ("cpu",)
        train_command(**keys)
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
