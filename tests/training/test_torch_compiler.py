"""What a training process does not import, and that torch's compiler is there once somebody asks for it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
import torch
from train.training.deepspeed_engine import import_deepspeed

import_deepspeed()
p = torch.nn.Parameter(torch.zeros(3))
optimizer = torch.optim.AdamW([p], lr=1.0)
for _ in range(2):
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
heavy = {"sympy", "transformers", "accelerate", "torch._inductor", "torch.utils.cpp_extension", "torch._dynamo.utils"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
import gc
from unittest.mock import patch
from deepspeed.runtime.zero import stage3, stage_1_and_2

with patch.object(gc, "collect", None):  # ZeRO's reports of memory, which are not shown, would begin with it
    for module in (stage3, stage_1_and_2):
        module.see_memory_usage("begin", force=True)
assert torch._dynamo.disable(len) is len and torch._dynamo.disable()(len) is len

from torch._dynamo.utils import counters  # the import system finds the real package behind the stand-in

assert torch._dynamo is sys.modules["torch._dynamo"] and torch._dynamo.config.cache_size_limit > 0
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item() == 2.0
import transformers, accelerate, torch.utils.cpp_extension, torch._inductor.config

assert transformers.__version__ and hasattr(torch.utils.cpp_extension, "load")
print(p.tolist())
"""


def test_compilers_are_imported_when_they_are_asked_for() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] != "[0.0, 0.0, 0.0]"
