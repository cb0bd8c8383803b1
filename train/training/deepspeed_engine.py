"""DeepSpeed under one training step: forward, backward, the optimizer's update, and all of its state by parameter name.

Knows gradients, AdamW's moments and loss scales; nothing of data, files or progress. The private names of DeepSpeed
that the program uses are in this file and in optimizer_state.py. Only the adapters are trained, or with method=full
every weight: what is trained is cast to the compute dtype and has float32 masters in the optimizer, while a frozen base
keeps its own dtype. The caller passes the learning rate at
every step, so there is no scheduler whose state would have to be saved. On a GPU, DeepSpeed gets a single parameter,
the vector of all adapters (graph_step.py): its Python work is per parameter and step, and for hundreds of small
adapters it would take longer than the GPU's own work.
"""

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from train.common.errors import UserError
from train.config.recipe import Recipe
from train.data.tokens.settings import row_length
from train.model.lora import trainable
from train.ops import kernels
from train.training import torch_compiler
from train.training.adamw import RATIO, make_adamw, make_vector_adamw
from train.training.deepspeed_config import deepspeed_config, zero_stage
from train.training.gradient_shares import NORM_CHUNK, shares_of
from train.training.graph_step import GraphStep
from train.training.optimizer_state import MASTER, MOMENTS, STATE_KEYS, OptimizerState
from train.training.preference import PreferenceLoss, without_noise
from train.training.state_buffers import StateBuffers

VECTOR = "vector"  # the name of the one parameter that holds all adapters
FUSED_DEVICES = ("cuda",)  # device types that train with the fused passes
Inspect = Callable[[str, dict[str, Tensor]], None]  # MASTER or a moment's key; parameter name -> tensor


# --- DeepSpeed itself


def import_deepspeed() -> Any:
    """DeepSpeed, imported without log lines, without nvcc, and without compiling a C++ extension in the home folder.

    At import DeepSpeed checks for each of its ops whether it could be compiled; on a machine with a GPU and no CUDA
    toolkit this check raises an error. No op is used here, so the accelerator is named explicitly and the GPU is hidden
    during the import. So are torch's compilers, transformers and accelerate, which it imports for what is not used here:
    they are four fifths of its import's time.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    no_gpu: dict[str, Any] = {"is_available": lambda: False, "get_device_capability": lambda device=None: (0, 0)}
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), patch.multiple(torch.cuda, **no_gpu):
            warnings.simplefilter("ignore")
            with torch_compiler.hidden("transformers", "accelerate"):
                import deepspeed
    finally:
        logging.disable(logging.NOTSET)
    torch_compiler.use_stand_in()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a C++ extension for inference only
    _leave_out_memory_reports()
    return deepspeed


def _leave_out_memory_reports() -> None:
    """ZeRO logs its memory while it begins, each time after a whole garbage collection: a second in all, for no reader."""

    def begin_again(message: str, force: bool = False) -> None:
        if force and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # as a report does: the peak of a run is that of its steps

    for name, module in list(sys.modules.items()):
        if name.startswith("deepspeed.") and "see_memory_usage" in vars(module):
            module.see_memory_usage = begin_again  # type: ignore[attr-defined]


class DeepSpeedModule(nn.Module):
    """The model as DeepSpeed sees it: `half` and `bfloat16` cast the trainable parameters only, not the base."""

    def __init__(self, model: nn.Module, preference: PreferenceLoss | None = None) -> None:
        super().__init__()
        self.model, self.preference = model, preference

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The SUM of the batch's token losses, 0-d; of pairs that of their losses, and of METRICS, [1 + METRICS]."""
        if isinstance(self.model, GraphStep):
            return self.model(batch)  # type: ignore[no-any-return]
        if self.preference is not None:
            return self.preference(batch)
        return self.model(**batch).loss  # type: ignore[no-any-return]

    def half(self) -> "DeepSpeedModule":
        return self._cast(torch.float16)

    def bfloat16(self) -> "DeepSpeedModule":
        return self._cast(torch.bfloat16)

    def _cast(self, dtype: torch.dtype) -> "DeepSpeedModule":
        for p in trainable(self).values():
            p.data = p.data.to(dtype)
        return self


def uses_fused_passes(recipe: Recipe, device: torch.device) -> bool:
    """Whether to train with the fused passes: of A and B alone, and not with ZeRO 3, which frees them between uses.

    Raises:
        UserError: precision=fp8, which they alone compute, where they do not run.
    """
    fits = recipe.zero < 3 and recipe.is_low_rank
    runs = device.type in FUSED_DEVICES and (device.type == "cpu" or kernels.usable(device))
    if recipe.precision == "fp8" and not runs:
        raise UserError("precision=fp8 needs Triton, which does not run here. Give precision=bf16.")
    return fits and runs


def _fix_gradient_norm(optimizer: Any) -> None:
    """Make ZeRO's gradient norm NaN for a gradient with NaN or infinity, and compute it in little memory.

    ZeRO reports −1 as the norm of such a gradient; the norm over all gradients then squares it to a normal-looking 1. It also
    copies a whole gradient to float64; given chunks of NORM_CHUNK values, it combines their norms as
    it combines those of several gradients.
    """
    compute = getattr(optimizer, "get_grad_norm_direct", None)
    if compute is None:  # torch's own optimizer
        return

    def norm(gradients: Any, params: Any, norm_type: int = 2) -> Tensor:
        pairs = zip(gradients, params)
        chunks = [(chunk, p) for g, p in pairs for chunk in g.detach().reshape(-1).split(NORM_CHUNK)]
        total: Tensor = compute([chunk for chunk, _ in chunks], [p for _, p in chunks], norm_type)
        return total.masked_fill(total < 0, float("nan"))

    optimizer.get_grad_norm_direct = norm


class Engine:
    """A model with adapters, or one whose every weight is trained. Every process calls every method, in the same order."""

    def __init__(self, model: nn.Module, recipe: Recipe, dtype: torch.dtype, world_size: int) -> None:
        """model: on its device, what is trained in float32. dtype: of the passes."""
        deepspeed = import_deepspeed()
        self.recipe, self.world_size, self.model, self.dtype = recipe, world_size, model, dtype
        names = {p: name for name, p in trainable(model).items()}
        self.device = next(iter(names)).device
        initial = {name: p.detach().clone() for p, name in names.items()}
        self.preference = self._preference_loss(model)
        self.fused = self._graph_step(model, names)
        module = DeepSpeedModule(self.fused or model, self.preference)
        warnings.filterwarnings("ignore", message=".*(c10d::|reduce_scatter_tensor|Full backward hook).*")
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        with redirect_stdout(io.StringIO()):
            self.engine, *_ = deepspeed.initialize(
                model=module, optimizer=self._adamw(trainable(module)), config=self._config(dtype)
            )
        self.parameters = {VECTOR: self.fused.vector} if self.fused else trainable(model)
        self.state = OptimizerState(self.engine, self.parameters)
        self.buffers = StateBuffers(pin=self.device.type == "cuda")
        _fix_gradient_norm(self.engine.optimizer)
        self.shares = shares_of(recipe, self.parameters.values(), world_size)
        self.engine.train()
        self.state.allocate()
        self.state.write_masters(self._join(initial))  # in float32: DeepSpeed has made them from 16-bit values
        self.state.set_updates(0)
        if self.fused:
            self.fused.bind()

    def _preference_loss(self, model: Any) -> PreferenceLoss | None:
        recipe = self.recipe
        return PreferenceLoss(model, recipe.dpo_beta, recipe.dpo_label_smoothing) if recipe.loss == "dpo" else None

    def _graph_step(self, model: Any, names: dict[nn.Parameter, str]) -> GraphStep | None:
        if not uses_fused_passes(self.recipe, self.device):
            return None
        fp8 = self.recipe.precision == "fp8"
        length = row_length(self.recipe)
        full = (self.recipe.batch, length) if self.recipe.pack else None
        return GraphStep(model.get_base_model(), names, length, self.recipe.graphs, full, self.preference, fp8)

    def _adamw(self, parameters: dict[str, nn.Parameter]) -> torch.optim.AdamW:
        if not self.fused:
            return make_adamw(self.recipe, parameters)
        sharded = self.world_size > 1 and zero_stage(self.recipe, self.dtype) > 0
        rank = torch.distributed.get_rank() if sharded else 0
        return make_vector_adamw(self.recipe, self.fused.vector, self.fused.layout.offsets, rank)

    def _config(self, dtype: torch.dtype) -> dict[str, Any]:
        config = deepspeed_config(self.recipe, dtype)
        if self.fused and zero_stage(self.recipe, dtype):
            # the vector is larger than any bucket, so it is reduced as it is, and no memory is held for a bucket
            config["zero_optimization"] |= {"reduce_bucket_size": 1}
        return config

    def close(self) -> None:
        """Release model and optimizer: DeepSpeed's hooks and tables would keep them in memory until the process ends."""
        from deepspeed.runtime.zero import parameter_offload

        with redirect_stdout(io.StringIO()):
            self.engine.destroy()
        parameter_offload.FWD_MODULE_STACK.clear()  # of ZeRO 3; `destroy` does not clear it

    # --- a step

    def to_device(self, batch: dict[str, Tensor]) -> Any:
        """A collated batch on the device, as `forward_backward` reads it; called while the GPU computes the previous batch."""
        if self.fused:
            return self.fused.to_device(batch)
        return {key: value.to(self.device) for key, value in batch.items()}

    def forward_backward(self, batch: Any, labels: int) -> Tensor:
        """Forward and backward of one micro batch; returns the SUM of its token losses, 0-d; of pairs METRICS too, [5].

        Args:
            batch: what `data.batches.collate` or `to_device` returns.
            labels: labelled tokens (or pairs) of the whole global step, over all processes. Each has the same weight, in
                whichever micro batch it is. DeepSpeed averages gradients over processes, which the factor `world_size`
                undoes.
        """
        sums: Tensor = self.engine(self.to_device(batch) if isinstance(batch, dict) else batch)
        total = sums[0] if sums.dim() else sums
        if self.shares is None:
            self.engine.backward(total * (self.world_size / labels), scale_wrt_gas=False)
        else:
            scaled = total * (self.state.loss_scale() / labels)
            self.shares.add(torch.autograd.grad(scaled, list(self.parameters.values()), allow_unused=True))
        return sums.detach()

    def step(self, last: bool, rate: float) -> float | None:
        """Finish a micro batch; after the last one of a global step, update the weights with learning rate `rate`.

        Returns:
            The gradient's norm before clipping, after the last micro batch. None after the others, and where float16
            overflowed and the update was left out.
        """
        norm = None
        if last:
            for group in self.engine.optimizer.param_groups:
                group["lr"] = rate * group.get(RATIO, 1.0)
            if self.shares is not None:
                self.state.set_gradient(self.shares.take())
            if self.state.is_torch_optimizer:
                limit = self.recipe.clip or float("inf")
                norm = float(nn.utils.clip_grad_norm_(list(self.parameters.values()), limit))
        self.engine.step()
        if not last or self.state.overflowed():
            return None
        return norm if norm is not None else float(self.engine.get_global_grad_norm() or 0.0)

    @torch.no_grad()
    def evaluate(self, batch: dict[str, Tensor]) -> Tensor:
        """What `forward_backward` returns of a collated batch, without dropout and noise. It draws no random number.

        The decoder's own passes compute it, also where the fused ones train: their adapters are the same memory.
        """
        moved = {key: value.to(self.device) for key, value in batch.items()}
        with without_noise(self.model):
            if self.preference is not None:
                return self.preference(moved)
            # ZeRO 3 collects weights in the hooks of its own module
            loss: Tensor = self.model(**moved).loss if self.fused else self.engine.module(moved)
        return loss

    # --- all state, by the names of the adapters' parameters

    def gather(
        self, inspect: Inspect | None = None, pinned: bool = False, keep: bool = True
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Float32 masters by parameter name, and AdamW's moments as name/exp_avg and name/exp_avg_sq: unsharded, on the CPU.

        Args:
            inspect: called with MASTER and the masters, then with each moment's key and its tensors; with the fused
                passes these are on the device.
            pinned: copy into the pinned buffers, which the next such call overwrites.
            keep: False in a process that does not need the result, but must take part in the communication: returns two
                empty dictionaries.
        """
        by_key: dict[str, dict[str, Tensor]] = {}
        for key in STATE_KEYS:
            values = self._gather(key, inspect, pinned and keep, keep)
            if keep:
                by_key[key] = values
        masters = by_key.pop(MASTER, {})
        return masters, {f"{name}/{key}": values[name] for name in masters for key, values in by_key.items()}

    def _gather(self, key: str, inspect: Inspect | None, pinned: bool, keep: bool) -> dict[str, Tensor]:
        """The masters, or one moment of all parameters, on the CPU. Every process takes part in each read."""
        if not self.fused:  # parameter by parameter: under ZeRO 3 the card has no room for all of them at once
            values = {name: self._to_host(self.state.read(name, key), name, key, pinned) for name in self.parameters}
            if inspect is not None:
                inspect(key, values)
            return values
        vector = self.state.read(VECTOR, key)
        if inspect is not None:
            inspect(key, self._split({VECTOR: vector}))
        return self._split({VECTOR: self._to_host(vector, VECTOR, key, pinned)}) if keep else {}

    def full_state(self, key: str, keep: bool = True) -> dict[str, Tensor]:
        """All masters, or one moment of all parameters, by name; valid until the next step. keep: as for `gather`."""
        if self.fused:
            return self._split({VECTOR: self.state.read(VECTOR, key)})
        values = ((name, self.state.read(name, key)) for name in self.parameters)
        return {name: self._to_host(value, name, key, pinned=False) for name, value in values if keep}

    def allocate_pinned_buffers(self) -> None:
        """Allocate the memory of `gather(pinned=True)`. Done before training starts, because pinning memory is slow."""
        shapes = self.state.shapes().items()
        self.buffers.allocate({f"{name}/{key}": shape for name, shape in shapes for key in STATE_KEYS})

    def _to_host(self, value: Tensor, name: str, key: str, pinned: bool) -> Tensor:
        """A copy of one parameter's state on the CPU, in its pinned buffer or in new memory."""
        if not pinned:
            return value.cpu() if value.is_cuda else value.clone()
        self.allocate_pinned_buffers()
        return self.buffers.copy(f"{name}/{key}", value)

    def _split(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of DeepSpeed's parameters -> those of the adapters' parameters by name: views of the vector, if there is one."""
        return self.fused.layout.split(values[VECTOR]) if self.fused else values

    def _join(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `_split`."""
        return {VECTOR: self.fused.layout.join(values, self.device)} if self.fused else values

    def restore(self, masters: dict[str, Tensor], moments: dict[str, Tensor], counters: dict[str, Any]) -> None:
        """The inverse of `gather` and `counters`; the number of processes may have changed in between."""
        self.state.write_masters(self._join(masters))
        for key in MOMENTS:
            suffix = f"/{key}"
            values = {name.removesuffix(suffix): x for name, x in moments.items() if name.endswith(suffix)}
            self.state.write_moments(key, self._join(values))
        self.state.set_updates(counters["updates"])
        self.state.set_scaler(counters["scaler"])

    def counters(self) -> dict[str, Any]:
        """Updates made so far (float16 may have left some out), and the state of the loss scaler."""
        return {"updates": self.state.updates(), "scaler": self.state.scaler()}
