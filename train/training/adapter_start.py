"""How the adapter of a run begins where `start` is not random: computed once, kept in the run's folder, equal everywhere.

The first process computes the values, or reads those of a run that continues; the others get them from it, because
another machine's linear algebra may differ in the last bits.
"""

from pathlib import Path
from typing import Any

import torch

from train.common.errors import UserError
from train.config.recipe import Recipe
from train.model import lora, lora_start
from train.runs import start_factors
from train.training import distributed
from train.training.distributed import AgreedError, RankInfo


def begin(model: Any, recipe: Recipe, run: Path, rank_info: RankInfo, continues: bool, dtype: torch.dtype) -> None:
    """Give `model`, on its device, the adapter's start that the recipe names. Every process calls it.

    Args:
        continues: from a checkpoint, so the values of the run's beginning are read. dtype: of the passes.
    Raises:
        AgreedError: the values cannot be written, or read; the first process says why.
    """
    if recipe.start == lora_start.RANDOM:
        if rank_info.rank == 0:
            start_factors.remove(run)
        return
    parameters = lora.trainable(model)
    problem = _first_process(model, recipe, run, continues) if rank_info.rank == 0 else ""
    if rank_info.world_size > 1:
        problem = distributed.all_gather(problem)[0]
    if problem:
        raise AgreedError(problem)
    if rank_info.world_size > 1:
        for p in parameters.values():
            torch.distributed.broadcast(p.data, 0)
    lora_start.fix(model, dtype)


def _first_process(model: Any, recipe: Recipe, run: Path, continues: bool) -> str:
    """Fill the parameters; what went wrong, in words, or nothing."""
    parameters = lora.trainable(model)
    try:
        if continues:
            factors = start_factors.read(run)
            for name, p in parameters.items():
                p.data.copy_(factors[name])
        else:
            lora_start.set_factors(model, recipe.start, recipe.seed)
            start_factors.write(run, {name: p.detach() for name, p in parameters.items()})
    except (UserError, OSError) as error:
        return str(error)
    return ""


def note(recipe: Recipe, quantised: bool) -> list[str]:
    """What `start` means for the base and the adapter's file, a line; none where it is random."""
    if recipe.start == lora_start.RANDOM:
        return []
    base = (
        "the quantised base stays as it is, since its format cannot store what is left: the part is subtracted as a fixed "
        "term"
        if quantised
        else "the base stays as it is: the part is subtracted as a fixed term"
    )
    return [
        f"start={recipe.start}: the adapter begins as a part of the base's weights, and {base}. The adapter is written "
        f"as plain LoRA of rank {2 * recipe.rank} for the unchanged base."
    ]
