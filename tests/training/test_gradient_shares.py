"""shares=: the order in which gradients are added, and the same bytes in 1, 2 and 4 processes."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from queue import Queue

import numpy as np
import pytest
import torch

from tests.support.tiny_training import ROOT, adapter, losses, train
from train.common.errors import UserError
from train.common.files import read_json
from train.config.recipe import Recipe
from train.training import gradient_shares, step_setting
from train.training.gradient_shares import GradientShares, check_shares, micro_batch_seed
from train.training.step_setting import Place

SIZES = [5, 12]


# --- the order --------------------------------------------------------------------------------------------------------


def gradients(count: int) -> list[np.ndarray]:
    """Of many sizes, so that each order of additions rounds to other bits: float32 [count][17]."""
    generator = np.random.default_rng(7)
    return [
        (generator.standard_normal(17) * 10.0 ** generator.integers(-4, 4, 17)).astype(np.float32) for _ in range(count)
    ]


def tree(parts: list[np.ndarray], shares: int) -> np.ndarray:
    """The definition: halves down to a share, whose gradients are added one after another."""
    if shares > 1:
        half = len(parts) // 2
        return tree(parts[:half], shares // 2) + tree(parts[half:], shares // 2)
    total = np.zeros_like(parts[0])
    for part in parts:
        total = total + part
    return total


def summed(parts: list[np.ndarray], shares: int, processes: int, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The sums of all processes, which are threads here and exchange tensors through queues."""
    boxes = {(a, b): Queue[torch.Tensor]() for a in range(processes) for b in range(processes)}
    rank_of_thread = threading.local()
    results: dict[int, bytes] = {}

    def exchange(own: torch.Tensor, partner: int) -> torch.Tensor:
        boxes[rank_of_thread.value, partner].put(own.clone())
        return boxes[partner, rank_of_thread.value].get(timeout=20)

    def work(rank: int) -> None:
        rank_of_thread.value = rank
        each = len(parts) // processes
        sums = GradientShares(SIZES, torch.device("cpu"), len(parts) // shares, rank, processes)
        for _ in range(2):  # the second step starts at zero again
            for part in parts[rank * each : (rank + 1) * each]:
                sums.add([part_of.view(-1, 1) for part_of in torch.from_numpy(part).split(SIZES)])
            results[rank] = sums.take().numpy().tobytes()

    monkeypatch.setattr(gradient_shares, "_exchange", exchange)
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [results[rank] for rank in range(processes)]


@pytest.mark.parametrize(("shares", "per_share"), [(2, 1), (4, 1), (4, 3), (8, 2)])
def test_any_number_of_processes_adds_in_the_order_of_the_tree(
    shares: int, per_share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = gradients(shares * per_share)
    expected = tree(parts, shares).tobytes()
    if len(parts) > 2:
        assert expected != tree(parts, 1).tobytes(), "gradients whose order does not matter show nothing"
    for processes in (1, 2, 4, 8):
        if processes <= shares:
            assert summed(parts, shares, processes, monkeypatch) == [expected] * processes


def test_a_parameter_without_gradient_counts_as_zeros_and_16_bits_are_added_in_float32() -> None:
    sums = GradientShares(SIZES, torch.device("cpu"), 2, 0, 1)
    ones = torch.ones(12, dtype=torch.bfloat16)
    sums.add([None, ones])
    sums.add([None, ones / 512])
    assert torch.equal(sums.take(), torch.cat([torch.zeros(5), torch.full((12,), 1 + 1 / 512)]))


def test_the_norm_is_that_of_float64_and_shows_what_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_shares, "NORM_CHUNK", 4)
    vector = torch.from_numpy(gradients(1)[0])
    assert gradient_shares.norm(vector) == vector.double().norm().float()
    for bad in (float("nan"), float("inf")):
        vector[3] = bad
        assert not gradient_shares.norm(vector).isfinite()


def test_every_micro_batch_has_a_seed_of_its_own() -> None:
    seeds = {micro_batch_seed(seed, step, number) for seed in (0, 1) for step in range(50) for number in range(16)}
    assert len(seeds) == 2 * 50 * 16 and all(0 <= seed < 2**63 for seed in seeds)
    assert micro_batch_seed(1234, 3, 2) == 4588249373713616522, (
        "a run that goes on with another program keeps its masks"
    )


# --- what is asked of the recipe --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "processes", "message"),
    [
        ({"shares": 6}, 1, "shares=6: expected a power of two. Give shares=4"),
        ({"shares": 4, "zero": 3}, 1, "zero=3: ZeRO 3 adds gradients in its own order"),
        ({"shares": 4}, 3, "shares=4 cannot be held equally by 3 processes"),
        ({"shares": 2}, 4, "shares=2 cannot be held equally by 4 processes"),
        ({"shares": 8, "accumulation": 6}, 2, "a step of 24 rows in micro batches of batch=2 has 12 of them"),
    ],
)
def test_what_shares_cannot_do_is_refused(keys: dict[str, int], processes: int, message: str) -> None:
    recipe = Recipe(**{"batch": 2, "accumulation": 4, **keys})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        check_shares(recipe, processes)


def test_one_share_asks_for_nothing() -> None:
    check_shares(Recipe(batch=2, accumulation=3, zero=3), 5)


@pytest.mark.parametrize("batch", [0, 1])
def test_every_number_of_processes_takes_the_same_batch(batch: int) -> None:
    chosen = [step_setting.resolve(Recipe(shares=8, batch=batch, zero=2), Place(n), None)[0] for n in (1, 2, 4, 8)]
    assert len({recipe.batch for recipe in chosen}) == 1
    assert [recipe.batch * recipe.accumulation * n for recipe, n in zip(chosen, (1, 2, 4, 8), strict=True)] == [16] * 4
    for recipe, processes in zip(chosen, (1, 2, 4, 8), strict=True):
        check_shares(recipe, processes)


# --- whole runs -------------------------------------------------------------------------------------------------------

KEYS = {"accumulation": "auto", "rows_per_step": 8, "batch": 1, "steps": 4, "epochs": 4, "pack": "off", "zero": 2}


@pytest.mark.parametrize("zero", [0, 2])
@pytest.mark.usefixtures("workspace")
def test_the_sums_are_deepspeeds_but_for_rounding(zero: int) -> None:
    """The same run with DeepSpeed's own order. 12 rows: the last step of each epoch has micro batches without rows."""
    for shares in (1, 4):
        train(run=f"order-{zero}-{shares}", shares=shares, dropout=0, **{**KEYS, "zero": zero})
    ours, theirs = losses(f"order-{zero}-4"), losses(f"order-{zero}-1")
    assert len(ours) == 4
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], rel=1e-5)
    assert ours[0] | {"seconds": 0, "grad_norm": 0} == theirs[0] | {"seconds": 0, "grad_norm": 0}


def run_all(runs: list[tuple[int, dict[str, object]]]) -> None:
    words = json.dumps([(n, {key: str(value) for key, value in keys.items()}) for n, keys in runs])
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.forked_worlds", words]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


PATHS: dict[str, dict[str, object]] = {
    "zero-1-lora-plus": {"zero": 1, "lora_plus": 4},
    "zero-2-held-out": {"held_out": 2, "near": 1, "neftune": 5},
    "fused": {"fused": 1},
    "bf16": {"precision": "bf16"},
}


@pytest.mark.slow
def test_one_two_and_four_processes_write_the_same_bytes(workspace: Path) -> None:
    """With dropout, clipped gradients and short steps; and a run that is stopped and continued as 4 → 2 → 1 → 4."""
    keys = {**KEYS, "rows_per_step": 16, "batch": 2, "shares": 4, "dropout": 0.1, "clip": 1, "save_every": 1}
    runs = [(n, {**keys, **path, "run": f"{name}-{n}"}) for name, path in PATHS.items() for n in (1, 2, 4)]
    long = {**keys, "steps": 8, "epochs": 8}
    walk = [(4, 0), (2, 2), (1, 4)]  # a signal after that step ends the run within the next one, or after it
    runs += [(n, {**long, "run": "walk", "signal_at": step}) for n, step in walk]
    run_all([*runs, (4, {**long, "run": "walk"}), (1, {**long, "run": "straight"})])
    for name in PATHS:
        first, *others = [(losses(f"{name}-{n}"), adapter(f"{name}-{n}")) for n in (1, 2, 4)]
        assert others == [first, first], name
        assert first[0][0]["grad_norm"] > 1, "clipped"
    assert (losses("walk"), adapter("walk")) == (losses("straight"), adapter("straight"))
    starts = read_json(Path("runs/walk/run.json"))["starts"]
    assert [(start["after"], start["processes"]) for start in starts] == [(0, 4), (2, 2), (4, 1), (5, 4)]
