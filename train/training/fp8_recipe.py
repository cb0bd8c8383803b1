"""precision=fp8: what goes with it, and what is said about it."""

from train.common.errors import UserError
from train.config.recipe import Recipe
from train.ops.kernels.fp8 import LEAST_CAPABILITY

NOTE = (
    "precision=fp8: the products with the frozen weights are in fp8 (e4m3, a scale a row); in bf16 stay the forward "
    "products of the first and the last block, the head, the adapters and the optimizer. Held-out losses are without fp8."
)


def check_recipe(recipe: Recipe, capability: tuple[int, int] | None) -> None:
    """Refuse precision=fp8 where it cannot run. capability: of the card; None without one.

    Raises:
        UserError: the reason, and what to give instead.
    """
    if recipe.precision != "fp8":
        return
    if capability is None or capability < LEAST_CAPABILITY:
        here = "here is none" if capability is None else f"this one has {capability[0]}.{capability[1]}"
        raise UserError(
            f"precision=fp8 needs an NVIDIA card of compute capability 8.9 or newer (RTX 40, L4, H100), and {here}. Give "
            "precision=auto."
        )
    if not recipe.is_low_rank or recipe.zero == 3:
        wrong = "zero=3" if recipe.is_low_rank else f"method={recipe.method}" + (" dora=on" if recipe.dora else "")
        raise UserError(
            f"precision=fp8 is computed by the fused passes of method=lora, which {wrong} does not use. Give precision=auto."
        )


def notes(recipe: Recipe) -> list[str]:
    """What it means for the run, a line."""
    return [NOTE] if recipe.precision == "fp8" else []
