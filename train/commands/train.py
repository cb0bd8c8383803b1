"""Fine-tune a base on a data set; the same command continues a run that was stopped.

make train DATA=file [MODEL=base] [RECIPE=name] [RUN=name] [FROM=run] [GPUS=n] [ARGS="key=value …"]

Everything that can be wrong with the inputs is reported before anything is loaded or written. Ctrl-C or SIGTERM
finishes the step, writes a checkpoint and ends with status 75; the same command continues from there, and its result has
the same bytes as without the stop. SIGTERM before the first step ends with status 75 at once.

A number with several values (rank=8,16,64, or a list in the recipe) is a sweep: a run for each, then one table.

TRAIN_WEBHOOK=https://… in the environment: a notice at the end, to a robot of DingTalk, WeCom or Feishu, or as JSON;
TRAIN_WEBHOOK_SECRET= for a robot that signs. It says how the run ended and its losses, and no row of the data.
"""

import os
import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.common import commands, garbage
from train.common.errors import UserError
from train.common.names import below
from train.common.webhook import notice_at_end
from train.config.options import RecipeOptions, build_with_overrides, describe, option, pairs
from train.config.recipe import Recipe, check_measured, check_preference, load_recipe, names_of, read_sweep
from train.config.stages import Stage, count
from train.config.stages import stage as stage_of_recipe
from train.data.choice.selection import check_settings
from train.data.origins.sources import sources, stem
from train.model.architecture import Shape
from train.model.folder import find
from train.model.names import hub_name
from train.model.published import read_folder_shape
from train.runs import trackers
from train.runs.folder import (
    RECIPE,
    TOKENS,
    adapter_source,
    finished,
    lock_run,
    read_run,
    result_folder,
    trained_model,
)
from train.runs.provenance import check_adapter
from train.training import cuda_start, distributed, early_work, launch, launchers, signals
from train.training.distributed import RankInfo
from train.training.signals import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from train.training.devices import Devices
    from train.training.early_work import EarlyWork
    from train.training.prepare import PreparedRun

__doc__ = f"{__doc__}\nEvery key of the recipe may be given too:\n{describe(Recipe)}\n\nKeys of this command:"


@dataclass(frozen=True)
class Options(RecipeOptions):
    """What to train on what."""

    data: str = option("", "a file, a folder, a set (see data/README.md), or several with commas between")
    model: str = option("", "base; empty: the recipe's")
    recipe: str = option("qlora", "a name in train/recipes/, or the path of a .yaml file")
    run: str = option("", "name of the run folder below runs/; empty: data-recipe-model")
    from_run: str = option("", "(or from=) the run to start from: its name, or a folder with a peft adapter")
    stage: int = option(0, "one stage of a recipe that has several; 0 = all, one after another", interval="[0, 1000]")
    gpus: int = option(1, "how many GPUs of this machine to use, if it has any", interval="[1, 64]")
    models: str = option("models", "folder of bases")
    runs: str = option("runs", "folder of runs")


def parse(values: dict[str, str]) -> Options:
    """Options from key=value; every key that is not an option is the recipe's."""
    if {"from", "from_run"} <= values.keys():
        raise UserError("from= and from_run= are the same key. Give one of them.")
    renamed = {("from_run" if key == "from" else key): value for key, value in values.items()}
    return build_with_overrides(Options, renamed, Recipe)


def wanted_base(words: list[str]) -> str:
    """The base that `make train WORDS` must fetch first: the data of a new run exists here, its base does not.

    Returns:
        Its name; "" if nothing is to be fetched, or the arguments are wrong (the command itself reports that).
    """
    try:
        options = _first(parse(pairs(words)))
        stage = _stage(replace(options, stage=min(1, count(options.recipe))))
        sources(stage.data)
        is_here = find(stage.recipe.model, Path(options.models))
    except UserError:
        return ""
    return "" if is_here or (stage.run / RECIPE).is_file() else stage.recipe.model


def run(options: Options) -> None:
    """Train all stages of the recipe. A signal or a full disk ends it with status 75; the same command continues it.

    Where TRAIN_WEBHOOK is set, a notice says how it ended; where TRAIN_TRACKER is, trackers get the curves.
    """
    garbage.collect_seldom()
    trackers.asked_for()  # a wrong name is reported before anything is read
    combinations = read_sweep(options.recipe, options.overrides)
    name = options.run or _default_name(_first(options))
    with notice_at_end(name, lambda: _notice(options, name), distributed.is_first_process):
        if combinations:
            _sweep(options, name, combinations)
        else:
            _run(options)


def _first(options: Options) -> Options:
    """The options of the first run of a sweep; those of an ordinary run as they are."""
    combinations = read_sweep(options.recipe, options.overrides)
    return replace(options, overrides=options.overrides | combinations[0]) if combinations else options


def _sweep(options: Options, name: str, combinations: list[dict[str, str]]) -> None:
    """A run for each combination, then one table."""
    from train.commands import train_sweep

    if distributed.detect() is not None:
        raise UserError("a sweep starts its runs itself: give GPUS= instead of torchrun, mpirun or srun.")
    each = [
        replace(options, run=train_sweep.folder_name(name, values), overrides=options.overrides | values)
        for values in combinations
    ]
    for one in each:  # a mistake in the last is reported before the first begins
        _stage(replace(one, stage=min(1, count(one.recipe))))
    if status := train_sweep.train_each((one.run, one.words()) for one in each):
        sys.exit(status)
    train_sweep.report(name, Path(options.runs), combinations)


def _run(options: Options) -> None:
    rank_info = distributed.detect()
    if distributed.SPAWNED in os.environ:
        signals.terminate_with_parent()
    try:
        with signals.exit_on_sigterm(announce=_is_first(rank_info) and distributed.SPAWNED not in os.environ):
            status = _all_stages(options, rank_info)
    except distributed.FullError as error:
        _say(rank_info, f"stopped: {error}")
        status = EXIT_INTERRUPTED
    except UserError as error:
        if rank_info is None or rank_info.rank == 0:
            raise
        if not distributed.reported_by_rank_0(error):
            print(f"error on {socket.gethostname()}, process {rank_info.rank}: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        distributed.destroy_single_process_group()  # also after an error
    if status:
        sys.exit(status)


def _notice(options: Options, name: str) -> dict[str, Any]:
    """What a notice says beside how the run ended: this machine, and the losses of a finished run."""
    facts: dict[str, Any] = {"host": socket.gethostname()}
    try:
        record = read_run(below(options.runs, name, "run"))
    except UserError:  # not finished
        return facts
    loss, seconds = record["loss"], record["timings"]["steps_seconds"]
    summary = f"{record['steps']} steps, {seconds:,.0f} s"
    if loss["last"] is not None:
        summary += f", loss {loss['first']:.4f} -> {loss['last']:.4f}"
    return {**facts, "steps": record["steps"], "loss": loss, "seconds": seconds, "summary": summary}


def _all_stages(options: Options, rank_info: RankInfo | None) -> int:
    """Train the stages of the recipe in order; a recipe without stages is one run. Returns the exit status."""
    stages = count(options.recipe)
    numbers = range(1, stages + 1) if stages and not options.stage else [options.stage]
    _stage(replace(options, stage=numbers[-1]))  # a mistake in the last stage is reported before the first begins
    status = 0
    for number in numbers:
        one = replace(options, stage=number)
        status = _one_stage(one, rank_info, later_stages=numbers[-1] - number)
        if status or not finished(_stage(one).run):  # under torchrun a worker that was stopped returns 0 too
            break
    distributed.leave_process_group()
    return status


def _one_stage(options: Options, rank_info: RankInfo | None, later_stages: int) -> int:
    """Resolve, prepare, then launch several processes or train in this one. Returns the exit status."""
    # --- resolve ------------------------------------------------------------------------------------------------------
    stage = _stage(options)
    if not stage.data:
        raise UserError("train: which data? Example: make train DATA=data/demo.jsonl")
    if distributed.SPAWNED not in os.environ:  # within a second, before libraries of several seconds are imported
        _say(rank_info, f"checking {stage.data} and {stage.recipe.model}")
    cuda_start.begin(make_context=rank_info is None and options.gpus == 1)
    early = early_work.begin(stage.recipe, stage.data, Path(options.models), alone=rank_info is None)
    from train.training import devices  # these imports take seconds: mistakes in the arguments are reported before
    from train.training.same_start import agree_on_start
    from train.training.train_one import train_one

    chosen = devices.pick(options.gpus, stage.recipe, rank_info)

    # --- prepare ------------------------------------------------------------------------------------------------------
    prepared = _prepare(options, stage, chosen, later_stages, early)
    if stage.text:
        _say(rank_info, f"{stage.text}: {stage.data}, in {stage.run}")
    checkpoint = agree_on_start(prepared, chosen.rank_info, chosen.device)
    if prepared.finished:
        check_adapter(stage.run)
        result = f"{'model' if trained_model(stage.run) else 'adapter'} is {result_folder(stage.run)}"
        _say(rank_info, f"run {stage.run.name!r} is finished: nothing to do. Its {result}.")
        _say(rank_info, _next_commands(options, stage.run))
        return 0

    # --- launch, or train ---------------------------------------------------------------------------------------------
    if rank_info is None and chosen.processes > 1:
        return _launch(options, prepared, chosen)
    if not train_one(prepared, chosen, checkpoint):
        return 0 if "TORCHELASTIC_RUN_ID" in os.environ else EXIT_INTERRUPTED  # torchrun would treat 75 as a failure
    _say(rank_info, _next_commands(options, stage.run))
    return 0


def _stage(options: Options) -> Stage:
    """The recipe of one stage, its data and its folder."""
    overrides = options.overrides | ({"model": options.model} if options.model else {})
    folder = below(options.runs, options.run or _default_name(options), "run")
    parent = adapter_source(options.from_run, Path(options.runs)) if options.from_run else None
    stage = stage_of_recipe(options.recipe, options.stage, overrides, options.data, folder, parent)
    if stage.parent and (model := trained_model(stage.parent)):  # every weight was trained: its model is the base
        stage = replace(stage, recipe=replace(stage.recipe, model=model.as_posix()))
    check_settings(stage.recipe)
    check_measured(stage.recipe)
    check_preference(stage.recipe)
    return stage


def _default_name(options: Options) -> str:
    """data-recipe-model, each without its folder; a run whose name has an earlier name of the recipe keeps that name."""
    model = options.model or load_recipe(options.recipe, options.overrides).model
    data = stem(options.data) if options.data else ""
    names = ["-".join(filter(None, (data, recipe, Path(hub_name(model)).name))) for recipe in names_of(options.recipe)]
    return next((name for name in names if (Path(options.runs) / name).is_dir()), names[0])


def _prepare(
    options: Options, stage: Stage, devices: "Devices", later_stages: int, early: "EarlyWork"
) -> "PreparedRun":
    """The checked run, with a note for each setting that differs from what the user asked for."""
    from train.common.device import dtype_name
    from train.runs.resume import has_progress
    from train.training import prepare, step_setting
    from train.training.devices import place as pick_place

    processes, models = devices.processes, Path(options.models)
    begun = stage.run if has_progress(stage.run) else None
    place = pick_place(devices, stage.recipe)
    recipe, choice = step_setting.resolve(stage.recipe, place, _shape(stage.recipe, models), begun)
    stage = replace(stage, recipe=recipe)
    if "accumulation" not in options.overrides:
        recipe = prepare.fitted(recipe, stage.run, processes)
    cache, dtype = Path(options.runs, TOKENS), dtype_name(devices.dtype)
    prepared = prepare.prepare(
        recipe,
        stage.data,
        stage.run,
        stage.parent,
        models,
        processes,
        dtype,
        later_stages,
        show_progress=_is_first(devices.rank_info),
        cache=cache,
        early=early,
    )
    prepared.notes.extend(filter(None, [choice]))
    if recipe.accumulation != stage.recipe.accumulation:
        rows = prepared.inputs["rows_per_step"]
        prepared.notes.append(f"accumulation={recipe.accumulation}: the run was started with {rows} rows per step.")
    if options.gpus > 1 and devices.device.type == "cpu":
        note = f"gpus={options.gpus}: this machine has no GPU: training runs on the CPU, with processes={processes}."
        prepared.notes.append(note)
    prepared.notes.extend(filter(None, [_launcher_note(options, recipe, devices)]))
    return prepared


def _shape(recipe: Recipe, models: Path) -> Shape | None:
    """The shape of a base that is here; None where `prepare` will report what is wrong with it."""
    try:
        folder = find(recipe.model, models)
        return None if folder is None else read_folder_shape(folder, recipe.load_as)
    except UserError:
        return None


def _launcher_note(options: Options, recipe: Recipe, devices: "Devices") -> str:
    """A note if a launcher has set the number of processes and the user asked for a different number; else ""."""
    if devices.rank_info is None or distributed.SPAWNED in os.environ:
        return ""
    key, asked = ("gpus", options.gpus) if devices.device.type == "cuda" else ("processes", recipe.processes)
    typed = asked != 1 or "processes" in options.overrides
    return launchers.unused_option_note(key, asked, devices.processes) if typed else ""


def _launch(options: Options, prepared: "PreparedRun", devices: "Devices") -> int:
    """Start the processes under torchrun and wait for them. Returns the exit status."""
    from train.training.prepare import begin

    with lock_run(prepared.folder):  # the first worker then takes the lock itself
        begin(prepared)
    status = launch.spawn(options.words(), devices.processes, devices.device.type == "cuda")
    return status if status or prepared.finished else EXIT_INTERRUPTED


def _is_first(rank_info: RankInfo | None) -> bool:
    """Whether this process prints for all processes of the run."""
    return rank_info is None or rank_info.rank == 0


def _say(rank_info: RankInfo | None, text: str) -> None:
    if _is_first(rank_info):
        print(text, flush=True)


def _next_commands(options: Options, folder: Path) -> str:
    keys = {"run": folder.relative_to(options.runs), "models": options.models, "runs": options.runs}
    chat, compare, export = (commands.make(verb, **keys) for verb in ("infer", "compare", "export"))
    pages = commands.make("studio", models=options.models, runs=options.runs)
    return f"Next: {chat} (chat), {compare} (before and after), {export} (merged weights); in a browser: {pages}"
