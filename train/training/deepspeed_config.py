"""DeepSpeed's configuration of a run: the ZeRO stage, and the recipe's values by DeepSpeed's keys."""

import json
from pathlib import Path
from typing import Any

import torch

from train.config.recipe import Recipe

PRESETS = Path(__file__).parent / "deepspeed"


def zero_stage(recipe: Recipe, dtype: torch.dtype) -> int:
    """The ZeRO stage of a run: the recipe's in float32, at least 2 in 16 bits; in one process stage 2 shards nothing.

    Stage 2 keeps float32 masters that can be saved by name, which stage 0 does not. It reports an overflow or an
    infinite norm, where stages 0 and 1 in bfloat16 end the process with an assertion.
    """
    return recipe.zero if dtype == torch.float32 else max(2, recipe.zero)


def deepspeed_config(recipe: Recipe, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's configuration: the file of the stage in training/deepspeed/, and the recipe's values."""
    stage = zero_stage(recipe, dtype)
    preset: dict[str, Any] = json.loads((PRESETS / f"zero{stage}.json").read_text())
    values: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": recipe.batch,
        "gradient_accumulation_steps": recipe.accumulation,
        "gradient_clipping": recipe.clip if stage else 0.0,  # stage 0: `Engine.step` clips, since it needs the norm too
    }
    if dtype != torch.float32:  # micro batches are summed in 32 bits
        values |= {"data_types": {"grad_accum_dtype": "fp32"}}
    if dtype == torch.bfloat16:
        values |= {"bf16": {"enabled": True}}
    elif dtype == torch.float16:
        values |= {"fp16": {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 500, "hysteresis": 2}}
    return preset | values
