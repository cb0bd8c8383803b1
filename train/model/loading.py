"""From a model folder to a frozen decoder: which file holds which tensor, which linear is Int4, which device and dtype.

It reads safetensors, and old .bin files only through torch.load(weights_only=True). It never imports or runs a file of
the folder. The files decide: a linear is Int4 if the folder has its qweight, and has a bias if the folder has its bias.
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
from train.model.tokenizer import load_tokenizer
from train.ops.gptq import Scheme

IGNORED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # buffers of old checkpoints, not weights


def read_folder_config(folder: Path) -> tuple[DecoderConfig, dict[str, Any]]:
    """The decoder's config, and the content of config.json.

    Raises:
        UserError: an architecture that this program cannot use.
    """
    published = read_json(folder / "config.json")
    return read_config(published), published


def keeps_float(folder: Path, device: torch.device) -> bool:
    """Whether to keep Int4 weights in float32 too: on a CPU whose free memory is twice the whole model in float32.

    The results are the same and come faster. A GPU dequantises quickly, and its memory is scarce.
    """
    config, published = read_folder_config(folder)
    if device.type != "cpu" or not published.get("quantization_config"):
        return False
    with torch.device("meta"):
        size = 4 * sum(p.numel() for p in Decoder(config).parameters())
    return bool(2 * size < psutil.virtual_memory().available)


def fits(folder: Path, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the GPU's free memory holds the float model of `folder` in `dtype`, and a tenth more to work in.

    On a CPU always: Int4 is fast there only with a float copy beside it, so the float model is the smaller one.
    """
    if device.type != "cuda":
        return True
    stored = sum(
        path.stat().st_size for path in [*folder.glob("*.safetensors")] or [*folder.glob("pytorch_model*.bin")]
    )
    itemsize = 4 if read_folder_config(folder)[1].get("torch_dtype") == "float32" else 2
    return bool(1.1 * stored * dtype.itemsize / itemsize < torch.cuda.mem_get_info(device)[0])


def tensor_files(folder: Path) -> dict[str, Path]:
    """Name of every tensor -> the file that holds it, from the headers alone (.bin files are read whole).

    Raises:
        UserError: no weights, or a file that is cut off.
    """
    files: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin")):
        with open_tensors(file) as tensors:
            files |= dict.fromkeys(tensors.keys(), file)
    if not files:
        raise UserError(
            f"{folder}: no weights (*.safetensors) in this folder. Fetch it again: make model MODEL={folder.name}"
        )
    return {name: file for name, file in files.items() if not name.endswith(IGNORED)}


class _BinFile:
    """The tensors of a .bin file, with the two methods of safe_open that are used here."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def keys(self) -> list[str]:
        return list(self.state)

    def get_tensor(self, name: str) -> Tensor:
        return self.state[name]


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """An object with keys() and get_tensor(name), tensors on the CPU. Of a pickle, plain tensors are read and nothing else.

    Raises:
        UserError: a safetensors file that is cut off or damaged.
    """
    if file.suffix == ".bin":
        yield _BinFile(torch.load(file, map_location="cpu", weights_only=True))
        return
    try:
        opened = safe_open(file, framework="pt", device="cpu")
    except SafetensorError as error:
        raise UserError(
            f"{file}: not a whole safetensors file ({error}). Fetch it again: make model MODEL={file.parent.name}"
        ) from error
    with opened as tensors:
        yield tensors


def read_tensors(files: dict[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in `files` (as `tensor_files` gives it), one by one, file by file."""
    for file in sorted(set(files.values())):
        with open_tensors(file) as tensors:
            for name in sorted(n for n, f in files.items() if f == file):
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
        keep_float: also keep each Int4 weight dequantised in `dtype`: the same results, faster on a CPU, 8 times the
            memory.
        embedding: device, or host: its table never goes to `device` (unless the head shares it).
    Raises:
        UserError: an architecture, scheme or file that this program cannot read; tensors missing or left over.
    """
    model, files = load_structure(folder)
    host_embedding = embedding == "host" and not model.config.tie_word_embeddings
    _load_weights(model, files, dtype, torch.device(device), host_embedding)
    model.tie_weights()
    if host_embedding:
        model.keep_embedding_on_host()
    model.requires_grad_(False).eval()
    for module in model.modules():
        if keep_float and isinstance(module, Int4Linear):
            module.keep_float(dtype)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_dict(read_json(folder / "generation_config.json"))
    return model


def load_structure(folder: Path) -> tuple[Decoder, dict[str, Path]]:
    """The model of `folder` on the meta device, without its weights, and the file of each tensor in the folder.

    Only headers are read, to check that every tensor is there.

    Raises:
        UserError: an architecture, scheme or file that this program cannot read; tensors missing or left over.
    """
    config, published = read_folder_config(folder)
    files = tensor_files(folder)
    with torch.device("meta"):
        model = Decoder(config)
    _match_linears(model, files, published.get("quantization_config"))
    _match_tensors(model, files)
    return model, files


def _match_linears(model: Decoder, files: dict[str, Path], quantization: dict[str, Any] | None) -> None:
    """Make every linear of `model` what the files hold: Int4 or float, with or without a bias."""
    scheme = Scheme.from_config(quantization) if quantization else None
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
        has_bias = f"{name}.bias" in files
        if f"{name}.qweight" in files:
            if scheme is None:
                raise UserError(f"{name} is quantised, but config.json has no quantization_config.")
            parent, _, child = name.rpartition(".")
            int4 = Int4Linear(linear.in_features, linear.out_features, has_bias, scheme, device=torch.device("meta"))
            setattr(model.get_submodule(parent), child, int4)
        elif has_bias != (linear.bias is not None):
            empty = nn.Parameter(torch.empty(linear.out_features, device="meta")) if has_bias else None
            linear.register_parameter("bias", empty)


def _match_tensors(model: Decoder, files: dict[str, Path]) -> tuple[dict[str, Tensor], dict[str, Path]]:
    """The tensors that `model` needs by name, and the file of each.

    Raises:
        UserError: a tensor is missing or left over.
    """
    expected = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        expected.pop("lm_head.weight")
        files = {name: file for name, file in files.items() if name != "lm_head.weight"}
    missing, extra = sorted(expected.keys() - files.keys()), sorted(files.keys() - expected.keys())
    if missing or extra:
        raise UserError(f"the weights do not fit config.json: missing {_some(missing)}; left over {_some(extra)}.")
    return expected, files


def _load_weights(
    model: Decoder, files: dict[str, Path], dtype: torch.dtype, device: torch.device, host_embedding: bool
) -> None:
    """Load the weights onto the device; with `host_embedding` the embedding's table stays on the CPU."""
    expected, files = _match_tensors(model, files)
    layout = model.config.names
    table = f"{layout.root}.{layout.embed}.weight"
    state = {}
    for name, tensor in read_tensors(files):
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"{name}: the file has shape {list(tensor.shape)}, config.json says {list(expected[name].shape)}."
            )
        cast = tensor.dtype.is_floating_point and not name.endswith(".scales")  # scales are part of the Int4 format
        target = torch.device("cpu") if host_embedding and name == table else device
        state[name] = tensor.to(target, dtype if cast else tensor.dtype)
    model.load_state_dict(state, strict=False, assign=True)


def _some(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "nothing"


def describe(folder: Path) -> str:
    """One line: layout, size, kind of weights, tokenizer. Only headers are read.

    Raises:
        UserError: something is missing, or config.json and the weights disagree about Int4.
    """
    config, published = read_folder_config(folder)
    files = tensor_files(folder)
    quantization = published.get("quantization_config")
    packed = sum(name.endswith(".qweight") for name in files)
    if bool(quantization) != bool(packed):
        says = "has a quantization_config" if quantization else "has no quantization_config"
        raise UserError(f"{folder}: config.json {says}, but {packed} linears are Int4.")
    weights = (
        f"Int4 in groups of {quantization['group_size']}" if quantization else published.get("torch_dtype", "float")
    )
    size = sum(path.stat().st_size for path in {*files.values()}) / 1e9
    tokens = load_tokenizer(folder).vocab_size
    shape = f"{config.num_hidden_layers} layers of {config.hidden_size}"
    return f"layout {config.layout}, {shape}, {weights}, {size:.2f} GB; tokenizer of {tokens:,}."
