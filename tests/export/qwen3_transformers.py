"""Run by a Python with a current transformers: a Qwen3 of its own. Imports nothing of this project.

python qwen3_transformers.py make FOLDER TIED            writes a small random Qwen3 to FOLDER
python qwen3_transformers.py ask FOLDER IDS RESULT       its float32 logits of IDS
"""

import sys

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM


def make(folder: str, tied: str) -> None:
    """Heads wider than the hidden size, as in the published small ones, and grouped; norms that are not one."""
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, tie_word_embeddings=tied == "1",
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, attention_bias=False,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).float()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=p.shape[-1] ** -0.5) if p.dim() > 1 else p.uniform_(0.5, 1.5)
    model.tie_weights()
    model.save_pretrained(folder)


def ask(folder: str, ids: str, result: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.save({"kind": type(model).__name__, "logits": model(torch.load(ids)).logits}, result)


if __name__ == "__main__":
    {"make": make, "ask": ask}[sys.argv[1]](*sys.argv[2:])
