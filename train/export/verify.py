"""Verifies an export: does the folder that was written answer as the adapter on its base does?

The folder is read back from disk. Where the merge was onto other weights than the Int4 base, it is compared with the
adapter on those and with the adapter on the Int4 base. One model is in memory at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from train.common.device import dtype_name
from train.common.errors import UserError
from train.common.memory import free_memory
from train.data.checked.conversations import training_data
from train.evaluation import parity
from train.export.merge import GB, MergeJob, written_bytes
from train.model.adapters import load_adapter
from train.model.architecture import STORED
from train.model.loading import load, read_folder_config
from train.model.tokenizer import load_tokenizer

GIB = 2**30
SCALE_ROWS = 8  # rows that the base computes without the adapter: enough to see by how much the adapter changes it


@dataclass(frozen=True)
class Comparison:
    """The merged model, what it is compared with, on which rows, and what computes it."""

    job: MergeJob
    base: Path  # that was trained on
    data: str  # name of the source of the rows
    rows: list[parity.MaskedRow]
    device: torch.device
    dtype: torch.dtype
    load_as: str = STORED  # how training loaded the base

    @property
    def onto(self) -> Path | None:
        """The weights that were merged onto, if they are others than those trained against."""
        same = (self.job.weights, self.job.load_as) == (self.base, self.load_as)
        return None if same or self.job.adapter is None else self.job.weights

    @property
    def passes(self) -> int:
        """Rows that are computed in all: by the adapter on its base, by the merged model, on `onto`, and without it."""
        return len(self.rows) * (3 if self.onto else 2) + min(len(self.rows), SCALE_ROWS)


@dataclass(frozen=True)
class ModelStates:
    """The states from which each model predicts the answer tokens of the rows."""

    on_int4: parity.AnswerStates  # the adapter on the base that was trained on; or the model that training left
    without: parity.AnswerStates  # this base alone, on the first SCALE_ROWS rows
    reference: parity.AnswerStates  # the adapter on what was merged onto
    merged: parity.AnswerStates


def placement(job: MergeJob) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the comparison: float32 where the merged model fits in it, or else the type that is written.

    Raises:
        UserError: neither the GPU nor the memory of the machine holds the merged model.
    """
    free = {"cpu": free_memory()}
    if torch.cuda.is_available():
        free = {"cuda": torch.cuda.mem_get_info()[0], **free}
    size = written_bytes(job)
    for needed, dtype in ((size * 4 // job.dtype.itemsize, torch.float32), (size, job.dtype)):
        for device, available in free.items():
            if available > 1.15 * needed + GIB:
                return torch.device(device), dtype
    raise UserError(
        f"comparing needs {size * 1.15 / GB + 1:.1f} GB of memory, {free['cpu'] / GB:.1f} GB are free. Close other programs, "
        "or export on a machine with more memory: copy runs/ and models/ there."
    )


def prepare(record: dict[str, Any], base: Path, job: MergeJob, conversations: int) -> Comparison:
    """The comparison on at most `conversations` of the run's own data, if that is unchanged, or else on built-in questions.

    Args:
        record: the run's run.json. base: the folder that was trained on.
    Raises:
        UserError: no question fits the context of the base, or too little memory.
    """
    tokenizer, context = load_tokenizer(base), read_folder_config(base)[0].seq_length
    device, dtype = placement(job)
    trained, name = training_data(record)
    for source, data in ((trained, name), (parity.builtin_conversations(), "the built-in list")):
        if rows := parity.masked_rows(source[:conversations], tokenizer, job.template, job.system, context):
            load_as = record["recipe"].get("load_as", STORED)
            return Comparison(job, base, data, rows, device, dtype, load_as)
    raise UserError(f"{base}: no question fits its context of {context} tokens.")


def answer_states(comparison: Comparison, written: Path, advance: Callable[[int], None]) -> ModelStates:
    """Run the rows through every model of the comparison; `written` is the folder of the merged one."""
    c = comparison
    keep_float = (
        c.dtype is torch.float32
    )  # memory for the merged model in float32 is enough for the base's weights in it

    def states(model: nn.Module, rows: int | None = None) -> parity.AnswerStates:
        return parity.answer_states(model, c.rows[:rows], advance)

    if c.job.adapter is None:
        on_int4 = states(load(c.job.weights, c.dtype, c.device))
        without = states(load(c.base, c.dtype, c.device), SCALE_ROWS)
        return ModelStates(on_int4, without, on_int4, states(load(written, c.dtype, c.device)))
    adapter = c.job.adapter

    def adapted(folder: Path, load_as: str) -> Any:
        base = load(folder, c.dtype, c.device, keep_float=keep_float, load_as=load_as)
        return load_adapter(base, adapter).eval()

    # no model has a name here, so each is freed before the next is loaded
    on_int4, without = _with_and_without(adapted(c.base, c.load_as), states)
    reference = states(adapted(c.onto, c.job.load_as)) if c.onto else on_int4
    return ModelStates(on_int4, without, reference, states(load(written, c.dtype, c.device)))


def _with_and_without(
    model: Any, states: Callable[..., parity.AnswerStates]
) -> tuple[parity.AnswerStates, parity.AnswerStates]:
    adapted = states(model)
    with model.disable_adapter():
        return adapted, states(model, SCALE_ROWS)


def measure(comparison: Comparison, states: ModelStates) -> dict[str, Any]:
    """How well the merged model agrees, for the manifest: with `reference`, with the adapter on Int4, and for scale how
    well the adapter agrees with the base alone.
    """
    if comparison.onto:
        merged = parity.compare(states.reference, states.merged)
        on_int4, without = parity.compare_all(states.on_int4, [states.merged, states.without])
    else:
        merged, without = parity.compare_all(states.on_int4, [states.merged, states.without])
        on_int4 = merged
    return {
        "against": f"the adapter on {comparison.job.weights.name}" if comparison.job.adapter else "the trained model",
        "data": comparison.data,
        "rows": len(comparison.rows),
        "computed_in": dtype_name(comparison.dtype),
        **merged.to_json(),
        "adapter_on_int4": on_int4.to_json(),
        "without_adapter": without.to_json(),
    }


def require_parity(measured: dict[str, Any], dtype: torch.dtype) -> None:
    """Raises UserError if the merged model agrees less than weights rounded to `dtype` must."""
    result = parity.Parity.from_json(measured)
    if not result.holds(dtype):
        raise UserError(
            f"what was written does not answer as {measured['against']}: {result}; expected at least "
            f"{parity.MIN_AGREEMENT[dtype]:.1%} and at most {parity.MAX_DIVERGENCE[dtype]:.0e}.\n"
            "Nothing was written. Try DTYPE=float32; if that fails too, the base or the trained weights are damaged: train again."
        )
