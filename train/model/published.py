"""The config.json of a base's folder, as every command reads it: one form of the keys, and the quantisation beside it.

It imports no torch, so that `plan` can use it. What the keys mean is told in config_keys.py and architecture.py.
"""

from pathlib import Path
from typing import Any

from train.common.errors import UserError
from train.model import config_keys
from train.model.architecture import STORED, Shape, read_architecture, read_shape
from train.model.base_files import check_settings, packed_linears, read_object, weights_present
from train.model.tokenizer import TOKENIZERS, load_tokenizer

CONFIG = "config.json"
GPTQ_CONFIG = "quantize_config.json"  # AutoGPTQ's own file, older than the section in config.json


def read_published(folder: Path) -> dict[str, Any]:
    """The content of config.json, in the keys of `config_keys.portable`.

    Without a quantization_config, that of quantize_config.json takes its place if the weights are packed.

    Raises:
        UserError: one of the folder's small files is damaged.
    """
    check_settings(folder)
    source = str(folder / CONFIG)
    config = config_keys.portable(read_object(folder / CONFIG), source)
    section = config_keys.quantization(config, source)
    if section is None and (folder / GPTQ_CONFIG).is_file() and packed_linears(folder) != 0:
        beside = {"quantization_config": {"quant_method": "gptq", **read_object(folder / GPTQ_CONFIG)}}
        section = config_keys.quantization(beside, str(folder / GPTQ_CONFIG))
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    return kept if section is None else {**kept, "quantization_config": section}


def read_folder_shape(folder: Path, load_as: str = STORED) -> Shape:
    """The shape of a folder, its weights loaded as `load_as`.

    Raises:
        UserError: as `read_published`, `read_shape` and `Shape.loaded` do.
    """
    return read_shape(read_published(folder), str(folder / CONFIG)).loaded(load_as, str(folder))


def check_without_torch(folder: Path) -> None:
    """Check weights and tokenizer from the outside, as far as the folder has them yet.

    Raises:
        UserError: a damaged file.
    """
    if weights_present(folder) and (packed := packed_linears(folder)) is not None:
        check_quantised(folder, "quantization_config" in read_published(folder), packed)
    if any((folder / name).exists() for name in TOKENIZERS):
        load_tokenizer(folder)


def check_quantised(folder: Path, quantised: bool, packed: int) -> None:
    """Check that config.json and the weights agree about Int4.

    Args:
        quantised: whether config.json says so. packed: linears with packed weights.
    Raises:
        UserError: they do not.
    """
    if quantised != bool(packed):
        says = "has a quantization_config" if quantised else "has no quantization_config"
        raise UserError(f"{folder}: config.json {says}, but {packed} linears are Int4.")


def check_config_alone(path: Path) -> None:
    """Check a config.json before the rest of its folder has arrived.

    Raises:
        UserError: a damaged file, or an architecture that this program cannot use.
    """
    read_architecture(read_object(path), str(path))
