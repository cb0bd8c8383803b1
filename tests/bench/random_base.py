"""Writes a base in a published shape with random Int4 weights, for whole commands at sizes that no download is needed for.

    python -m tests.bench.random_base FOLDER SHAPE TOKENIZER [float]

SHAPE: a name of tests/bench/shapes.py. float: float16 weights instead. TOKENIZER: a model folder whose tokenizer and generation settings are copied. One
tensor is in memory at a time, so a 72B shape takes 2.5 GB.
"""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tests.bench import shapes
from train.common.files import write_json
from train.model.decoder import Decoder
from train.model.folder import ShardWriter
from train.model.layouts import DecoderConfig, write_config
from train.ops.gptq import Scheme

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "qwen.tiktoken")


def tensors(c: DecoderConfig, device: torch.device, int4: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Name and values of each tensor, in float16 as published."""
    with torch.device("meta"):
        model = shapes.meta_decoder(c) if int4 else Decoder(c)
    for module_name, module in model.named_modules():
        for name, tensor in shapes.random_tensors(module, device, torch.float16):
            full = f"{module_name}.{name}"
            if full != "lm_head.weight" or not c.tie_word_embeddings:
                yield full, tensor


def write(folder: Path, c: DecoderConfig, tokenizer: Path, device: torch.device, int4: bool = True) -> None:
    folder.mkdir(parents=True)
    writer = ShardWriter(folder)
    for name, tensor in tensors(c, device, int4):
        writer.add(name, tensor.cpu())
    writer.close()
    quantised = {"quantization_config": Scheme(group_size=shapes.group_of(c)).to_config()} if int4 else {}
    write_json(folder / "config.json", {**write_config(c), "torch_dtype": "float16", **quantised})
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)


def main() -> None:
    folder, shape, tokenizer, *kind = sys.argv[1:]
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write(Path(folder), shapes.config(shape), Path(tokenizer), device, kind != ["float"])


if __name__ == "__main__":
    main()
