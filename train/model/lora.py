"""Low-rank adapters (Hu et al. 2021) on a frozen decoder, in files that stock peft reads.

It knows the decoder's linears by name, and nothing of training, devices or Int4. A and B are float32 whatever the base
is: the input is cast to float32 and the result back, as in peft. That costs two casts a layer, and small updates are
not lost in rounding.
"""

import math
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save
from torch import Tensor, nn

from train.common.errors import UserError, first_few
from train.common.files import write_json
from train.model.adapter_file import CONFIG, MAGNITUDE, PREFIX, WEIGHTS, AdapterFile, read_adapter
from train.model.decoder import Decoder, linear_names
from train.model.dora_layers import DoraLinear
from train.model.layouts import DecoderConfig
from train.model.lora_layers import NAME, AdaptedModel, LoraLinear, LoraSettings
from train.model.lora_start import as_plain

CHANGE = f"lora_magnitude_change.{NAME}.weight"  # DoRA's parameter in a linear: see DoraLinear
SAME_ALPHA = 1e-6  # relative: an alpha that was typed with seven digits is the same
PEFT_FIELDS: dict[str, Any] = {
    **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True},
    **{"init_lora_weights": True, "fan_in_fan_out": False, "use_dora": False, "use_rslora": False},
    **{"alpha_pattern": {}, "rank_pattern": {}, "loftq_config": {}, "megatron_core": "megatron.core"},
    **dict.fromkeys(("auto_mapping", "layer_replication", "layers_pattern", "layers_to_transform")),
    **dict.fromkeys(("megatron_config", "modules_to_save", "revision")),
}
PARTIAL = (
    "Training here adapts a linear of the blocks in all of them or in none (layers_to_transform and exclude_modules "
    "leave some out), and never the head. Merge this adapter into its base, and give the result as MODEL=."
)


class Sized(Protocol):
    """The size of the weight of one linear that an adapter changes; None where its file does not tell it."""

    @property
    def in_features(self) -> int | None: ...

    @property
    def out_features(self) -> int | None: ...


class ChangesLinears(Protocol):
    """An adapter's file of any method. updates: by the name of the linear."""

    @property
    def folder(self) -> Path: ...

    @property
    def updates(self) -> Mapping[str, Sized]: ...


class AdapterSettings(Protocol):
    """The settings of a new adapter; a recipe has these fields."""

    @property
    def model(self) -> str: ...  # the base's name, for adapter_config.json

    @property
    def rank(self) -> int: ...

    @property
    def alpha(self) -> float: ...

    @property
    def rslora(self) -> bool: ...

    @property
    def dora(self) -> bool: ...

    @property
    def method(self) -> str: ...

    @property
    def lokr_factor(self) -> int: ...

    @property
    def dropout(self) -> float: ...

    @property
    def targets(self) -> str: ...

    @property
    def seed(self) -> int: ...


def targets(layout: str, requested: str) -> list[str]:
    """The names of the linears that `requested` means: "all", or names separated by commas.

    Raises:
        UserError: a name that no linear of a block has; the message lists the names.
    """
    known = linear_names(layout)
    names = (
        sorted(known) if requested == "all" else sorted({name.strip() for name in requested.split(",") if name.strip()})
    )
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise UserError(
            f"targets={requested}: no linear is called {', '.join(unknown) or 'nothing'} in layout {layout}. "
            f"There are: {', '.join(known)}; or targets=all."
        )
    return names


def attach(model: Decoder, settings: AdapterSettings) -> AdaptedModel:
    """The decoder with new adapters: A random, B zero, both float32 and trainable.

    The values of A depend on the seed and the parameter's name alone, not on the device or the state of any generator.
    """
    names = targets(model.config.layout, settings.targets)
    values = (settings.rank, settings.alpha, settings.dropout, sorted(names), base_name(settings))
    own = LoraSettings(*values, settings.rslora, settings.dora)
    kind = DoraLinear if settings.dora else LoraLinear
    layers = {
        name: kind(linear, settings.rank, own.scale, settings.dropout) for name, linear in linears(model, names).items()
    }
    adapted = AdaptedModel(model, layers, own)
    for name, p in trainable(adapted).items():
        p.data.copy_(initial_lora_a(name, p.shape, settings.seed) if ".lora_A." in name else torch.zeros(()))
    return adapted


def base_name(settings: AdapterSettings) -> str:
    """The base's name for adapter_config.json, without folders of this machine."""
    return Path(settings.model).name if Path(settings.model).is_absolute() else settings.model


def initial_lora_a(name: str, shape: torch.Size, seed: int) -> Tensor:
    """A [r, K], uniform in ±1/sqrt(K) as in peft (Kaiming with a = sqrt 5), float32 on the CPU."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of all that require a gradient, in the order of the model."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_adapter(
    model: AdaptedModel,
    folder: Path,
    tensors: dict[str, Tensor] | None = None,
    factors: dict[str, Tensor] | None = None,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors as stock peft does; equal adapters give equal bytes.

    Args:
        tensors: name of a parameter -> its full float32 value, where the model has only a part or a rounded copy of it.
        factors: A and B as they began, by the same names, where they began with a part of the base: then it is written
            as a plain adapter of twice the rank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = model.settings
    assert settings is not None, "an adapter that was read has its file already"
    state: dict[str, Tensor] = dict(tensors) if tensors is not None else dict(trainable(model))
    if settings.dora:
        state |= {name: state[name] + length.to(state[name]) for name, length in _base_lengths(model)}
    if factors is not None:
        state, settings = as_plain(state, factors, settings)
    stock = {stock_name(name): state[name].detach().float().cpu().contiguous() for name in sorted(state)}
    (folder / WEIGHTS).write_bytes(save(stock, metadata={"format": "pt"}))
    write_json(folder / CONFIG, _as_json(settings))


def _base_lengths(model: AdaptedModel) -> Iterator[tuple[str, Tensor]]:
    """(name of the parameter, |W| [N]) of each linear with DoRA, whose parameter holds the difference to it."""
    for name, layer in model.named_modules():
        if isinstance(layer, DoraLinear):
            yield f"{name}.{CHANGE}", layer.base_length


def stock_name(parameter: str) -> str:
    """The name in the file, without the adapter's name: …q_proj.lora_A.default.weight -> …q_proj.lora_A.weight."""
    return parameter.replace(f".{CHANGE}", MAGNITUDE).replace(".default.", ".")


def _as_json(settings: LoraSettings) -> dict[str, Any]:
    """The content of adapter_config.json: the fields of peft 0.12 in inference mode, which every later one reads."""
    alpha = int(settings.alpha) if float(settings.alpha).is_integer() else settings.alpha
    changed = {"base_model_name_or_path": settings.base, "r": settings.rank, "lora_alpha": alpha}
    changed |= {"lora_dropout": settings.dropout, "target_modules": settings.targets, "use_rslora": settings.rslora}
    changed |= {"use_dora": settings.dora}
    return PEFT_FIELDS | changed


def delta(folder: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Linear in the base -> (A [r, K], B [N, r], scale): its weight [N, K] gets scale · B @ A. Float32, on the CPU.

    Raises:
        UserError: no adapter, a damaged one, one that is not computed here, or one that does more than this: DoRA.
    """
    adapter = read_adapter(folder)
    refuse_dora(adapter, "here only A and B are read")
    return adapter.load()


def refuse_dora(adapter: AdapterFile, reason: str) -> None:
    """Raises UserError for DoRA where a file or a program has A and B only."""
    if adapter.dora:
        raise UserError(
            f"{adapter.folder} is DoRA, which also changes the length of each row of a weight, and {reason}. Export the "
            "merged model: make export RUN=… (FORMAT=gguf writes the merged model, too)."
        )


def load_adapter(model: Decoder, folder: Path) -> AdaptedModel:
    """The decoder with the adapter of `folder`, of any peft; float32, frozen, in evaluation mode.

    Raises:
        UserError: no adapter in the folder, a damaged one, one that is not computed here, or one of another model.
    """
    return apply(model, read_adapter(folder))


def apply(model: Decoder, adapter: AdapterFile) -> AdaptedModel:
    """As `load_adapter`, of an adapter that `read_adapter` gave."""
    at = linears(model)
    check_linears(adapter, at)
    kind = DoraLinear if adapter.dora else LoraLinear
    layers = {name: kind(at[name], update.rank, update.scale) for name, update in adapter.updates.items()}
    magnitudes = adapter.magnitudes()
    for name, a, b in adapter.pairs():
        for part, value in ((layers[name].lora_A, a), (layers[name].lora_B, b)):
            weight: Any = part[NAME].weight
            weight.data = value.to(weight.device)
    for name, layer in layers.items():
        if isinstance(layer, DoraLinear):
            layer.set_magnitude(magnitudes[name])
            layer.fix_factor()
    return AdaptedModel(model, layers, None).requires_grad_(False).eval()


def linears(model: nn.Module, names: Collection[str] | None = None) -> dict[str, nn.Linear]:
    """Name -> module of every linear of a decoder, of which adapters change some; or of those called one of `names`."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: linear for name, linear in found.items() if names is None or name.rpartition(".")[2] in names}


def check_linears(adapter: ChangesLinears, linears: dict[str, nn.Linear]) -> None:
    """Raises UserError if the adapter changes a linear that the base lacks, or that has another shape there."""
    for name, update in adapter.updates.items():
        linear = linears.get(name)
        if linear is None:
            raise UserError(
                f"{adapter.folder}: the adapter changes {name}, which this base does not have. Was it trained on "
                "another model?"
            )
        sizes = (update.out_features, linear.out_features), (update.in_features, linear.in_features)
        if any(found not in (None, own) for found, own in sizes):
            in_adapter, in_base = (f"[{n or 'any'}, {k or 'any'}]" for n, k in zip(*sizes, strict=True))
            raise UserError(
                f"{adapter.folder}: {name} is {in_adapter} in the adapter and {in_base} in the base. Was it trained on "
                "another model?"
            )


def check_start(adapter: AdapterFile, settings: AdapterSettings) -> None:
    """Check that training with `settings` computes what `adapter` does: one rank and one scale, and the same ones.

    rsLoRA with alpha is the same as plain LoRA with alpha · sqrt(rank), so either kind continues as the other.

    Raises:
        UserError: what differs, and the values to give.
    """
    first, *others = adapter.updates.values()
    if any((other.rank, other.scale) != (first.rank, first.scale) for other in others):
        ranks = ", ".join(map(str, sorted({update.rank for update in adapter.updates.values()})))
        scales = ", ".join(f"{scale:g}" for scale in sorted({update.scale for update in adapter.updates.values()}))
        raise UserError(
            f"its linears have different ranks or scales (rank_pattern, alpha_pattern: ranks {ranks}; scales {scales}), "
            "and training here gives all of them the same. Merge it into its base, and give the result as MODEL=."
        )
    alpha, wrong = first.scale * (math.sqrt(first.rank) if settings.rslora else first.rank), []
    if first.rank != settings.rank:
        wrong.append(f"rank is {first.rank} there and {settings.rank} here")
    if not math.isclose(alpha, settings.alpha, rel_tol=SAME_ALPHA):
        stabilized = adapter.config.get("use_rslora") and not settings.rslora
        origin = f" (use_rslora with lora_alpha {adapter.config['lora_alpha']:g})" if stabilized else ""
        wrong.append(f"alpha is {alpha:.9g}{origin} there and {settings.alpha:g} here")
    if wrong:
        raise UserError(f"its adapter has another shape: {', '.join(wrong)}. Give rank={first.rank} alpha={alpha:.9g}.")
    if adapter.dora != settings.dora:
        has, give = ("is", "on") if adapter.dora else ("is not", "off")
        raise UserError(f"its adapter {has} DoRA. Give dora={give}.")


def check_targets(adapter: ChangesLinears, settings: AdapterSettings, config: DecoderConfig) -> None:
    """Check that training with `settings` has adapters on the very linears that `adapter` changes.

    Raises:
        UserError: it lacks some, or has others; the message names them.
    """
    with torch.device("meta"):
        base = linears(Decoder(config))
    check_linears(adapter, base)
    names = targets(config.layout, settings.targets)
    wanted = {name for name in base if name.rpartition(".")[2] in names}
    lacking, surplus = sorted(wanted - adapter.updates.keys()), sorted(adapter.updates.keys() - wanted)
    if lacking or surplus:
        differ = f"it has none for {first_few(lacking)}" if lacking else f"it is also for {first_few(surplus)}"
        kinds = {name.rpartition(".")[2] for name in adapter.updates}
        complete = kinds <= set(linear_names(config.layout)) and adapter.updates.keys() == {
            name for name in base if name.rpartition(".")[2] in kinds
        }
        hint = f"Give targets={','.join(sorted(kinds))}." if complete else PARTIAL
        raise UserError(f"its adapter is for other linears: {differ}. {hint}")


def copy_adapter(adapter: AdapterFile, model: AdaptedModel) -> None:
    """Give the trainable parameters of `model` the values of `adapter`, which check_start and check_targets accepted."""
    pairs, magnitudes = adapter.load(), adapter.magnitudes()
    for name, layer in model.named_modules():
        if isinstance(layer, DoraLinear):
            layer.set_magnitude(magnitudes[name.removeprefix(PREFIX)])
    for name, p in trainable(model).items():
        if name.endswith(CHANGE):
            continue
        linear, _, part = name.removeprefix(PREFIX).partition(".lora_")
        a, b, _ = pairs[linear]
        p.data.copy_(a if part.startswith("A") else b)
