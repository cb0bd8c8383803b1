"""Verifies an export: does the folder that was written answer as the adapter on its base does?

The folder is read back from disk. Where the merge was onto other weights than the Int4 base, it is compared with the
adapter on those and with the adapter on the Int4 base. One block of one model is in memory at a time, so the size of the
model does not matter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.common.device import dtype_name
from train.common.errors import UserError
from train.common.memory import free_memory
from train.data.checked.conversations import training_data
from train.evaluation import parity
from train.evaluation.streamed_states import streamed_states
from train.export.merge import GB, MergeJob
from train.model.architecture import STORED
from train.model.block_stream import BlockStream
from train.model.decoder import DecoderBlock
from train.model.loading import read_folder_config
from train.model.tokenizer import load_tokenizer

GIB = 2**30
DTYPE = torch.float32  # of all that is computed
SCALE_ROWS = 8  # rows that the base computes without the adapter: enough to see by how much the adapter changes it


@dataclass(frozen=True)
class Comparison:
    """The merged model, what it is compared with, on which rows, and what computes it."""

    job: MergeJob
    base: Path  # that was trained on
    data: str  # name of the source of the rows
    rows: list[parity.MaskedRow]
    device: torch.device
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


def comparison_device(job: MergeJob) -> torch.device:
    """The GPU if it has room for a block and what the comparison holds besides, else the CPU.

    Raises:
        UserError: neither has.
    """
    needed, free = memory_needed(job), free_memory()
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > needed:
        return torch.device("cuda", torch.cuda.current_device())
    if free > needed:
        return torch.device("cpu")
    raise UserError(
        f"comparing needs {needed / GB:.1f} GB of memory, {free / GB:.1f} GB are free. Close other programs, or export on a "
        "machine with more memory: copy runs/ and models/ there."
    )


def memory_needed(job: MergeJob) -> int:
    """Bytes of the heads and of a block in float32, with as much as that again to compute with; for any number of blocks."""
    config, published = read_folder_config(job.weights)
    with torch.device("meta"):
        block = sum(p.numel() for p in DecoderBlock(config).parameters())
    heads = 1 if published.get("torch_dtype") == dtype_name(job.dtype) else 2  # rounded to another type they differ
    return DTYPE.itemsize * (heads * config.vocab_size * config.hidden_size + 2 * block) + GIB


def prepare(record: dict[str, Any], base: Path, job: MergeJob, conversations: int) -> Comparison:
    """The comparison on at most `conversations` of the run's own data, if that is unchanged, or else on built-in questions.

    Args:
        record: the run's run.json. base: the folder that was trained on.
    Raises:
        UserError: no question fits the context of the base, or too little memory.
    """
    tokenizer, context = load_tokenizer(base), read_folder_config(base)[0].seq_length
    device = comparison_device(job)
    trained, name = training_data(record)
    for source, data in ((trained, name), (parity.builtin_conversations(), "the built-in list")):
        if rows := parity.masked_rows(source[:conversations], tokenizer, job.template, job.system, context):
            load_as = record["recipe"].get("load_as", STORED)
            return Comparison(job, base, data, rows, device, load_as)
    raise UserError(f"{base}: no question fits its context of {context} tokens.")


def answer_states(comparison: Comparison, written: Path, advance: Callable[[int], None]) -> ModelStates:
    """Run the rows through every model of the comparison; `written` is the folder of the merged one."""
    c, adapter = comparison, comparison.job.adapter
    head: list[Tensor] = []  # the first model's, and mostly that of all

    def states(
        folder: Path, adapter: Path | None = None, load_as: str = STORED, rows: int | None = None, without: int = 0
    ) -> tuple[parity.AnswerStates, parity.AnswerStates]:
        model = BlockStream(folder, DTYPE, c.device, adapter, load_as)
        found = streamed_states(model, c.rows[:rows], without, head[0] if head else None, advance)
        head.append(found[0].head)
        return found

    if adapter is None:
        on_int4, _ = states(c.job.weights)
        without, _ = states(c.base, rows=SCALE_ROWS)
    else:
        on_int4, without = states(c.base, adapter, c.load_as, without=SCALE_ROWS)
    reference = states(c.onto, adapter, c.job.load_as)[0] if c.onto else on_int4
    return ModelStates(on_int4, without, reference, states(written)[0])


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
        "computed_in": dtype_name(DTYPE),
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
