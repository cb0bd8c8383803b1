"""The Int4 format: AutoGPTQ v1 packing, rounding and dequantising, in plain torch (the definition).

The kernel is ops/kernels/gptq_dequantize.py. Source: Frantar et al. 2022 (GPTQ); the files of AutoGPTQ.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from train.common.errors import UserError
from train.ops import kernels

WORD = 32  # bits of one packed int32
BLOCK = 128  # rows of W that a CPU dequantises at once: they stay in its cache
CHUNK = 1 << 18  # weights that are rounded at once, for the same reason
TINY, HUGE = 2.0**-24, 65504.0  # the smallest and the largest float16 above zero


@dataclass(frozen=True)
class Scheme:
    """How weights are packed: the part of `quantization_config` that matters."""

    bits: int = 4  # of one code: 2, 4 or 8
    group_size: int = 128  # rows of W [K, N] that share one scale and zero; -1: all K
    desc_act: bool = False  # activation order: g_idx holds the group of each row, in any order
    sym: bool = True  # symmetric: every zero point is the middle code

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise UserError(f"{self.bits}-bit GPTQ weights are not supported: expected 4 (2 and 8 are read too).")
        if self.group_size != -1 and (self.group_size < 1 or self.group_size % WORD):
            raise UserError(
                f"group_size={self.group_size}: expected 32, 64, 128, another multiple of 32, or -1 for one group."
            )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Scheme":
        """From the `quantization_config` of a config.json. Raises UserError if it is not AutoGPTQ v1."""
        method, version = config.get("quant_method", "gptq"), config.get("checkpoint_format", "gptq")
        if method != "gptq" or version != "gptq":
            raise UserError(
                f"the checkpoint is quantised as {method!r}, format {version!r}; "
                "expected 'gptq', 'gptq' (AutoGPTQ v1). "
                "Take the model's GPTQ-Int4 folder, or its float folder and `make quantize`."
            )
        return cls(
            config.get("bits", 4), config.get("group_size", 128), config.get("desc_act", False), config.get("sym", True)
        )

    def to_config(self) -> dict[str, Any]:
        """The `quantization_config` that Qwen publishes with its Int4 checkpoints."""
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "damp_percent": 0.01,
            "desc_act": self.desc_act,
            "static_groups": False,
            "sym": self.sym,
            "true_sequential": True,
            "model_name_or_path": None,
            "model_file_base_name": "model",
            "quant_method": "gptq",
        }

    def rows(self, in_features: int) -> int:
        """Rows of W in one group."""
        return in_features if self.group_size == -1 else self.group_size

    def check(self, in_features: int, name: str = "a linear layer") -> None:
        """Raise UserError if K = in_features is not a multiple of both a word's codes and a group."""
        if in_features % (WORD // self.bits) or in_features % self.rows(in_features):
            raise UserError(
                f"{name}: {in_features} inputs cannot be packed at {self.bits} bits in groups of {self.group_size}: "
                f"expected a multiple of both {WORD // self.bits} and the group size. Choose group_size=64, 32 or -1."
            )


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, WORD, bits, dtype=torch.int32, device=device)


def pack_rows(codes: Tensor, bits: int = 4) -> Tensor:
    """Codes [K, N] int32 -> [K * bits / 32, N] int32; code k of a word is at bit k * bits."""
    per = WORD // bits
    assert codes.dtype == torch.int32 and codes.ndim == 2 and codes.shape[0] % per == 0, (codes.dtype, codes.shape)
    packed = codes[0::per].clone()
    for k in range(1, per):
        packed |= codes[k::per] << (k * bits)
    return packed


def unpack_rows(packed: Tensor, bits: int = 4) -> Tensor:
    """The inverse of pack_rows: [R, N] int32 -> codes [R * 32 / bits, N] int32."""
    assert packed.dtype == torch.int32 and packed.ndim == 2, (packed.dtype, packed.shape)
    codes = packed[:, None] >> _shifts(bits, packed.device)[:, None]  # [R, 32/bits, N]
    return codes.bitwise_and_(2**bits - 1).view(-1, packed.shape[1])


def pack_columns(codes: Tensor, bits: int = 4) -> Tensor:
    """Codes [G, N] int32 -> [G, ceil(N * bits / 32)] int32; the last word is filled with zeros."""
    assert codes.dtype == torch.int32 and codes.ndim == 2, (codes.dtype, codes.shape)
    padded = nn.functional.pad(codes, (0, -codes.shape[1] % (WORD // bits)))
    return pack_rows(padded.t(), bits).t().contiguous()


def unpack_columns(packed: Tensor, columns: int, bits: int = 4) -> Tensor:
    """The inverse of pack_columns: [G, W] int32 -> codes [G, columns] int32."""
    assert packed.dtype == torch.int32 and packed.ndim == 2, (packed.dtype, packed.shape)
    codes = packed[:, :, None] >> _shifts(bits, packed.device)  # [G, W, 32/bits]
    return codes.bitwise_and_(2**bits - 1).flatten(1)[:, :columns].contiguous()


def unpack_zeros(qzeros: Tensor, columns: int, bits: int = 4) -> Tensor:
    """Stored zeros [G, W] int32 -> zeros [G, N] int32. AutoGPTQ v1 stores each zero minus one, modulo 2^bits."""
    return (unpack_columns(qzeros, columns, bits) + 1) & (2**bits - 1)


def groups_in_order(g_idx: Tensor, groups: int) -> bool:
    """Whether row k belongs to group k // (K / groups), so no activation order. On a GPU this synchronises."""
    rows = g_idx.shape[0]
    if rows % groups:
        return False
    return torch.equal(g_idx.long(), torch.arange(rows, device=g_idx.device) // (rows // groups))


def dequantize(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bits: int = 4,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    border: kernels.Border | None = None,
) -> Tensor:
    """`dequantize_plain`, by the Triton kernel where that runs (on a CUDA device); the same bits.

    Args:
        g_idx: None where the groups are in order, which is faster. Not checked here: the check would synchronise the GPU.
        out: [K, N], gets the result; its rows may be strided. border: matrices to write around `out`, in the larger
            matrix that `out` is the upper left corner of.
    """
    if qweight.is_cuda and kernels.usable(qweight.device):
        return kernels.dequantize(qweight, qzeros, scales, g_idx, bits, dtype, out, border)
    weight = dequantize_plain(qweight, qzeros, scales, g_idx, bits, dtype)
    if out is None:
        return weight
    if border is not None:
        border.fill(out)
    return out.copy_(weight)


def dequantize_plain(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bits: int = 4,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The definition: the float weight [K, N] in `dtype`, computed in float32, rounded once.

    Args:
        qweight: [K * bits / 32, N] int32. qzeros: [G, ceil(N * bits / 32)] int32. scales: [G, N] float.
        g_idx: [K] int32, the group of each row; None: groups of K / G rows in order.
    """
    rows, columns = qweight.shape[0] * (WORD // bits), qweight.shape[1]
    assert scales.shape == (qzeros.shape[0], columns), (scales.shape, qzeros.shape, qweight.shape)
    zeros, steps = unpack_zeros(qzeros, columns, bits).float(), scales.float()  # [G, N] both
    in_order = g_idx is None or groups_in_order(g_idx, len(steps))
    weight = torch.empty(rows, columns, dtype=dtype, device=qweight.device)
    group = rows // len(steps)
    step = _block(group) if qweight.device.type == "cpu" else rows
    for start in range(0, rows, step):
        block = unpack_rows(qweight[start * bits // WORD : (start + step) * bits // WORD], bits).float()  # [step, N]
        if in_order:
            groups = slice(start // group, (start + len(block) - 1) // group + 1)
            by_group = block.view(groups.stop - groups.start, -1, columns)  # [groups, rows of each, N]
            by_group.sub_(zeros[groups, None]).mul_(steps[groups, None])
        else:
            group_of_row = g_idx[start : start + step].long()  # type: ignore[index]
            block.sub_(zeros[group_of_row]).mul_(steps[group_of_row])
        weight[start : start + step] = block
    return weight


def _block(group: int) -> int:
    """Rows that fit into a CPU's cache, and are either whole groups or an equal part of one."""
    return BLOCK // group * group if group < BLOCK else math.gcd(group, BLOCK)


def quantize(weight: Tensor, scheme: Scheme, name: str = "a linear layer") -> dict[str, Tensor]:
    """Round a float weight [N, K] to the nearest code: {qweight, qzeros, scales, g_idx} as AutoGPTQ stores them.

    Symmetric: every zero is the middle code. The scale of a group is the candidate of `_divisors` with the least
    squared error; codes are rounded with the stored, float16 scale. Deterministic, in float32 on any device.
    A weight that the format can represent exactly is returned bit for bit by dequantize (bits <= 4).

    Raises:
        UserError: K is not a multiple of the group, a weight is not finite, or the scheme has desc_act or zero points.
    """
    assert weight.ndim == 2, weight.shape
    if not weight.isfinite().all():
        raise UserError(f"{name}: the weight has infinities or NaN. The file is damaged: fetch the model again.")
    if scheme.desc_act or not scheme.sym:
        raise UserError(
            "Only desc_act=off, sym=on can be written: rounding to nearest needs neither an activation order nor zero points."
        )
    scheme.check(weight.shape[1], name)
    group, middle = scheme.rows(weight.shape[1]), 2 ** (scheme.bits - 1)
    groups = weight.shape[1] // group
    chunk = max(1, CHUNK // weight.shape[1])
    parts = [_round(rows.float().view(-1, groups, group), middle) for rows in weight.split(chunk)]
    scales = torch.cat([scale for scale, _ in parts])  # [N, G]
    codes = torch.cat([code for _, code in parts]).flatten(1)  # [N, K]
    return pack_codes(codes, scales, scheme.bits)


def pack_codes(codes: Tensor, scales: Tensor, bits: int = 4) -> dict[str, Tensor]:
    """Symmetric codes [N, K] int32 and scales [N, G], groups in order -> {qweight, qzeros, scales, g_idx} as stored."""
    rows, width = codes.shape
    groups = scales.shape[1]
    assert width % groups == 0 and len(scales) == rows, (codes.shape, scales.shape)
    zeros = torch.full((groups, rows), 2 ** (bits - 1) - 1, dtype=torch.int32, device=codes.device)
    return {
        "qweight": pack_rows(codes.t(), bits).contiguous(),
        "qzeros": pack_columns(zeros, bits),
        "scales": scales.half().t().contiguous(),
        "g_idx": torch.arange(width, dtype=torch.int32, device=codes.device) // (width // groups),
    }


def _divisors(middle: int) -> list[float]:
    """A group's candidate scales are its largest |w| divided by these.

    Each divisor is the code that the largest |w| gets: every whole code (2 and 4 bits), so that a weight that was quantised
    before is found exactly, and 0.86 to 1.5 times the middle code. Above 1 the largest weights are clipped, by a third at most.
    """
    whole = range(1, middle + 1) if middle <= 8 else ()
    return sorted({*map(float, whole), *(middle * (0.86 + 0.04 * i) for i in range(17))})


def _round(weight: Tensor, middle: int) -> tuple[Tensor, Tensor]:
    """Groups [n, G, g] float32 -> scales [n, G] float16, codes [n, G, g] int32."""
    scales = search_scales(weight, middle)
    return scales.half(), _nearest(weight, scales, middle).add_(middle).int()


def search_scales(weight: Tensor, middle: int) -> Tensor:
    """Groups [n, G, g] float32 -> the scales [n, G] of least squared error, float32 with values that a float16 has."""
    largest = weight.abs().amax(-1)
    best = torch.full_like(largest, math.inf)
    scales = torch.ones_like(largest)
    for divisor in _divisors(middle):
        scale = (largest / divisor).clamp_(TINY, HUGE).half().float()
        error = _nearest(weight, scale, middle).mul_(scale[..., None]).sub_(weight).square_().sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, scale, scales)
    return scales


def _nearest(weight: Tensor, scale: Tensor, middle: int) -> Tensor:
    return (weight / scale[..., None]).round_().clamp_(-middle, middle - 1)
