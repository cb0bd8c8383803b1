"""Random tensors of the Int4 format, and an Int4Linear of them."""

import torch

from train.model.int4_linear import Int4Linear
from train.ops.gptq import Scheme, pack_columns

K, N = 256, 96  # in_features and out_features


def random_words(*shape: int) -> torch.Tensor:
    """int32 of any bit pattern."""
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).int()


def random_tensors(scheme: Scheme, k: int = K, n: int = N) -> dict[str, torch.Tensor]:
    """Four-bit codes; with desc_act groups in random order, with sym every zero the middle."""
    torch.manual_seed(scheme.group_size + 7 * scheme.desc_act)
    groups = k // scheme.rows(k)
    g_idx = torch.arange(k, dtype=torch.int32) // scheme.rows(k)
    middle = torch.full((groups, n), 7, dtype=torch.int32)
    return {
        "qweight": random_words(k // 8, n),
        "qzeros": pack_columns(middle) if scheme.sym else random_words(groups, -(-n // 8)),
        "scales": (torch.rand(groups, n) * 0.02 + 1e-4).half(),
        "g_idx": g_idx[torch.randperm(k)] if scheme.desc_act else g_idx,
    }


def random_int4_linear(scheme: Scheme | None = None, bias: bool = True, k: int = K, n: int = N) -> Int4Linear:
    scheme = scheme or Scheme(4, 64)
    layer = Int4Linear(k, n, bias, scheme, device="meta")
    state = random_tensors(scheme, k, n)
    if bias:
        state["bias"] = torch.randn(n).half()
    layer.load_state_dict(state, assign=True)
    return layer
