"""Train a prepared run in this process, alone or as one of several: load the model, train, write the record."""

import os
import time
from contextlib import closing
from pathlib import Path

import torch

from train.common import garbage
from train.model import lora
from train.model.loading import keeps_float, read_folder_config
from train.runs.checkpoint import sweep
from train.runs.folder import lock_run, result_folder
from train.training import adapter_start, cpu_memory, distributed, loop, peer_watch, record, save_resume
from train.training.deepspeed_config import zero_stage
from train.training.deepspeed_engine import Engine
from train.training.devices import Devices
from train.training.distributed import RankInfo
from train.training.guard import Guard, layers_allowed_zero_grad
from train.training.prepare import PreparedRun, begin, decisions, load_model
from train.training.run_state import RunState
from train.training.trained_size import trained_parameters


def train_one(prepared: PreparedRun, devices: Devices, checkpoint: Path | None) -> bool:
    """Train to the end; False if a signal stopped the run, whose last checkpoint is then on the disk.

    The first process holds the run's lock. Every process calls it with the same `checkpoint`: None for a new run.
    """
    rank_info = devices.rank_info or RankInfo()
    if rank_info.rank > 0:
        return _load_and_train(prepared, devices, rank_info, checkpoint)
    if devices.device.type == "cpu":
        _check_memory(prepared, devices.device, rank_info)
    with lock_run(prepared.folder):
        begin(prepared)
        return _load_and_train(prepared, devices, rank_info, checkpoint)


def _check_memory(prepared: PreparedRun, device: torch.device, rank_info: RankInfo) -> None:
    """Refuse, before anything is written or loaded, a run on the CPU that would be killed for want of memory."""
    recipe, config = prepared.recipe, read_folder_config(prepared.base)[0]
    parameters = trained_parameters(config, lora.targets(config.layout, recipe.targets), recipe)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", rank_info.world_size))  # processes on this machine
    cpu_memory.check(prepared.base, recipe, parameters, keeps_float(prepared.base, device, recipe.load_as), here)


def _load_and_train(prepared: PreparedRun, devices: Devices, rank_info: RankInfo, checkpoint: Path | None) -> bool:
    recipe, device, dtype = prepared.recipe, devices.device, devices.dtype
    garbage.leave_alone_what_exists()
    keep_float, stage = keeps_float(prepared.base, device, recipe.load_as), zero_stage(recipe, dtype)
    notes = [*prepared.notes, *decisions(prepared, rank_info, device, dtype, stage, keep_float)]
    if rank_info.rank == 0:
        print("\n".join(notes), flush=True)
        sweep(prepared.folder)
    distributed.join(rank_info, device.type == "cuda")
    with peer_watch.watching(rank_info):
        model = load_model(prepared, device, dtype, keep_float)
        adapter_start.begin(model, recipe, prepared.folder, rank_info, checkpoint is not None, dtype)
        engine = Engine(model, recipe, dtype, rank_info.world_size)
        with closing(engine):  # the next stage needs its memory
            return _train(prepared, _run_state(prepared, devices, rank_info), engine, notes, checkpoint)


def _run_state(prepared: PreparedRun, devices: Devices, rank_info: RankInfo) -> RunState:
    samples, pad_id = prepared.samples, prepared.tokenizer.pad
    guard = Guard(
        prepared.recipe.spike, layers_allowed_zero_grad(one.mask for sample in samples for one in sample.sequences)
    )
    return RunState(
        prepared.recipe,
        prepared.schedule,
        samples,
        pad_id,
        prepared.folder,
        rank_info,
        devices.device,
        prepared.held_out,
        guard=guard,
    )


def _train(prepared: PreparedRun, run: RunState, engine: Engine, notes: list[str], checkpoint: Path | None) -> bool:
    garbage.collect_as_usual()
    done, start_notes = save_resume.start(run, engine, checkpoint)
    began = time.time()
    if not loop.train(run, engine, done):
        return False
    if written := record.finish(prepared, run, engine, [*notes, *start_notes], began):
        print(f"{record.summary(written)}\n{run.result}: {result_folder(run.folder)}", flush=True)
    return True
