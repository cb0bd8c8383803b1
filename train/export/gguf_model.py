"""The model in the GGUF files of an export, as they are on the disk: dequantised, with the adapter's file added.

For the passport: what these files hold, in this program's decoder. It reads files that this program wrote.
"""

from pathlib import Path

import gguf
import torch
from torch import Tensor

from train.common.errors import UserError
from train.model.decoder import Decoder
from train.model.gguf_reader import GgufFile, GgufTensor, published_config, published_name
from train.model.layouts import read_config

Updates = dict[str, tuple[Tensor, Tensor, float]]  # name of a weight in GGUF -> (A [r, K], B [N, r], scale)


def load_gguf(model: Path, adapter: Path | None, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The decoder with the file's weights in `dtype`, plus alpha / rank · B A of the adapter's file, as llama.cpp adds it.

    Raises:
        UserError: a file that is not whole, or whose tensors are not those of its architecture.
    """
    file = GgufFile(model)
    with torch.device("meta"):
        decoder = Decoder(read_config(published_config(file), str(model)))
    updates = _updates(adapter) if adapter else {}
    state = {
        published_name(one.name): _added(_floats(one), updates.pop(one.name, None)).to(device, dtype)
        for one in file.tensors
    }
    missing, extra = decoder.load_state_dict(state, strict=False, assign=True)
    tied = {"lm_head.weight"} if decoder.config.tie_word_embeddings else set[str]()
    if (wrong := {*missing, *extra, *updates} - tied) or updates:
        raise UserError(f"{model}: tensors are missing or left over: {', '.join(sorted(wrong)[:3])}. Export it again.")
    decoder.tie_weights()
    return decoder.requires_grad_(False).eval()


def _updates(path: Path) -> Updates:
    file = GgufFile(path)
    tensors = {one.name: _floats(one) for one in file.tensors}
    alpha = float(file.field("adapter.lora.alpha"))
    names = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    pairs = {name: (tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]) for name in names}
    return {name: (a, b, alpha / len(a)) for name, (a, b) in pairs.items()}


def _floats(one: GgufTensor) -> Tensor:
    """float32, in the shape of the published tensor."""
    rows = one.data.reshape(one.shape[0], -1)
    return torch.tensor(gguf.dequantize(rows, one.quantisation)).reshape(one.shape)


def _added(weight: Tensor, update: tuple[Tensor, Tensor, float] | None) -> Tensor:
    if update is None:
        return weight
    a, b, scale = update
    return weight.double().addmm_(b.double(), a.double(), alpha=scale)
