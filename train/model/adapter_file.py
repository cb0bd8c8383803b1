"""An adapter's folder as any peft writes it: which settings are computed here, and which are refused by name.

Stock peft fails on keys that are newer than itself, so adapter_config.json is read here by known keys. A key that can
change what the adapter computes is either computed (ranks, alphas, rsLoRA, DoRA, patterns) or refused. An unknown key is
refused if it is set. Which linears the adapter changes is read from the tensors. Nothing named in the file is imported.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from train.common.errors import UserError
from train.common.files import read_json

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # of every module's name in peft's files
A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"

Settings = list[tuple[int, float]]  # (rank, alpha) of a linear, as one version of peft or another reads them

COMPUTED = {"r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"}
CHECKED = {"peft_type", "task_type", "bias", "init_lora_weights"}
# Settings without effect on a finished adapter: origin and training, which linears were chosen (the tensors say it),
# details of a method that another key switches on, and of an initialisation that init_lora_weights names.
WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config"),
    *("exclude_modules", "layers_pattern", "layers_to_transform", "lora_dropout", "target_modules"),
    *("ensure_weight_tying", "megatron_core", "qalora_group_size"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),
}
# Initialisations of A and B that leave the base as it is, and those that change its weights by what A and B begin with:
# such an adapter is right on the changed base alone.
BASE_UNCHANGED = (None, True, False, "gaussian", "eva", "orthogonal")
BASE_CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")
REFUSED = {
    "alora_invocation_tokens": "aLoRA acts only on the tokens after its invocation",
    "arrow_config": "Arrow chooses among several adapters at each token",
    "fan_in_fan_out": "it is for a base that stores its weights transposed",
    "layer_replication": "it repeats blocks of the base",
    "lora_bias": "B has a bias",
    "megatron_config": "it is for linears of Megatron",
    "modules_to_save": "it holds whole modules of the base, trained further",
    "target_parameters": "it changes parameters that are not linears",
    "trainable_token_indices": "it changes rows of the embedding",
    "use_qalora": "QALoRA pools the input before A",
}
SINCE_0_14 = {"exclude_modules", "peft_version"}  # keys that peft writes from that version on
ELSEWHERE = (
    "Use it with the library that wrote it; where that can merge it into its base (merge_and_unload of peft), give the "
    "merged model as MODEL="
)
CONVERT = (
    "python -c \"import torch, safetensors.torch as s; t = torch.load('adapter_model.bin', map_location='cpu', "
    "weights_only=True); s.save_file({k: v.contiguous() for k, v in t.items()}, 'adapter_model.safetensors')\""
)


@dataclass(frozen=True)
class LinearUpdate:
    """What the adapter adds to the weight [out_features, in_features] of one linear: scale · B [., rank] @ A [rank, .]."""

    rank: int
    in_features: int
    out_features: int
    scale: float


@dataclass(frozen=True)
class AdapterFile:
    """A checked adapter of which only names and shapes have been read. `updates`: name of the linear -> its update."""

    folder: Path
    config: dict[str, Any]
    updates: dict[str, LinearUpdate]

    @property
    def dora(self) -> bool:
        """Whether each row of a changed weight also gets a length: `magnitudes`."""
        return bool(self.config.get("use_dora"))

    def magnitudes(self) -> dict[str, Tensor]:
        """Name of the linear -> the lengths [out_features] of the rows of its weight; float32. Empty without DoRA.

        Raises:
            UserError: a value that is not finite.
        """
        if not self.dora:
            return {}
        with open_weights(self.folder) as file:
            vectors = {name: file.get_tensor(f"{PREFIX}{name}{MAGNITUDE}").float() for name in self.updates}
        for name, vector in vectors.items():
            if not vector.isfinite().all():
                raise self._not_finite("the magnitude", name)
        return vectors

    def _not_finite(self, part: str, name: str) -> UserError:
        return UserError(
            f"{self.folder / WEIGHTS}: {part} of {name} has non-finite values (NaN or infinity): the training of this "
            "adapter diverged. Use an earlier checkpoint of it."
        )

    def load(self) -> dict[str, tuple[Tensor, Tensor, float]]:
        """Name of the linear -> (A [rank, in_features], B [out_features, rank], scale); float32, on the CPU.

        Raises:
            UserError: a value that is not finite.
        """
        return {name: (a, b, self.updates[name].scale) for name, a, b in self.pairs()}

    def pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, A, B) of one linear after the other, as in `load`."""
        with open_weights(self.folder) as file:
            for name in self.updates:
                a, b = (file.get_tensor(f"{PREFIX}{name}{part}").float() for part in (A, B))
                if not (a.isfinite().all() and b.isfinite().all()):
                    raise self._not_finite("A or B", name)
                yield name, a, b


def read_adapter(folder: Path) -> AdapterFile:
    """Read and check adapter_config.json, and the names and shapes of the tensors.

    Raises:
        UserError: no adapter, a damaged one, or one that does more than add s · B @ A to linears: all reasons at once.
    """
    check_present(folder)
    config = read_config(folder / CONFIG)
    problems = [*_unsupported(config), *_invalid(config)]
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise UserError(f"{folder / CONFIG}: only LoRA, rsLoRA and DoRA are computed here:{listed}\n{ELSEWHERE}.")
    return AdapterFile(folder, config, _updates(folder, config, shapes_of(folder)))


def check_present(folder: Path) -> None:
    """Raises UserError, with what to do, if `folder` lacks one of an adapter's two files."""
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if not missing:
        return
    if missing == [WEIGHTS] and (folder / PICKLED).is_file():
        raise UserError(
            f"{folder}: its weights are in {PICKLED}, a pickle, which is not read here. Convert it in that folder:\n"
            f"  {CONVERT}"
        )
    remedy = ""
    if (folder / "config.json").is_file():
        remedy = " It holds a whole model: give that as MODEL=."
    elif below := sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}")):
        remedy = f" There are adapters in {', '.join(below[:5])}: name one of these folders."
    raise UserError(f"{folder}: no adapter there ({' and '.join(missing)} missing).{remedy}")


def read_config(path: Path) -> dict[str, Any]:
    """The content of adapter_config.json. Raises UserError if it is damaged."""
    try:
        config = read_json(path)
    except (ValueError, OSError, RecursionError) as error:  # ValueError: neither JSON nor UTF-8
        raise UserError(f"{path}: the adapter is damaged ({error}). Copy it again from where it was made.") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: the adapter is damaged (not a JSON object). Copy it again from where it was made.")
    return config


def _unsupported(config: dict[str, Any]) -> list[str]:
    """A sentence for each setting that is not computed here."""
    kind = config.get("peft_type")
    if kind != "LORA":
        return [f"peft_type is {kind}" if kind else "peft_type is missing: this is not an adapter of peft"]
    problems = [f"{key}={shown(config[key])}: {reason}" for key, reason in REFUSED.items() if config.get(key)]
    known = {*COMPUTED, *CHECKED, *WITHOUT_EFFECT, *REFUSED}
    unknown = sorted(key for key in config.keys() - known if config[key])
    problems += [f"{key}={shown(config[key])}: this setting is not known here" for key in unknown]
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        problems.append(f"task_type={shown(config['task_type'])}: only CAUSAL_LM is computed")
    if (bias := config.get("bias")) not in (None, "none"):
        problems.append(f"bias={shown(bias)}: it changes biases of the base")
    if reason := _changed_base(config.get("init_lora_weights", True)):
        problems.append(f"init_lora_weights={shown(config['init_lora_weights'])}: {reason}")
    return problems


def _changed_base(init: Any) -> str:
    """Why an adapter that began with this initialisation is not right on the base; empty if it is."""
    method = init.lower() if isinstance(init, str) else init
    if method in BASE_UNCHANGED:
        return ""
    known = isinstance(method, str) and method.startswith(BASE_CHANGED)
    return "it changed the weights of the base before training" if known else "this initialisation is not known here"


def shown(value: Any) -> str:
    """A value of the config for a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _invalid(config: dict[str, Any]) -> list[str]:
    """A sentence for each computed setting whose value has the wrong type or is missing."""
    checks = {
        "r": (is_rank, "a whole number from 1"),
        "lora_alpha": (is_number, "a number"),
        "use_rslora": (lambda value: value in (None, False, True), "true or false"),
        "use_dora": (lambda value: value in (None, False, True), "true or false"),
        "rank_pattern": (lambda value: _is_pattern(value, is_rank), "ranks by name of a linear"),
        "alpha_pattern": (lambda value: _is_pattern(value, is_number), "alphas by name of a linear"),
    }
    if config.get("peft_type") != "LORA":
        return []
    return [
        f"{key}={shown(config.get(key))}: expected {expected}"
        for key, (holds, expected) in checks.items()
        if not holds(config.get(key))
    ]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_pattern(value: Any, holds: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, dict) and all(_is_regex(key) and holds(entry) for key, entry in value.items())


def _is_regex(key: str) -> bool:
    try:
        re.compile(key)
    except re.error:
        return False
    return True


# --- tensors ----------------------------------------------------------------------------------------------------------


def open_weights(folder: Path) -> Any:
    """The opened adapter_model.safetensors. Raises UserError if it is damaged."""
    try:
        return safe_open(folder / WEIGHTS, "pt")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder / WEIGHTS}: the adapter is damaged ({error}). Copy it again from where it was made."
        ) from error


def shapes_of(folder: Path) -> dict[str, list[int]]:
    """Name of each tensor -> its shape."""
    with open_weights(folder) as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # no mapping


def _updates(folder: Path, config: dict[str, Any], shapes: dict[str, list[int]]) -> dict[str, LinearUpdate]:
    """The update of each linear, by its name in the base."""
    path, updates, settings = folder / WEIGHTS, {}, _settings_by_name(config)
    for key in sorted(name for name in shapes if name.startswith(PREFIX) and name.endswith(A)):
        name = key.removeprefix(PREFIX).removesuffix(A)
        a, b = shapes[key], shapes.get(f"{PREFIX}{name}{B}", [])
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise UserError(f"{path}: the adapter is damaged (A of {name} has no B of the same rank). Copy it again.")
        alpha = _alpha(path, name, a[0], settings(name))
        updates[name] = LinearUpdate(a[0], a[1], b[0], alpha / (math.sqrt(a[0]) if config.get("use_rslora") else a[0]))
        if config.get("use_dora") and shapes.get(f"{PREFIX}{name}{MAGNITUDE}") != [b[0]]:
            raise UserError(f"{path}: the adapter is damaged (DoRA, and no lengths for {name}). Copy it again.")
    parts = (A, B, MAGNITUDE) if config.get("use_dora") else (A, B)
    others = sorted(shapes.keys() - {f"{PREFIX}{name}{part}" for name in updates for part in parts})
    if others or not updates:
        names = ", ".join(others[:3]) + (" …" if len(others) > 3 else "")
        problem = f"has tensors other than A and B of linears: {names}" if others else "is empty"
        raise UserError(f"{path}: {problem}. Only LoRA, rsLoRA and DoRA are computed here. {ELSEWHERE}.")
    return updates


def _alpha(path: Path, name: str, rank: int, settings: Settings) -> float:
    """alpha of the linear `name`, whose tensors have this rank.

    Raises:
        UserError: the tensors have another rank than the config, or versions of peft disagree about alpha.
    """
    alphas = sorted({alpha for expected, alpha in settings if expected == rank})
    if not alphas:
        raise UserError(f"{path}: the rank of {name} is {rank}, but {CONFIG} says {settings[0][0]}. Copy both again.")
    if len(alphas) > 1:
        raise UserError(
            f"{path.with_name(CONFIG)}: rank_pattern and alpha_pattern: versions of peft disagree about {name}, whose "
            f"alpha is {alphas[0]:g} or {alphas[1]:g}. Give every linear its full name there."
        )
    return alphas[0]


def _settings_by_name(config: dict[str, Any]) -> Callable[[str], Settings]:
    """A function from a linear's name to its rank and alpha: one pair, or two where versions of peft may differ.

    From 0.14 on, peft looks in each pattern alone (peft/utils/other.py, get_pattern_key). Before, it took the first key
    of both that matches, for both (peft/tuners/lora/model.py, _create_and_replace).
    """
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    of_rank, of_alpha = _compiled(ranks, r"(.*\.)?"), _compiled(alphas, r"(.*\.)?")
    of_both = _compiled([*ranks, *alphas], r".*\.")

    def pair(rank_key: str, alpha_key: str) -> tuple[int, float]:
        return ranks.get(rank_key, config["r"]), alphas.get(alpha_key, config["lora_alpha"])

    def settings(name: str) -> Settings:
        newer = pair(_first_match(of_rank, name), _first_match(of_alpha, name))
        key = _first_match(of_both, name)
        return [newer] if SINCE_0_14 & config.keys() else [newer, pair(key, key)]

    return settings


def _compiled(keys: Iterable[str], before: str) -> list[tuple[str, re.Pattern[str]]]:
    return [(key, re.compile(rf"{before}({key})$")) for key in keys]


def _first_match(patterns: list[tuple[str, re.Pattern[str]]], name: str) -> str:
    """The first key that matches the end of `name`; the name itself if none does."""
    return next((key for key, pattern in patterns if pattern.match(name)), name)
