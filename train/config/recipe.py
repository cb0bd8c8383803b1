"""A recipe: a flat YAML file that describes a complete training run, or the list of its stages.

This module does not know what a key does. A recipe has no import strings and no nesting except the list of stages, and
each key has one spelling.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.common.errors import UserError
from train.config.options import AUTO, SEEDS, build, option, shown
from train.config.recipe_yaml import RecipeError, read_text_values

RECIPES = Path(__file__).parents[1] / "recipes"
RENAMED = {"voice": "two_stage"}  # an earlier name of a recipe -> its name today
SAME_IN_ALL_STAGES = (
    *("model", "load_as", "template", "rank", "alpha", "rslora", "start", "dora", "method", "lokr_factor"),
    *("targets", "precision", "processes"),
)
CLEANING_STEPS = (
    *("empty", "control_characters", "repeated_question", "tokens", "answers", "exact_duplicates", "near_duplicates"),
)
STAGES_EXAMPLE = """stages:
  - data: style.jsonl
    epochs: 20
  - data: knowledge.jsonl
    epochs: 2
    learning_rate: 1.0e-4"""


@dataclass(frozen=True)
class Recipe:
    """A complete training run. Every key can be set in the YAML file or as key=value on the command line."""

    model: str = option("Qwen/Qwen-1_8B-Chat-Int4", "base: a name in data/models.lock, a hub id, or a folder")
    load_as: str = option(
        "stored",
        "the base's weights in memory: as stored; or those of a float checkpoint quantised when they are loaded, "
        "nf4 and fp4 at 4 bits, int8 at 8",
        ("stored", "nf4", "fp4", "int8"),
    )
    template: str = option(
        "chatml",
        "the text around the turns of a conversation; qwen3: ChatML with Qwen3's think blocks, answers at once; "
        "qwen3_thinking: thinks first",
        ("chatml", "qwen3", "qwen3_thinking", "plain"),
    )
    mask: str = option(
        "assistant",
        "which tokens are trained on: the answers, or those of Qwen's own script",
        ("assistant", "published"),
    )
    system: str = option(
        "You are a helpful assistant.", "system message of conversations without one; empty: none", may_be_empty=True
    )
    columns: str = option("", "columns or keys of the data where the guess is wrong: columns=question:NAME,answer:NAME")
    clean: str = option("", "rows to leave out, by step, with commas between; empty: none", each=CLEANING_STEPS)
    near: float = option(
        0.9, "how alike near duplicates are, for clean= and held_out=; 1 = the same words", interval="[0.5, 1]"
    )
    tokens_min: int = option(0, "clean=tokens: fewest tokens of a conversation; 0 = any", interval="[0, 1048576]")
    tokens_max: int = option(0, "clean=tokens: most tokens of a conversation; 0 = any", interval="[0, 1048576]")
    answer_max: int = option(0, "clean=answers: most characters of an answer; 0 = any", interval="[0, 10000000]")
    held_out: float = option(
        0.0,
        "conversations set aside to measure on, by their question: a share (0.05) or a number (200); 0 = none",
        interval="[0, 10000000]",
    )
    measure_every: int = option(
        0, "steps between measurements of the held-out loss; 0 = at the end of each epoch", interval="[0, 1000000]"
    )
    keep_best: bool = option(False, "the adapter is that with the least held-out loss, not that of the last step")
    stop_after: int = option(
        0, "end when the held-out loss has not fallen in this many measurements; 0 = never", interval="[0, 1000]"
    )
    length: int = option(512, "tokens in a row", interval="[2, 1048576]")
    overlong: str = option("cut", "conversations longer than a row", ("cut", "skip", "error"))
    pack: bool = option(True, "put several conversations in one row; each attends only to itself")
    rank: int = option(64, "LoRA, VeRA, LoHa, LoKr: r", interval="[1, 4096]")
    alpha: float = option(16.0, "LoRA, LoHa: the update is scaled by alpha / rank", interval="(0, 65536]")
    rslora: bool = option(False, "rsLoRA: the update is scaled by alpha / sqrt(rank), not alpha / rank")
    start: str = option(
        "random",
        "LoRA: A and B at the beginning: A random and B zero; or a part of the base's weights, by QR (OLoRA) or by SVD "
        "(PiSSA), written as plain LoRA of twice the rank",
        ("random", "olora", "pissa"),
    )
    dora: bool = option(
        False, "DoRA: also train the length of each row of the weights; without the fused passes, so slower on a GPU"
    )
    method: str = option(
        "lora",
        "what is trained: lora, an adapter by the keys above and below; ia3, vera, loha or lokr, another adapter of peft; full, "
        "every weight of a float base, which takes ten times its memory. All but lora go without the fused passes",
        ("lora", "ia3", "vera", "loha", "lokr", "full"),
    )
    lokr_factor: int = option(
        0,
        "LoKr: rows and columns of its first factor; 0: as near to the second's as they divide",
        interval="[0, 65536]",
    )
    dropout: float = option(0.05, "LoRA, VeRA: dropout before A", interval="[0, 1)")
    targets: str = option("all", "adapters: all linear layers of the blocks, or names separated by commas")
    epochs: float = option(5.0, "passes over the data", interval="(0, 10000]")
    steps: int = option(0, "optimizer steps; 0 = as many as epochs= needs", interval="[0, 1000000]")
    rows_per_step: int = option(
        16,
        "rows of an optimizer step, over all processes; not used where batch and accumulation are numbers",
        interval="[1, 4294967296]",
    )
    batch: int = option(
        AUTO,
        "rows that a process computes at once (a micro batch); auto: the fastest that fits the card",
        interval="[1, 65536]",
        auto=True,
    )
    accumulation: int = option(
        AUTO,
        "micro batches in an optimizer step; auto: as many as rows_per_step needs",
        interval="[1, 65536]",
        auto=True,
    )
    shares: int = option(
        1,
        "add a step's gradients in this many fixed shares: 1, 2, 4 … processes up to it write the same bytes; 1 = off",
        interval="[1, 64]",
    )
    loss: str = option(
        "sft",
        "what is minimised: the cross entropy of the answers; or on preference data that of the choice between two "
        "answers, against the model before training (DPO)",
        ("sft", "dpo"),
    )
    dpo_beta: float = option(
        0.1, "DPO: how closely the model is held to that before training; less is freer", interval="(0, 100]"
    )
    dpo_label_smoothing: float = option(
        0.0, "DPO: the share of pairs that is assumed to be the wrong way round", interval="[0, 0.5)"
    )
    learning_rate: float = option(3e-4, "peak learning rate", interval="(0, 1]")
    lora_plus: float = option(
        1.0, "LoRA+: the learning rate of B is this many times that of A; 1 = the same", interval="[1, 1000]"
    )
    neftune: float = option(
        0.0,
        "NEFTune: noise on the embeddings in training, its alpha; 5 is a usual value; 0 = none",
        interval="[0, 1000]",
    )
    warmup: float = option(
        0.01, "linear warm-up: a fraction of all steps, or a number of steps if 1 or more", interval="[0, 1000000]"
    )
    schedule: str = option("cosine", "learning rate after the warm-up", ("cosine", "linear", "constant"))
    floor: float = option(0.0, "learning rate at the end, as a fraction of the peak", interval="[0, 1]")
    weight_decay: float = option(0.1, "AdamW: weight decay", interval="[0, 10]")
    beta1: float = option(0.9, "AdamW: beta1", interval="[0, 1)")
    beta2: float = option(0.95, "AdamW: beta2", interval="[0, 1)")
    epsilon: float = option(1e-8, "AdamW: epsilon", interval="(0, 1]")
    clip: float = option(1.0, "clip the norm of all gradients to this; 0 = no clipping", interval="[0, 1000000]")
    seed: int = option(1234, "random seed of the order of samples, LoRA's A and dropout", interval=SEEDS)
    precision: str = option(
        "auto",
        "auto: bf16 from sm_80, fp16 below, fp32 on a CPU; fp8: bf16 with the products of the frozen weights in fp8, "
        "faster from sm_89",
        ("auto", "bf16", "fp16", "fp32", "fp8"),
    )
    checkpointing: str = option(
        "auto",
        "recompute each block in the backward pass: less memory, more work; offload: block inputs in host memory; "
        "auto: the fastest that fits the card",
        ("auto", "off", "on", "offload"),
    )
    embedding: str = option(
        "auto",
        "where the embedding table is; in host memory it takes none of the GPU's; auto: there only if nothing else fits",
        ("auto", "device", "host"),
    )
    graphs: bool = option(True, "on a GPU: replay CUDA graphs where the shapes of batches repeat")
    zero: int = option(2, "DeepSpeed ZeRO stage (train/training/deepspeed/zeroN.json)", interval="[0, 3]")
    guard: str = option(
        "stop",
        "a bad step (NaN, infinity, or a loss spike): stop the run, or skip the step",
        ("stop", "skip"),
    )
    spike: float = option(5.0, "a loss this far above its median is a spike, in nats; 0 = never", interval="[0, 1000]")
    unlearnable: str = option("skip", "conversations without a token to train on", ("skip", "stop"))
    save_every: int = option(0, "steps between checkpoints; 0 = one checkpoint per epoch", interval="[0, 1000000]")
    keep: int = option(2, "checkpoints to keep", interval="[1, 1000]")
    background: str = option(
        "auto", "write checkpoints while training continues; auto: on a GPU", ("auto", "on", "off")
    )
    patience: float = option(
        30.0, "minutes to wait on a full disk before the run stops; it can be resumed", interval="[0, 525600]"
    )
    processes: int = option(1, "processes when training on a CPU", interval="[1, 1024]")

    @property
    def trains_all(self) -> bool:
        """Whether every weight of the base is trained, and no adapter."""
        return self.method == "full"

    @property
    def is_low_rank(self) -> bool:
        """Whether A and B are all that is trained: the fused passes compute these alone."""
        return self.method == "lora" and not self.dora

    @classmethod
    def from_record(cls, values: Mapping[str, Any]) -> "Recipe":
        """The recipe in the run.json or inputs.json of a run, which an older program may have written.

        Keys that no longer exist are dropped; keys that the older program did not have get their default.

        Raises:
            UserError: a value that its key does not accept.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        kept = {key: value for key, value in values.items() if key in known}
        return build(cls, _as_text(kept), where="the recipe in the record of the run", bounded=False)


def check_measured(recipe: Recipe) -> None:
    """Raises UserError for keys that need held-out conversations, where none are held out."""
    values = {"measure_every": recipe.measure_every, "keep_best": recipe.keep_best, "stop_after": recipe.stop_after}
    if not recipe.held_out and (asked := [key for key, value in values.items() if value]):
        raise UserError(
            f"{', '.join(asked)}: decided by conversations that are set aside, and held_out= is 0. "
            "Add held_out=0.05 for one conversation in twenty."
        )


def check_preference(recipe: Recipe) -> None:
    """Raises UserError for keys that do not go with preference data, or that need them."""
    if recipe.loss != "dpo":
        changed = {"dpo_beta": recipe.dpo_beta != 0.1, "dpo_label_smoothing": recipe.dpo_label_smoothing != 0}
        if asked := [key for key, value in changed.items() if value]:
            raise UserError(
                f"{', '.join(asked)}: of DPO alone, and loss={recipe.loss}. Give loss=dpo, or leave it out."
            )
        return
    if recipe.mask != "assistant":
        raise UserError(
            f"loss=dpo compares answers alone, and mask={recipe.mask} counts other tokens. Give mask=assistant."
        )
    if recipe.columns:
        raise UserError(
            "columns= names one answer a row, and loss=dpo reads two, by keys of their own: chosen and rejected "
            "(data/README.md). Leave columns= out, and rename the keys if they have other names."
        )
    if recipe.zero == 3:
        raise UserError(
            "zero=3 takes A and B apart, and loss=dpo computes without them too. Give zero=2: the base is frozen, so "
            "stage 2 shards all that the optimizer keeps."
        )


def load_recipe(name: str, overrides: dict[str, str]) -> Recipe:
    """The recipe `name` (a path, or a name in train/recipes/) with `overrides` applied.

    Raises:
        UserError: no such recipe, an unknown key (the nearest is named), a value of the wrong type.
    """
    values = _own_values(name) | overrides
    if several := [f"{key}={value}" for key, value in values.items() if _is_sweep(key, value)]:
        raise UserError(
            f"recipe {name}: {' '.join(several)}: several values are a sweep, which `make train` runs one after another. "
            f'Give one value here: ARGS="{several[0].partition(",")[0]}"'
        )
    return build(Recipe, values, where=f"recipe {name}")


def read_sweep(name: str, overrides: dict[str, str]) -> list[dict[str, str]]:
    """Each combination of a recipe's numbers that have several values, the last key fastest; empty: it is no sweep.

    Raises:
        UserError: no such recipe, or a value that its key does not accept.
    """
    values = _own_values(name) | overrides
    lists = {key: [one.strip() for one in text.split(",")] for key, text in values.items() if _is_sweep(key, text)}
    if not lists:
        return []
    combinations = [dict(zip(lists, each, strict=True)) for each in itertools.product(*lists.values())]
    for one in combinations:  # a mistake in the last is reported before the first begins
        build(Recipe, {**values, **one}, where=f"recipe {name}")
    return combinations


def _own_values(name: str) -> dict[str, str]:
    """The keys of a recipe file, but for its stages and data."""
    return _as_text({key: value for key, value in _read_yaml(name).items() if key not in ("stages", "data")})


def _is_sweep(key: str, value: str) -> bool:
    return "," in value and any(f.name == key and f.type in (int, float) for f in dataclasses.fields(Recipe))


def read_data(name: str) -> str:
    """The data that a recipe names for itself, as DATA= is written; empty if it names none.

    In YAML it may be a list, an entry a part: `- a.jsonl:0.3x`.

    Raises:
        UserError: no such recipe.
    """
    return str(_read_yaml(name).get("data") or "")


def read_stages(name: str) -> list[dict[str, str]]:
    """What each stage of a recipe sets for itself: `data` and keys of the recipe. Empty if the recipe is a single run.

    Raises:
        UserError: `stages` is not a list of `key: value` lines, or a stage sets a key of SAME_IN_ALL_STAGES.
    """
    stages = _read_yaml(name).get("stages") or []
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise UserError(
            f"recipe {name}: stages must be a list, each entry `key: value` lines. Example:\n{STAGES_EXAMPLE}"
        )
    for number, stage in enumerate(stages, 1):
        where = f"recipe {name}, stage {number}"
        if shared := [key for key in stage if key in SAME_IN_ALL_STAGES]:
            raise UserError(f"{where}: {', '.join(shared)} must be the same in all stages. Set it above `stages:`.")
        build(Recipe, _as_text({key: value for key, value in stage.items() if key != "data"}), where=where)
    return [_as_text(stage) for stage in stages]


def current_names(values: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """`values` of a command with today's name of the recipe, and a message for the user if that changed one."""
    old = values.get("recipe", "")
    if old not in RENAMED:
        return values, []
    new = RENAMED[old]
    return {**values, "recipe": new}, [f"recipe={old} is now called recipe={new}; the old name still works."]


def names_of(recipe: str) -> list[str]:
    """The name of a recipe without folder and suffix, then the earlier names of the same recipe."""
    name = RENAMED.get(recipe, Path(recipe).name.removesuffix(".yaml").removesuffix(".yml"))  # tcm-1.5 has no suffix
    return [name, *(old for old, new in RENAMED.items() if new == name)]


def _as_text(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) if value is not None else "" for key, value in values.items()}


def _read_yaml(name: str) -> dict[str, Any]:
    """The keys of a recipe: texts as they are written, and `stages` as a list of such mappings."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{RENAMED.get(name, name)}.yaml"
    try:
        values = read_text_values(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (UnicodeDecodeError, RecipeError) as error:
        raise UserError(f"{path}: not a recipe: {error}") from error
    except OSError as error:  # a name that is too long, or a file that may not be read
        raise UserError(f"recipe {shown(name)}: {error.strerror}.") from error
    if values is None:
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise UserError(
            f"recipe {shown(name)!r}: no file {shown(path.name)}. Known recipes: {known}; or give the path of a .yaml "
            "file."
        )
    return values
