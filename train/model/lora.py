"""Low-rank adapters (Hu et al. 2021) with peft's own layers on a frozen decoder, in files that stock peft reads.

It knows the decoder's linears by name, and nothing of training, devices or Int4. A and B are float32 whatever the base
is: peft casts the input to float32 and the result back. That costs two casts a layer, and small updates are not lost in
rounding.
"""

import json
import math
import zlib
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from train.common.errors import UserError
from train.common.files import read_json, write_json
from train.model.decoder import Decoder, linear_names

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Settings that an adapter may not have here: with megatron_config, peft imports whatever module the file names.
UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "layer_replication",
    "megatron_config",
)
CHANGES_BASE = ("pissa", "olora", "loftq")  # ways to initialise A and B that also change the base's weights
PREFIX = "base_model.model."  # of every module's name in peft's files


class AdapterSettings(Protocol):
    """The settings of a new adapter; a recipe has these fields."""

    @property
    def model(self) -> str: ...  # the base's name, for adapter_config.json

    @property
    def rank(self) -> int: ...

    @property
    def alpha(self) -> float: ...

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


def attach(model: Decoder, settings: AdapterSettings) -> PeftModel:
    """The decoder with new adapters: A random, B zero, both float32 and trainable.

    The values of A depend on the seed and the parameter's name alone, not on the device or the state of any generator.
    """
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=targets(model.config.layout, settings.targets),
        bias="none",
    )
    peft_model = get_peft_model(model, config)
    config.base_model_name_or_path = Path(settings.model).name if Path(settings.model).is_absolute() else settings.model
    for name, p in trainable(peft_model).items():
        p.data = p.data.float()
        if ".lora_A." in name:
            p.data.copy_(initial_lora_a(name, p.shape, settings.seed))
    return peft_model


def initial_lora_a(name: str, shape: torch.Size, seed: int) -> Tensor:
    """A [r, K], uniform in ±1/sqrt(K) as in peft (Kaiming with a = sqrt 5), float32 on the CPU."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of all that require a gradient, in the order of the model."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_adapter(model: PeftModel, folder: Path, tensors: dict[str, Tensor] | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors as stock peft does; equal adapters give equal bytes.

    Args:
        tensors: name of a parameter -> its full float32 value, where the model has only a part or a rounded copy of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = tensors if tensors is not None else dict(trainable(model))
    stock = {stock_name(name): state[name].detach().float().cpu().contiguous() for name in sorted(state)}
    (folder / WEIGHTS).write_bytes(save(stock, metadata={"format": "pt"}))
    write_json(folder / CONFIG, _as_json(model.peft_config["default"]))


def stock_name(parameter: str) -> str:
    """The name in the file, without the adapter's name: …q_proj.lora_A.default.weight -> …q_proj.lora_A.weight."""
    return parameter.replace(".default.", ".")


def _as_json(config: LoraConfig) -> dict[str, Any]:
    """peft's own fields as JSON values: sets sorted, and set to inference mode."""
    values: dict[str, Any] = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
    values |= {"inference_mode": True, "auto_mapping": None, "revision": None}
    if float(values["lora_alpha"]).is_integer():
        values["lora_alpha"] = int(values["lora_alpha"])
    return values


def load_adapter(model: Decoder, folder: Path, trainable: bool = False) -> PeftModel:
    """The decoder with the adapter of `folder`, written here or by stock peft; float32, frozen unless `trainable`.

    Raises:
        UserError: no adapter in the folder, a damaged one, or one made for other modules or shapes.
    """
    _check_modules(folder, model)
    loaded = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    for name, p in loaded.named_parameters():
        if ".lora_" in name:
            p.data = p.data.float()
            p.requires_grad_(trainable)
    return loaded


def _check_modules(folder: Path, model: Decoder) -> None:
    """Refuse an adapter that has an A and B for no linear of the model: peft would load the others and say nothing."""
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, (a, b, _) in delta(folder).items():
        linear = linears.get(name)
        if linear is None:
            raise UserError(
                f"{folder}: the adapter changes {name}, which this base does not have. Was it trained on another model?"
            )
        if (a.shape[1], b.shape[0]) != (linear.in_features, linear.out_features):
            in_adapter, in_base = [b.shape[0], a.shape[1]], [linear.out_features, linear.in_features]
            raise UserError(
                f"{folder}: {name} is {in_adapter} in the adapter and {in_base} in the base. Was it trained on another model?"
            )


def delta(folder: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Module name in the base -> (A [r, K], B [N, r], scale): its weight [N, K] gets scale · B @ A. Float32, on the CPU.

    Raises:
        UserError: no adapter, a damaged one, or more than plain LoRA (DoRA, saved modules, patterns).
    """
    config, state = _read(folder)
    _check_plain_lora(folder, config)
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    updates = {}
    for key in sorted(k for k in state if k.endswith(".lora_A.weight")):
        b_key = key.replace(".lora_A.", ".lora_B.")
        if b_key not in state or state[key].shape[0] != state[b_key].shape[1]:
            raise UserError(f"{folder / WEIGHTS}: {key} has no matching B. The file is damaged.")
        module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        updates[module] = (state[key].float(), state[b_key].float(), scale)
    if len(updates) * 2 != len(state):
        raise UserError(
            f"{folder / WEIGHTS}: has tensors that are no A or B of LoRA, among {', '.join(sorted(state)[:3])} …"
        )
    return updates


def _check_plain_lora(folder: Path, config: dict[str, Any]) -> None:
    unsupported = [key for key in UNSUPPORTED if config.get(key)]
    if str(config.get("init_lora_weights", True)).partition("_")[0] in CHANGES_BASE:
        unsupported.append("init_lora_weights")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unsupported:
        raise UserError(
            f"{folder / CONFIG}: only plain LoRA is read here; found {', '.join(unsupported) or config.get('peft_type')}."
        )


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The adapter's config, and its tensors by name."""
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: no adapter there ({' and '.join(missing)} missing).")
    try:
        return read_json(folder / CONFIG), load_file(folder / WEIGHTS)
    except (json.JSONDecodeError, OSError, SafetensorError) as error:
        raise UserError(f"{folder}: the adapter is damaged ({error}).") from error
