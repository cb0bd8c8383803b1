"""Devices and dtypes: the one table of their names, and which of them this machine computes with."""

import torch

DTYPES = {
    **{"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16},
    **{"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16},
}


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16", as run.json and a model's config.json have it."""
    return str(dtype).removeprefix("torch.")


def pick_device() -> torch.device:
    """The current CUDA device if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def pick_dtype(device: torch.device, precision: str = "auto") -> torch.dtype:
    """The dtype to compute in.

    Args:
        precision: a key of DTYPES, or "auto": bfloat16 from compute capability 8.0, float16 below, float32 on a CPU; or
            "fp8": bfloat16, beside which some products are in fp8.
    """
    if precision == "fp8":
        return torch.bfloat16
    if precision != "auto":
        return DTYPES[precision]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
