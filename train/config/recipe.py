"""A recipe: one flat YAML file that is a complete training run, and its list of stages.

Refuses to know what a key does. There are no import strings and no nesting but the list of stages, and every key has one spelling.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.common.errors import UserError
from train.config.options import T, build, option, unknown_key

RECIPES = Path(__file__).parents[1] / "recipes"


# what stages hand on to one another
COMMON = ("model", "template", "rank", "alpha", "targets", "precision", "processes")


STAGES = "stages:\n  - data: voice.jsonl\n    epochs: 20\n  - data: knowledge.jsonl\n    epochs: 2\n    learning_rate: 1.0e-4"


@dataclass(frozen=True)
class Recipe:
    """One training run, whole. Every key may be given in a YAML file or as key=value."""

    model: str = option("Qwen/Qwen-1_8B-Chat-Int4", "base: a name in data/models.lock, a hub id, or a folder")
    template: str = option("chatml", "how a conversation is written", ("chatml", "plain"))
    mask: str = option(
        "assistant", "what is learnt: the answers, or what Qwen's own script learns", ("assistant", "published")
    )
    system: str = option(
        "You are a helpful assistant.", "system message of conversations that bring none; empty for none"
    )
    length: int = option(512, "tokens in a row")
    overlong: str = option("cut", "conversations longer than that", ("cut", "skip", "error"))
    pack: bool = option(True, "put several conversations in one row, each attending to itself only")
    rank: int = option(64, "LoRA: r")
    alpha: float = option(16.0, "LoRA: the update is scaled by alpha / rank")
    dropout: float = option(0.05, "LoRA: dropout before A")
    targets: str = option("all", "LoRA: all linears of the blocks, or their names by comma")
    epochs: float = option(5.0, "passes over the data")
    steps: int = option(0, "optimizer steps; 0 = as many as the epochs take")
    batch: int = option(2, "rows a process computes at once")
    accumulation: int = option(8, "such batches an optimizer step")
    learning_rate: float = option(3e-4, "peak learning rate")
    warmup: float = option(0.01, "linear warm-up: a fraction of all steps, or a number of steps if 1 or more")
    schedule: str = option("cosine", "learning rate after the warm-up", ("cosine", "linear", "constant"))
    floor: float = option(0.0, "learning rate at the end, as a fraction of the peak")
    weight_decay: float = option(0.1, "AdamW: weight decay")
    beta1: float = option(0.9, "AdamW: beta1")
    beta2: float = option(0.95, "AdamW: beta2")
    epsilon: float = option(1e-8, "AdamW: epsilon")
    clip: float = option(1.0, "clip the norm of all gradients to this; 0 = do not")
    seed: int = option(1234, "seed of the order of samples, LoRA's A and dropout")
    precision: str = option(
        "auto", "auto: bf16 from sm_80, fp16 below, fp32 on a CPU", ("auto", "bf16", "fp16", "fp32")
    )
    checkpointing: str = option(
        "on",
        "compute each block again in the backward pass: less memory, a third more work; offload: what is kept stands on the host",
        ("off", "on", "offload"),
    )
    embedding: str = option(
        "device", "where the embedding's table is: on the host it takes no memory of the card", ("device", "host")
    )
    graphs: bool = option(True, "on a GPU: replay CUDA graphs where the shapes of batches repeat")
    zero: int = option(2, "DeepSpeed ZeRO stage (train/deepspeed/zeroN.json)")
    guard: str = option(
        "stop",
        "a step that must not count (no number, a jump of the loss): stop the run, or leave it out",
        ("stop", "skip"),
    )
    spike: float = option(5.0, "how far over its median a loss is a jump, in nats; 0 = never")
    unlearnable: str = option("skip", "conversations in which nothing is learnt", ("skip", "stop"))
    save_every: int = option(0, "steps between checkpoints; 0 = one an epoch")
    keep: int = option(2, "checkpoints to keep")
    background: str = option("auto", "write them while training goes on; auto: on a GPU", ("auto", "on", "off"))
    patience: float = option(30.0, "minutes to wait on a full disk before the run ends, to go on later")
    processes: int = option(1, "processes when training on a CPU")


def load_recipe(name: str, overrides: dict[str, str]) -> Recipe:
    """The recipe of a YAML file (a path, or a name in train/recipes/) with `overrides` on top.

    Raises:
        UserError: no such recipe, an unknown key (the nearest is named), a value of the wrong kind.
    """
    values = _read_yaml(name)
    values.pop("stages", None)
    return build(Recipe, {**_texts(values), **overrides}, where=f"recipe {name}")


def read_stages(name: str) -> list[dict[str, str]]:
    """What each stage of a recipe has for itself: `data` and keys of the recipe; none if the recipe is a single run.

    Raises:
        UserError: stages that are no list of `key: value` lines, or change what an adapter is.
    """
    stages = _read_yaml(name).get("stages") or []
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise UserError(f"recipe {name}: stages is a list, each entry `key: value` lines. Example:\n{STAGES}")
    for number, stage in enumerate(stages, 1):
        if common := [key for key in stage if key in COMMON]:
            raise UserError(
                f"recipe {name}, stage {number}: {', '.join(common)} is the same in all stages. Give it above them."
            )
        build(Recipe, _texts({k: v for k, v in stage.items() if k != "data"}), where=f"recipe {name}, stage {number}")
    return [_texts(stage) for stage in stages]


def _texts(values: dict[str, Any]) -> dict[str, str]:
    return {key: str(value) if value is not None else "" for key, value in values.items()}


def _read_yaml(name: str) -> dict[str, Any]:
    import yaml

    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise UserError(
            f"recipe {name!r}: no file {path.name}. Known recipes: {known}; or give the path of a .yaml file."
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a list of `key: value` lines, found a {type(values).__name__}.")
    return values


def build_with_overrides(cls: type[T], values: dict[str, str]) -> T:
    """An instance of dataclass `cls`, whose field `overrides` (a dict) takes every key that is the recipe's instead."""
    own = {f.name for f in dataclasses.fields(cls)} - {"overrides"}  # type: ignore[arg-type]
    recipe = {f.name for f in dataclasses.fields(Recipe)}
    strange = [key for key in values if key not in own | recipe]
    if strange:
        raise UserError("\n".join(unknown_key(key, sorted(own | recipe)) for key in strange))
    options = build(cls, {key: value for key, value in values.items() if key in own})
    overrides = {key: value for key, value in values.items() if key not in own}
    return dataclasses.replace(options, overrides=overrides)  # type: ignore[type-var, call-arg]
