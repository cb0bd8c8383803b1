"""The DeepSpeed engine under a run: one micro batch, one step, and all of its state by name.

Knows gradients, moments and scales; nothing of data, files or progress. The base is frozen and stays in its own dtype: only the
adapter is cast for computing, with float32 masters in the optimizer. The learning rate is given at every step, so that there is no
scheduler to save. What DeepSpeed prints is turned off where it is printed. On a GPU DeepSpeed is given one parameter, the vector of all
adapters (step.py): its work a parameter and step is Python's, and would take longer than the GPU's.
"""

import io
import json
import logging
import os
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from train.config.recipe import Recipe
from train.model.lora import trainable
from train.ops import kernels
from train.training.graph_step import GraphStep

PRESETS = Path(__file__).parent / "deepspeed"
MOMENTS = ("exp_avg", "exp_avg_sq")
PIECE = 1 << 22  # numbers of a gradient that are float64 at once, for its norm
FUSED_ON = ("cuda",)  # types of devices on which the passes are the fused ones
Look = Callable[[str, dict[str, Tensor]], None]  # "", exp_avg or exp_avg_sq; name -> tensor


def import_deepspeed() -> Any:
    """DeepSpeed without its log lines, its need of nvcc, and the C++ extension that it would compile into the home folder.

    At import it asks every op whether it could be built, and where a GPU is and no CUDA toolkit the asking raises. No op is
    used here: the accelerator is named by hand, and the GPU is out of sight until the import is done.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from torch.utils import cpp_extension  # noqa: F401  here, where it sees the GPU: else it says that there is none

    hidden: dict[str, Any] = {"is_available": lambda: False, "get_device_capability": lambda device=None: (0, 0)}
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), patch.multiple(torch.cuda, **hidden):
            warnings.simplefilter("ignore")
            import deepspeed
    finally:
        logging.disable(logging.NOTSET)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # only inference would use it
    return deepspeed


class Trainee(nn.Module):
    """The model as DeepSpeed sees it: `half` and `bfloat16` cast what is learnt, never the base or its Int4 scales."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        if isinstance(self.model, GraphStep):
            return self.model(batch)  # type: ignore[no-any-return]
        return self.model(**batch).loss  # type: ignore[no-any-return]

    def half(self) -> "Trainee":
        return self._cast(torch.float16)

    def bfloat16(self) -> "Trainee":
        return self._cast(torch.bfloat16)

    def _cast(self, dtype: torch.dtype) -> "Trainee":
        for p in trainable(self).values():
            p.data = p.data.to(dtype)
        return self


def fusable(recipe: Recipe, device: torch.device) -> bool:
    """Whether the passes are the fused ones. ZeRO 3 takes parameters away between uses, which a graph cannot follow."""
    return device.type in FUSED_ON and recipe.zero < 3 and (device.type == "cpu" or kernels.usable(device))


def stage_of(recipe: Recipe, dtype: torch.dtype) -> int:
    """In 16 bits at least ZeRO 2: it keeps float32 masters that can be saved by name, as stage 0 does not, and reports an overflow
    or an infinite norm, where stages 0 and 1 in bfloat16 break off with an assertion. In one process it shards nothing."""
    return recipe.zero if dtype == torch.float32 else max(2, recipe.zero)


def settings(recipe: Recipe, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's configuration: the file of the stage, and the recipe's values."""
    stage = stage_of(recipe, dtype)
    preset: dict[str, Any] = json.loads((PRESETS / f"zero{stage}.json").read_text())
    values: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": recipe.batch,
        "gradient_accumulation_steps": recipe.accumulation,
        "gradient_clipping": recipe.clip if stage else 0.0,  # stage 0: clipped in `step`, which also wants the norm
    }
    if dtype != torch.float32:  # micro batches are added up in 32 bits
        values |= {"data_types": {"grad_accum_dtype": "fp32"}}
    if dtype == torch.bfloat16:
        values |= {"bf16": {"enabled": True}}
    elif dtype == torch.float16:
        values |= {"fp16": {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 500, "hysteresis": 2}}
    return preset | values


def _measured(optimizer: Any) -> None:
    """ZeRO's norm of a gradient, honest and in little memory.

    It calls the norm of what holds NaN or infinity -1, and the norm of that is 1, a good one: here it is none. And it copies a whole
    gradient to float64 first: here it is given PIECE numbers at a time, which it adds up as it does several gradients.
    """
    measure = getattr(optimizer, "get_grad_norm_direct", None)
    if measure is None:
        return

    def norm(gradients: Any, params: Any, norm_type: int = 2) -> Tensor:
        pieces = [(piece, p) for g, p in zip(gradients, params) for piece in g.detach().reshape(-1).split(PIECE)]
        found: Tensor = measure([piece for piece, _ in pieces], [p for _, p in pieces], norm_type)
        return found.masked_fill(found < 0, float("nan"))

    optimizer.get_grad_norm_direct = norm


def _pinned(shape: torch.Size, pin: bool) -> Tensor:
    """Memory for float32 numbers; pageable, if the machine gives no such memory away."""
    try:
        return torch.empty(shape, dtype=torch.float32, pin_memory=pin)
    except RuntimeError:
        return torch.empty(shape, dtype=torch.float32)


class Engine:
    """A model with adapters, ready to learn. Every process calls every method, in the same order."""

    def __init__(self, model: nn.Module, recipe: Recipe, dtype: torch.dtype, world: int) -> None:
        deepspeed = import_deepspeed()
        self.recipe, self.world, self.model = recipe, world, model
        names = {p: name for name, p in trainable(model).items()}
        self.device = next(iter(names)).device
        starts = {name: p.detach().clone() for p, name in names.items()}
        self.fused = self._fused(model, names)
        self._lent: dict[tuple[str, str], Tensor] = {}
        trainee = Trainee(self.fused or model)
        # lr 0: some stages take a step when they are built, to allocate the moments, and would decay the weights in it
        optimizer = torch.optim.AdamW(
            list(trainable(trainee).values()),
            lr=0.0,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.epsilon,
            weight_decay=recipe.weight_decay,
            fused=True if self.fused and self.device.type == "cuda" else None,
        )
        warnings.filterwarnings("ignore", message=".*(c10d::|reduce_scatter_tensor|Full backward hook).*")
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        config = settings(recipe, dtype)
        if self.fused:  # the vector is larger than any bucket: reduced as it is, and no room is held for copies
            config["zero_optimization"] |= {"reduce_bucket_size": 1} if stage_of(recipe, dtype) else {}
        with redirect_stdout(io.StringIO()):
            self.engine, *_ = deepspeed.initialize(model=trainee, optimizer=optimizer, config=config)
        self.parameters = {"vector": self.fused.vector} if self.fused else trainable(model)
        _measured(self.engine.optimizer)
        self.engine.train()
        self._allocate()
        self._restore_parameters(self._joined(starts))  # float32 masters, not their 16-bit roundings
        self._set_count(0)
        if self.fused:
            self.fused.bind()

    def _fused(self, model: Any, names: dict[nn.Parameter, str]) -> GraphStep | None:
        if not fusable(self.recipe, self.device):
            return None
        full = (self.recipe.batch, self.recipe.length) if self.recipe.pack else None
        return GraphStep(model.get_base_model(), names, self.recipe.length, self.recipe.graphs, full)

    def close(self) -> None:
        """Let go of model and optimizer, which DeepSpeed's hooks and tables hold as long as the process lives."""
        from deepspeed.runtime.zero import parameter_offload

        with redirect_stdout(io.StringIO()):
            self.engine.destroy()
        parameter_offload.FWD_MODULE_STACK.clear()  # ZeRO 3's, which `destroy` forgets

    # --- a step -------------------------------------------------------------------------------------------------------

    def place(self, batch: dict[str, Tensor]) -> Any:
        """What `dataset.collate` makes, on the device as `micro` reads it; worth doing while the GPU is at the batch before."""
        return (
            self.fused.to_device(batch) if self.fused else {key: value.to(self.device) for key, value in batch.items()}
        )

    def micro(self, batch: Any, labels: int) -> Tensor:
        """Forward and backward of one micro batch; returns the SUM of its token losses.

        Args:
            batch: what `dataset.collate` or `place` makes. labels: learnt tokens of the whole global step, over all processes: each
                token weighs the same, in whichever micro batch it stands. DeepSpeed averages over processes: undone here.
        """
        total = self.engine(self.place(batch) if isinstance(batch, dict) else batch)
        self.engine.backward(total * (self.world / labels), scale_wrt_gas=False)
        return total.detach()

    def step(self, last: bool, rate: float) -> float | None:
        """Close a micro batch; after the last one of a global step, update the weights at learning rate `rate`.

        Returns:
            The norm of the gradient before clipping, after the last micro batch; None before, and where float16 overflowed
            and the update was left out.
        """
        norm = None
        if last:
            for group in self.engine.optimizer.param_groups:
                group["lr"] = rate
            if self._plain():
                limit = self.recipe.clip or float("inf")
                norm = float(nn.utils.clip_grad_norm_(list(self.parameters.values()), limit))
        self.engine.step()
        if not last:
            return None
        if getattr(self.engine.optimizer, "overflow", False) and self.engine.fp16_enabled():
            return None
        return norm if norm is not None else float(self.engine.get_global_grad_norm() or 0.0)

    def _plain(self) -> bool:
        """Whether DeepSpeed left torch's own optimizer on the parameters themselves (stage 0)."""
        return isinstance(self.engine.optimizer, torch.optim.Optimizer)

    # --- all state, by name -------------------------------------------------------------------------------------------

    def gather(
        self, look: Look | None = None, lent: bool = False, keep: bool = True
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Float32 masters by parameter name, and AdamW's moments as name/exp_avg and name/exp_avg_sq; whole, on the CPU.

        Args:
            look: called with "" and the masters, then with each moment's name and its tensors; on the device where the passes are fused.
            lent: copied into memory of `lend`, which the next such call writes over.
            keep: False in a process that only takes part: returns nothing.
        """
        held: dict[str, dict[str, Tensor]] = {}
        for key in ("", *MOMENTS):
            if self.fused:
                live = {"vector": self._one(self.fused.vector, key)}
                if look is not None:
                    look(key, self._split(live))
                found = {"vector": self._copied(live.pop("vector"), "vector", key, lent)} if keep else {}
            else:  # one after the other: ZeRO 3 has no room for all of them on a card
                found = {name: self._copied(self._one(p, key), name, key, lent) for name, p in self.parameters.items()}
                if look is not None:
                    look(key, found)
            if keep:
                held[key] = self._split(found)
        masters = held.pop("", {})
        return masters, {f"{name}/{key}": found[name] for name in masters for key, found in held.items()}

    def whole(self, key: str) -> dict[str, Tensor]:
        """Every parameter's master (key ""), or one of its moments, by name; only until the next step, where it stands."""
        if self.fused:
            return self._split({"vector": self._one(self.fused.vector, key)})
        return {name: self._copied(self._one(p, key), name, key, False) for name, p in self.parameters.items()}

    def lend(self) -> None:
        """Make the memory for `gather`: pinned where there is a GPU, which fills it ten times as fast as memory that is new.

        Pinning takes as long as a few copies: done before training, where nothing waits for it. torch rounds it up to a power of two.
        """
        for name, p in self.parameters.items() if not self._lent else ():
            for key in ("", *MOMENTS):
                self._lent[name, key] = _pinned(getattr(p, "ds_shape", p.shape), self.device.type == "cuda")

    def _copied(self, value: Tensor, name: str, key: str, lent: bool) -> Tensor:
        """A copy on the CPU, in the memory that is lent or in its own."""
        if not lent:
            return value.cpu() if value.is_cuda else value.clone()
        self.lend()
        return self._lent[name, key].copy_(value)

    def _one(self, p: Tensor, key: str) -> Tensor:
        """What DeepSpeed holds in all processes of a parameter's master (key ""), or of one of its moments; on the device."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._plain():
            held: Tensor = self.engine.optimizer.state[p][key] if key else p.detach()
            return held
        whole: Tensor = safe_get_full_optimizer_state(p, key) if key else safe_get_full_fp32_param(p)
        return whole

    def _split(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """What DeepSpeed holds, by the names of the adapters' parameters."""
        return self.fused.layout.split(found["vector"]) if self.fused else found

    def _joined(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `_split`."""
        return {"vector": self.fused.layout.join(values, self.device)} if self.fused else values

    def restore(self, masters: dict[str, Tensor], moments: dict[str, Tensor], counters: dict[str, Any]) -> None:
        """The inverse of `gather` and `counters`, in whatever number of processes."""
        self._restore_parameters(self._joined(masters))
        for key in MOMENTS:
            part = {name.rpartition("/")[0]: x for name, x in moments.items() if name.endswith(f"/{key}")}
            self._restore_moments(self._joined(part), key)
        self._set_count(counters["updates"])
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)
        for key, value in counters["scaler"].items():
            setattr(scaler, key, value)

    def counters(self) -> dict[str, Any]:
        """Updates made so far (float16 may leave some out), and the state of the loss scaler."""
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)
        plain = vars(scaler).items() if scaler is not None and self.engine.fp16_enabled() else ()
        return {
            "updates": self._count(),
            "scaler": {key: value for key, value in plain if isinstance(value, (bool, int, float))},
        }

    def _restore_parameters(self, masters: dict[str, Tensor]) -> None:
        from deepspeed import zero
        from deepspeed.utils import safe_set_full_fp32_param

        for name, p in self.parameters.items():
            value = masters[name].to(self.engine.device)
            if not self._plain():
                safe_set_full_fp32_param(p, value)
            with zero.GatheredParameters([p], modifier_rank=0, enabled=hasattr(p, "ds_id")):
                p.data.copy_(value)

    def _restore_moments(self, values: dict[str, Tensor], key: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        for name, p in self.parameters.items():
            value = values[name].to(self.engine.device)
            if self._plain():
                self.engine.optimizer.state[p][key].copy_(value)
            else:
                safe_set_full_optimizer_state(p, value, key)

    def _inner(self) -> torch.optim.Optimizer:
        return self.engine.optimizer if self._plain() else self.engine.optimizer.optimizer

    def _allocate(self) -> None:
        """AdamW's state before its first step, where DeepSpeed has not made it, and ZeRO's map from parameters into it."""
        inner = self._inner()
        sharded = getattr(self.engine.optimizer, "fp32_partitioned_groups_flat", None)  # stage 3
        for p in sharded or [p for group in inner.param_groups for p in group["params"]]:
            if not inner.state[p]:
                at = p.device if inner.defaults["fused"] else None  # the fused update counts on the GPU
                inner.state[p] = {"step": torch.tensor(0.0, device=at), **{key: torch.zeros_like(p) for key in MOMENTS}}
        link = getattr(self.engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()

    def _count(self) -> int:
        return max(int(state["step"]) for state in self._inner().state.values() if "step" in state)

    def _set_count(self, updates: int) -> None:
        """AdamW's own step count, which its bias correction reads."""
        for state in self._inner().state.values():
            if "step" in state:
                state["step"].fill_(updates)
