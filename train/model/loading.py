"""From a model folder to a frozen decoder: which file holds what, which linear is Int4, on which device in which dtype.

Reads safetensors, and old .bin files only through torch.load(weights_only=True); never imports or runs a file of the
folder. The files decide: a linear is Int4 if its qweight is there, and has a bias if its bias is there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GenerationConfig

from train.common.errors import UserError
from train.common.files import read_json
from train.model.decoder import Decoder
from train.model.int4_linear import Int4Linear
from train.model.layouts import DecoderConfig, read_config
from train.ops.gptq import Scheme

IGNORED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # buffers of old checkpoints that hold no weights


def read_folder_config(folder: Path) -> tuple[DecoderConfig, dict[str, Any]]:
    """The decoder's config and config.json as published."""
    published = read_json(folder / "config.json")
    return read_config(published), published


def keeps_float(folder: Path, device: torch.device) -> bool:
    """Whether to keep Int4 weights in float32 too: on a CPU with twice the memory free that the whole model takes in float32.

    The numbers are the same, the work is faster; a GPU dequantises quickly, and its memory is dear.
    """
    config, published = read_folder_config(folder)
    if device.type != "cpu" or not published.get("quantization_config"):
        return False
    with torch.device("meta"):
        need = 4 * sum(p.numel() for p in Decoder(config).parameters())
    return bool(2 * need < psutil.virtual_memory().available)


def fits(folder: Path, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the GPU's free memory holds the float model of `folder` in `dtype`, and a tenth more for its work.

    On a CPU always: there Int4 is only quick beside a float copy of itself, so the float model is the smaller one.
    """
    if device.type != "cuda":
        return True
    stored = sum(
        path.stat().st_size for path in [*folder.glob("*.safetensors")] or [*folder.glob("pytorch_model*.bin")]
    )
    width = 4 if read_folder_config(folder)[1].get("torch_dtype") == "float32" else 2
    return bool(1.1 * stored * dtype.itemsize / width < torch.cuda.mem_get_info(device)[0])


def state_names(folder: Path) -> dict[str, Path]:
    """Every tensor's name -> the file that holds it, from the headers alone (.bin files are read whole).

    Raises:
        UserError: no weights, or a file that is cut off.
    """
    names: dict[str, Path] = {}
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    for file in files:
        with open_tensors(file) as tensors:
            names |= dict.fromkeys(tensors.keys(), file)
    if not names:
        raise UserError(
            f"{folder}: no weights (*.safetensors) in this folder. Fetch it again: make model MODEL={folder.name}"
        )
    return {name: file for name, file in names.items() if not name.endswith(IGNORED)}


class _Loaded:
    """A .bin file with the two calls of safe_open that are used here."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def keys(self) -> list[str]:
        return list(self.state)

    def get_tensor(self, name: str) -> Tensor:
        return self.state[name]


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """An object with keys() and get_tensor(name), tensors on the CPU; no pickle beyond plain tensors is read."""
    if file.suffix == ".bin":
        yield _Loaded(torch.load(file, map_location="cpu", weights_only=True))
        return
    try:
        opened = safe_open(file, framework="pt", device="cpu")
    except SafetensorError as error:
        raise UserError(
            f"{file}: not a whole safetensors file ({error}). Fetch it again: make model MODEL={file.parent.name}"
        ) from error
    with opened as tensors:
        yield tensors


def read_state(names: dict[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of `names` one by one, file by file."""
    for file in sorted(set(names.values())):
        with open_tensors(file) as tensors:
            for name in sorted(n for n, f in names.items() if f == file):
                yield name, tensors.get_tensor(name)


def load(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    keep_float: bool = False,
    embedding: str = "device",
) -> Decoder:
    """The model of `folder`, frozen and in evaluation mode; float tensors in `dtype`, Int4 as stored.

    Args:
        keep_float: keep each Int4 weight dequantised in `dtype` too: the same numbers, faster on a CPU, 8 times the
        memory. embedding: device, or host: its table never goes to `device` (unless the head is the same table).
    Raises:
        UserError: an architecture, scheme or file that this program cannot read; tensors missing or left over.
    """
    model, names = check(folder)
    apart = embedding == "host" and not model.config.tie_word_embeddings
    _fill(model, names, dtype, torch.device(device), apart)
    model.tie_weights()
    if apart:
        model.keep_embedding_on_host()
    model.requires_grad_(False).eval()
    for module in model.modules():
        if keep_float and isinstance(module, Int4Linear):
            module.keep_float(dtype)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_dict(read_json(folder / "generation_config.json"))
    return model


def _shape_linears(model: Decoder, names: dict[str, Path], quantization: dict[str, Any] | None) -> None:
    """Make every linear of `model` what the file says it is: Int4 or float, with or without a bias."""
    scheme = Scheme.from_config(quantization) if quantization else None
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
        bias = f"{name}.bias" in names
        if f"{name}.qweight" in names:
            if scheme is None:
                raise UserError(f"{name} is quantised, but config.json has no quantization_config.")
            parent, _, child = name.rpartition(".")
            int4 = Int4Linear(linear.in_features, linear.out_features, bias, scheme, device=torch.device("meta"))
            setattr(model.get_submodule(parent), child, int4)
        elif bias != (linear.bias is not None):
            empty = nn.Parameter(torch.empty(linear.out_features, device="meta")) if bias else None
            linear.register_parameter("bias", empty)


def _fill(model: Decoder, names: dict[str, Path], dtype: torch.dtype, device: torch.device, apart: bool) -> None:
    """The weights, on the device but for the embedding's if it stays `apart`."""
    wanted, names = _expected(model, names)
    layout = model.config.names
    table = f"{layout.root}.{layout.embed}.weight"
    state = {}
    for name, tensor in read_state(names):
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"{name}: the file has shape {list(tensor.shape)}, config.json says {list(wanted[name].shape)}."
            )
        whole = tensor.dtype.is_floating_point and not name.endswith(".scales")  # scales are part of the Int4 format
        place = torch.device("cpu") if apart and name == table else device
        state[name] = tensor.to(place, dtype if whole else tensor.dtype)
    model.load_state_dict(state, strict=False, assign=True)


def _expected(model: Decoder, names: dict[str, Path]) -> tuple[dict[str, Tensor], dict[str, Path]]:
    """The tensors that `model` wants by name, and the file of each. Raises UserError if one is missing or left over."""
    wanted = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        wanted.pop("lm_head.weight")
        names = {n: f for n, f in names.items() if n != "lm_head.weight"}
    missing, extra = sorted(wanted.keys() - names.keys()), sorted(names.keys() - wanted.keys())
    if missing or extra:
        raise UserError(f"the weights do not fit config.json: missing {_some(missing)}; left over {_some(extra)}.")
    return wanted, names


def check(folder: Path) -> tuple[Decoder, dict[str, Path]]:
    """The model that `folder` holds, without its weights, and which file has which: headers are read, to see that all is there.

    Raises:
        UserError: an architecture, scheme or file that this program cannot read; tensors missing or left over.
    """
    config, published = read_folder_config(folder)
    names = state_names(folder)
    with torch.device("meta"):
        model = Decoder(config)
    _shape_linears(model, names, published.get("quantization_config"))
    _expected(model, names)
    return model, names


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "nothing"
