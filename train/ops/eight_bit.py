"""The 8-bit weights of LLM.int8() (Dettmers et al. 2022): int8 codes, and for each output its largest |w|.

bitsandbytes rounds the inputs to int8 too, and multiplies input columns with outliers (|x| >= 6) in floats, by the same
rounded weights. Here every column is multiplied in floats, so the inputs are exact and nothing is left to decompose; the
weights are the same. The kernel is ops/kernels/eight_bit_dequantize.py.
"""

import torch
from torch import Tensor

from train.common.errors import UserError
from train.ops import kernels

LARGEST = 127  # the code of a row's largest |w|
CHUNK = 1 << 22  # weights that are rounded at once


def quantize(weight: Tensor, name: str = "a linear layer") -> dict[str, Tensor]:
    """Round a float weight [N, K]: {codes [K, N] int8, absmax [N] float32}. Computed in float32.

    Raises:
        UserError: a weight is not finite.
    """
    if not weight.isfinite().all():
        raise UserError(f"{name}: the weight has infinities or NaN. The file is damaged: fetch the model again.")
    absmax = weight.abs().amax(1).float()
    factor = torch.where(absmax > 0, LARGEST / absmax, 0.0)  # of a row of zeros: its codes are 0
    codes = torch.empty(weight.shape[1], weight.shape[0], dtype=torch.int8, device=weight.device)
    step = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        codes[:, rows] = (weight[rows].float() * factor[rows, None]).round_().to(torch.int8).t()
    return {"codes": codes, "absmax": absmax}


def dequantize_plain(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """The definition: the float weight [K, N] in `dtype`, code · absmax · (1 / 127) in float32, rounded once."""
    return (codes.float() * absmax).mul_(1 / LARGEST).to(dtype)


def dequantize(
    codes: Tensor,
    absmax: Tensor,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    border: kernels.Border | None = None,
) -> Tensor:
    """`dequantize_plain`, by the Triton kernel where that runs (on a CUDA device); the same bits.

    Args:
        out, border: as for ops.four_bit.dequantize.
    """
    if border is not None and out is not None:
        border.fill(out)
    if codes.is_cuda and kernels.usable(codes.device):
        return kernels.dequantize_eight_bit(codes, absmax, dtype, out)
    weight = dequantize_plain(codes, absmax, dtype)
    return weight if out is None else out.copy_(weight)
