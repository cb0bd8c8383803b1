"""What RUN= or MODEL= names, found and loaded: a finished run, its merged export, or any model, ready to answer.

Knows folders, and neither options nor terminals. A merged export is taken before the adapter on its base, because it
answers faster, if the GPU has room for it. A run that trained every weight has its model itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from train.common import commands
from train.common.device import pick_device, pick_dtype
from train.common.errors import UserError
from train.common.files import sha256
from train.common.names import below
from train.data.tokens.chat_template import Encoder
from train.model import adapters
from train.model.architecture import STORED
from train.model.folder import check_whole, read_manifest, resolve
from train.model.loading import fits, keeps_float, load
from train.model.tokenizer import Tokenizer, load_tokenizer
from train.runs.folder import RESTORE, newest_run, read_run, trained_model


@dataclass(frozen=True)
class Source:
    """What is to be loaded: a model folder, or with `adapter` the folder of a run.

    description: one line for the user. recipe: the run's, or what an export's manifest keeps of it; empty for other
    models.
    """

    folder: Path
    description: str
    adapter: bool = False
    recipe: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainedModel:
    """A loaded model with its tokenizer; recipe and description are its Source's."""

    model: nn.Module
    tokenizer: Encoder
    recipe: dict[str, Any]
    description: str


def load_trained(
    models: Path,
    runs: Path,
    run: str = "",
    model: str = "",
    default_model: str = "",
    dtype: str = "auto",
    on_source: Callable[[str], None] = lambda description: None,
) -> TrainedModel:
    """Find and load what `run` or `model` names (see `find_source`), on this machine's device.

    Args:
        dtype: auto, bf16, fp16 or fp32. on_source: called with the description before the weights are read.
    """
    source = find_source(models, runs, run, model, default_model, dtype)
    on_source(source.description)
    device = pick_device()
    compute_dtype = pick_dtype(device, dtype)
    base = resolve(source.recipe["model"], models) if source.adapter else source.folder
    keep_float = keeps_float(base, device, load_as_of(source.recipe) if source.adapter else STORED)
    if source.adapter:
        loaded, tokenizer, _ = load_run(source.folder, models, compute_dtype, device, keep_float)
    else:
        loaded, tokenizer = load(base, compute_dtype, device, keep_float), load_tokenizer(base)
    return TrainedModel(loaded, tokenizer, source.recipe, source.description)


def find_source(
    models: Path,
    runs: Path,
    run: str = "",
    model: str = "",
    default_model: str = "",
    dtype: str = "auto",
    any_size: bool = False,
) -> Source:
    """The model that `run` or `model` names; with neither the newest finished run, and without any the default model.

    Args:
        run: a finished run below `runs`: its merged export if there is one and it fits, else its adapter on its base;
            or the model of a run that trained every weight.
        model: a name below `models`, or a folder.
        any_size: take a merged export even where the GPU has no room for it.
    Raises:
        UserError: both are given, or what is named is missing or not finished.
    """
    if run and model:
        raise UserError(f"run={run} and model={model}: give one of them.")
    if model:
        folder = resolve(model, models)
        return Source(folder, f"model {model}", recipe=(read_manifest(folder) or {}).get("inputs", {}))
    if run:
        return _source_of_run(below(runs, run, "run"), f"run {run}", dtype, any_size)
    if (newest := newest_run(runs)) is not None:
        description = f"run {newest.name}, the newest that is finished (RUN= or MODEL= for another)"
        return _source_of_run(newest, description, dtype, any_size)
    description = f"model {default_model}, the default base: there is no finished run below {runs}/ yet"
    try:
        return Source(resolve(default_model, models), description)
    except UserError as error:
        train = commands.make("train", data="mine.jsonl", run="mine")
        raise UserError(
            f"there is no finished run below {runs}/ yet. Train one: {train}\nOr chat with a base: {error}"
        ) from error


def identity(source: Source) -> dict[str, Any]:
    """What tells a model from any other, for a record of its answers: its name, and a hash that its weights decide."""
    weights = source.folder / "adapter" / "adapter_model.safetensors" if source.adapter else None
    if weights is not None and weights.is_file():
        return {"model": str(source.folder), "weights": sha256(weights), "base": source.recipe["model"]}
    manifest = source.folder / "manifest.json"
    if manifest.is_file():
        return {"model": str(source.folder), "weights": sha256(manifest)}
    sizes = {path.name: path.stat().st_size for path in sorted(source.folder.iterdir()) if path.is_file()}
    return {"model": str(source.folder), "weights": sizes}


def _source_of_run(folder: Path, description: str, dtype: str, any_size: bool) -> Source:
    recipe, merged = read_run(folder)["recipe"], folder / "merged"
    if model := trained_model(folder):
        check_whole(model, RESTORE)
        return Source(model, f"{description}: its model {model}", recipe=recipe)
    exported = check_whole(merged, f"Export it again: make export RUN={folder.name}")
    if exported and (any_size or _fits(merged, dtype)):
        return Source(merged, f"{description}: its merged export {merged}", recipe=recipe)
    reason = "the GPU has no room for the merged export" if exported else "no merged export yet"
    return Source(folder, f"{description}: its adapter on {recipe['model']} ({reason})", adapter=True, recipe=recipe)


def _fits(merged: Path, dtype: str) -> bool:
    device = pick_device()
    return fits(merged, pick_dtype(device, dtype), device)


def load_as_of(recipe: dict[str, Any]) -> str:
    """How training loaded the base, by the recipe in run.json; an older program had no such key."""
    return str(recipe.get("load_as", STORED))


def load_run(
    run: Path, models: Path, dtype: torch.dtype, device: torch.device | str = "cpu", keep_float: bool = False
) -> tuple[nn.Module, Tokenizer, dict[str, Any]]:
    """A finished run: its base with the adapter, or its own model; the tokenizer; and run.json.

    Raises:
        UserError: the run is not finished, or its base is missing.
    """
    record = read_run(run)
    if own := trained_model(run):
        return load(own, dtype, device), load_tokenizer(own), record
    folder = resolve(record["recipe"]["model"], models)
    base = load(folder, dtype, device, keep_float, load_as=load_as_of(record["recipe"]))
    model = adapters.load_adapter(base, run / "adapter")
    return model.eval(), load_tokenizer(folder), record
