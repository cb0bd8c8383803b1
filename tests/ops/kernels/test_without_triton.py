"""A machine without Triton runs the definitions: everything that uses kernels is imported there too."""

import subprocess
import sys

IMPORTS = """
import importlib, pkgutil, sys
sys.modules["triton"] = None  # as if it were not installed
import train.ops
for module in pkgutil.walk_packages(train.ops.__path__, "train.ops."):
    importlib.import_module(module.name)
import train.inference.decode_graph, train.model.decoder, train.training.graph_step
"""


def test_all_modules_are_imported_without_triton() -> None:
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
