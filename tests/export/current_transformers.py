"""Run by a Python with a current transformers: what it makes of exports. Imports nothing of this project.

    python current_transformers.py MERGED GPTQ QUESTION RESULT

Writes to RESULT the ids of the question in each folder's chat template, and the float32 logits of the merged model and of
the packed base with its adapter. The packed weights are unpacked here by numpy, from the description of the format.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def ids_of(folder: str, question: str) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text)["input_ids"])


@torch.no_grad()
def logits_of(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    result: torch.Tensor = model.eval()(torch.tensor([ids])).logits
    return result


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [R, N] -> codes [R * 32 / bits, N]: the lowest bits of a word first."""
    parts = [(words.astype(np.uint32) >> shift) & (2**bits - 1) for shift in range(0, 32, bits)]
    return np.stack(parts, axis=1).reshape(-1, words.shape[1]).astype(np.int64)


def float_state(folder: Path, bits: int) -> dict[str, torch.Tensor]:
    state, result = tensors_of(folder), {}
    for name, tensor in state.items():
        stem, _, part = name.rpartition(".")
        if part == "qweight":
            packed = {key: state[f"{stem}.{key}"].numpy() for key in ("qweight", "qzeros", "scales", "g_idx")}
            zeros = (unpack(packed["qzeros"].T.copy(), bits).T + 1) % 2**bits
            group = packed["g_idx"]
            codes = unpack(packed["qweight"], bits)
            weight = (codes - zeros[group][:, : codes.shape[1]]) * packed["scales"].astype(np.float64)[group]
            result[f"{stem}.weight"] = torch.from_numpy(weight.T.astype(np.float32).copy())
        elif part not in ("qzeros", "scales", "g_idx"):
            result[name] = tensor.float()
    return result


def packed_model(folder: Path) -> torch.nn.Module:
    """The base of a packed export with its adapter added, as a float32 model of transformers."""
    config = AutoConfig.from_pretrained(folder / "base")
    bits = json.loads((folder / "base/config.json").read_text())["quantization_config"]["bits"]
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state, adapter = float_state(folder / "base", bits), tensors_of(folder / "adapter")
    settings = json.loads((folder / "adapter/adapter_config.json").read_text())
    for name in adapter:
        if name.endswith("lora_A.weight"):
            target = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            update = adapter[name.replace("lora_A", "lora_B")].double() @ adapter[name].double()
            state[target] = (state[target].double() + settings["lora_alpha"] / settings["r"] * update).float()
    missing, extra = model.load_state_dict(state, strict=False)
    assert not extra and set(missing) <= {"lm_head.weight"}, (missing, extra)
    model.tie_weights()
    return model


def main(merged: str, packed: str, question: str, result: str) -> None:
    ids = ids_of(merged, question)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    found = {"version": transformers.__version__, "ids": ids, "packed_ids": ids_of(f"{packed}/base", question)}
    found["logits"] = logits_of(model, ids)
    del model
    found["packed_logits"] = logits_of(packed_model(Path(packed)), ids)
    torch.save(found, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
