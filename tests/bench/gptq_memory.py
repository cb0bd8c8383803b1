"""Quantises a model of random weights by GPTQ on a GPU under an allocator cap; prints time and peak memory.

    python -m tests.bench.gptq_memory [shape=Qwen-7B-Chat] [cap=8] [layers=0] [rows=128] [length=512] [work=FOLDER]

The float model (15.4 GB of 7B) is written to `work` and removed at the end. cap: GiB that torch may reserve.
layers: of the model; 0: all of the shape's. The command that is measured is the one that `make quantize` runs.
"""

import dataclasses
import json
import random
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.bench import shapes
from tests.support.oracles import small_tokenizer
from train.commands import quantize
from train.config.options import pairs
from train.model.architecture import published
from train.model.decoder import DecoderBlock
from train.model.folder import ShardWriter
from train.model.layouts import DecoderConfig, write_config

GIB = 2**30
DEFAULTS = {"shape": "Qwen-7B-Chat", "cap": "8", "layers": "0", "rows": "128", "length": "512", "work": ""}


def write_model(folder: Path, config: DecoderConfig, device: torch.device) -> None:
    """A float16 folder of random weights, a block at a time."""
    folder.mkdir(parents=True)
    names, writer = config.names, ShardWriter(folder)
    generator = torch.Generator(device).manual_seed(0)

    def random_weight(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return (values * shape[-1] ** -0.5).half().cpu()

    with torch.device("meta"):
        block = DecoderBlock(config)
    for number in range(config.num_hidden_layers):
        for name, p in block.named_parameters():
            value = (
                random_weight(*p.shape) if p.ndim == 2 else torch.full(p.shape, float("norm" in name or "ln" in name))
            )
            writer.add(f"{names.block(number)}.{name}", value.half())
    writer.add(f"{names.root}.{names.embed}.weight", random_weight(config.vocab_size, config.hidden_size))
    writer.add(f"{names.root}.{names.norm}.weight", torch.ones(config.hidden_size).half())
    writer.add("lm_head.weight", random_weight(config.vocab_size, config.hidden_size))
    writer.close()
    (folder / "config.json").write_text(json.dumps({**write_config(config), "torch_dtype": "float16"}))
    small_tokenizer(folder)


def write_data(path: Path, rows: int, length: int) -> None:
    """Conversations of random words, each longer than `length` tokens of one byte."""
    words = random.Random(0)
    text = lambda: " ".join(str(words.randrange(10**6)) for _ in range(length // 6 + 8))  # noqa: E731
    lines = [json.dumps({"instruction": f"{n}?", "input": "", "output": text()}) + "\n" for n in range(rows)]
    path.write_text("".join(lines))


def main(words: list[str]) -> None:
    given = {**DEFAULTS, **pairs(words)}
    config = shapes.decoder_config(published(given["shape"]))
    config = dataclasses.replace(config, num_hidden_layers=int(given["layers"]) or config.num_hidden_layers)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = Path(given["work"] or tempfile.mkdtemp(prefix="gptq-"))
    began = time.monotonic()
    write_model(work / "Float", config, device)
    write_data(work / "data.jsonl", int(given["rows"]) + 32, int(given["length"]))
    print(f"random weights written in {time.monotonic() - began:.0f} s", flush=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, float(given["cap"]) * GIB / total), 0)
        torch.cuda.reset_peak_memory_stats(device)
    began = time.monotonic()
    options = {"rows": int(given["rows"]), "length": int(given["length"]), "data": str(work / "data.jsonl")}
    quantize.run(quantize.Options(model=str(work / "Float"), models=str(work), method="gptq", **options))
    seconds, host = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    gpu = ""
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        name = torch.cuda.get_device_name(device)
        gpu = f"; {name}, cap {given['cap']} GiB: {allocated / GIB:.2f} GiB allocated, {reserved / GIB:.2f} reserved"
    print(
        f"{given['shape']}, {config.num_hidden_layers} layers, {given['rows']} rows of {given['length']}: {seconds:.0f} s; "
        f"host {host / GIB:.2f} GiB{gpu}"
    )
    shutil.rmtree(work)


if __name__ == "__main__":
    main(sys.argv[1:])
