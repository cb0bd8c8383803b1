"""DeepSpeed's import and configuration. Each import has its own process: DeepSpeed chooses its device only once."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from train.config.recipe import Recipe
from train.training import deepspeed_engine
from train.training.deepspeed_engine import deepspeed_config, zero_stage

ROOT = Path(__file__).parents[2]
GPU_WITHOUT_TOOLKIT = """
import torch, torch.utils.cpp_extension
torch.utils.cpp_extension.CUDA_HOME = None
torch.cuda.is_available, torch.cuda.get_device_capability = lambda: True, lambda *_: (9, 0)
"""
IMPORT = """
import torch
from train.training.deepspeed_engine import import_deepspeed
import_deepspeed()
from deepspeed.accelerator import get_accelerator
print(get_accelerator().device_name(), torch.cuda.is_available())
"""


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH", "DS_ACCELERATOR")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**env, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
    )


def test_a_gpu_without_the_cuda_toolkit_is_enough() -> None:
    done = python(GPU_WITHOUT_TOOLKIT + IMPORT)
    assert done.stdout.splitlines()[-1:] == ["cuda True"], done.stderr


def test_deepspeed_alone_requires_the_toolkit() -> None:
    """Once this fails, `import_deepspeed` no longer has to hide the GPU."""
    old = GPU_WITHOUT_TOOLKIT.replace("(9, 0)", "(7, 0)")  # on a newer one it imports Triton kernels first
    done = python(old + "import deepspeed", DS_ACCELERATOR="cuda")
    assert "MissingCUDAException" in done.stderr


@pytest.mark.gpu
def test_a_real_gpu_without_nvcc_on_the_path() -> None:
    done = python(IMPORT, PATH="/nowhere", CUDA_HOME="/nowhere")
    assert done.stdout.splitlines()[-1:] == ["cuda True"], done.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_use_at_least_stage_two(dtype: torch.dtype) -> None:
    assert [zero_stage(Recipe(zero=zero), dtype) for zero in range(4)] == [2, 2, 2, 3]
    assert deepspeed_config(Recipe(zero=0), dtype)["zero_optimization"]["stage"] == 2
    assert [zero_stage(Recipe(zero=zero), torch.float32) for zero in range(4)] == [0, 1, 2, 3]


def test_a_gradient_norm_is_summed_from_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO gives a gradient with infinity a norm of -1; here it becomes NaN."""
    monkeypatch.setattr(deepspeed_engine, "NORM_CHUNK", 4)
    lengths: list[int] = []

    def compute(gradients: list[torch.Tensor], params: list[str], norm_type: int) -> torch.Tensor:
        assert params == ["a", "a", "a", "b"]
        lengths.extend(len(g) for g in gradients)
        norm = torch.stack([g.double().norm() for g in gradients]).square().sum().float().sqrt()
        return torch.where(norm.isfinite(), norm, -1.0)

    optimizer = SimpleNamespace(get_grad_norm_direct=compute)
    deepspeed_engine._fix_gradient_norm(optimizer)
    gradients = [torch.arange(10.0), torch.ones(2, 2)]
    whole = torch.cat([g.flatten() for g in gradients]).norm()
    torch.testing.assert_close(optimizer.get_grad_norm_direct(gradients, ["a", "b"]), whole)
    assert lengths == [4, 4, 2, 4]
    gradients[1][0, 0] = float("inf")
    assert optimizer.get_grad_norm_direct(gradients, ["a", "b"]).isnan()
    deepspeed_engine._fix_gradient_norm(SimpleNamespace())  # torch's own optimizer has no such method


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "lora_plus"), [("0", "1"), ("2", "1"), ("2", "8")])
def test_the_vector_trains_alike_in_one_process_and_in_two(tmp_path: Path, stage: str, lora_plus: str) -> None:
    """The fused passes under DeepSpeed, whose single parameter stage 2 shards and stage 0 does not."""
    results = []
    for processes in (1, 2):
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
        arguments = [
            f"--nproc_per_node={processes}",
            "-m",
            "tests.support.vector_worlds",
            stage,
            str(tmp_path / str(processes)),
            lora_plus,
        ]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{"))))
    one, two = results
    assert [loss for loss, _ in two["rows"]] == pytest.approx([loss for loss, _ in one["rows"]], rel=1e-5)
    assert [norm for _, norm in two["rows"]] == pytest.approx([norm for _, norm in one["rows"]], rel=1e-4)
    assert two["sum"] == pytest.approx(one["sum"], rel=1e-5)


def test_a_cuda_toolkit_without_a_gpu_is_not_mentioned(tmp_path: Path) -> None:
    """PyTorch prints "No CUDA runtime is found" for it, in every training on the CPU."""
    program = "from train.training.deepspeed_engine import import_deepspeed; import_deepspeed()"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "No CUDA runtime" not in done.stderr + done.stdout
