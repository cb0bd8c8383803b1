"""Adapters of peft's other methods on a frozen decoder, in files that stock peft reads: what lora.py does for LoRA.

Values at the beginning follow from the seed and a parameter's name alone, as LoRA's A. Nothing of peft is imported.
"""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from train.common.errors import UserError
from train.common.files import write_json
from train.model import lora
from train.model.adapter_file import CONFIG, PREFIX, WEIGHTS
from train.model.decoder import Decoder
from train.model.layouts import LAYOUTS, DecoderConfig
from train.model.lora_layers import NAME, AdaptedModel
from train.model.peft_file import PROJECTIONS, PeftFile, read_peft
from train.model.peft_layers import (
    FIRST_D,
    Ia3Linear,
    LohaLinear,
    LokrLinear,
    MethodLinear,
    MethodSettings,
    Projections,
    VeraLinear,
    lokr_sizes,
)

CHANGE, WHOLE = "ia3_change", "ia3_l"  # what a run trains, and what the file has: 1 + the change
ZERO = ("ia3_change", "vera_lambda_b", "hada_w2_b", "lokr_w1")  # parts that are zero before training
BEGUN: dict[str, Any] = {  # fields of adapter_config.json as peft 0.12 writes them
    **{"task_type": "CAUSAL_LM", "inference_mode": True},
    **dict.fromkeys(("auto_mapping", "modules_to_save", "revision")),
}
ON_LAYERS = dict.fromkeys(("layers_pattern", "layers_to_transform"))
LYCORIS: dict[str, Any] = {
    **{"rank_pattern": {}, "alpha_pattern": {}, "rank_dropout": 0.0, "module_dropout": 0.0, "init_weights": True},
    **{"use_effective_conv2d": False, **ON_LAYERS},
}
FIELDS: dict[str, dict[str, Any]] = {
    "ia3": {"fan_in_fan_out": False, "init_ia3_weights": True},
    "vera": {
        "save_projection": True,
        "d_initial": FIRST_D,
        "fan_in_fan_out": False,
        "bias": "none",
        "init_weights": True,
    }
    | ON_LAYERS,
    "loha": LYCORIS,
    "lokr": LYCORIS | {"decompose_both": False},
}


def attach(model: Decoder, settings: lora.AdapterSettings) -> AdaptedModel:
    """The decoder with new adapters of `settings.method`, which change nothing yet; float32 and trainable."""
    names = lora.targets(model.config.layout, settings.targets)
    found = lora.linears(model, names)
    inputs = [name for name in found if is_down(name, model.config.layout)]
    own = MethodSettings(
        *(settings.method, settings.rank, settings.alpha, settings.dropout, settings.seed, settings.lokr_factor),
        *(_targets(settings.method, list(found)), _targets("ia3", inputs), lora.base_name(settings)),
    )
    shared = vera_projections(found, own.rank, own.seed) if own.method == "vera" else None
    layers = {name: _layer(linear, own, name in inputs, shared) for name, linear in found.items()}
    adapted = _adapted(model, layers, shared, own)
    for name, p in lora.trainable(adapted).items():
        part = name.split(".")[-2]
        if part in ZERO:
            p.data.zero_()
        elif part == "vera_lambda_d":
            p.data.fill_(FIRST_D)
        else:  # uniform in ±1/sqrt(columns), as in peft (Kaiming with a = sqrt 5)
            p.data.copy_(lora.initial_lora_a(name, p.shape, settings.seed))
    return adapted


def is_down(name: str, layout: str) -> bool:
    """Whether a linear is that after the activation, whose input IA3 scales."""
    names = LAYOUTS[layout]
    return name.endswith(f".{names.mlp}.{names.down}")


def _targets(method: str, names: list[str]) -> list[str]:
    """Linears as adapter_config.json names them; for IA3 with their module, as Qwen-1 calls two of them c_proj."""
    last = 2 if method == "ia3" else 1
    return sorted({".".join(name.split(".")[-last:]) for name in names})


def _layer(linear: nn.Linear, own: MethodSettings, scales_input: bool, shared: Projections | None) -> MethodLinear:
    if own.method == "ia3":
        return Ia3Linear(linear, scales_input)
    if shared is not None:
        return VeraLinear(linear, shared, own.rank, own.dropout)
    if own.method == "loha":
        return LohaLinear(linear, own.rank, own.alpha / own.rank)
    return LokrLinear(linear, lokr_sizes(linear.in_features, linear.out_features, own.rank, own.factor))


def vera_projections(linears: dict[str, nn.Linear], rank: int, seed: int) -> Projections:
    """A [r, K] and B [N, r] for the largest K and N of these linears, as peft draws them from the seed on the CPU."""
    columns = max(linear.in_features for linear in linears.values())
    rows = max(linear.out_features for linear in linears.values())
    generator = torch.Generator().manual_seed(seed)
    a, b = (
        torch.empty(size, device="cpu").uniform_(-bound, bound, generator=generator)
        for size, bound in (((rank, columns), math.sqrt(6 / columns)), ((rows, rank), math.sqrt(6 / rank)))
    )
    first: Any = next(iter(linears.values()))
    device = next(t.device for t in (*first.parameters(), *first.buffers()))
    return Projections(a, b).to(device)


def _adapted(
    model: Decoder, layers: dict[str, Any], shared: Projections | None, settings: MethodSettings | None
) -> AdaptedModel:
    adapted = AdaptedModel(model, layers, settings)
    if shared is not None:
        adapted.vera = shared  # so that it moves with the model
    return adapted


def _shared(model: AdaptedModel) -> Projections:
    shared = model.vera
    assert isinstance(shared, Projections)
    return shared


def save_adapter(model: AdaptedModel, folder: Path, tensors: dict[str, Tensor] | None = None) -> None:
    """Write the adapter's two files as stock peft does; equal adapters give equal bytes. As lora.save_adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    settings: MethodSettings = model.settings
    state: dict[str, Tensor] = dict(tensors) if tensors is not None else dict(lora.trainable(model))
    stock = {_stock_name(name): _stock_values(name, values) for name, values in state.items()}
    if settings.method == "vera":
        stock |= dict(zip(PROJECTIONS, (t.cpu().contiguous() for t in _shared(model).buffers()), strict=True))
    (folder / WEIGHTS).write_bytes(save(dict(sorted(stock.items())), metadata={"format": "pt"}))
    write_json(folder / CONFIG, _as_json(settings))


def _stock_name(parameter: str) -> str:
    return parameter.removesuffix(f".{NAME}").replace(f".{CHANGE}", f".{WHOLE}")


def _stock_values(parameter: str, values: Tensor) -> Tensor:
    held = values.detach().float().cpu().contiguous()
    return 1 + held if f".{CHANGE}." in parameter else held


def _as_json(settings: MethodSettings) -> dict[str, Any]:
    """The content of adapter_config.json."""
    method = settings.method
    own: dict[str, Any] = {"base_model_name_or_path": settings.base, "target_modules": settings.targets}
    if method == "ia3":
        own |= {"feedforward_modules": settings.inputs}
    else:
        own |= {"r": settings.rank}
    if method == "vera":
        own |= {"vera_dropout": settings.dropout, "projection_prng_key": settings.seed}
    if method == "loha":
        own |= {"alpha": int(settings.alpha) if float(settings.alpha).is_integer() else settings.alpha}
    if method == "lokr":
        own |= {"alpha": settings.rank, "decompose_factor": settings.factor or -1}
    return {"peft_type": method.upper(), **BEGUN, **FIELDS[method], **own}


def load_adapter(model: Decoder, folder: Path) -> AdaptedModel:
    """The decoder with the adapter of `folder`, of any peft; float32, frozen, in evaluation mode.

    Raises:
        UserError: a damaged adapter, one that is not computed here, or one of another model.
    """
    return apply(model, read_peft(folder))


def apply(model: Decoder, adapter: PeftFile) -> AdaptedModel:
    """As `load_adapter`, of an adapter that `read_peft` gave."""
    at = lora.linears(model)
    lora.check_linears(adapter, at)
    shared = _read_projections(adapter, at) if adapter.method == "vera" else None
    layers: dict[str, MethodLinear] = {}
    for name, parts in adapter.parts():
        layers[name] = layer = _read_layer(adapter, at[name], parts, shared)
        _fill(layer, parts)
    return _adapted(model, layers, shared, None).requires_grad_(False).eval()


def _read_projections(adapter: PeftFile, linears: dict[str, nn.Linear]) -> Projections:
    a, b = adapter.projections()
    changed = {name: linears[name] for name in adapter.updates}
    if (columns := max(linear.in_features for linear in changed.values())) > a.shape[1]:
        raise UserError(
            f"{adapter.folder}: A of VeRA has {a.shape[1]} columns, and this base {columns}. Was it trained on another model?"
        )
    first: Any = next(iter(changed.values()))
    return Projections(a, b).to(next(t.device for t in (*first.parameters(), *first.buffers())))


def _read_layer(
    adapter: PeftFile, linear: nn.Linear, parts: dict[str, Tensor], shared: Projections | None
) -> MethodLinear:
    if adapter.method == "ia3":
        return Ia3Linear(linear, scales_input=len(parts[WHOLE]) == 1)
    if shared is not None:
        return VeraLinear(linear, shared, adapter.rank)
    if adapter.method == "loha":
        return LohaLinear(linear, adapter.rank, adapter.scale)
    w1, w2 = lokr_factors(parts)
    parts.clear()
    parts |= {"lokr_w1": w1, "lokr_w2": w2}
    return LokrLinear(linear, {name: (len(values), values.shape[1]) for name, values in parts.items()})


def lokr_factors(parts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """w1 and w2 of LoKr, each multiplied out if the file has two factors of it."""
    w1, w2 = (
        parts[name] if name in parts else parts[f"{name}_a"] @ parts[f"{name}_b"] for name in ("lokr_w1", "lokr_w2")
    )
    return w1, w2


def _fill(layer: MethodLinear, parts: dict[str, Tensor]) -> None:
    for name, values in parts.items():
        held = layer.part(CHANGE if name == WHOLE else name)
        held.data.copy_(values - 1 if name == WHOLE else values)


def check_start(adapter: PeftFile, settings: lora.AdapterSettings) -> None:
    """Check that training with `settings` computes what `adapter` does.

    Raises:
        UserError: what differs, and the values to give.
    """
    wrong = {}
    if adapter.method != "ia3" and adapter.rank != settings.rank:
        wrong["rank"] = adapter.rank
    if adapter.method == "loha" and not math.isclose(
        adapter.scale * adapter.rank, settings.alpha, rel_tol=lora.SAME_ALPHA
    ):
        wrong["alpha"] = adapter.config["alpha"]
    if adapter.method == "vera" and adapter.config.get("projection_prng_key", 0) != settings.seed:
        wrong["seed"] = adapter.config.get("projection_prng_key", 0)  # it draws A and B
    if wrong:
        differ = ", ".join(
            f"{key} is {value} there and {getattr(settings, key):g} here" for key, value in wrong.items()
        )
        give = " ".join(f"{key}={value}" for key, value in wrong.items())
        raise UserError(f"its {adapter.title} differs: {differ}. Give {give}.")


def check_targets(adapter: PeftFile, settings: lora.AdapterSettings, config: DecoderConfig) -> None:
    """As lora.check_targets; and that every linear has the parts that training here gives it.

    Raises:
        UserError: it lacks linears, has others, or other parts of them.
    """
    lora.check_targets(adapter, settings, config)
    with torch.device("meta"):
        base = lora.linears(Decoder(config))
    for name, update in adapter.updates.items():
        expected = _expected(adapter.method, base[name], settings, is_down(name, config.layout))
        if expected is not None and {part: tuple(shape) for part, shape in update.shapes.items()} != expected:
            found, here = (
                " ".join(f"{part} {list(size)}" for part, size in one.items()) for one in (update.shapes, expected)
            )
            remedy = (
                "Give lokr_factor= as it was trained with" if adapter.method == "lokr" else "Merge it into its base"
            )
            raise UserError(
                f"its {adapter.title} has other parts of {name}: {found} there, {here} here. {remedy}; decompose_both, and "
                "IA3 with feedforward_modules= of its own, are not trained here."
            )


def _expected(
    method: str, linear: nn.Linear, settings: lora.AdapterSettings, scales_input: bool
) -> dict[str, tuple[int, int]] | None:
    """The shapes of a linear's parts where the method leaves a choice."""
    if method == "ia3":
        return {WHOLE: (1, linear.in_features) if scales_input else (linear.out_features, 1)}
    if method == "lokr":
        return lokr_sizes(linear.in_features, linear.out_features, settings.rank, settings.lokr_factor)
    return None


def copy_adapter(adapter: PeftFile, model: AdaptedModel) -> None:
    """Give the trainable parameters of `model` the values of `adapter`, which check_start and check_targets accepted."""
    for name, parts in adapter.parts():
        layer = model.get_submodule(PREFIX + name)
        assert isinstance(layer, MethodLinear), name
        _fill(layer, parts)
    if adapter.method == "vera":
        for held, values in zip(_shared(model).buffers(), adapter.projections(), strict=True):
            held.copy_(values[: len(held), : held.shape[1]])
