"""Run by a Python with a current transformers: a training of Qwen2 there. Imports nothing of this project.

    python full_transformers.py BASE TRAINED STEPS RESULT

STEPS holds the ids of each micro batch of each step. RESULT gets the gradient of the first micro batch, the weights after
AdamW's steps (norms and biases without weight decay), and the logits of the folder TRAINED for the first ids.
"""

import sys
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM


def loss_sum(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def train(model: Any, steps: list[list[torch.Tensor]]) -> None:
    groups = [[p for p in model.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False)]
    settings: Any = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
    decays = [{"params": p, "weight_decay": decay} for p, decay in zip(groups, (0.1, 0.0))]
    optimizer = torch.optim.AdamW(decays, **settings)
    for micros in steps:
        optimizer.zero_grad()
        labels = sum(ids[:, 1:].numel() for ids in micros)
        for ids in micros:
            (loss_sum(model, ids) / labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


def main(base: str, trained: str, steps: str, result: str) -> None:
    batches = torch.load(steps)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    loss_sum(model, batches[0][0]).backward()
    found: dict[str, Any] = {"version": transformers.__version__, "class": type(model).__name__}
    found["grads"] = {name: p.grad.clone() for name, p in model.named_parameters()}
    train(model, batches)
    found["weights"] = {name: p.detach() for name, p in model.named_parameters()}
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32).eval()
        found["logits"] = model(input_ids=batches[0][0]).logits
    torch.save(found, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
