"""method=full: every weight of a float base is trained, by torch's autograd; what goes with it, and what is said about it.

Knows recipes and shapes; imports no torch.
"""

from typing import Any

from train.common.errors import UserError
from train.config.recipe import Recipe
from train.model.architecture import STORED, Shape

FLOAT_BITS = 16  # of a shape whose weights are floats
USUAL_RATE = 1e-4  # a learning rate above it is one for adapters
REMEDIES = {  # key -> the value that goes with method=full, and why
    "load_as": (STORED, "rounded weights cannot be trained"),
    "rslora": (False, "there is no adapter"),
    "start": ("random", "there is no adapter"),
    "dora": (False, "there is no adapter"),
    "lora_plus": (1.0, "there is no B with a rate of its own"),
    "targets": ("all", "every weight is trained"),
    "loss": ("sft", "its reference is the base without an adapter"),
    "embedding": ("device", "the embedding is trained where the passes are"),
}
ALSO = {"embedding": ("auto",)}  # values that go with it too


def check_recipe(recipe: Recipe) -> None:
    """Refuse what does not go with method=full, all of it at once.

    Raises:
        UserError: the keys, the reasons, and the values to give.
    """
    if not recipe.trains_all:
        return
    wrong = {key: why for key, (wanted, why) in REMEDIES.items() if not _goes(key, getattr(recipe, key), wanted)}
    remedies = [f"{key}={_typed(REMEDIES[key][0])}" for key in wrong]
    reasons = [f"{key}={_typed(getattr(recipe, key))}: {why}" for key, why in wrong.items()]
    if recipe.zero == 3:
        reasons.append("zero=3: its checkpoints of whole models were not tested")
        remedies.append("zero=2")
    if reasons:
        raise UserError(
            f"method=full does not go with {'; '.join(reasons)}. Give {' '.join(remedies)}, or method=lora."
        )


def _goes(key: str, value: Any, wanted: Any) -> bool:
    return value == wanted or value in ALSO.get(key, ())


def _typed(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def check_base(recipe: Recipe, shape: Shape) -> None:
    """Refuse a quantised base for method=full.

    Raises:
        UserError: it names the float base to take.
    """
    if recipe.trains_all and shape.bits != FLOAT_BITS:
        name = recipe.model.split("-GPTQ-")[0].removesuffix("-AWQ").removesuffix("-Int4").removesuffix("-Int8")
        instead = f"MODEL={name}" if name != recipe.model else "the float model that it was made from"
        raise UserError(
            f"method=full: {recipe.model} is quantised, and its {shape.bits}-bit weights cannot be trained. Take its float "
            f"checkpoint: {instead}; or method=lora, which trains an adapter on this one."
        )


def notes(recipe: Recipe, device: str, parameters: int) -> list[str]:
    """What method=full means for the run, a line each. device: cpu or cuda. parameters: how many are trained."""
    if not recipe.trains_all:
        return []
    passes = "" if device == "cpu" else ", by torch's autograd and without the fused passes: slower than method=lora"
    lines = [
        f"method=full: all {parameters:,} weights are trained, embeddings, norms and biases too{passes}. rank, alpha and "
        "dropout are LoRA's and have no effect; norms and biases have no weight decay."
    ]
    if recipe.learning_rate > USUAL_RATE:
        lines.append(
            f"learning_rate={recipe.learning_rate:g} is one for adapters: whole models usually take 1e-5 to 5e-5."
        )
    return lines
