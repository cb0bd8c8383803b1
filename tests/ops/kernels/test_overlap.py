"""Kernels that start before the one before them has ended compute what they compute without (ops/kernels/overlap.py).

The interpreter has no such starts, so there the waiting and the prefetching do nothing, and the rest is compared.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.ops.kernels.test_gptq_matmul import activations, adapters, weights
from train.ops.kernels import overlap


def results(device: str) -> list[Tensor]:
    """Of a chain of the kernels of a decoding step, for one row and for three."""
    from train.ops.kernels import decode_step
    from train.ops.kernels.down_product import down_product
    from train.ops.kernels.gptq_matmul import LowRankSegments, product
    from train.ops.kernels.gptq_tiles import Tile

    a, b = (t.to(device) for t in adapters(torch.float32))
    found = []
    for act_order in (False, True):
        weight, _ = weights(256, 192, 128, 4, act_order, device)
        for batch in (1, 3):
            x, scale = activations(batch, 256, torch.float32, device), torch.ones(256, device=device)
            for tile in (Tile(16, 32, 2, 2, 1), Tile(16, 64, 1, 4, 3)):
                total, h, down = decode_step.add_norm(x, torch.stack([x, x]), scale, 1e-6, a)
                found += [total, h, down_product(h, a) if down is None else down]
                found.append(product(h, weight, LowRankSegments(found[-1], b, (64, 128)), tile=tile))
                found.append(decode_step.swiglu_parts(found[-1], torch.float32))
    return found


def check_early_starts(device: str) -> None:

    with patch.object(overlap, "allowed", False):
        expected = results(device)
    found = results(device)
    assert len(found) == len(expected)
    assert all(torch.allclose(x, y, rtol=1e-5, atol=1e-5) for x, y in zip(found, expected))


def check_early_starts_without_a_card() -> None:
    """With the instructions of such cards left out."""
    from train.ops.kernels import decode_step, down_product, gptq_matmul

    with ExitStack() as stack:
        stack.enter_context(patch.object(overlap, "starts_early", lambda device, rows: overlap.allowed and rows == 1))
        stack.enter_context(patch.object(overlap, "launch_options", lambda early: {}))
        for module in (decode_step, down_product, gptq_matmul):
            for name in ("start_next", "wait_for_previous", "prefetch"):
                stack.enter_context(patch.object(module, name, lambda *args: None))
        check_early_starts("cpu")


def test_an_early_start_changes_no_result_through_the_interpreter() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    code = (
        "import os; os.environ['TRITON_INTERPRET'] = '1'\n"
        "from tests.ops.kernels.test_overlap import check_early_starts_without_a_card as check\ncheck()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_only_one_row_on_hopper_starts_early(monkeypatch: pytest.MonkeyPatch) -> None:
    from train.ops import kernels

    meta = torch.device("meta")
    monkeypatch.setattr(overlap, "INTERPRETED", False)
    for generation, rows, expected in ((9, 1, True), (9, 2, False), (9, 32, False), (8, 1, False)):
        monkeypatch.setattr(kernels, "generation", lambda device, generation=generation: generation)
        assert overlap.starts_early(meta, rows) == expected
    monkeypatch.setattr(kernels, "generation", lambda device: 9)
    monkeypatch.setattr(overlap, "allowed", False)
    assert not overlap.starts_early(meta, 1)


# --- how Triton is asked for it


@pytest.fixture
def scope(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The globals of Triton's launchers, with the function that it came with, and nothing cached."""
    pytest.importorskip("triton.backends.nvidia.driver")

    found = overlap.launcher_scope()
    make = found["make_launcher"]
    monkeypatch.setitem(found, "make_launcher", getattr(make, "__wrapped__", make))
    overlap._option.cache_clear()
    yield found
    overlap._option.cache_clear()


def has_own_option() -> bool:
    """Whether Triton, from 3.4 on, has an option for it."""
    from triton.backends.nvidia.compiler import CUDAOptions

    return "launch_pdl" in CUDAOptions.__dataclass_fields__


def test_the_launchers_that_triton_uses_ask_for_an_early_start(scope: dict[str, Any]) -> None:
    from triton.backends import backends

    launcher = scope["CudaLauncher"]
    assert launcher in backends["nvidia"].driver.__init__.__globals__.values()  # it is the driver's launcher_cls
    if has_own_option():
        assert overlap.launch_options(True) == {"launch_pdl": True}
        return
    before = scope["make_launcher"]
    signature = {0: "*fp32", 1: "i32"}
    source = launcher.__init__.__globals__["make_launcher"]({}, signature)
    assert overlap.COOPERATIVE in source and overlap.EARLY not in source
    for _ in range(2):  # replaced only once
        assert overlap.launch_options(True) == {"launch_cooperative_grid": True}
        assert scope["make_launcher"].__wrapped__ is before
        overlap._option.cache_clear()
    early = launcher.__init__.__globals__["make_launcher"]({}, signature)
    assert early == source.replace(overlap.COOPERATIVE, overlap.EARLY)
    assert overlap.COOPERATIVE not in early and early.count(overlap.EARLY) == source.count(overlap.COOPERATIVE)


def test_another_launcher_is_left_as_it_is(scope: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:

    def without_the_attribute(constants: Any, signature: Any) -> str:
        return ""

    for other in (without_the_attribute, None, max):
        monkeypatch.setitem(scope, "make_launcher", other)
        assert not overlap._replace_attribute()
        assert scope["make_launcher"] is other
    monkeypatch.delitem(scope, "make_launcher")
    assert not overlap._replace_attribute()


@pytest.mark.gpu
def test_the_active_drivers_launcher_is_the_one(scope: dict[str, Any]) -> None:
    from triton.runtime import driver

    assert driver.active.launcher_cls.__init__.__globals__ is scope


@pytest.mark.gpu
def test_an_early_start_changes_no_result_on_the_gpu() -> None:
    check_early_starts("cuda")


@pytest.mark.parametrize(
    ("error", "times"), [(RuntimeError("too many blocks"), 2), (torch.OutOfMemoryError("no memory"), 1)], ids=str
)
def test_where_kernels_cannot_start_early_they_are_recorded_without(
    monkeypatch: pytest.MonkeyPatch, error: RuntimeError, times: int
) -> None:
    monkeypatch.setattr(overlap, "allowed", True)
    tried: list[bool] = []

    def record() -> str:
        tried.append(overlap.allowed)
        if overlap.allowed:
            raise error
        return "recorded"

    if times == 1:
        with pytest.raises(torch.OutOfMemoryError):
            overlap.recorded(record)
        assert tried == [True]
    else:
        assert overlap.recorded(record) == "recorded"
        assert tried == [True, False]


def test_what_fails_without_an_early_start_too_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "allowed", True)

    def record() -> None:
        raise RuntimeError("not a graph's")

    with pytest.raises(RuntimeError, match="not a graph's"):
        overlap.recorded(record)
