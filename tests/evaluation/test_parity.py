"""Agreement and divergence of two models."""

from pathlib import Path

import pytest
import torch

from tests.support.runs import tiny_run
from train.evaluation import parity
from train.model.loading import load


def test_agreement_and_divergence_equal_those_by_hand() -> None:
    """Two heads over known hidden states."""
    hidden, head = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    flipped = torch.tensor([[2.0, 0.0], [0.0, -1.0], [0.0, 0.0]])
    result = parity.compare(parity.AnswerStates(hidden, head), parity.AnswerStates(hidden, flipped))
    p, q = torch.tensor([0.0, 1.0, 0.0]).double().softmax(0), torch.tensor([0.0, -1.0, 0.0]).double().softmax(0)
    assert result.tokens == 2 and result.agreement == 0.5
    assert result.divergence == pytest.approx(float((p * (p.log() - q.log())).sum() / 2))


def test_rows_that_share_a_pass_do_not_see_each_other(tmp_path: Path) -> None:
    tiny_run(tmp_path, "qwen", seq_length=1024)
    model = load(tmp_path / "models" / "base-Int4", torch.float32)
    rows = [([5, 6, 7, 8], [0, 0, 1, 1]), ([9, 10, 11], [1, 1, 1]), ([12] * 600, [0] * 599 + [1])]
    assert [len(group) for group in parity.pack(rows)] == [2, 1]
    together = parity.answer_states(model, rows[:2]).hidden
    alone = torch.cat([parity.answer_states(model, [row]).hidden for row in rows[:2]])
    assert together.shape[0] == 4 and torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("layout", ["qwen", "qwen2", "qwen3"])
def test_what_all_rows_begin_with_is_computed_once(tmp_path: Path, layout: str) -> None:
    """The states are those of each row alone; the pass has fewer tokens."""
    tiny_run(tmp_path, layout)
    model = load(tmp_path / "models" / "base-Int4", torch.float32)
    start = list(range(20, 40))
    rows = [([*start, n, 7, 8, 9], [0] * 22 + [1, 1]) for n in (3, 4, 5)]
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda m, x, y: seen.append(x[0].numel()))
    together = parity.answer_states(model, rows).hidden
    assert seen == [20, 12]
    alone = torch.cat([parity.answer_states(model, [row]).hidden for row in rows])
    assert together.shape[0] == 6 and torch.allclose(together, alone, atol=1e-5)


def test_the_shared_start_ends_before_the_first_answer() -> None:
    row = ([1, 2, 3, 4], [0, 0, 1, 1])
    assert parity.shared_tokens([row, row], 8) == 1  # the state of token 1 predicts the answer: it is each row's own
    assert parity.shared_tokens([([1], [1]), ([1, 2], [1, 1])][1:], 8) == 0
    assert parity.shared_tokens([row, row], 3) == 0  # dynamic NTK would act
    assert parity.shared_tokens([([9, 2, 3], [0, 0, 1]), ([1, 2, 3], [0, 0, 1])], 8) == 0


def test_a_comparison_with_the_first_tokens_only() -> None:
    head, hidden = torch.eye(3), torch.randn(100, 3, generator=torch.Generator().manual_seed(1))
    whole, part = parity.AnswerStates(hidden, head), parity.AnswerStates(hidden[:70], -head)
    same, other = parity.compare_all(whole, [whole, part])
    assert same == parity.Parity(100, 1.0, 0.0)
    assert other == parity.compare(parity.AnswerStates(hidden[:70], head), part)


def test_one_token_may_differ_two_may_not() -> None:
    assert parity.Parity(40, 39 / 40, 1e-6).holds(torch.float16)
    assert not parity.Parity(40, 38 / 40, 1e-6).holds(torch.float16)
    assert not parity.Parity(4000, 0.998, 1e-6).holds(torch.float32)
    assert not parity.Parity(40, 1.0, float("nan")).holds(torch.float16)


def test_a_result_survives_json() -> None:
    result = parity.Parity(40, 39 / 40, 1e-6)
    assert parity.Parity.from_json({**result.to_json(), "against": "other"}) == result
