"""The schedule of a run as properties over seeded random data; batches against a plain loop."""

import random
from typing import Any

import pytest
import torch

from tests.data.samples import cases, random_samples
from train.common.errors import UserError
from train.data.tokens.batches import Schedule, collate


def test_every_sample_once_an_epoch_and_no_row_over_length() -> None:
    for samples, arguments in cases():
        schedule = Schedule(samples, **{**arguments, "epochs": 3})
        for epoch in range(3):
            steps = [s for s in range(len(schedule)) if schedule.epoch(s) == epoch]
            rows = [row for s in steps for row in schedule.rows(s)]
            assert sorted(i for row in rows for i in row) == list(range(len(samples)))
            assert all(sum(len(samples[i].ids) for i in row) <= arguments["length"] for row in rows)
            assert all(len(schedule.rows(s)) == arguments["rows_per_step"] for s in steps[:-1])
            assert arguments["pack"] or all(len(row) == 1 for row in rows)


def test_the_schedule_is_a_pure_function_that_can_be_asked_in_any_order() -> None:
    for samples, arguments in cases()[:20]:
        schedule, again = Schedule(samples, **arguments), Schedule(samples, **arguments)
        backwards = [again.rows(step) for step in reversed(range(len(again)))][::-1]
        assert [schedule.rows(step) for step in range(len(schedule))] == backwards
        schedule.rows(0)[0].append(-1)  # a caller gets a copy of the rows
        assert schedule.rows(0) == backwards[0]


def test_any_number_of_processes_trains_on_the_same_tokens() -> None:
    """1 × 12, 2 × 6 and 3 × 4 rows per step are the same steps: only rows_per_step counts."""
    draw = random.Random(5)
    samples = random_samples([draw.randint(1, 64) for _ in range(100)], draw)
    schedule = Schedule(samples, 64, 12, 2, seed=1)
    for step in range(len(schedule)):
        rows = schedule.rows(step)
        for processes in (1, 2, 3):
            shares = [rows[rank::processes] for rank in range(processes)]
            labels = sum(int((collate(share, samples, 0)["labels"] >= 0).sum()) for share in shares if share)
            assert labels == schedule.label_count(step)


@pytest.mark.parametrize(
    ("epochs", "steps", "expected"),
    [(1, 0, 4), (2, 0, 8), (0.5, 0, 2), (0.1, 0, 1), (2.25, 0, 9), (5, 3, 3), (0.1, 11, 11), (1, 4, 4)],
)
def test_number_of_steps_of_a_run(epochs: float, steps: int, expected: int) -> None:
    samples = random_samples([4] * 10, random.Random(0))
    schedule = Schedule(samples, 4, 3, epochs, steps, pack=False)
    assert len(schedule) == expected
    assert [schedule.epoch(s) for s in range(expected)] == [s // 4 for s in range(expected)]
    assert [len(schedule.rows(s)) for s in range(min(4, expected))] == [3, 3, 3, 1][:expected]
    for beyond in (expected, -1):
        with pytest.raises(IndexError):
            schedule.rows(beyond)


@pytest.mark.parametrize("change", [{"samples": []}, {"rows_per_step": 0}, {"epochs": 0.0}, {"epochs": float("nan")}])
def test_a_run_of_nothing_is_refused(change: dict[str, Any]) -> None:
    arguments = {
        "samples": random_samples([3], random.Random(0)),
        "length": 4,
        "rows_per_step": 1,
        "epochs": 1.0,
        **change,
    }
    with pytest.raises(UserError, match="all above 0"):
        Schedule(**arguments)


def test_collate_against_a_plain_loop() -> None:
    for samples, arguments in cases():
        schedule = Schedule(samples, **arguments)
        for step in {0, len(schedule) - 1}:
            rows = schedule.rows(step)
            batch = collate(rows, samples, pad_id=7, width=arguments["length"])
            for number, row in enumerate(rows):
                ids, labels, positions, segments = [], [], [], []
                for segment, index in enumerate(row, 1):
                    for position, (token, trained_on) in enumerate(zip(samples[index].ids, samples[index].mask)):
                        ids.append(token)
                        labels.append(token if trained_on and position > 0 else -100)
                        positions.append(position)
                        segments.append(segment)
                pad = arguments["length"] - len(ids)
                assert batch["input_ids"][number].tolist() == ids + [7] * pad
                assert batch["labels"][number].tolist() == labels + [-100] * pad
                assert batch["position_ids"][number].tolist() == positions + [0] * pad
                assert batch["segment_ids"][number].tolist() == segments + [0] * pad
            assert int((batch["labels"] != -100).sum()) == schedule.label_count(step)
            assert int((batch["segment_ids"] > 0).sum()) == schedule.token_count(step)


def test_collate_is_as_wide_as_its_longest_row() -> None:
    samples = random_samples([2, 5, 3], random.Random(1))
    batch = collate([[0, 2], [1]], samples, 0)
    assert {tensor.shape for tensor in batch.values()} == {(2, 5)}
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    with pytest.raises(ValueError, match="a row of 5 tokens in a batch of width 4"):
        collate([[1]], samples, 0, width=4)
    with pytest.raises(ValueError, match="no rows"):
        collate([], samples, 0)
