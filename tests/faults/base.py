"""A base of a published shape with random Int4 weights, as a folder that the commands read.

The cost of a save at a real size needs neither real weights nor a download.

    python -m tests.faults.base [1.8b] FOLDER
"""

import json
import sys
from pathlib import Path

import torch

from tests.bench import shapes
from tests.support.oracles import small_tokenizer
from train.model.folder import ShardWriter
from train.model.layouts import write_config
from train.ops.gptq import Scheme


def write(shape: str, folder: Path, device: str = "cpu") -> Path:
    """Write config.json, Int4 weights in shards, and a tokenizer of bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    config = shapes.config(shape)
    torch.manual_seed(0)
    model = shapes.random_decoder(config, torch.device(device), torch.float16)
    shards = ShardWriter(folder)
    for name, tensor in model.state_dict().items():
        if not (config.tie_word_embeddings and name == "lm_head.weight"):
            shards.add(name, tensor.cpu())
    shards.close()
    scheme = Scheme(group_size=shapes.group_of(config))
    published = {**write_config(config), "torch_dtype": "float16", "quantization_config": scheme.to_config()}
    (folder / "config.json").write_text(json.dumps(published))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 256], "pad_token_id": 256}))
    small_tokenizer(folder)
    return folder


def main(arguments: list[str]) -> int:
    shape, folder = arguments if len(arguments) > 1 else ("1.8b", arguments[0])
    write(shape, Path(folder), "cuda" if torch.cuda.is_available() else "cpu")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
