"""Exports of tiny runs, and the exact merge that they are compared with."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from train.commands.export import Options, run
from train.common.files import sha256
from train.model import lora
from train.model.loading import load
from train.ops.gptq import unpack_rows, unpack_zeros

IDS = torch.tensor([[72, 101, 108, 108, 111, 32, 119, 111, 114]])


def export(folder: Path, **options: object) -> Path:
    """`make export` of the run in `folder` (tests/support/runs.py); returns the folder that was written."""
    root = folder.parent.parent
    run(Options(run=folder.name, models=str(root / "models"), runs=str(root / "runs"), **options))  # type: ignore[arg-type]
    return Path(options.get("out", folder / "merged"))  # type: ignore[arg-type]


def hashes(folder: Path) -> dict[str, str]:
    """Path in `folder` -> sha256 of every file."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def merged_state(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of an export, by name."""
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def exact_merge(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight of base + adapter in float64, computed independently: unpack, subtract, scale, add."""
    base = folder.parent.parent / "models" / "base-Int4"
    state, expected = load_file(base / "model.safetensors"), {}
    delta = lora.delta(folder / "adapter")
    for name, tensor in state.items():
        module, _, part = name.rpartition(".")
        if part == "qweight":
            codes, group = unpack_rows(tensor), state[f"{module}.g_idx"].long()
            zeros = unpack_zeros(state[f"{module}.qzeros"], tensor.shape[1])
            weight = ((codes - zeros[group]).double() * state[f"{module}.scales"].double()[group]).T
        elif part in ("scales", "qzeros", "g_idx"):
            continue
        else:
            weight = tensor.double()
        if part in ("qweight", "weight") and module in delta:
            A, B, scale = delta[module]
            weight = weight + scale * (B.double() @ A.double())
        expected[f"{module}.weight" if part == "qweight" else name] = weight
    return expected


def adapted(folder: Path) -> torch.nn.Module:
    """The run's adapter on its Int4 base."""
    base = load(folder.parent.parent / "models" / "base-Int4", torch.float32)
    return lora.load_adapter(base, folder / "adapter").eval()


@torch.no_grad()
def equal_logits(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return torch.allclose(a(IDS).logits, b(IDS).logits, atol=1e-4)
