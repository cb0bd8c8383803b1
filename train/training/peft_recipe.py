"""method=ia3, vera, loha and lokr: what goes with them, and what is said about them. Knows recipes; imports no torch."""

from train.common.errors import UserError
from train.config.recipe import Recipe

METHODS = ("ia3", "vera", "loha", "lokr")
OF_LORA = {
    "rslora": False,
    "start": "random",
    "dora": False,
    "lora_plus": 1.0,
}  # keys of A and B, and what leaves them off
TRAINED = {
    "ia3": "IA3 trains a factor of each output of the adapted linears, and of each input of the MLP's last one",
    "vera": "VeRA trains two vectors of each adapted linear; A and B are random, drawn from seed=, and shared by all",
    "loha": "LoHa trains four factors of each adapted linear; its update is the product of two products, element by element",
    "lokr": "LoKr trains the two factors of a Kronecker product of each adapted linear",
}
UNUSED = {
    "ia3": "rank, alpha and dropout have",
    "vera": "alpha has",
    "loha": "dropout has",
    "lokr": "alpha and dropout have",
}
USUAL_RATE = {"ia3": 3e-3, "vera": 3e-3}  # learning rates below it are ones for LoRA: these train few values
USUAL_RANK = 256  # of VeRA


def check_recipe(recipe: Recipe) -> None:
    """Refuse what does not go with these methods, all of it at once.

    Raises:
        UserError: the keys, the reasons, and the values to give.
    """
    if recipe.lokr_factor and recipe.method != "lokr":
        raise UserError(f"lokr_factor={recipe.lokr_factor} is for method=lokr. Give lokr_factor=0.")
    if recipe.method not in METHODS:
        return
    wrong = [key for key, off in OF_LORA.items() if getattr(recipe, key) != off]
    if wrong:
        given = " ".join(f"{key}={_typed(getattr(recipe, key))}" for key in wrong)
        remedy = " ".join(f"{key}={_typed(OF_LORA[key])}" for key in wrong)
        raise UserError(
            f"method={recipe.method} has no A and B, which {given} is about. Give {remedy}, or method=lora."
        )
    if recipe.zero == 3:
        raise UserError(
            f"zero=3 takes the parameters apart, which method={recipe.method} needs whole. Give zero=2: the base is frozen, so "
            "stage 2 shards all that the optimizer keeps."
        )


def _typed(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def notes(recipe: Recipe, device: str) -> list[str]:
    """What such a method means for the run, a line each. device: cpu or cuda."""
    method = recipe.method
    if method not in METHODS:
        return []
    passes = "" if device == "cpu" else " By torch's autograd and without the fused passes: slower than method=lora."
    lines = [f"method={method}: {TRAINED[method]}. {UNUSED[method]} no effect.{passes}"]
    if recipe.learning_rate < USUAL_RATE.get(method, 0):
        lines.append(
            f"learning_rate={recipe.learning_rate:g} is one for LoRA: method={method} usually takes 3e-3 to 2e-2."
        )
    if method == "vera" and recipe.rank < USUAL_RANK:
        lines.append(
            f"rank={recipe.rank}: VeRA usually takes rank={USUAL_RANK}, which adds {USUAL_RANK} values a linear."
        )
    return lines
