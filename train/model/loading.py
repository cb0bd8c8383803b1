"""From a model folder to a frozen decoder: which file holds which tensor, which linear is Int4, which device and dtype.

It reads safetensors, and .bin files by a reader of its own (bin_weights.py). It never imports or runs a file of the
folder. The files decide: a linear is Int4 if the folder has its qweight, and has a bias if the folder has its bias.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from train.common.errors import UserError
from train.common.memory import free_memory
from train.common.threads import on_cores
from train.model import awq
from train.model.architecture import STORED
from train.model.base_files import DamagedFileError, check_all_json, open_safetensors, weight_files
from train.model.bin_weights import read_bin
from train.model.decoder import Decoder
from train.model.int4_linear import Int4Linear
from train.model.layouts import DecoderConfig, read_config
from train.model.loaded_linear import is_quantised, quantize, replace_linears
from train.model.packed_linear import PackedLinear
from train.model.published import CONFIG, check_quantised, read_folder_shape, read_published
from train.model.stops import GENERATION, read_generation
from train.model.tokenizer import load_tokenizer
from train.ops.gptq import Scheme

MAPPED_BYTES = 1 << 30
IGNORED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # buffers of old checkpoints, not weights


def read_folder_config(folder: Path) -> tuple[DecoderConfig, dict[str, Any]]:
    """The decoder's config, and the content of config.json as `read_published` gives it.

    Raises:
        UserError: an architecture that this program cannot use, or a damaged file.
    """
    published = read_published(folder)
    return read_config(published, str(folder / CONFIG)), published


def keeps_float(folder: Path, device: torch.device, load_as: str = STORED) -> bool:
    """Whether to keep packed weights in float32 too: on a CPU whose free memory is twice the whole model in float32.

    The results are the same and come faster. A GPU dequantises quickly, and its memory is scarce.
    """
    config, published = read_folder_config(folder)
    if device.type != "cpu" or not (published.get("quantization_config") or load_as != STORED):
        return False
    with torch.device("meta"):
        size = 4 * sum(p.numel() for p in Decoder(config).parameters())
    return bool(2 * size < free_memory())


def memory_needed(folder: Path, dtype: torch.dtype, keep_float: bool = False, load_as: str = STORED) -> int:
    """Bytes that the weights of `folder` take when they are loaded in `dtype`: packed ones, and once more in floats.

    Args:
        keep_float, load_as: as for `load`.
    """
    model, _ = load_structure(folder)
    if load_as != STORED:
        replace_linears(model, model.config.names, load_as)
    stored = sum(
        tensor.numel() * (dtype.itemsize if tensor.is_floating_point() and not _is_exact(name) else tensor.itemsize)
        for name, tensor in _needed_tensors(model).items()
    )
    copies = [m.in_features * m.out_features for m in model.modules() if keep_float and isinstance(m, PackedLinear)]
    return stored + dtype.itemsize * sum(copies)


def _is_exact(name: str) -> bool:
    """Whether a tensor keeps its dtype: it is part of a packed weight."""
    return name.endswith((".scales", ".absmax", ".absmax_scales", ".absmax_mean"))


def check_memory(
    folder: Path, dtype: torch.dtype, device: torch.device, keep_float: bool = False, load_as: str = STORED
) -> None:
    """Refuse to load on a CPU what does not fit into its free memory, before anything is read.

    Raises:
        UserError: what is needed and what is free.
    """
    if device.type != "cpu":
        return
    needed, free = memory_needed(folder, dtype, keep_float, load_as), free_memory()
    if needed > free:
        raise UserError(
            f"{folder}: {needed / 1e9:.1f} GB of memory are needed to load it, {free / 1e9:.1f} GB are free. Take an Int4 or "
            "a smaller base, close other programs, or raise the container's limit."
        )


def fits(folder: Path, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the GPU's free memory holds the float model of `folder` in `dtype`, and a tenth more to work in.

    On a CPU always: Int4 is fast there only with a float copy beside it, so the float model is the smaller one.
    """
    if device.type != "cuda":
        return True
    stored = sum(path.stat().st_size for path in weight_files(folder))
    itemsize = 4 if read_published(folder).get("torch_dtype") == "float32" else 2
    return bool(1.1 * stored * dtype.itemsize / itemsize < torch.cuda.mem_get_info(device)[0])


@dataclass(frozen=True)
class TensorHeader:
    """What a file says of one tensor: where it is, its shape, and whether it holds floats."""

    file: Path
    shape: tuple[int, ...]
    floating: bool


def tensor_headers(folder: Path) -> dict[str, TensorHeader]:
    """Name of every tensor -> its header; no weights are read.

    Raises:
        UserError: no weights, or a file that is missing, cut off or damaged.
    """
    headers: dict[str, TensorHeader] = {}
    for file in weight_files(folder):
        with open_tensors(file) as tensors:
            names = tensors.keys()
            headers |= {name: TensorHeader(file, *tensors.header(name)) for name in names}
    return {name: header for name, header in headers.items() if not name.endswith(IGNORED)}


def tensor_files(folder: Path) -> dict[str, Path]:
    """Name of every tensor -> the file that holds it. Raises UserError as `tensor_headers` does."""
    return {name: header.file for name, header in tensor_headers(folder).items()}


class _BinFile:
    """The tensors of a .bin file, with the methods of _SafetensorsFile."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def keys(self) -> list[str]:
        return list(self.state)

    def header(self, name: str) -> tuple[tuple[int, ...], bool]:
        return tuple(self.state[name].shape), self.state[name].is_floating_point()

    def get_tensor(self, name: str) -> Tensor:
        return self.state[name]


class _SafetensorsFile:
    """The tensors of a safetensors file; `header` reads no weights."""

    def __init__(self, opened: Any) -> None:
        self.opened = opened

    def keys(self) -> list[str]:
        return list(self.opened.keys())

    def header(self, name: str) -> tuple[tuple[int, ...], bool]:
        part = self.opened.get_slice(name)
        return tuple(part.get_shape()), part.get_dtype() in ("F64", "F32", "F16", "BF16")

    def get_tensor(self, name: str) -> Tensor:
        tensor: Tensor = self.opened.get_tensor(name)
        return tensor


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """An object with keys(), header(name) and get_tensor(name), tensors on the CPU.

    Of a pickle, plain tensors are read and nothing else. Those of an AWQ folder come in the GPTQ format.

    Raises:
        UserError: a file that is cut off or damaged, or a .bin file that holds anything else than tensors.
    """
    group_size = awq.group_size_of(file.parent)
    if file.suffix == ".bin":
        tensors: Any = _BinFile(read_bin(file))
        yield tensors if group_size is None else awq.AwqTensors(tensors, group_size, file)
        return
    with open_safetensors(file, "pt") as opened:
        tensors = _SafetensorsFile(opened)
        yield tensors if group_size is None else awq.AwqTensors(tensors, group_size, file)


def read_tensors(files: dict[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in `files` (as `tensor_files` gives it), one by one, file by file.

    What was read of a safetensors file stays mapped until it is closed, as memory of this process. So it is opened again
    after every MAPPED_BYTES: a reader that copies each tensor needs no more than that.
    """
    for file in sorted(set(files.values())):
        names = sorted((n for n, f in files.items() if f == file), reverse=True)
        most = MAPPED_BYTES if file.suffix == ".safetensors" else float("inf")
        while names:
            read = 0
            with open_tensors(file) as tensors:
                while names and read < most:
                    tensor = tensors.get_tensor(names[-1])
                    read += tensor.nbytes
                    yield names.pop(), tensor
                    del tensor


def load(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    keep_float: bool = False,
    embedding: str = "device",
    load_as: str = STORED,
) -> Decoder:
    """The model of `folder`, frozen and in evaluation mode; float tensors in `dtype`, Int4 as stored.

    Args:
        keep_float: also keep each packed weight dequantised in `dtype`: the same results, faster on a CPU, 2 to 8 times
            the memory.
        embedding: device, or host: its table never goes to `device` (unless the head shares it).
        load_as: stored; or nf4, fp4, int8: the linears of the blocks of a float checkpoint are quantised, one by one.
    Raises:
        UserError: what load_structure refuses; too little memory on a CPU; a checkpoint that is quantised already, with
            `load_as`.
    """
    model, files = load_structure(folder)
    read_folder_shape(folder, load_as)  # refuses what cannot be loaded so
    check_memory(folder, dtype, torch.device(device), keep_float, load_as)
    names, on_host = model.config.names, ""
    if load_as != STORED:
        replace_linears(model, names, load_as)
    if embedding == "host" and not model.config.tie_word_embeddings:
        on_host = f"{names.root}.{names.embed}.weight"
    load_tensors(model, files, dtype, torch.device(device), load_as, on_host)
    model.tie_weights()
    if on_host:
        model.keep_embedding_on_host()
    model.requires_grad_(False).eval()
    if keep_float:
        packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
        on_cores(lambda linear: linear.keep_float(dtype), packed, most=None if model.device.type == "cpu" else 1)
    return model


def _check_generation(folder: Path) -> None:
    """Raise a UserError if transformers does not read generation_config.json, which a copy of the folder gets."""
    generation = read_generation(folder)
    if not generation:
        return
    from transformers import GenerationConfig  # takes half a second, and only what copies a folder needs it

    try:
        GenerationConfig.from_dict(generation)
    except Exception as error:  # transformers checks types and ranges of its own, each with another exception
        raise DamagedFileError(folder / GENERATION, f"transformers does not read it: {error!r:.200}") from error


def load_structure(folder: Path) -> tuple[Decoder, dict[str, Path]]:
    """The model of `folder` on the meta device, without its weights, and the file of each tensor that it needs.

    Only headers are read, to check that every tensor is there and has its shape.

    Raises:
        UserError: an architecture, scheme or file that this program cannot read; tensors missing, left over or of
            another shape or kind than config.json says.
    """
    config, published = read_folder_config(folder)
    headers = tensor_headers(folder)
    files = {name: header.file for name, header in headers.items()}
    with torch.device("meta"):
        model = Decoder(config)
    _match_linears(folder, model, files, published.get("quantization_config"))
    expected, files = _match_tensors(model, files)
    for name, tensor in expected.items():
        _check_header(name, headers[name], tensor)
    read_generation(folder)
    return model, files


def _check_header(name: str, header: TensorHeader, expected: Tensor) -> None:
    """Raise a UserError if the file has another shape for a tensor, or floats where integers belong."""
    if header.shape != tuple(expected.shape):
        raise UserError(
            f"{header.file}: {name}: the file has shape {list(header.shape)}, config.json says {list(expected.shape)}."
        )
    if header.floating != expected.is_floating_point():
        held, wanted = ("floats", "integers") if header.floating else ("integers", "floats")
        raise DamagedFileError(header.file, f"{name} holds {held}, expected {wanted}")


def _match_linears(folder: Path, model: Decoder, files: dict[str, Path], quantization: dict[str, Any] | None) -> None:
    """Make every linear of `model` what the files hold: Int4 or float, with or without a bias.

    Raises:
        UserError: config.json and the weights disagree about Int4.
    """
    scheme = Scheme.from_config(quantization) if quantization else None
    check_quantised(folder, scheme is not None, sum(name.endswith(".qweight") for name in files))
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
        parent, _, child = name.rpartition(".")
        needs_bias = model.config.names.qkv_bias and child in model.config.names.qkv  # without it, these would be wrong
        has_bias = needs_bias or f"{name}.bias" in files
        if scheme is not None and f"{name}.qweight" in files:
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
    expected = _needed_tensors(model)
    if model.config.tie_word_embeddings:
        files = {name: file for name, file in files.items() if name != "lm_head.weight"}
    missing, extra = sorted(expected.keys() - files.keys()), sorted(files.keys() - expected.keys())
    if missing or extra:
        raise UserError(f"the weights do not fit config.json: missing {_some(missing)}; left over {_some(extra)}.")
    return expected, files


def _needed_tensors(model: Decoder) -> dict[str, Tensor]:
    """Name -> tensor of everything that is loaded; a tied head is not."""
    tied = model.config.tie_word_embeddings
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight" or not tied}


def load_tensors(
    model: Decoder, files: dict[str, Path], dtype: torch.dtype, device: torch.device, load_as: str, on_host: str = ""
) -> None:
    """Load all or some of the files' tensors that `load_structure` gave; the one called `on_host` stays on the CPU.

    The linears of `model` are those of `load_as` already.
    """
    expected, layout = _needed_tensors(model), model.config.names
    state: dict[str, Tensor] = {}
    for name, tensor in read_tensors(files):
        if name.endswith(".g_idx"):
            _check_groups(name, tensor, groups=len(expected[f"{name.removesuffix('g_idx')}scales"]))
        if load_as != STORED and is_quantised(name, layout):
            module = name.removesuffix(".weight")
            state |= {f"{module}.{part}": value for part, value in quantize(tensor.to(device), load_as, name).items()}
            continue
        cast = tensor.dtype.is_floating_point and not name.endswith(".scales")  # scales are part of the Int4 format
        placed = tensor.to("cpu" if name == on_host else device)  # before the cast, which would else be the CPU's
        state[name] = placed.to(dtype) if cast else placed
    model.load_state_dict(state, strict=False, assign=True)


def _check_groups(name: str, g_idx: Tensor, groups: int) -> None:
    """Raise a UserError if a row of an Int4 weight belongs to a group that has no scale."""
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise UserError(
            f"{name}: names a group outside 0 to {groups - 1}. The weights are damaged: fetch the model again."
        )


def _some(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "nothing"


def check_folder(folder: Path) -> None:
    """Check everything of a folder that is read or copied to another: JSON files, tensors, tokenizer; no weights are read.

    Raises:
        UserError: the first file that is damaged, or what `load_structure` refuses.
    """
    check_all_json(folder)
    load_structure(folder)
    _check_generation(folder)
    load_tokenizer(folder)


def describe(folder: Path) -> str:
    """One line: layout, size, kind of weights, tokenizer. Only headers are read.

    Raises:
        UserError: something is missing, or config.json and the weights disagree about Int4.
    """
    check_all_json(folder)
    model, files = load_structure(folder)
    config, published = model.config, read_published(folder)
    if scheme := published.get("quantization_config"):
        weights = f"Int{scheme.get('bits', 4)} in groups of {scheme.get('group_size', 128)}"
    else:
        weights = published.get("torch_dtype", "float")
    size = sum(path.stat().st_size for path in {*files.values()}) / 1e9
    shape = f"{config.num_hidden_layers} layers of {config.hidden_size}"
    tokens = f"tokenizer of {load_tokenizer(folder).vocab_size:,}"
    return f"layout {config.layout}, {shape}, {weights}, {size:.2f} GB; {tokens}."
