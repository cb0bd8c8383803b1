"""auto-gptq's algorithm on linears that read the same input (Frantar et al. 2022, GPTQ).

`auto_gptq.quantization.GPTQ` collects the Hessian of the inputs and rounds one column after the other, each time
correcting those that follow. Linears with the same input are given to it as one matrix: the rows of a weight do not
influence each other, so the codes are those that each linear would get alone, and the Hessian is computed once. The
scale of a group is searched as for rounding to nearest and has its stored, float16 value before codes are chosen.
"""

import importlib
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from train.common.errors import UserError
from train.ops.gptq import Scheme, pack_codes, search_scales

DAMPING = (0.01, 0.1, 1.0)  # of the mean of the Hessian's diagonal: auto-gptq's own, and what is tried if that fails
BLOCK = 128  # columns whose corrections are collected before they are applied to the rest

State = dict[str, Tensor]


def auto_gptq() -> Any:
    """The module auto_gptq.quantization. Its import takes seconds, and tells of kernels that are not needed here."""
    logging.getLogger("auto_gptq").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            return importlib.import_module("auto_gptq.quantization")
        except ImportError as error:
            raise UserError(
                f"METHOD=gptq needs the package auto-gptq: {error}. Install env.lock: make setup"
            ) from error


class SearchedScales:
    """Takes the place of auto-gptq's Quantizer: symmetric, with the scales of `search_scales`."""

    def __init__(self, scheme: Scheme) -> None:
        self.middle = 2 ** (scheme.bits - 1)
        self.by_group = scheme.group_size != -1
        self.scale: Tensor | None = None  # [N, 1] of the group in work
        self.zero: Tensor | None = None

    def ready(self) -> bool:
        """Whether auto-gptq need not ask for a scale of the whole row before the first column."""
        return self.by_group or self.scale is not None

    def find_params(self, columns: Tensor, **_: bool) -> None:
        """Set the scales for `columns` [N, g] of the weight."""
        self.scale = search_scales(columns.float()[:, None], self.middle)
        self.zero = torch.full_like(self.scale, self.middle)

    def quantize(self, column: Tensor) -> Tensor:
        """A column [N, 1] rounded to its codes, as floats."""
        assert self.scale is not None
        return (column / self.scale).round_().clamp_(-self.middle, self.middle - 1) * self.scale


@contextmanager
def _ready_for(device: torch.device) -> Iterator[None]:
    """On a CPU: one thread, and no waiting for a GPU.

    The operations on one column are so small that torch's threads would spend their time waiting for one another.
    auto-gptq calls torch.cuda.synchronize in any case, which is an error on a machine without a GPU.
    """
    if device.type == "cuda":
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with patch.object(torch.cuda, "synchronize", lambda *_: None):
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _without_debug() -> Iterator[None]:
    """auto-gptq reads DEBUG, which other programs set too: it would then keep the inputs and compare with outputs that
    it was not given, which is an error."""
    with patch.dict(os.environ):
        os.environ.pop("DEBUG", None)
        yield


def quantize_linears(
    weights: dict[str, Tensor], inputs: Iterable[Tensor], scheme: Scheme, device: torch.device
) -> dict[str, State]:
    """The packed tensors of linears that read the same input, on the CPU.

    Args:
        weights: name -> float weight [N, K] on any device. inputs: [T, K] float32 on `device`, of the calibration rows.
    Raises:
        UserError: K does not fit the scheme; a weight or an input is not finite.
    """
    for name, weight in weights.items():
        scheme.check(weight.shape[1], name)
        if not weight.isfinite().all():
            raise UserError(f"{name}: the weight has infinities or NaN. The file is damaged: fetch the model again.")
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.cat([w.to(device, torch.float32) for w in weights.values()]), requires_grad=False)
    one = auto_gptq().GPTQ(layer)
    one.quantizer = SearchedScales(scheme)
    for x in inputs:
        with _without_debug():
            one.add_batch(x, None)
    first = next(iter(weights))
    if not bool(one.H.diagonal().isfinite().all()):
        raise UserError(f"{first}: its inputs have infinities or NaN in float32. The model is damaged, or diverged.")
    scales = _round(one, scheme, first)
    width = layer.weight.shape[1]
    steps = scales.repeat_interleave(width // scales.shape[1], dim=1)  # [N, K]
    codes = (layer.weight / steps).round_().add_(2 ** (scheme.bits - 1)).int()  # exact: rounded weights are multiples
    sizes = [len(weight) for weight in weights.values()]
    parts = zip(weights, codes.split(sizes), scales.split(sizes), strict=True)
    return {name: _packed(code, scale, scheme.bits) for name, code, scale in parts}


def _packed(codes: Tensor, scales: Tensor, bits: int) -> State:
    return {key: value.cpu() for key, value in pack_codes(codes, scales, bits).items()}


def _round(one: Any, scheme: Scheme, name: str) -> Tensor:
    """Let auto-gptq round the weights in place; the scales [N, G]. More damping where the Hessian cannot be inverted."""
    block = (
        scheme.group_size if 0 < scheme.group_size < BLOCK else BLOCK
    )  # a group's scale needs all corrections before it
    hessian = one.H
    for damping in DAMPING:
        one.H = hessian  # still has what was added to its diagonal before
        try:
            with _ready_for(hessian.device), _without_debug():
                scales: Tensor = one.fasterquant(blocksize=block, percdamp=damping, group_size=scheme.group_size)[0]
            return scales
        except torch.linalg.LinAlgError:
            one.quantizer.scale = None
    raise UserError(f"{name}: the Hessian of its inputs cannot be inverted. Take more calibration rows: ROWS=")
