"""Low-rank adapters: peft's own, on a frozen decoder, in files that stock peft reads.

Knows the decoder's linears by name; nothing of training, devices or Int4. A and B are float32 whatever the base is: peft casts the
input to them and the sum back, which costs a cast a layer and buys weights that small steps do not vanish in.
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
# with megatron_config peft imports whatever module the file names
UNREAD = (
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "layer_replication",
    "megatron_config",
)
PREFIX = "base_model.model."  # what peft puts before every module's name


class AdapterSettings(Protocol):
    """What a fresh adapter is made by; a recipe has these fields."""

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


def targets(layout: str, wanted: str) -> list[str]:
    """Names of the linears that `wanted` means: "all", or some of them by comma.

    Raises:
        UserError: a name that no block has; the message lists those there are.
    """
    known = linear_names(layout)
    names = sorted(known) if wanted == "all" else sorted({name.strip() for name in wanted.split(",") if name.strip()})
    strange = [name for name in names if name not in known]
    if strange or not names:
        found = ", ".join(strange) or "nothing"
        raise UserError(
            f"targets={wanted}: no linear is called {found} in layout {layout}. There are: {', '.join(known)}; or targets=all."
        )
    return names


def attach(model: Decoder, settings: AdapterSettings) -> PeftModel:
    """The decoder with fresh adapters: A random by the seed and its own name, B zero, both float32 and trainable.

    The numbers in A depend on neither the device nor the state of any generator.
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
            p.data.copy_(initial(name, p.shape, settings.seed))
    return peft_model


def initial(name: str, shape: torch.Size, seed: int) -> Tensor:
    """A [r, K] uniform in ±1/sqrt(K), as peft draws it (Kaiming, a = sqrt 5), float32 on the CPU."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of all that is learnt, in the model's own order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_adapter(model: PeftModel, folder: Path, tensors: dict[str, Tensor] | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors as stock peft does; equal adapters are equal bytes.

    Args:
        tensors: name of a parameter -> its full value [.., ..], where the model holds parts or roundings of them only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = tensors if tensors is not None else dict(trainable(model))
    stock = {stock_name(name): state[name].detach().float().cpu().contiguous() for name in sorted(state)}
    (folder / WEIGHTS).write_bytes(save(stock, metadata={"format": "pt"}))
    write_json(folder / CONFIG, _plain(model.peft_config["default"]))


def stock_name(parameter: str) -> str:
    """The name in the file: without the name of the adapter. …q_proj.lora_A.default.weight -> …q_proj.lora_A.weight"""
    return parameter.replace(".default.", ".")


def _plain(config: LoraConfig) -> dict[str, Any]:
    """peft's own fields as JSON: sets sorted, enums by value, ready for inference."""
    values: dict[str, Any] = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
    values |= {"inference_mode": True, "auto_mapping": None, "revision": None}
    if float(values["lora_alpha"]).is_integer():
        values["lora_alpha"] = int(values["lora_alpha"])
    return values


def load_adapter(model: Decoder, folder: Path, trainable: bool = False) -> PeftModel:
    """The decoder with the adapter of `folder`, ours or stock peft's; float32, frozen unless `trainable`.

    Raises:
        UserError: no adapter there, or one made for other modules or shapes.
    """
    _check(folder, model)
    loaded = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    for name, p in loaded.named_parameters():
        if ".lora_" in name:
            p.data = p.data.float()
            p.requires_grad_(trainable)
    return loaded


def _check(folder: Path, model: Decoder) -> None:
    """Refuse an adapter whose every A and B does not have its place: peft itself would load the rest and say nothing."""
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, (a, b, _) in delta(folder).items():
        linear = linears.get(name)
        if linear is None:
            raise UserError(
                f"{folder}: the adapter changes {name}, which this base does not have. Was it trained on another model?"
            )
        if (a.shape[1], b.shape[0]) != (linear.in_features, linear.out_features):
            have, want = [b.shape[0], a.shape[1]], [linear.out_features, linear.in_features]
            raise UserError(
                f"{folder}: {name} is {have} in the adapter and {want} in the base. Was it trained on another model?"
            )


def delta(folder: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Module name in the base -> (A [r, K], B [N, r], scale): the update of its weight [N, K] is scale · B @ A. Float32, CPU.

    Raises:
        UserError: no adapter, a damaged one, or one of a kind that is more than A and B (DoRA, saved modules, patterns).
    """
    config, state = _read(folder)
    unread = [key for key in UNREAD if config.get(key)]
    if str(config.get("init_lora_weights", True)).partition("_")[0] in (
        "pissa",
        "olora",
        "loftq",
    ):  # change the base too
        unread.append("init_lora_weights")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unread:
        raise UserError(
            f"{folder / CONFIG}: only plain LoRA is read here; found {', '.join(unread) or config.get('peft_type')}."
        )
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    done = {}
    for key in sorted(k for k in state if k.endswith(".lora_A.weight")):
        other = key.replace(".lora_A.", ".lora_B.")
        if other not in state or state[key].shape[0] != state[other].shape[1]:
            raise UserError(f"{folder / WEIGHTS}: {key} has no fitting B. The file is damaged.")
        done[key.removeprefix(PREFIX).removesuffix(".lora_A.weight")] = (
            state[key].float(),
            state[other].float(),
            scale,
        )
    if len(done) * 2 != len(state):
        raise UserError(
            f"{folder / WEIGHTS}: holds tensors that are no A and B of LoRA: {', '.join(sorted(state)[:3])} …"
        )
    return done


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: no adapter there ({' and '.join(missing)} missing).")
    try:
        return read_json(folder / CONFIG), load_file(folder / WEIGHTS)
    except (json.JSONDecodeError, OSError, SafetensorError) as error:
        raise UserError(f"{folder}: the adapter is damaged ({error}).") from error
