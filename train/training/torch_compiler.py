"""Keeps torch's compilers out of a training process. Nothing here is compiled by them; importing them takes 5 to 10 s.

torch's optimizers import `torch._dynamo` at their first update, to tell it where not to compile; DeepSpeed imports it and
`torch._inductor` for a kind of ZeRO that compiles the model. A stand-in answers the first. During DeepSpeed's import the
compiler cannot be found, which DeepSpeed copes with, as it does on a torch without one. It asks `cpp_extension`, which
compiles C++, only for the folder of a CUDA toolkit: it is told that there is none, and builds none of its ops.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

COMPILER, EXTENSIONS = "torch._dynamo", "torch.utils.cpp_extension"


class CompilerStandIn(ModuleType):
    """`torch._dynamo` as far as eager code needs it. Any other name is the real module's, which is imported then."""

    def __init__(self) -> None:
        super().__init__(COMPILER)

    @staticmethod
    def graph_break(*args: Any, **kwargs: Any) -> None:
        """Nothing: there is no graph to break."""

    @staticmethod
    def disable(fn: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """`fn` itself, or a decorator that returns what it decorates: eager functions are not compiled."""
        return fn if fn is not None else lambda decorated: decorated

    def __getattr__(self, name: str) -> Any:
        """Import the real module and put it where this one stands; the import system asks for `__path__`, too."""
        if name in ("__file__", "__wrapped__"):  # asked for by inspection of all modules, which shall not import one
            raise AttributeError(name)
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER]
        real = importlib.import_module(COMPILER)
        torch._dynamo = real  # type: ignore[attr-defined]
        return getattr(real, name)


def use_stand_in() -> None:
    """Put the stand-in where `torch._dynamo` would be, unless that has been imported."""
    if COMPILER not in sys.modules:
        sys.modules[COMPILER] = torch._dynamo = CompilerStandIn()  # type: ignore[attr-defined]


@contextmanager
def hidden(*names: str) -> Iterator[None]:
    """Within this, modules of these names cannot be imported, except those that have been; nor can torch's compilers."""
    no_toolkit = ModuleType(EXTENSIONS)
    no_toolkit.CUDA_HOME = None  # type: ignore[attr-defined]
    # None in sys.modules: an import raises ModuleNotFoundError
    instead: Any = {**dict.fromkeys((*names, COMPILER, "torch._inductor")), EXTENSIONS: no_toolkit}
    instead = {name: module for name, module in instead.items() if name not in sys.modules}
    sys.modules.update(instead)
    real = sys.modules[EXTENSIONS]
    try:
        with (
            patch.object(torch.compiler, "disable", CompilerStandIn.disable),
            patch.object(torch.utils, "cpp_extension", real, create=True),
        ):
            yield
    finally:
        for name in instead:
            del sys.modules[name]
