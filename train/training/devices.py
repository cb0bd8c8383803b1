"""What one process of a run computes on, and in how many processes: from the machine, the recipe and the launcher."""

from dataclasses import dataclass, replace

import torch

from train.common.device import pick_dtype
from train.common.errors import UserError
from train.config.recipe import Recipe
from train.training import distributed, fp8_recipe, launchers
from train.training.distributed import RankInfo
from train.training.memory_plan import can_plan
from train.training.prepare import check_supported
from train.training.step_setting import Place


@dataclass(frozen=True)
class Devices:
    """device and dtype of the computation; processes of the whole run; rank_info: None in a process started by hand."""

    device: torch.device
    dtype: torch.dtype
    processes: int
    rank_info: RankInfo | None


def place(devices: Devices, recipe: Recipe) -> Place:
    """What computes the steps, for step_setting.py. Of the cards that this machine's processes use the smallest counts."""
    cards = range(_used_here(devices)) if devices.device.type == "cuda" else []
    if not all(can_plan(torch.cuda.get_device_capability(n), recipe) for n in cards):
        return Place(devices.processes)
    sizes = [torch.cuda.get_device_properties(n).total_memory for n in cards]
    return Place(devices.processes, min(sizes, default=0))


def _used_here(devices: Devices) -> int:
    """How many of this machine's cards the run uses, counted from the first; all where a launcher does not say."""
    present = torch.cuda.device_count()
    here = launchers.count("LOCAL_WORLD_SIZE") if devices.rank_info else devices.processes
    return min(here or present, present)


def pick(gpus: int, recipe: Recipe, rank_info: RankInfo | None) -> Devices:
    """A GPU where there is one, else the CPU. `gpus`: how many to use of this machine.

    Raises:
        UserError: more GPUs than there are, counts below 1, or a combination that DeepSpeed refuses.
    """
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if present and gpus > present:
        raise UserError(f"gpus={gpus}: this machine has {present}.")
    if gpus < 1 or recipe.processes < 1:
        raise UserError("gpus= and processes= count from 1.")
    local_rank = distributed.assign_gpu(rank_info or RankInfo(), present).local_rank if present else 0
    device = torch.device("cuda", local_rank) if present else torch.device("cpu")
    check_supported(recipe, device.type)
    fp8_recipe.check_recipe(recipe, torch.cuda.get_device_capability(device) if present else None)
    if rank_info is not None and present:
        rank_info = replace(rank_info, local_rank=local_rank)
    processes = rank_info.world_size if rank_info else (gpus if present else recipe.processes)
    return Devices(device, pick_dtype(device, recipe.precision), processes, rank_info)
