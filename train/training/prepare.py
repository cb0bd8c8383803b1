"""Everything before the first step: all checks that need no weights, the decisions taken for the user, and the model.

Reads the recipe, the data, the base's small files and the run's folder, and writes nothing before `begin`. Problems are
gathered and raised at once. Knows nothing of engines. The whole data set is checked; its tokens are in memory, or of
large data in a cache on the disk.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.common.device import dtype_name
from train.common.errors import UserError, first_few
from train.common.files import free_bytes
from train.common.threads import in_background
from train.config.recipe import Recipe, check_measured, check_preference
from train.data.choice.selection import Selection, check_settings, select, token_counter
from train.data.choice.writing import write_conversations, write_removed
from train.data.origins.sources import hash_data, pinned
from train.data.rows.data_row import ReadOptions
from train.data.tokens import training_set
from train.data.tokens.batches import Schedule
from train.data.tokens.encoding import TokenArrays
from train.data.tokens.pairs import examples_of
from train.data.tokens.samples import Example
from train.data.tokens.settings import row_length
from train.model import adapters, lora
from train.model.adapters import AnyAdapter
from train.model.architecture import STORED
from train.model.folder import resolve
from train.model.layouts import DecoderConfig
from train.model.loading import load, read_folder_config
from train.model.lora_start import RANDOM, check_rank
from train.model.published import read_folder_shape
from train.model.stops import no_chat_model, thinking_note
from train.model.tokenizer import Tokenizer, load_tokenizer
from train.runs import folder, provenance
from train.runs.folder import CHECKPOINTS, adapter_folder, trained_model
from train.runs.resume import check_unchanged, fitted_accumulation
from train.training import adapter_start, fp8_recipe, full_recipe, full_weights, peft_recipe
from train.training.distributed import RankInfo
from train.training.early_work import NOTHING_EARLY, EarlyWork, read_options
from train.training.gradient_shares import check_shares
from train.training.parent_adapter import (
    about_parent,
    check_begins_once,
    digest_of,
    parent_notes,
    read_parent,
    reference_note,
)
from train.training.trained_size import disk_space, trained_parameters


@dataclass(frozen=True)
class PreparedRun:
    """A checked run: its inputs as hashes, its samples and their schedule, notes for the person who started it."""

    recipe: Recipe
    folder: Path
    base: Path
    tokenizer: Tokenizer
    samples: Sequence[Example]
    schedule: Schedule
    inputs: dict[str, Any]
    parent: Path | None
    notes: list[str]
    lineage: list[dict[str, Any]]
    selection: Selection  # without the conversations that are trained on: those are samples now
    held_out: Sequence[Example]

    @property
    def finished(self) -> bool:
        return folder.finished(self.folder)


def prepare(
    recipe: Recipe,
    data: str,
    run: Path,
    parent: Path | None,
    models: Path,
    processes: int,
    dtype: str,
    later_stages: int = 0,
    show_progress: bool = False,
    cache: Path = Path("runs", folder.TOKENS),
    early: EarlyWork = NOTHING_EARLY,
) -> PreparedRun:
    """Check all that can be checked; nothing is written and no weights are loaded.

    Args:
        run: its folder. parent: the run, or the folder of an adapter, that this one starts from; or None.
        processes: how many share the rows of a step. dtype: of the computation, as inputs.json has it.
        later_stages: number of stages after this one, which need space on the disk too.
        cache: the folder for the tokens of large data. early: what was begun for these arguments.
    Raises:
        UserError: all that is wrong with data, base and parent together; then whatever follows from them.
    """
    check_settings(recipe)
    check_measured(recipe)
    check_preference(recipe)
    check_shares(recipe, processes)
    check_begins_once(recipe, later_stages)
    options = read_options(recipe)
    base, adapter = _read_base(recipe, data, options, parent, models)
    base_hashes = early.base_hashes or in_background(lambda: provenance.hash_folder(base))
    config, _ = read_folder_config(base)
    full_recipe.check_base(recipe, read_folder_shape(base, recipe.load_as))  # also refuses what cannot be loaded so
    targets = lora.targets(config.layout, recipe.targets)
    check_rank(recipe.start, recipe.rank, targets, config)
    if parent is not None and adapter is not None:
        with about_parent(parent):
            adapters.check_targets(adapter, recipe, config)
    tokenizer, hashes = load_tokenizer(base), hash_data(data)
    loaded, tokens = training_set.load_tokens(data, tokenizer, recipe, cache, options, hashes, early.tokens)
    selection = select(loaded.conversations, recipe, token_counter(tokenizer, recipe), show_progress)
    samples, summary = examples_of(tokens, recipe, selection.trained_rows)
    held_out = _held_out_samples(tokens, selection, recipe)
    notes = [*selection.notes(), str(summary), *_without_labels(summary.unlearnable, recipe.unlearnable)]
    notes += [f"data: {notice}." for notice in loaded.notices()]
    notes += parent_notes(recipe, adapter) if adapter else []
    template = recipe.template
    notes += filter(None, [no_chat_model(base, tokenizer, template), thinking_note(config.layout, tokenizer, template)])
    notes += beyond_context(config, recipe.length, samples.longest)
    rows = recipe.batch * recipe.accumulation * processes
    schedule = Schedule(samples, row_length(recipe), rows, recipe.epochs, recipe.steps, recipe.seed, recipe.pack)
    inputs = _inputs(recipe, {"path": pinned(data), **hashes}, base_hashes(), parent, rows, dtype)
    inputs |= {"rows": digest} if (digest := selection.digest()) else {}
    lineage, selection = provenance.lineage(parent), replace(selection, trained=[])
    prepared = PreparedRun(
        recipe, run, base, tokenizer, samples, schedule, inputs, parent, notes, lineage, selection, held_out
    )
    check_unchanged(run, inputs, recipe_defaults=asdict(Recipe()))
    if not prepared.finished:
        _check_disk(prepared, config, targets, later_stages)
    return prepared


def _read_base(
    recipe: Recipe, data: str, options: ReadOptions, parent: Path | None, models: Path
) -> tuple[Path, AnyAdapter | None]:
    """The base's folder and the adapter to start from.

    Raises:
        UserError: all that is wrong with them, and with the data: a person corrects it at once.
    """
    try:
        base, adapter = _run_all(lambda: resolve(recipe.model, models), lambda: read_parent(recipe, parent))
    except UserError as error:
        message = str(error)
        try:
            training_set.read(data, options)
        except UserError as found:
            message = f"{found}\n{message}"
        raise UserError(message) from error
    return base, adapter


def _held_out_samples(tokens: TokenArrays, selection: Selection, recipe: Recipe) -> Sequence[Example]:
    """The samples to measure on; conversations without a token to measure on are left out."""
    if not selection.held_out:
        return []
    try:
        return examples_of(tokens, recipe, selection.held_out_rows)[0]
    except UserError as error:
        raise UserError(f"held_out={recipe.held_out:g}, the conversations set aside: {error}") from error


def _run_all(*checks: Callable[[], Any]) -> list[Any]:
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


def _without_labels(places: Sequence[str], action: str) -> list[str]:
    """A note that names the conversations without a label (`places`); raised as an error if `action` is stop."""
    if not places:
        return []
    text = f"no token to train on (every label masked, or cut off) in {first_few(places)}"
    if action == "stop":
        raise UserError(f"{text}.\nCorrect these conversations, raise length=, or leave them out: unlearnable=skip.")
    return [f"{text}: left out (unlearnable=skip)."]


def beyond_context(config: DecoderConfig, length: int, lengths: np.ndarray) -> list[str]:
    """A note where `length` is over what the base was made for, and how many samples (of these lengths) are.

    Rotary positions exist for any length. Dynamic NTK (Qwen-1, beyond seq_length) is off in training, as published.
    """
    limit, ntk = config.max_position_embeddings, config.use_dynamic_ntk
    limit = min(limit, config.seq_length) if ntk else limit
    if length <= limit:
        return []
    count = int((lengths > limit).sum())
    reason = "training computes positions without dynamic NTK, answers with it" if ntk else "it has not seen them"
    return [
        f"length={length} is more than the {limit} tokens that the base was made for, and {count} of {len(lengths)} "
        f"conversations have more: {reason}. length={limit} keeps to them."
    ]


def check_supported(recipe: Recipe, device: str) -> None:
    """Refuse combinations that DeepSpeed would refuse only after minutes of loading. `device`: cpu or cuda."""
    full_recipe.check_recipe(recipe)
    peft_recipe.check_recipe(recipe)
    if recipe.precision == "fp16" and device == "cpu":
        raise UserError("precision=fp16 needs a GPU: on a CPU DeepSpeed refuses it. Give precision=fp32 or bf16.")
    if recipe.dora and recipe.zero == 3:
        raise UserError(
            "zero=3 takes A and B apart, which dora=on needs whole to measure the rows of a weight. Give zero=2: the base "
            "is frozen, so stage 2 shards all that the optimizer keeps."
        )
    if recipe.dora and recipe.start != RANDOM:
        raise UserError(f"dora=on and start={recipe.start} are not computed together. Give dora=off, or start=random.")
    if recipe.zero == 3 and recipe.checkpointing not in ("off", "auto"):
        raise UserError(
            f"zero=3 removes weights that checkpointing={recipe.checkpointing} needs to compute blocks again. Give "
            "checkpointing=off, or zero=2: the base is frozen, so stage 2 shards all that the optimizer keeps (and "
            "stage 3 does not shard Int4 weights)."
        )


def _inputs(
    recipe: Recipe, data: dict[str, Any], base: dict[str, str], parent: Path | None, rows: int, dtype: str
) -> dict[str, Any]:
    """The content of inputs.json: all that decides the results of the run. base: file name -> sha256."""
    adapter = {"run": parent.name, "sha256": digest_of(parent)} if parent else None
    return {
        "data": data,
        "base": {"name": recipe.model, "files": base},
        "from": adapter,
        "recipe": asdict(recipe),
        "rows_per_step": rows,
        "dtype": dtype,
    }


# --- the folder of the run --------------------------------------------------------------------------------------------


def fitted(recipe: Recipe, run: Path, processes: int) -> Recipe:
    """The recipe with the accumulation that keeps the rows per step of a run begun in another number of processes.

    Raises:
        UserError: these processes cannot share the rows of a step equally.
    """
    return replace(recipe, accumulation=fitted_accumulation(run, recipe.batch, recipe.accumulation, processes))


def _check_disk(prepared: PreparedRun, config: DecoderConfig, targets: list[str], later_stages: int) -> None:
    """Refuse a disk without space for this run's files and those of later stages."""
    run, recipe = prepared.folder, prepared.recipe
    written = len(list((run / CHECKPOINTS).glob("step-*")))
    needed = disk_space(config, targets, recipe, written) + later_stages * disk_space(config, targets, recipe)
    if (free := free_bytes(run)) < needed:
        stages = f", in this stage and the {later_stages} after it" if later_stages else ""
        raise UserError(
            f"{run}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed for {recipe.keep} checkpoints and the "
            f"adapter{stages}. Free some space, give runs=FOLDER on another disk, or keep=1."
        )


def begin(prepared: PreparedRun) -> None:
    """Make the run's folder: the recipe after overrides, the inputs, and the lineage. The caller holds its lock.

    Raises:
        UserError: another process has trained in it since `prepare`, with other inputs.
    """
    for note in check_unchanged(prepared.folder, prepared.inputs, recipe_defaults=asdict(Recipe())):
        print(note, flush=True)
    lineage = _lineage_text(prepared) if prepared.lineage else ""
    folder.begin(prepared.folder, asdict(prepared.recipe), prepared.inputs, lineage)
    _write_selection(prepared.folder, prepared.selection)


def _write_selection(run: Path, selection: Selection) -> None:
    """held_out.jsonl and removed.jsonl, where the recipe asks for them; else those of an earlier start are removed."""
    held_out, removed = run / folder.HELD_OUT, run / folder.REMOVED
    if selection.split:
        write_conversations(held_out, selection.held_out, named=True)
    else:
        held_out.unlink(missing_ok=True)
    if selection.cleaned:
        write_removed(removed, selection.cleaned.removed)
    else:
        removed.unlink(missing_ok=True)


def _weights_text(hashes: dict[str, str]) -> str:
    """The first digits of the hash of an adapter, or of the first file of a model's weights."""
    kind, names = ("adapter", [lora.WEIGHTS]) if lora.WEIGHTS in hashes else ("weights", sorted(hashes))
    return f"{kind} {next((hashes[name] for name in names if name.endswith('.safetensors')), '')[:12]}"


def _lineage_text(prepared: PreparedRun) -> str:
    """The runs that this one starts from, a line each, for a person."""
    lines = [
        f"{entry['run']}: {entry['steps']} steps on {entry['data']}, learning rate {entry['learning_rate']}, "
        f"loss {entry['loss']}, {_weights_text(entry['adapter'])}"
        for entry in prepared.lineage
    ]
    steps, data = len(prepared.schedule), prepared.inputs["data"]["path"]
    own = f"{prepared.folder.as_posix()}: {steps} steps on {data}, learning rate {prepared.recipe.learning_rate}"
    return "".join(f"{line}\n" for line in [*lines, own])


# --- decisions and model ----------------------------------------------------------------------------------------------


def decisions(
    prepared: PreparedRun,
    rank_info: RankInfo,
    device: torch.device,
    dtype: torch.dtype,
    zero_stage: int,
    keep_float: bool,
) -> list[str]:
    """What was decided for the user, a line each. keep_float: whether packed weights are also kept in float32."""
    recipe, schedule = prepared.recipe, prepared.schedule
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    reason = "chosen for this device" if recipe.precision == "auto" else f"as precision={recipe.precision} says"
    processes = f"{rank_info.world_size} processes" if rank_info.world_size > 1 else "1 process"
    rows = f"{prepared.inputs['rows_per_step']} rows of at most {row_length(recipe)} tokens"
    lines = [
        f"base: {recipe.model} in {prepared.base}; run: {prepared.folder}",
        f"device: {name}, {dtype_name(dtype)} ({reason}), ZeRO {zero_stage}",
        f"a step: {recipe.batch} rows × {recipe.accumulation} × {processes} = {rows}",
        f"{len(schedule)} steps, {schedule.epoch(len(schedule) - 1) + 1} epochs",
    ]
    if zero_stage != recipe.zero:
        lines.append(
            f"zero={recipe.zero} is for float32: in 16 bits stage {zero_stage} is used, whose float32 masters a "
            "checkpoint can hold."
        )
    if recipe.dora:
        passes = (
            "" if device.type == "cpu" else ", by torch's autograd and without the fused passes: slower than dora=off"
        )
        lines.append(f"dora=on: the length of each row of the adapted weights is trained too{passes}.")
    lines += adapter_start.note(
        recipe, recipe.load_as != STORED or "quantization_config" in read_folder_config(prepared.base)[1]
    )
    if recipe.load_as != STORED:
        lines.append(
            f"load_as={recipe.load_as}: the linears of the blocks are quantised when they are loaded; training, answers and "
            "exports use these weights."
        )
    if keep_float:
        lines.append(
            "the quantised weights are also kept in float32: there is memory for it, and it is faster, with the same results."
        )
    lines += host_memory_notes(recipe, prepared.base) if device.type == "cuda" else []
    lines += reference_note(recipe, prepared.parent)
    parameters = trained_parameters(read_folder_config(prepared.base)[0], [], recipe) if recipe.trains_all else 0
    lines += full_recipe.notes(recipe, device.type, parameters) + peft_recipe.notes(recipe, device.type)
    lines += fp8_recipe.notes(recipe)
    if prepared.parent is not None:
        kind = "adapter" if trained_model(prepared.parent) is None else "weights"
        lines.append(f"starts from the {kind} of run {prepared.parent.name!r}.")
    return lines


def host_memory_notes(recipe: Recipe, base: Path) -> list[str]:
    """What is kept in the host's memory instead of the card's, a line each."""
    lines = []
    if recipe.checkpointing == "offload":
        lines.append("checkpointing=offload: the inputs of the blocks are kept in the host's memory.")
    if recipe.embedding == "host":
        tied = read_folder_config(base)[0].tie_word_embeddings
        stays = "stays on the card: this base's head is the same table" if tied else "stays in the host's memory"
        lines.append(f"embedding=host: the embedding's table {stays}.")
    return lines


def load_model(prepared: PreparedRun, device: torch.device, dtype: torch.dtype, keep_float: bool) -> Any:
    """The frozen base with adapters: fresh ones, or those of the run that this one starts from; or all of it trainable."""
    recipe = prepared.recipe
    model: Any
    if recipe.trains_all:
        model = full_weights.load_model(prepared.base, device)
    else:
        base = load(prepared.base, dtype, device, keep_float, recipe.embedding, recipe.load_as)
        model = adapters.attach(base, recipe)
    if prepared.parent is not None and trained_model(prepared.parent) is None:
        adapters.copy_adapter(adapters.read(adapter_folder(prepared.parent)), model)
    model.get_base_model().set_checkpointing(recipe.checkpointing)
    model.get_base_model().backbone.neftune = recipe.neftune
    return model.to(device)
