"""Triton kernels on a machine without a GPU: a function of a test runs in a process whose kernels Triton interprets.

A process of its own, because Triton reads TRITON_INTERPRET when it is imported.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def run_interpreted(module: str, function: str, *arguments: Any) -> Any:
    """What `function` of `module` returns where the kernels run. Arguments and result: what torch.save can write."""
    with tempfile.TemporaryDirectory() as folder:
        call, result = Path(folder) / "call", Path(folder) / "result"
        torch.save((module, function, arguments), call)
        command = [sys.executable, "-m", "tests.support.interpreter", str(call), str(result)]
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"})
        return torch.load(result)


def round_as_cards() -> None:
    """Triton's interpreter rounds to e4m3 wrongly where a value is rounded up to the next power of two: torch does it."""
    from triton.runtime import interpreter

    convert: Any = interpreter._convert_float

    def rounded(x: Any, of: Any, to: Any, mode: Any) -> Any:
        if str(to) != "fp8e4nv" or str(of) != "fp32":
            return convert(x, of, to, mode)
        values = torch.from_numpy(x.view("float32").copy()).to(torch.float8_e4m3fn)
        return values.view(torch.uint8).numpy()

    interpreter._convert_float = rounded


def main(call: str, result: str) -> None:
    import importlib

    from train.ops import kernels

    assert kernels.usable(torch.device("cpu")), "Triton does not interpret kernels here"
    module, function, arguments = torch.load(call)
    torch.save(getattr(importlib.import_module(module), function)(*arguments), result)


if __name__ == "__main__":
    main(*sys.argv[1:])
