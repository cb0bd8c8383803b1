"""Run under torchrun: four global steps of a tiny model with the fused step on the CPU; rank 0 prints a line of JSON.

python -m torch.distributed.run --standalone --nproc_per_node=2 -m tests.support.vector_worlds STAGE FOLDER [LORA_PLUS]
"""

import json
import os
import sys
from pathlib import Path

import torch

from tests.support.fused_step import PACKED, RAGGED, adapted_decoder, batch_of
from train.config.recipe import load_recipe
from train.training import deepspeed_engine, distributed


def main(stage: str, folder: Path, ratio: str = "1") -> None:
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    distributed.join(distributed.RankInfo(rank=rank, local_rank=rank, world_size=size), cuda=False)
    deepspeed_engine.FUSED_DEVICES = ("cpu",)
    model = adapted_decoder(folder / str(rank), "qwen2", True, torch.float32, "cpu")
    batches, micros = (PACKED, RAGGED), 2 // size
    values = {"dropout": "0", "batch": "3", "accumulation": str(micros), "zero": stage, "length": "64"}
    values["lora_plus"] = ratio
    learner = deepspeed_engine.Engine(model, load_recipe("qlora", values), torch.float32, size)
    rows = []
    for _ in range(4):
        total, norm = torch.zeros(1), None
        for micro in range(micros):
            total += learner.forward_backward(batch_of(batches[micro * size + rank]), 150).float()
            norm = learner.step(last=micro == micros - 1, rate=1e-2)
        torch.distributed.all_reduce(total)
        rows.append([float(total) / 150, norm])
    masters, moments = learner.gather()
    learner.restore(masters, moments, learner.counters())
    seen: list[str] = []
    again, also = learner.gather(inspect=lambda key, found: seen.append(key), pinned=True)
    assert seen == ["", "exp_avg", "exp_avg_sq"] and again.keys() == learner.full_state("").keys()
    assert all(torch.equal((again | also)[name], x) for name, x in (masters | moments).items())
    assert learner.gather(keep=False) == ({}, {})
    if rank == 0:
        print(json.dumps({"rows": rows, "sum": float(sum(x.abs().sum() for x in masters.values()))}))
    distributed.leave_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
