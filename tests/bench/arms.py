"""The two stacks that `make bench` compares: this program's training step, and that of the published recipe.

An arm is built for one shape and then asked for steps: forward, backward, clipping and the optimizer's update, with
every token in the loss. All arms have the same shape of model with random Int4 weights, the same ranks and the same
tokens. Knows nothing of clocks and reports.

ours         this program: training/deepspeed_engine.py as `make train` uses it.
ours-fp8     the same with precision=fp8.
stock        as Qwen's finetune_qlora_single_gpu.sh runs: transformers' LlamaForCausalLM in the same shape (its class
             computes what the checkpoint's own code does), auto_gptq's QuantLinear as optimum picks it without exllama,
             peft, float16, DeepSpeed ZeRO-2 with the published bucket sizes. One difference: torch's fused AdamW, since
             DeepSpeed's own needs a compiler.
stock-lean   the same model without DeepSpeed: bfloat16 under autocast, float32 adapters, torch's fused AdamW. The loop
             as one would write it by hand, with less overhead per step.
"""

import io
from contextlib import nullcontext, redirect_stdout
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tests.bench import shapes
from tests.bench.spec import Spec
from tests.bench.stack import adapt, deepspeed_engine, stock_llama
from train.common.device import pick_dtype
from train.config.recipe import Recipe, load_recipe
from train.model import lora
from train.training import distributed
from train.training.deepspeed_engine import Engine
from train.training.distributed import RankInfo

LEARNING_RATE = 1e-4


class Arm(Protocol):
    """A model, ready to train, at one shape."""

    grad_norm: float | None  # of the last step, before clipping; None where float16 overflowed

    def step(self, ids: Tensor) -> Tensor:
        """One step over ids [B, T] int64 on the CPU; returns the mean loss of this process's tokens, 0-d."""
        ...

    def close(self) -> None:
        """Release everything that DeepSpeed would hold."""
        ...


class Ours:
    """This program's own step."""

    precision = "auto"

    def __init__(self, spec: Spec, rank_info: RankInfo, device: torch.device) -> None:
        same = ("batch", "length", "checkpointing", "dropout", "rank", "embedding")
        recipe = load_recipe(
            "qlora",
            {"accumulation": "1", "precision": self.precision, **{name: str(getattr(spec, name)) for name in same}},
        )
        self.engine = self.engine_for(recipe, spec.model, rank_info, device)
        self.world_size = rank_info.world_size
        self.labels = spec.batch * (spec.length - 1) * rank_info.world_size
        self.grad_norm: float | None = None
        self.next_batch: Any = None  # moved to the device while the GPU is at this batch, as in training

    @staticmethod
    def engine_for(recipe: Recipe, model: str, rank_info: RankInfo, device: torch.device) -> Engine:
        """The engine of a run with this recipe, on random weights in the shape `model`."""
        dtype = pick_dtype(device, recipe.precision)
        base = shapes.random_decoder(shapes.config(model), device, dtype)
        base.set_checkpointing(recipe.checkpointing)
        if recipe.embedding == "host" and not base.config.tie_word_embeddings:
            base.keep_embedding_on_host()
        return Engine(lora.attach(base, recipe).train(), recipe, dtype, rank_info.world_size)

    def step(self, ids: Tensor) -> Tensor:
        batch = {"input_ids": ids, "labels": ids}
        total = self.engine.forward_backward(self.next_batch or self.engine.to_device(batch), self.labels)
        self.next_batch = self.engine.to_device(batch)
        self.grad_norm = self.engine.step(last=True, rate=LEARNING_RATE)
        return total * self.world_size / self.labels

    def close(self) -> None:
        self.engine.close()


class OursFp8(Ours):
    """This program's own step with products in fp8."""

    precision = "fp8"


class Stock:
    """The published recipe's stack; the arm stock-lean leaves DeepSpeed and float16 out."""

    def __init__(self, spec: Spec, rank_info: RankInfo, device: torch.device) -> None:
        self.device, self.lean = device, spec.arm == "stock-lean"
        self.grad_norm: float | None = None
        dtype = (torch.bfloat16 if self.lean else torch.float16) if device.type == "cuda" else torch.float32
        base = stock_llama(shapes.config(spec.model), device, dtype)
        self.model = adapt(base, spec.rank, spec.dropout, spec.checkpointing == "on").train()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            trainable, lr=LEARNING_RATE, weight_decay=0.1, betas=(0.9, 0.95), fused=fused
        )
        self.engine = None if self.lean else deepspeed_engine(self.model, self.optimizer, spec.batch, dtype)

    def step(self, ids: Tensor) -> Tensor:
        ids = ids.to(self.device)
        if self.engine is not None:
            loss = self.engine(input_ids=ids, labels=ids).loss
            self.engine.backward(loss)
            self.engine.step()
            self.grad_norm = _number(self.engine.get_global_grad_norm())
            return loss.detach()  # type: ignore[no-any-return]
        with torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext():
            loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.grad_norm = _number(nn.utils.clip_grad_norm_(parameters, 1.0))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()  # type: ignore[no-any-return]

    def close(self) -> None:
        if self.engine is not None:
            with redirect_stdout(io.StringIO()):
                self.engine.destroy()


def _number(norm: Any) -> float | None:
    return None if norm is None else float(norm)


ARMS: dict[str, type[Ours] | type[Stock]] = {
    "ours": Ours,
    "ours-fp8": OursFp8,
    "stock": Stock,
    "stock-lean": Stock,
}


def join(device: torch.device) -> RankInfo:
    """Join the process group of this arm, a group of one where it runs alone; returns the ranks of this process."""
    rank_info = distributed.detect() or RankInfo()
    if device.type == "cuda":
        rank_info = distributed.assign_gpu(rank_info, torch.cuda.device_count())
    distributed.join(rank_info, device.type == "cuda")
    return rank_info
