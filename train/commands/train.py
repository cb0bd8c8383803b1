"""Fine-tune a base on a data set; the same command again goes on where it was cut off.

make train DATA=file [MODEL=base] [RECIPE=name] [RUN=name] [FROM=run] [GPUS=n] [ARGS="key=value …"]

Everything that can be wrong with the inputs is said before anything is loaded or written. Ctrl-C or SIGTERM finishes the step,
writes a checkpoint and ends with status 75; the same command goes on from there, in the same bytes as if it had never stopped.
SIGTERM before the first step ends with 75 at once.
"""

import os
import socket
import sys
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.common.errors import UserError
from train.config.options import RecipeOptions, build_with_overrides, describe, option, pairs
from train.config.recipe import Recipe, load_recipe, names_of
from train.config.stages import Stage, count
from train.config.stages import stage as stage_of_recipe
from train.data.conversations import sources
from train.model.folder import find
from train.training import distributed, launch, signals
from train.training.distributed import World
from train.training.signals import CUT_OFF

if TYPE_CHECKING:
    import torch

    from train.training.deepspeed_engine import Engine
    from train.training.loop import Task
    from train.training.prepare import Job

__doc__ = f"{__doc__}\nEvery key of the recipe may be given too:\n{describe(Recipe)}\n\nKeys of this command:"


@dataclass(frozen=True)
class Options(RecipeOptions):
    """What to train on what."""

    data: str = option("", "file, folder of .json and .jsonl files, or several with commas between")
    model: str = option("", "base; empty: the recipe's")
    recipe: str = option("qlora", "a name in train/recipes/, or the path of a .yaml file")
    run: str = option("", "name of the run folder below runs/; empty: data-recipe-model")
    from_run: str = option("", "(or from=) the run whose adapter to start from")
    stage: int = option(0, "one stage of a recipe that has several; 0 = all, one after another")
    gpus: int = option(1, "GPUs of this machine to use, where there are any")
    models: str = option("models", "folder of bases")
    runs: str = option("runs", "folder of runs")


def parse(values: dict[str, str]) -> Options:
    """Options from key=value; every key that is not an option is the recipe's."""
    renamed = {("from_run" if key == "from" else key): value for key, value in values.items()}
    return build_with_overrides(Options, renamed, Recipe)


def wanted_base(words: list[str]) -> str:
    """The base that `make train WORDS` fetches first: a new run's that is not here, once its data is. Empty where the words are
    wrong: the command itself says how."""
    try:
        options = parse(pairs(words))
        wanted = _stage(replace(options, stage=min(1, count(options.recipe))))
        sources(wanted.data)
        here = find(wanted.recipe.model, Path(options.models))
    except UserError:
        return ""
    return "" if here or (wanted.run / "recipe.yaml").is_file() else wanted.recipe.model


def run(options: Options) -> None:
    from train.training.async_save import FullError

    place = distributed.detect()
    if distributed.SPAWNED in os.environ:
        signals.follow()
    try:
        with signals.leaving_early(speaks=place is None or (place.rank == 0 and distributed.SPAWNED not in os.environ)):
            status = _stages(options, place)
    except FullError as error:
        _say(place, f"stopped: {error}")
        status = CUT_OFF
    except UserError as error:
        if place is None or place.rank == 0:
            raise
        if not distributed.spoken_for(error):
            print(f"error on {socket.gethostname()}, process {place.rank}: {error}", file=sys.stderr)
        sys.exit(2)
    if status:
        sys.exit(status)


def _stages(options: Options, place: World | None) -> int:
    """All stages of a recipe, each when the one before is done; a recipe without any is one run."""
    stages = count(options.recipe)
    if not stages or options.stage:
        status = _run(options, place)
        distributed.leave()
        return status
    _stage(replace(options, stage=stages))  # what is wrong with the last is said before the first begins
    status = 0
    for number in range(1, stages + 1):
        status = _run(one := replace(options, stage=number), place, later=stages - number)
        if (
            status or not (_stage(one).run / "run.json").is_file()
        ):  # under torchrun, a worker that was stopped says 0 too
            break
    distributed.leave()
    return status


def _stage(options: Options) -> Stage:
    """What is to be done, in which folder."""
    overrides = options.overrides | ({"model": options.model} if options.model else {})
    folder = Path(options.runs) / (options.run or _name(options))
    parent = Path(options.runs) / options.from_run if options.from_run else None
    return stage_of_recipe(options.recipe, options.stage, overrides, options.data, folder, parent)


def _run(options: Options, place: World | None, later: int = 0) -> int:
    # --- what is to be done, checked --------------------------------------------------------------------------------------
    if not options.data and not options.stage:
        raise UserError("train: which data? Example: make train DATA=data/demo.jsonl")
    wanted = _stage(options)
    recipe, folder = wanted.recipe, wanted.run
    device, dtype, processes = _machine(options, recipe, place)
    if place is not None and device.type == "cuda":
        place = replace(place, local=device.index)
    from train.common.device import dtype_name
    from train.runs import folder as folder_module
    from train.runs.folder import lock_run
    from train.training.prepare import begin, check_same, fitted, prepare, start_of

    if "accumulation" not in options.overrides:
        recipe = fitted(recipe, folder, processes)
    name = dtype_name(dtype)
    job = prepare(recipe, wanted.data, folder, wanted.parent, Path(options.models), processes, name, later)
    if recipe.accumulation != wanted.recipe.accumulation:
        job.notes.append(
            f"accumulation={recipe.accumulation}: the run was begun with {job.inputs['rows_per_step']} rows a step."
        )
    if wanted.text:
        _say(place, f"{wanted.text}: {wanted.data}, in {folder}")
    if options.gpus > 1 and device.type == "cpu":
        job.notes.append(f"gpus={options.gpus}: this machine has no GPU; the CPU computes, in processes={processes}.")
    found, harmed = (None, []) if job.finished else folder_module.resume_point(folder)
    job.notes.extend(harmed)
    if place is not None:
        distributed.join(place, device.type == "cuda")
        check_same(distributed.gather((socket.gethostname(), start_of(job, found))))
    if job.finished:
        _say(
            place,
            f"run {folder.name!r} is finished: nothing to do. Its adapter is {folder / 'adapter'}.\n{_next(folder)}",
        )
        return 0

    # --- several processes: start them and wait ---------------------------------------------------------------------------
    if place is None and processes > 1:
        with lock_run(folder):
            begin(job)
        status = launch.spawn(options.words(), processes, device.type == "cuda")
        return status if status or job.finished else CUT_OFF

    # --- one process, or one of several: learn ----------------------------------------------------------------------------
    place = place or World()
    if place.rank > 0:
        return _train(job, place, device, dtype, found)
    with lock_run(folder):
        begin(job)
        return _train(job, place, device, dtype, found)


def _machine(options: Options, recipe: Recipe, place: World | None) -> "tuple[torch.device, torch.dtype, int]":
    """Device, dtype and number of processes."""
    import torch

    from train.common.device import pick_dtype
    from train.training.prepare import check_ways

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if there and options.gpus > there:
        raise UserError(f"gpus={options.gpus}: this machine has {there}.")
    if options.gpus < 1 or recipe.processes < 1:
        raise UserError("gpus= and processes= count from 1.")
    device = torch.device("cuda", distributed.on_card(place or World(), there).local) if there else torch.device("cpu")
    check_ways(recipe, device.type)
    processes = place.size if place else (options.gpus if there else recipe.processes)
    return device, pick_dtype(device, recipe.precision), processes


def _name(options: Options) -> str:
    """data-recipe-model, each without its folder; a run that was named after an earlier name of the recipe keeps it."""
    model = options.model or load_recipe(options.recipe, options.overrides).model
    data = Path(options.data.split(",")[0]).stem
    names = ["-".join(filter(None, (data, recipe, Path(model).name))) for recipe in names_of(options.recipe)]
    return next((name for name in names if (Path(options.runs) / name).is_dir()), names[0])


def _train(job: "Job", place: World, device: "torch.device", dtype: "torch.dtype", found: Path | None) -> int:
    from train.model.loading import keeps_float
    from train.runs import checkpoint
    from train.training.deepspeed_engine import Engine, stage_of

    # --- the decisions that were taken, once ------------------------------------------------------------------------------
    keep_float = keeps_float(job.base, device)
    notes = [*job.notes, *_decisions(job, place, device, dtype, stage_of(job.recipe, dtype), keep_float)]
    if place.rank == 0:
        print("\n".join(notes), flush=True)
        checkpoint.sweep(job.run)

    distributed.join(place, device.type == "cuda")
    engine = Engine(_model(job, device, dtype, keep_float), job.recipe, dtype, place.size)
    with closing(engine):  # the next stage is trained in this process
        return _learn(job, engine, place, device, notes, found)


def _learn(
    job: "Job", engine: "Engine", place: World, device: "torch.device", notes: list[str], found: Path | None
) -> int:  # fmt: skip
    from train.runs import checkpoint, losses
    from train.training import guard, loop

    # --- where it stands --------------------------------------------------------------------------------------------------
    watch = guard.Watch(job.recipe.spike, guard.excused(sample.mask for sample in job.samples))
    task = loop.Task(job.recipe, job.plan, job.samples, job.tokenizer.pad, job.run, place, device, watch)
    first = 0
    if found is not None:
        first = loop.resume(task, engine, found)
        _say(place, f"goes on after step {first} of {len(job.plan)} ({found.name})")
        if told := _another_number(task):
            notes.append(told)
            _say(place, told)
    else:
        task.start(0, [])
        checkpoint.seed_all(job.recipe.seed + place.rank)
        if place.rank == 0:
            losses.rewind(job.run / "losses.jsonl", 0)

    # --- learn ------------------------------------------------------------------------------------------------------------
    began = time.time()
    whole = loop.learn(task, engine, first)
    if whole:
        _finish(job, task, engine, notes, began)
    else:
        _say(place, f"stopped with a checkpoint in {job.run / 'checkpoints'}. The same command goes on from there.")
    return 0 if whole or "TORCHELASTIC_RUN_ID" in os.environ else CUT_OFF  # torchrun would take it for a failure


def _another_number(task: "Task") -> str:
    """What it means that the steps so far were computed in another number of processes; empty if they were not."""
    before, now = task.starts[-2:-1], task.world.size
    if not before or before[0]["processes"] == now:
        return ""
    drops = " dropout draws other numbers from here on." if task.recipe.dropout else ""
    was = before[0]["processes"]
    return f"{was} processes before, {now} now: the same samples in the same order, losses within 1e-5 of what they would be.{drops}"


def _say(place: World | None, text: str) -> None:
    if place is None or place.rank == 0:
        print(text, flush=True)


def _decisions(
    job: "Job", place: World, device: "torch.device", dtype: "torch.dtype", stage: int, keep_float: bool
) -> list[str]:
    """What was decided for the user, a line each."""
    import torch

    from train.common.device import dtype_name

    recipe, rows = job.recipe, job.inputs["rows_per_step"]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    asked = "as this device does best" if recipe.precision == "auto" else f"as precision={recipe.precision} says"
    number = f"{place.size} processes" if place.size > 1 else "1 process"
    lines = [
        f"base: {recipe.model} in {job.base}; run: {job.run}",
        f"device: {where}, {dtype_name(dtype)} ({asked}), ZeRO {stage}",
        f"a step: {recipe.batch} rows × {recipe.accumulation} × {number} = {rows} rows of at most {recipe.length} tokens",
        f"{len(job.plan)} steps, {job.plan.epoch(len(job.plan) - 1) + 1} epochs",
    ]
    if stage != recipe.zero:
        lines.append(
            f"zero={recipe.zero} is for float32: in 16 bits stage {stage} is used, whose float32 masters a checkpoint can hold."
        )
    if keep_float:
        lines.append(
            "the Int4 weights are also kept in float32: memory suffices, the numbers are the same, and it is faster."
        )
    if device.type == "cuda":
        lines += _on_the_host(recipe, job.base)
    if job.parent is not None:
        lines.append(f"starts from the adapter of run {job.parent.name!r}.")
    return lines


def _on_the_host(recipe: Recipe, base: Path) -> list[str]:
    """What waits in the machine's own memory, a line each."""
    from train.model.loading import read_folder_config

    lines = []
    if recipe.checkpointing == "offload":
        lines.append("checkpointing=offload: what the backward pass begins each block from waits in the host's memory.")
    if recipe.embedding == "host":
        tied = read_folder_config(base)[0].tie_word_embeddings
        stays = "stays on the card: this base's head is the same table" if tied else "stays in the host's memory"
        lines.append(f"embedding=host: the embedding's table {stays}.")
    return lines


def _model(job: "Job", device: "torch.device", dtype: "torch.dtype", keep_float: bool) -> Any:
    """The frozen base with adapters: fresh ones, or those of the run it starts from."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from train.model import lora
    from train.model.loading import load

    model = lora.attach(load(job.base, dtype, device, keep_float, job.recipe.embedding), job.recipe)
    if job.parent is not None:
        try:
            learnt = load_file(job.parent / "adapter" / lora.WEIGHTS)
        except SafetensorError as error:
            raise UserError(f"from={job.parent.name}: its adapter is damaged ({error}).") from error
        parameters = lora.trainable(model)
        if learnt.keys() != {lora.stock_name(name) for name in parameters}:
            raise UserError(
                f"from={job.parent.name}: its adapter changes other linears. Give the same targets= and base."
            )
        for name, p in parameters.items():
            p.data.copy_(learnt[lora.stock_name(name)])
    model.get_base_model().config.use_cache = False
    model.get_base_model().set_checkpointing(job.recipe.checkpointing)
    return model.to(device)


def _finish(job: "Job", task: "Task", engine: "Engine", notes: list[str], began: float) -> None:
    """Write the adapter and run.json; on a full disk every process waits for that too."""
    from train.training import record
    from train.training.async_save import together
    from train.training.signals import Stop

    masters, _ = engine.gather()
    written: list[dict[str, Any]] = []

    def attempt() -> Exception | None:
        try:
            written.append(record.write(job, task, engine, masters, notes, began))
        except OSError as error:
            return error
        return None

    with Stop(speaks=False) as stop:
        together(attempt, job.run, stop, job.recipe.patience, task.world.rank)
    if written:
        print(f"{record.summary(written[0])}\nadapter: {job.run / 'adapter'}\n{_next(job.run)}", flush=True)


def _next(folder: Path) -> str:
    chat, compare, export = (f"make {verb} RUN={folder.name}" for verb in ("infer", "compare", "export"))
    return f"Next: {chat} (chat), {compare} (before and after), {export} (merged weights)"
