"""A base and the adapters of several runs, loaded together: the base's weights are in memory once.

Knows folders, and neither options nor requests. Every adapter is on the linears of a model of its own, whose modules
are those of the base: only the linears that it changes differ.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from train.common import commands
from train.common.device import pick_device, pick_dtype
from train.common.errors import UserError
from train.common.names import below
from train.inference.generate import context_of
from train.inference.trained import load_as_of
from train.model import adapters
from train.model.architecture import STORED
from train.model.decoder import Decoder
from train.model.folder import check_whole, read_manifest, resolve
from train.model.loading import keeps_float, load
from train.model.stops import read_generation
from train.model.tokenizer import Tokenizer, load_tokenizer
from train.runs.folder import RESTORE, newest_run, read_run, trained_model


@dataclass(frozen=True)
class NamedModel:
    """A model that can be asked for. root: its folder. parent: the name of its base, empty for a base.

    recipe: what it was trained with; empty for other models.
    """

    name: str
    root: str
    parent: str
    model: Decoder
    recipe: dict[str, Any]


@dataclass(frozen=True)
class SharedBase:
    """Models that share a tokenizer; the first is the base. generation: of its generation_config.json.

    tool_template: whether the template that the base was published with has a place for tools.
    """

    models: tuple[NamedModel, ...]
    tokenizer: Tokenizer
    generation: dict[str, Any]
    context: int
    tool_template: bool


@dataclass(frozen=True)
class BaseSource:
    """What is to be loaded: the folder of a base, and those of runs whose adapters go on it.

    whole: the folder of a run whose own model is the base, because it trained every weight.
    """

    folder: Path
    runs: tuple[Path, ...]
    description: str
    load_as: str = STORED  # how the runs' training loaded the base
    whole: Path | None = None


def find_base(models: Path, runs: Path, run: str, model: str, default_model: str) -> BaseSource:
    """The base and the runs that `run` (names, with commas between) or `model` names.

    With neither, the newest finished run; without any, the default model.

    Raises:
        UserError: both are given, what is named is missing or not finished, or the runs have several bases.
    """
    if run and model:
        raise UserError(f"run={run} and model={model}: give one of them.")
    if model:
        return BaseSource(resolve(model, models), (), f"model {model}")
    names = [name.strip() for name in run.split(",") if name.strip()]
    folders = [below(runs, name, "run") for name in dict.fromkeys(names)]
    if not folders and (newest := newest_run(runs)) is not None:
        folders = [newest]
    if not folders:
        try:
            return BaseSource(resolve(default_model, models), (), f"model {default_model}, the default base")
        except UserError as error:
            train = commands.make("train", data="mine.jsonl", run="mine")
            raise UserError(f"there is no finished run below {runs}/ yet. Train one: {train}\nOr {error}") from error
    if own := [folder for folder in folders if trained_model(folder)]:
        return _whole_model(
            folders, own[0], "" if run else ", the newest run that is finished (RUN= or MODEL= for another)"
        )
    bases = {folder.name: resolve(read_run(folder)["recipe"]["model"], models).resolve() for folder in folders}
    if len(set(bases.values())) > 1:
        listed = "\n".join(f"  {name}: {base}" for name, base in bases.items())
        raise UserError(f"run={run}: these runs have several bases, and a server has one:\n{listed}")
    formats = {folder.name: load_as_of(read_run(folder)["recipe"]) for folder in folders}
    if len(set(formats.values())) > 1:
        listed = "\n".join(f"  {name}: load_as={load_as}" for name, load_as in formats.items())
        raise UserError(f"run={run}: these runs loaded their base in several ways, and a server has one:\n{listed}")
    base = resolve(read_run(folders[0])["recipe"]["model"], models)
    described = ", ".join(bases) + ("" if run else ", the newest run that is finished (RUN= or MODEL= for another)")
    return BaseSource(base, tuple(folders), f"base {base} with {described}", formats[folders[0].name])


def _whole_model(folders: list[Path], run: Path, remark: str) -> BaseSource:
    """The model of a run that trained every weight, which is served alone.

    Raises:
        UserError: `folders` has other runs too.
    """
    model = trained_model(run)
    assert model is not None
    check_whole(model, RESTORE)
    if len(folders) > 1:
        raise UserError(
            f"run={','.join(folder.name for folder in folders)}: run {run.name} trained every weight of its base, and a server "
            f"has one base. Serve it alone: RUN={run.name}"
        )
    return BaseSource(model, (), f"run {run.name}: its model {model}{remark}", whole=run)


def load_base(source: BaseSource, dtype: str = "auto", notify: Callable[[str], None] = print) -> SharedBase:
    """Load what `find_base` found, onto this machine's device.

    Args:
        dtype: auto, bf16, fp16 or fp32. notify: is called with what is loaded, before its weights are read.
    """
    device, folder = pick_device(), source.folder
    compute_dtype = pick_dtype(device, dtype)
    notify(f"loading {source.description}")
    base = load(
        folder, compute_dtype, device, keeps_float(folder, device, source.load_as), load_as=source.load_as
    ).eval()
    if source.whole:
        models = [NamedModel(source.whole.name, str(source.whole), "", base, read_run(source.whole)["recipe"])]
    else:
        inputs = (read_manifest(folder) or {}).get("inputs", {})
        models = [NamedModel(folder.name, str(folder), "", base, inputs)]
    for run in source.runs:
        if run.name == folder.name:
            raise UserError(f"run {run.name} has the name of its base: rename one of their folders.")
        adapted: Any = adapters.load_adapter(twin(base), run / "adapter").eval()
        recipe = read_run(run)["recipe"]
        models.append(NamedModel(run.name, str(run), folder.name, adapted.get_base_model(), recipe))
    return SharedBase(
        tuple(models), load_tokenizer(folder), read_generation(folder), context_of(base), _has_tools(folder)
    )


def twin(model: Decoder) -> Decoder:
    """A model whose layers are those of `model`, in modules of its own: one can be replaced without the other."""
    copied: Decoder = _copied(model)
    return copied


def _copied(module: nn.Module) -> Any:
    if not module._modules:
        return module
    own = copy.copy(module)
    own._modules = {name: child and _copied(child) for name, child in module._modules.items()}
    return own


def _has_tools(folder: Path) -> bool:
    """Whether the published template writes tools as Qwen2.5 does. It is looked at, and never run."""
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        path = folder / name
        if path.is_file() and "<tool_call>" in path.read_text(encoding="utf-8", errors="replace"):
            return True
    return False
