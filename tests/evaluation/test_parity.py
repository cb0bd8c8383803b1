"""Agreement and divergence of two models, and how much of each an export may have."""

from pathlib import Path

import pytest
import torch

from tests.support.runs import tiny_run
from train.evaluation import parity
from train.model.loading import load


def test_agreement_and_divergence_are_as_computed_by_hand() -> None:
    """Two heads on known hidden states."""
    hidden, head = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    flipped = torch.tensor([[2.0, 0.0], [0.0, -1.0], [0.0, 0.0]])
    found = parity.compare(parity.States(hidden, head), parity.States(hidden, flipped))
    p, q = torch.tensor([0.0, 1.0, 0.0]).double().softmax(0), torch.tensor([0.0, -1.0, 0.0]).double().softmax(0)
    assert found.tokens == 2 and found.agreement == 0.5
    assert found.divergence == pytest.approx(float((p * (p.log() - q.log())).sum() / 2))


def test_rows_that_share_a_pass_do_not_see_each_other(tmp_path: Path) -> None:
    tiny_run(tmp_path, "qwen", seq_length=1024)
    model = load(tmp_path / "models" / "base-Int4", torch.float32)
    rows = [([5, 6, 7, 8], [0, 0, 1, 1]), ([9, 10, 11], [1, 1, 1]), ([12] * 600, [0] * 599 + [1])]
    assert [len(pack) for pack in parity.packs(rows)] == [2, 1]
    together = parity.states(model, rows[:2]).hidden
    alone = torch.cat([parity.states(model, [row]).hidden for row in rows[:2]])
    assert together.shape[0] == 4 and torch.allclose(together, alone, atol=1e-5)


def test_one_differing_token_is_a_tie_two_are_not() -> None:
    assert parity.Parity(40, 39 / 40, 1e-6).holds(torch.float16)
    assert not parity.Parity(40, 38 / 40, 1e-6).holds(torch.float16)
    assert not parity.Parity(4000, 0.998, 1e-6).holds(torch.float32)
    assert not parity.Parity(40, 1.0, float("nan")).holds(torch.float16)
