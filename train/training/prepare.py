"""Everything about a training run that can be known before a weight is loaded or a file is written.

Reads the recipe, the data, the base's small files and the run folder; what is wrong is gathered and said at once. Knows nothing of
engines and devices' memory. The whole data set is in memory as numbers, which is why it can be checked whole.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from train.common.errors import UserError
from train.common.files import free_bytes, make_folder, read_json, sha256, write_json, write_text
from train.config.recipe import Recipe
from train.data import conversations
from train.data.batches import Schedule
from train.data.conversations import hash_data
from train.data.samples import Sample, encode
from train.model import lora
from train.model.decoder import Decoder
from train.model.folder import resolve
from train.model.layouts import DecoderConfig
from train.model.loading import read_folder_config
from train.model.tokenizer import Tokenizer, load_tokenizer
from train.runs import provenance
from train.runs.folder import changes, recorded
from train.training.distributed import AgreedError


@dataclass(frozen=True)
class Job:
    """A checked run: its inputs as hashes, its rows as a plan, its notes for the person who started it."""

    recipe: Recipe
    run: Path
    base: Path
    tokenizer: Tokenizer
    samples: list[Sample]
    plan: Schedule
    inputs: dict[str, Any]
    parent: Path | None
    notes: list[str]
    lineage: list[dict[str, Any]]

    @property
    def finished(self) -> bool:
        return (self.run / "run.json").is_file()


def prepare(
    recipe: Recipe,
    data: str,
    run: Path,
    parent: Path | None,
    models: Path,
    processes: int,
    dtype: str,
    later: int = 0,
) -> Job:
    """Check everything there is to check; nothing is written and no weight is loaded.

    Args:
        parent: the run whose adapter this one starts from, or None. processes: how many will share a step's rows.
        dtype: what is computed in, as it stands in the record. later: stages that come after this one, which need room too.
    Raises:
        UserError: all that is wrong with data, base and parent together; then whatever follows from them.
    """
    talks, base, _ = _all(
        lambda: conversations.load(data), lambda: resolve(recipe.model, models), lambda: _check_parent(recipe, parent)
    )
    config, _ = read_folder_config(base)
    names = lora.targets(config.layout, recipe.targets)
    tokenizer = load_tokenizer(base)
    samples, summary = encode(talks, tokenizer, recipe)
    notes = _unlearnable(summary.unlearnable, recipe.unlearnable)
    rows = recipe.batch * recipe.accumulation * processes
    plan = Schedule(samples, recipe.length, rows, recipe.epochs, recipe.steps, recipe.seed, recipe.pack)
    inputs = _inputs(recipe, data, base, parent, rows, dtype)
    job = Job(
        recipe, run, base, tokenizer, samples, plan, inputs, parent, [str(summary), *notes], provenance.lineage(parent)
    )
    _check_unchanged(job)
    if not job.finished:
        _check_disk(job, config, names, later)
    return job


def _unlearnable(places: Sequence[str], action: str) -> list[str]:
    """A sentence that names the conversations in which nothing is learnt: to be noted, or raised if `action` is stop."""
    if not places:
        return []
    more = f" and {len(places) - 5} more" if len(places) > 5 else ""
    text = f"nothing to learn (every label masked, or cut off) in {', '.join(places[:5])}{more}"
    if action == "stop":
        raise UserError(f"{text}.\nMend these conversations, raise length=, or say unlearnable=skip to leave them out.")
    return [f"{text}: left out (unlearnable=skip)."]


def _all(*checks: Callable[[], Any]) -> list[Any]:
    """The value of every check, or one UserError with all of their messages."""
    values, problems = [], []
    for check in checks:
        try:
            values.append(check())
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return values


def _check_parent(recipe: Recipe, parent: Path | None) -> None:
    """FROM= must be a run with an adapter of the recipe's own shape."""
    if parent is None:
        return
    path = parent / "adapter" / lora.CONFIG
    if not path.is_file():
        raise UserError(f"from={parent.name}: run {parent} has no adapter. Finish it first, or leave FROM= out.")
    theirs, ours = read_json(path), {"r": recipe.rank, "lora_alpha": recipe.alpha}
    wrong = [f"{key} is {theirs[key]} there and {value:g} here" for key, value in ours.items() if theirs[key] != value]
    if wrong:
        hint = f"rank={theirs['r']} alpha={theirs['lora_alpha']:g}"
        raise UserError(f"from={parent.name}: its adapter has another shape: {', '.join(wrong)}. Give {hint}.")


def check_ways(recipe: Recipe, device: str) -> None:
    """Refuse what DeepSpeed would break off with, after minutes of loading."""
    if recipe.precision == "fp16" and device == "cpu":
        raise UserError(
            "precision=fp16 needs a GPU: DeepSpeed does not compute it on a CPU. Give precision=fp32 or bf16."
        )
    if recipe.zero == 3 and recipe.checkpointing != "off":
        raise UserError(
            f"zero=3 takes its weights away while checkpointing={recipe.checkpointing} recomputes with them. Give "
            "checkpointing=off, or zero=2: the base is frozen, so stage 2 shards all that an optimizer keeps (and stage 3 does "
            "not shard Int4 weights)."
        )


def _inputs(recipe: Recipe, data: str, base: Path, parent: Path | None, rows: int, dtype: str) -> dict[str, Any]:
    adapter = parent / "adapter" / lora.WEIGHTS if parent else None
    return {
        "data": {"path": data, **hash_data(data)},
        "base": {"name": recipe.model, "files": provenance.hash_folder(base)},
        "from": {"run": parent.name, "sha256": sha256(adapter)} if parent and adapter else None,
        "recipe": asdict(recipe),
        "rows_per_step": rows,
        "dtype": dtype,
    }


def start_of(job: Job, found: Path | None) -> dict[str, str]:
    """What all processes of a run must have in common before they begin, each from its own disk; short, in words."""
    inputs = job.inputs
    return {
        "finished": "yes" if job.finished else "no",
        "checkpoint": found.name if found else "none",
        "data": inputs["data"]["sha256"][:12],
        "base": _digest(inputs["base"]["files"]),
        "adapter of FROM=": (inputs["from"] or {}).get("sha256", "none")[:12],
        "recipe": _digest(inputs["recipe"]),
        "rows a step": str(inputs["rows_per_step"]),
        "computed in": inputs["dtype"],
    }


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def check_same(starts: list[tuple[str, dict[str, str]]]) -> None:
    """Refuse (machine, start_of) of several processes that are not the same.

    Raises:
        AgreedError: what differs, and between which machines.
    """
    host, first = starts[0]
    other = next((entry for entry in starts if entry[1] != first), None)
    if other is None:
        return
    differ = [
        f"{key}: {value} on {host}, {other[1][key]} on {other[0]}"
        for key, value in first.items()
        if value != other[1][key]
    ]
    listed = "\n  ".join(differ)
    raise AgreedError(
        f"the processes would not begin with the same:\n  {listed}\nNothing was changed. Put runs/, models/ and the data on a folder "
        "that all machines share (runs=FOLDER models=FOLDER), or copy them to each."
    )


def _check_unchanged(job: Job) -> None:
    """A run folder belongs to one set of inputs."""
    old = recorded(job.run)
    if old is None:
        if (job.run / "run.json").is_file() or (job.run / "checkpoints").is_dir():
            raise UserError(f"{job.run}: a run folder without inputs.json. Choose another RUN=, or remove it.")
        return
    found = changes(old, job.inputs)
    if found:
        listed = "\n  ".join(found)
        raise UserError(
            f"run {job.run.name!r} was begun with other inputs:\n  {listed}\n"
            f"Nothing was changed. Start a new one with RUN=another-name, and FROM={job.run.name} to begin with what this one "
            "has learnt; or give the same inputs to go on with it."
        )


def fitted(recipe: Recipe, run: Path, processes: int) -> Recipe:
    """The recipe with the accumulation that keeps the rows a step of a run that was begun with another number of processes.

    Raises:
        UserError: they cannot share those rows alike.
    """
    old = recorded(run)
    if old is None or old["rows_per_step"] == recipe.batch * recipe.accumulation * processes:
        return recipe
    rows, share = old["rows_per_step"], recipe.batch * processes
    if rows % share:
        able = [str(n) for n in range(1, rows // recipe.batch + 1) if rows % (recipe.batch * n) == 0]
        raise UserError(
            f"run {run.name!r} was begun with {rows} rows a step, which {processes} processes of batch={recipe.batch} cannot share "
            f"alike: {rows} / ({recipe.batch} × {processes}) is no whole number. With this batch: "
            f"{', '.join(able) or 'none'} processes (GPUS=, processes=); or another batch=."
        )
    return replace(recipe, accumulation=rows // share)


def _check_disk(job: Job, config: DecoderConfig, names: list[str], later: int = 0) -> None:
    """Room for the checkpoints that are kept and not yet there, one that is being written, and the adapter; of later stages as well."""
    needed = room(config, names, job.recipe, there=len(list((job.run / "checkpoints").glob("step-*"))))
    needed += later * room(config, names, job.recipe)
    if (free := free_bytes(job.run)) < needed:
        each = f", in this stage and the {later} after it" if later else ""
        raise UserError(
            f"{job.run}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed for {job.recipe.keep} checkpoints and the "
            f"adapter{each}. Free some, give runs=FOLDER on another disk, or keep=1."
        )


def room(config: DecoderConfig, names: list[str], recipe: Recipe, there: int = 0) -> int:
    """Bytes that the checkpoints still to be written take, of which `there` are written, with one on its way and the adapter."""
    missing = max(recipe.keep - there, 0) + 1
    return 4 * adapter_size(config, names, recipe.rank) * (3 * missing + 1) + (64 << 20)


def adapter_size(config: DecoderConfig, names: list[str], rank: int) -> int:
    """Numbers in A and B of every linear called one of `names`."""
    with torch.device("meta"):
        model = Decoder(config)
    linears = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.rpartition(".")[2] in names]
    return sum(rank * (m.in_features + m.out_features) for m in linears)


def begin(job: Job) -> None:
    """Make the run folder: the recipe after overrides, and the inputs that it belongs to, as this command gives them."""
    make_folder(job.run)
    write_text(job.run / "recipe.yaml", yaml.safe_dump(asdict(job.recipe), sort_keys=False, allow_unicode=True))
    write_json(job.run / "inputs.json", job.inputs)
    if job.lineage:
        write_text(job.run / "lineage.txt", _lineage(job))


def _lineage(job: Job) -> str:
    """Where a run comes from, a line an ancestor, for a person."""
    lines = [
        f"{entry['run']}: {entry['steps']} steps on {entry['data']}, learning rate {entry['learning_rate']}, loss {entry['loss']}, "
        f"adapter {entry['adapter'].get(lora.WEIGHTS, '')[:12]}"
        for entry in job.lineage
    ]
    own = f"{job.run.as_posix()}: {len(job.plan)} steps on {job.inputs['data']['path']}, learning rate {job.recipe.learning_rate}"
    return "".join(f"{line}\n" for line in [*lines, own])
