"""What DeepSpeed's optimizer holds, by parameter name: read, written and counted, whatever the ZeRO stage.

Knows AdamW's state and ZeRO's shards; nothing of passes, recipes or files. Private names of DeepSpeed that concern its
optimizer are in this file, all others in deepspeed_engine.py.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from train.training import gradient_shares

MASTER = ""  # the key of the float32 master weights; the other keys are those of AdamW's moments
MOMENTS = ("exp_avg", "exp_avg_sq")
STATE_KEYS = (MASTER, *MOMENTS)


class OptimizerState:
    """What DeepSpeed's optimizer holds: each parameter's float32 master and AdamW moments, and the count of updates.

    ZeRO shards them over the processes, so every process makes every call that reads or writes a parameter, in the same
    order.
    """

    def __init__(self, engine: Any, parameters: Mapping[str, Tensor]) -> None:
        """engine: DeepSpeed's. parameters: those of the optimizer, by name."""
        self.engine, self.optimizer, self.parameters = engine, engine.optimizer, parameters
        # stage 0: DeepSpeed uses torch's optimizer directly, on the parameters themselves
        self.is_torch_optimizer = isinstance(self.optimizer, torch.optim.Optimizer)
        self._adamw: torch.optim.Optimizer = self.optimizer if self.is_torch_optimizer else self.optimizer.optimizer

    def allocate(self) -> None:
        """Create AdamW's state before its first step where it is missing, and ZeRO's map from parameters into it."""
        shards = getattr(self.optimizer, "fp32_partitioned_groups_flat", None)  # stage 3
        for p in shards or [p for group in self._adamw.param_groups for p in group["params"]]:
            if not self._adamw.state[p]:
                device = p.device if self._adamw.defaults["fused"] else None  # the fused AdamW counts on the GPU
                moments = {key: torch.zeros_like(p) for key in MOMENTS}
                self._adamw.state[p] = {"step": torch.tensor(0.0, device=device), **moments}
        link = getattr(self.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()

    def shapes(self) -> dict[str, torch.Size]:
        """The whole shape of every parameter; under ZeRO 3 the parameter itself is empty between uses."""
        return {name: getattr(p, "ds_shape", p.shape) for name, p in self.parameters.items()}

    def read(self, name: str, key: str) -> Tensor:
        """The whole master (MASTER) or moment of one parameter, on its device; valid until the next step."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        p = self.parameters[name]
        if self.is_torch_optimizer:
            local: Tensor = p.detach() if key == MASTER else self.optimizer.state[p][key]
            return local
        whole: Tensor = safe_get_full_fp32_param(p) if key == MASTER else safe_get_full_optimizer_state(p, key)
        return whole

    def write_masters(self, masters: Mapping[str, Tensor]) -> None:
        """Set every float32 master, and the parameter that the passes read from it."""
        from deepspeed import zero
        from deepspeed.utils import safe_set_full_fp32_param

        for name, p in self.parameters.items():
            value = masters[name].to(self.engine.device)
            if not self.is_torch_optimizer:
                safe_set_full_fp32_param(p, value)
            with zero.GatheredParameters([p], modifier_rank=0, enabled=hasattr(p, "ds_id")):
                p.data.copy_(value)

    def write_moments(self, key: str, values: Mapping[str, Tensor]) -> None:
        """Set one of AdamW's moments of every parameter."""
        from deepspeed.utils import safe_set_full_optimizer_state

        for name, p in self.parameters.items():
            value = values[name].to(self.engine.device)
            if self.is_torch_optimizer:
                self.optimizer.state[p][key].copy_(value)
            else:
                safe_set_full_optimizer_state(p, value, key)

    def set_gradient(self, gradient: Tensor) -> None:
        """Hand over the whole gradient of a step, the same in every process, as if DeepSpeed had added it.

        Args:
            gradient: float32 [n], of all parameters in their order, times `loss_scale`. Its memory is overwritten.
        """
        sizes = [p.numel() for p in self.parameters.values()]
        parts = dict(zip(self.parameters.values(), gradient.split(sizes), strict=True))
        if self.is_torch_optimizer:
            for p, part in parts.items():
                p.grad = part.view_as(p)
            return
        norm = gradient_shares.norm(gradient)
        self.optimizer.scaled_global_norm = lambda: norm  # its own is added up over the shards
        for number, group in enumerate(self.optimizer.bit16_groups):
            size = int(self.optimizer.partition_size[number])  # of each process, the last one padded
            first, values = torch.distributed.get_rank() * size, [parts[p] for p in group]
            shard = (values[0] if len(values) == 1 else torch.cat(values))[first : first + size]
            self.optimizer.averaged_gradients[number] = [torch.nn.functional.pad(shard, (0, size - len(shard)))]

    def loss_scale(self) -> float:
        """What float16 multiplies the loss by, so that gradients do not vanish; 1 in other dtypes."""
        return float(self.optimizer.loss_scale) if self.engine.fp16_enabled() else 1.0

    def updates(self) -> int:
        """Updates that AdamW has made; its bias correction depends on it."""
        return max(int(state["step"]) for state in self._adamw.state.values() if "step" in state)

    def set_updates(self, count: int) -> None:
        for state in self._adamw.state.values():
            if "step" in state:
                state["step"].fill_(count)

    def scaler(self) -> dict[str, Any]:
        """The plain values of float16's loss scaler; empty in other dtypes."""
        scaler = getattr(self.optimizer, "loss_scaler", None)
        values = vars(scaler).items() if scaler is not None and self.engine.fp16_enabled() else ()
        return {key: value for key, value in values if isinstance(value, (bool, int, float))}

    def set_scaler(self, values: Mapping[str, Any]) -> None:
        scaler = getattr(self.optimizer, "loss_scaler", None)
        for key, value in values.items():
            setattr(scaler, key, value)

    def overflowed(self) -> bool:
        """Whether the last step overflowed in float16, so that its update was left out."""
        return bool(getattr(self.optimizer, "overflow", False) and self.engine.fp16_enabled())
