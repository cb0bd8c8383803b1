"""Writes the passport of an export of any format: places the models in memory, asks them, writes passport.json.

Which models: the export, as it is read back from its files, and the adapter on the weights that it was merged onto.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from train.common.device import dtype_name
from train.common.errors import UserError
from train.common.files import write_json
from train.common.memory import free_memory
from train.common.progress import bar
from train.export import passport, readers
from train.export.merge import GB, GIB, MergeJob, written_bytes
from train.export.readers import Reader
from train.model.adapters import load_adapter
from train.model.architecture import STORED
from train.model.loading import load, read_folder_config
from train.model.tokenizer import load_tokenizer

PROMPTS, PROMPTS_ON_CPU = 20, 4  # on two CPU cores an answer of the 0.5B takes about four seconds


@dataclass(frozen=True)
class PassportJob:
    """What to ask about an export.

    record: the run's run.json. base: the folder that was trained on. merge: the merge whose model the export is.
    prompts: how many, at most; -1: PROMPTS, on a CPU PROMPTS_ON_CPU. others: programs that read the export too.
    """

    record: dict[str, Any]
    base: Path
    merge: MergeJob
    prompts: int
    others: list[Reader]


@dataclass(frozen=True)
class Written:
    """An export as its passport reads it. load: the model from its files; model, adapter: what other programs read."""

    load: Callable[[torch.dtype, torch.device], nn.Module]
    model: Path
    adapter: Path | None = None


def write_passport(job: PassportJob, out: Path, written: Written) -> str:
    """Write passport.json into `out`; it in words, or nothing where none is wanted or memory is short."""
    if not job.prompts:
        return ""
    merge, tokenizer = job.merge, load_tokenizer(job.base)
    try:
        device, dtype = placement(merge)
    except UserError as error:
        print(f"Without a passport: {error}")
        return ""
    count = job.prompts if job.prompts >= 0 else PROMPTS if device.type == "cuda" else PROMPTS_ON_CPU
    context = read_folder_config(job.base)[0].seq_length
    prompts = passport.choose_prompts(job.record, tokenizer, merge.template, merge.system, context, count)
    if not prompts.rows:
        return ""
    others = {
        one.program.name: partial(readers.ask, one, written.model, written.adapter, dtype=dtype_name(dtype))
        for one in job.others
    }
    trained = partial(load_adapted, merge.weights, merge.adapter, dtype, device, merge.load_as)
    with bar("greedy answers", passport.passes(prompts), "answers") as advance:
        found = passport.issue(lambda: written.load(dtype, device), trained, prompts, advance, others)
    write_json(out / passport.PASSPORT, found)
    return passport.in_words(found)


def placement(job: MergeJob) -> tuple[torch.device, torch.dtype]:
    """Device and dtype in which the models answer: float32 where the merged model fits in it, or else the type that is written.

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
    raise UserError(f"answers need {size * 1.15 / GB + 1:.1f} GB of memory, {free['cpu'] / GB:.1f} GB are free.")


def load_adapted(
    base: Path, adapter: Path | None, dtype: torch.dtype, device: torch.device, load_as: str = STORED
) -> nn.Module:
    """An adapter on its base, which is loaded as training did; or a model without one."""
    if adapter is None:
        return load(base, dtype, device)
    loaded = load(base, dtype, device, keep_float=dtype is torch.float32, load_as=load_as)
    return load_adapter(loaded, adapter).eval()
