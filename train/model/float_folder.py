"""The small files of a folder of float weights that is made from another: its config.json, and what is copied of the rest."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.common.device import dtype_name
from train.common.files import write_json
from train.model.folder import ShardWriter, copy_companions
from train.model.layouts import DecoderConfig
from train.model.loading import read_folder_config

# Files of the base that are not copied. In this order: written again, describes the Int4 format, describes the base, the
# base's own prompt.
NOT_COPIED = ("config.json", "quantize_config.json", "README.md", "chat_template.*")


def dtype_keys(layout: str, dtype: torch.dtype) -> dict[str, Any]:
    """The keys of config.json for the type of the weights.

    `torch_dtype` is read by transformers 4 and 5 alike. Qwen-1's own code has three switches, of which one at most may be
    on. All are off here, as Qwen publishes them, so that users can choose one: with fp16 on, from_pretrained(…, bf16=True)
    fails.
    """
    keys: dict[str, Any] = {"torch_dtype": dtype_name(dtype)}
    return keys | (dict.fromkeys(("bf16", "fp16", "fp32"), False) if layout == "qwen" else {})


def float_config(published: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The base's config.json for float weights."""
    kept = {key: value for key, value in published.items() if key != "quantization_config"}
    return {**kept, **dtype_keys(published["model_type"], dtype)}


def write_weights(base: Path, weights: Mapping[str, Tensor], folder: Path) -> DecoderConfig:
    """Write the model in `base` with other weights into the empty `folder`; only its tokenizer's settings are missing.

    Args:
        base: a float model. weights: float32, by the names of its files; a tied head is none of them.
    Returns:
        The config of the model.
    Raises:
        safetensors.SafetensorError, OSError: the disk refuses.
    """
    config, published = read_folder_config(base)
    writer = ShardWriter(folder)
    for name in sorted(weights):
        writer.add(name, weights[name].detach().float().cpu())
    writer.close()
    copy_companions(base, folder, without=NOT_COPIED)
    write_json(folder / "config.json", float_config(published, torch.float32))
    return config
