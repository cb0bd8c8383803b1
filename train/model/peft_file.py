"""The folder of an adapter of peft's other methods, IA3, VeRA, LoHa and LoKr: what is computed here, and what is refused.

As adapter_file.py, which reads LoRA and DoRA: adapter_config.json is read by known keys, a key that can change what the
adapter computes is computed or refused, and which linears it changes is read from the tensors.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from train.common.errors import UserError
from train.model.adapter_file import (
    CONFIG,
    ELSEWHERE,
    WEIGHTS,
    check_present,
    is_number,
    is_rank,
    open_weights,
    read_config,
    shapes_of,
    shown,
)
from train.model.peft_layers import METHODS

TITLES = {"ia3": "IA3", "vera": "VeRA", "loha": "LoHa", "lokr": "LoKr"}
PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")
PARTS: dict[str, list[tuple[str, ...]]] = {  # the tensors of a linear, in the ways in which they can be written
    "ia3": [("ia3_l",)],
    "vera": [("vera_lambda_b", "vera_lambda_d")],
    "loha": [("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")],
    "lokr": [
        (*w1, *w2)
        for w1 in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for w2 in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    ],
}
COMPUTED = {
    "ia3": set[str](),
    "vera": {"r", "projection_prng_key", "save_projection"},
    "loha": {"r", "alpha"},
    "lokr": {"r", "alpha"},
}
# Without effect on a finished adapter: origin and training, which linears were chosen (the tensors say it), how values
# began, what acts on convolutions alone
WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("exclude_modules", "layers_pattern", "layers_to_transform", "runtime_config", "target_modules", "task_type"),
    *("feedforward_modules", "init_ia3_weights", "init_weights", "d_initial", "vera_dropout"),
    *("rank_dropout", "rank_dropout_scale", "module_dropout", "use_effective_conv2d", "decompose_both"),
    *("decompose_factor", "ensure_weight_tying"),
}
REFUSED = {
    "alpha_pattern": "it gives linears an alpha of their own",
    "fan_in_fan_out": "it is for a base that stores its weights transposed",
    "modules_to_save": "it holds whole modules of the base, trained further",
    "rank_pattern": "it gives linears a rank of their own",
}


@dataclass(frozen=True)
class Changed:
    """One linear of the adapter: the shapes of its parts, and the size of its weight; None where they do not tell it."""

    shapes: dict[str, list[int]]
    in_features: int | None
    out_features: int | None


@dataclass(frozen=True)
class PeftFile:
    """A checked adapter of which only names and shapes have been read. `updates`: by the name of the linear."""

    folder: Path
    config: dict[str, Any]
    method: str
    updates: dict[str, Changed]

    @property
    def title(self) -> str:
        """The method's name for people."""
        return TITLES[self.method]

    @property
    def rank(self) -> int:
        """r; 0 for IA3, which has none."""
        return int(self.config["r"]) if self.method != "ia3" else 0

    @property
    def scale(self) -> float:
        """alpha / r of LoHa; 1 for the others."""
        return float(self.config["alpha"]) / self.rank if self.method == "loha" else 1.0

    def parts(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(name, part -> values) of one linear after the other; float32, on the CPU.

        Raises:
            UserError: a value that is not finite.
        """
        with open_weights(self.folder) as file:
            for name, update in self.updates.items():
                yield name, {part: self._read(file, f"base_model.model.{name}.{part}") for part in update.shapes}

    def projections(self) -> tuple[Tensor, Tensor]:
        """VeRA's A [r, K] and B [N, r], float32.

        Raises:
            UserError: a value that is not finite.
        """
        with open_weights(self.folder) as file:
            a, b = (self._read(file, name) for name in PROJECTIONS)
            return a, b

    def _read(self, file: Any, name: str) -> Tensor:
        values: Tensor = file.get_tensor(name).float()
        if not values.isfinite().all():
            raise UserError(
                f"{self.folder / WEIGHTS}: {name.removeprefix('base_model.model.')} has non-finite values (NaN or infinity): "
                "the training of this adapter diverged. Use an earlier checkpoint of it."
            )
        return values


def method_of(folder: Path) -> str:
    """The method of the adapter in `folder`, one of METHODS; empty for LoRA, and for what read_adapter refuses.

    Raises:
        UserError: no adapter there, or a damaged adapter_config.json.
    """
    check_present(folder)
    kind = read_config(folder / CONFIG).get("peft_type")
    return kind.lower() if isinstance(kind, str) and kind.lower() in METHODS and kind.isupper() else ""


def read_peft(folder: Path) -> PeftFile:
    """Read and check adapter_config.json, and the names and shapes of the tensors, of an adapter with a `method_of`.

    Raises:
        UserError: a damaged one, or one that does more than is computed here: all reasons at once.
    """
    method, config = method_of(folder), read_config(folder / CONFIG)
    if problems := [*_unsupported(config, method), *_invalid(config, method)]:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise UserError(f"{folder / CONFIG}: this {TITLES[method]} is not computed here:{listed}\n{ELSEWHERE}.")
    return PeftFile(folder, config, method, _updates(folder, config, method))


def _unsupported(config: dict[str, Any], method: str) -> list[str]:
    """A sentence for each setting that is not computed here."""
    problems = [f"{key}={shown(config[key])}: {reason}" for key, reason in REFUSED.items() if config.get(key)]
    known = {*COMPUTED[method], *WITHOUT_EFFECT, *REFUSED, "bias"}
    problems += [
        f"{key}={shown(config[key])}: this setting is not known here"
        for key in sorted(config.keys() - known)
        if config[key]
    ]
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        problems.append(f"task_type={shown(config['task_type'])}: only CAUSAL_LM is computed")
    if (bias := config.get("bias")) not in (None, "none"):
        problems.append(f"bias={shown(bias)}: it changes biases of the base")
    return problems


def _invalid(config: dict[str, Any], method: str) -> list[str]:
    """A sentence for each computed setting whose value has the wrong type, is missing, or has no one meaning."""
    problems = []
    if "r" in COMPUTED[method] and not is_rank(config.get("r")):
        problems.append(f"r={shown(config.get('r'))}: expected a whole number from 1")
    if "alpha" in COMPUTED[method] and not is_number(config.get("alpha")):
        problems.append(f"alpha={shown(config.get('alpha'))}: expected a number")
    if method == "lokr" and not problems and config["alpha"] != config["r"]:
        problems.append(
            f"alpha={shown(config['alpha'])} with r={shown(config['r'])}: peft 0.12 leaves LoKr's alpha out, and later ones "
            "do not. If 0.12 trained it, write the value of r there"
        )
    return problems


def _updates(folder: Path, config: dict[str, Any], method: str) -> dict[str, Changed]:
    """What the adapter has for each linear, by its name in the base."""
    path, shapes = folder / WEIGHTS, shapes_of(folder)
    names = "|".join(sorted({part for way in PARTS[method] for part in way}))
    pattern, found, others = re.compile(rf"base_model\.model\.(.+)\.({names})"), dict[str, dict[str, list[int]]](), []
    for key in sorted(shapes):
        if match := pattern.fullmatch(key):
            found.setdefault(match[1], {})[match[2]] = shapes[key]
        elif method != "vera" or key not in PROJECTIONS:
            others.append(key)
    if others or not found:
        listed = ", ".join(others[:3]) + (" …" if len(others) > 3 else "")
        problem = f"has tensors other than those of {TITLES[method]}: {listed}" if others else "is empty"
        raise UserError(f"{path}: {problem}. {ELSEWHERE}.")
    updates = {}
    for name, own in found.items():
        sizes = _sizes(own, method, int(config["r"]) if method in ("vera", "loha") else 0)
        if sizes is None:
            raise UserError(f"{path}: the adapter is damaged (the parts of {name} do not fit together). Copy it again.")
        updates[name] = Changed(own, *sizes)
    _check_projections(path, shapes, config, method, updates)
    return updates


def _sizes(shapes: dict[str, list[int]], method: str, rank: int) -> tuple[int | None, int | None] | None:
    """(K, N) of a weight from its parts' shapes, None for one that they do not tell; None if they do not fit together."""
    way = next((way for way in PARTS[method] if set(way) == shapes.keys()), None)
    if way is None:
        return None
    own = [shapes[part] for part in way]
    if method == "vera":
        return (None, own[0][0]) if len(own[0]) == 1 and own[1] == [rank] else None
    if any(len(shape) != 2 for shape in own):
        return None
    if method == "ia3":
        (rows, columns), *_ = own
        return (columns, None) if rows == 1 else (None, rows) if columns == 1 else None
    if method == "loha":
        (n, *_), (_, k), *_ = own
        return (k, n) if own == [[n, rank], [rank, k]] * 2 else None
    w1, w2 = (_product([shapes[part] for part in way if part.startswith(name)]) for name in ("lokr_w1", "lokr_w2"))
    return (w1[1] * w2[1], w1[0] * w2[0]) if w1 and w2 else None


def _product(shapes: list[list[int]]) -> list[int] | None:
    """The shape of the product of one or two matrices; None if they do not fit."""
    if len(shapes) == 1:
        return shapes[0]
    (rows, inner), (same, columns) = shapes
    return [rows, columns] if inner == same else None


def _check_projections(
    path: Path, shapes: dict[str, list[int]], config: dict[str, Any], method: str, updates: dict[str, Changed]
) -> None:
    if method != "vera":
        return
    if not all(name in shapes for name in PROJECTIONS):
        raise UserError(
            f"{path}: VeRA without its projections A and B (save_projection=false), which are read from the file here. Save "
            "it again with save_projection=True in the program that wrote it."
        )
    a, b = (shapes[name] for name in PROJECTIONS)
    rows = max(update.out_features or 0 for update in updates.values())
    if len(a) != 2 or len(b) != 2 or a[0] != config["r"] or b[1] != config["r"] or b[0] < rows:
        raise UserError(f"{path}: the adapter is damaged (A and B do not fit its linears). Copy it again.")
