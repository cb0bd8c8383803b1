"""The plan of a run as properties over seeded random data; batches against a loop that is plain to the eye."""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from train.common.errors import UserError
from train.config.recipe import Recipe
from train.data import conversations
from train.data.batches import Schedule, collate
from train.data.conversations import Conversation
from train.data.formats import Turn
from train.data.packing import arrange
from train.data.samples import Sample, encode


@dataclass
class Letters:
    """A tokenizer of fifteen lines: a character is a token."""

    im_start: int = 1
    im_end: int = 2
    endoftext: int = 3

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(number) if number > 3 else f"<{number}>" for number in ids)


def talk(question: str, answer: str, where: str = "f:1") -> Conversation:
    return Conversation((Turn("user", question), Turn("assistant", answer)), None, where)


def samples_of(lengths: list[int], draw: random.Random) -> list[Sample]:
    return [
        Sample(
            np.array([draw.randrange(10, 99) for _ in range(n)], np.int32),
            np.array([draw.randrange(2) for _ in range(n)], np.uint8),
            f"f:{number}",
        )
        for number, n in enumerate(lengths, 1)
    ]


def plans() -> list[tuple[list[Sample], dict[str, Any]]]:
    draw = random.Random(3)
    cases = []
    for _ in range(60):
        length = draw.choice([8, 33, 128])
        samples = samples_of([draw.randint(1, length) for _ in range(draw.randint(1, 50))], draw)
        how = {"length": length, "rows_per_step": draw.randint(1, 7), "epochs": draw.choice([1, 2, 3.5, 0.2])}
        cases.append((samples, {**how, "seed": draw.randrange(10**6), "pack": draw.random() < 0.7}))
    return cases


# The order


def test_every_sample_once_an_epoch_and_no_row_over_length() -> None:
    for samples, how in plans():
        plan = Schedule(samples, **{**how, "epochs": 3})
        for epoch in range(3):
            steps = [s for s in range(len(plan)) if plan.epoch(s) == epoch]
            rows = [row for s in steps for row in plan.rows(s)]
            assert sorted(i for row in rows for i in row) == list(range(len(samples)))
            assert all(sum(len(samples[i].ids) for i in row) <= how["length"] for row in rows)
            assert all(len(plan.rows(s)) == how["rows_per_step"] for s in steps[:-1])
            assert how["pack"] or all(len(row) == 1 for row in rows)


def test_the_plan_is_a_pure_function_and_asked_in_any_order() -> None:
    for samples, how in plans()[:20]:
        plan, again = Schedule(samples, **how), Schedule(samples, **how)
        backwards = [again.rows(step) for step in reversed(range(len(again)))][::-1]
        assert [plan.rows(step) for step in range(len(plan))] == backwards
        plan.rows(0)[0].append(-1)  # what a caller does to its rows stays with it
        assert plan.rows(0) == backwards[0]


def test_any_split_among_processes_learns_the_same() -> None:
    """1 × 12, 2 × 6 and 3 × 4 rows a step are the same steps: only rows_per_step counts."""
    draw = random.Random(5)
    samples = samples_of([draw.randint(1, 64) for _ in range(100)], draw)
    plan = Schedule(samples, 64, 12, 2, seed=1)
    for step in range(len(plan)):
        rows = plan.rows(step)
        for processes in (1, 2, 3):
            shares = [rows[rank::processes] for rank in range(processes)]
            labels = sum(int((collate(share, samples, 0)["labels"] >= 0).sum()) for share in shares if share)
            assert labels == plan.label_count(step)


def test_epochs_and_seeds_differ_in_order() -> None:
    lengths = [5] * 40
    orders = [arrange(lengths, 20, seed, epoch, pack) for seed in (0, 1) for epoch in (0, 1) for pack in (True, False)]
    assert len({str(order) for order in orders}) == len(orders)


def test_the_order_is_pinned() -> None:
    """The same on every machine and with every later numpy: these lists are data, not what the code says today."""
    assert arrange([3] * 8, 3, 1234, 0, False) == PINNED_PLAIN
    assert arrange([3, 1, 2, 5, 4, 2, 1, 1], 6, 1234, 1, True) == PINNED_PACKED


def test_best_fit_is_what_it_says() -> None:
    """Against a search through all open rows: the fullest that takes the sample, the oldest of equals."""
    draw = random.Random(9)
    for _ in range(50):
        length, lengths = 40, [draw.randint(1, 40) for _ in range(60)]
        order = [row[0] for row in arrange(lengths, length, 3, 0, False)]
        open_rows: list[list[int]] = []
        freed: list[int] = []  # when a row last changed its room
        for clock, index in enumerate(order):
            room = [length - sum(lengths[i] for i in row) for row in open_rows]
            fits = [r for r in range(len(open_rows)) if room[r] >= lengths[index]]
            if fits:
                best = min(fits, key=lambda r: (room[r], freed[r]))
            else:
                open_rows.append([])
                freed.append(0)
                best = len(open_rows) - 1
            open_rows[best].append(index)
            freed[best] = clock
        assert sorted(arrange(lengths, length, 3, 0, True)) == sorted(open_rows)


def test_packing_a_hundred_thousand_wastes_little() -> None:
    draw = random.Random(2)
    lengths = [min(512, int(draw.lognormvariate(4.6, 0.8)) + 20) for _ in range(100_000)]
    rows = arrange(lengths, 512, 0, 0, True)
    assert sum(lengths) / (len(rows) * 512) > 0.97


@pytest.mark.parametrize(
    ("epochs", "steps", "expected"),
    [(1, 0, 4), (2, 0, 8), (0.5, 0, 2), (0.1, 0, 1), (2.25, 0, 9), (5, 3, 3), (0.1, 11, 11), (1, 4, 4)],
)
def test_length_of_a_run(epochs: float, steps: int, expected: int) -> None:
    samples = samples_of([4] * 10, random.Random(0))
    plan = Schedule(samples, 4, 3, epochs, steps, pack=False)
    assert len(plan) == expected
    assert [plan.epoch(s) for s in range(expected)] == [s // 4 for s in range(expected)]
    assert [len(plan.rows(s)) for s in range(min(4, expected))] == [3, 3, 3, 1][:expected]
    for beyond in (expected, -1):
        with pytest.raises(IndexError):
            plan.rows(beyond)


@pytest.mark.parametrize("how", [{"samples": []}, {"rows_per_step": 0}, {"epochs": 0.0}, {"epochs": float("nan")}])
def test_a_run_of_nothing_is_refused(how: dict[str, Any]) -> None:
    arguments = {"samples": samples_of([3], random.Random(0)), "length": 4, "rows_per_step": 1, "epochs": 1.0, **how}
    with pytest.raises(UserError, match="all above 0"):
        Schedule(**arguments)


def test_a_sample_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="sample 1 has 5 tokens"):
        arrange([4, 5], 4, 0, 0, True)


# Batches


def test_collate_against_a_plain_loop() -> None:
    for samples, how in plans():
        plan = Schedule(samples, **how)
        for step in {0, len(plan) - 1}:
            rows = plan.rows(step)
            batch = collate(rows, samples, pad_id=7, width=how["length"])
            for number, row in enumerate(rows):
                ids, labels, positions, segments = [], [], [], []
                for segment, index in enumerate(row, 1):
                    for position, (token, learn) in enumerate(zip(samples[index].ids, samples[index].mask)):
                        ids.append(token)
                        labels.append(token if learn and position > 0 else -100)
                        positions.append(position)
                        segments.append(segment)
                pad = how["length"] - len(ids)
                assert batch["input_ids"][number].tolist() == ids + [7] * pad
                assert batch["labels"][number].tolist() == labels + [-100] * pad
                assert batch["position_ids"][number].tolist() == positions + [0] * pad
                assert batch["segment_ids"][number].tolist() == segments + [0] * pad
            assert int((batch["labels"] != -100).sum()) == plan.label_count(step)
            assert int((batch["segment_ids"] > 0).sum()) == plan.token_count(step)


def test_collate_is_as_wide_as_its_longest_row() -> None:
    samples = samples_of([2, 5, 3], random.Random(1))
    batch = collate([[0, 2], [1]], samples, 0)
    assert {tensor.shape for tensor in batch.values()} == {(2, 5)}
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    with pytest.raises(ValueError, match="a row of 5 tokens in a batch of width 4"):
        collate([[1]], samples, 0, width=4)
    with pytest.raises(ValueError, match="no rows"):
        collate([], samples, 0)


# Samples


def test_the_mask_to_the_eye() -> None:
    samples, _ = encode([talk("hi", "yo")], Letters(), Recipe(system=""))
    learnt = Letters().decode([i for i, m in zip(samples[0].ids.tolist(), samples[0].mask) if m])
    assert Letters().decode(samples[0].ids.tolist()) == "<1>user\nhi<2>\n<1>assistant\nyo<2>\n"
    assert learnt == "yo<2>" and samples[0].label_count == 3


RECIPE = Recipe(system="", length=40, batch=2, pack=True)
TALKS = [talk("q", "a", "f:1"), talk("q" * 30, "a" * 9, "f:2"), talk("q", "a" * 30, "f:3")]  # 23, 60 and 52 tokens


def test_overlong_is_cut_and_told() -> None:
    samples, summary = encode(TALKS, Letters(), RECIPE)
    assert [len(s.ids) for s in samples] == [23, 40] and [s.where for s in samples] == ["f:1", "f:3"]
    assert samples[1].mask.sum() == 40 - 20
    assert (summary.overlong, summary.action, summary.tokens_cut) == (2, "cut", 32)
    assert summary.unlearnable == ("f:2",)  # its answer lies behind the cut
    assert "2 over 40 tokens: cut, 32 tokens lost; 1 left out, nothing to learn" in str(summary)


def test_overlong_is_skipped_and_told() -> None:
    samples, summary = encode(TALKS, Letters(), replace(RECIPE, overlong="skip"))
    assert [s.where for s in samples] == ["f:1"] and summary.unlearnable == ()
    assert "2 over 40 tokens: left out" in str(summary)


def test_overlong_is_an_error_that_names_all() -> None:
    with pytest.raises(UserError) as raised:
        encode(TALKS, Letters(), replace(RECIPE, overlong="error"))
    assert "2 conversations over length=40" in str(raised.value)
    assert "f:2: 60 tokens\nf:3: 52 tokens" in str(raised.value)
    assert encode(TALKS, Letters(), replace(RECIPE, overlong="error", length=60))[1].overlong == 0


def test_nothing_left_to_learn_is_an_error() -> None:
    with pytest.raises(UserError, match=r"nothing to learn: 3 conversations, none .* within length=8"):
        encode(TALKS, Letters(), replace(RECIPE, length=8))


def test_summary_numbers() -> None:
    done: list[int] = []
    talks = [talk("q" * n, "a") for n in range(1, 513)]
    samples, summary = encode(talks, Letters(), replace(RECIPE, length=600), on_progress=done.append)
    lengths = sorted(len(s.ids) for s in samples)
    assert (summary.tokens_min, summary.tokens_max, summary.tokens) == (lengths[0], lengths[-1], sum(lengths))
    assert summary.tokens_median in lengths[254:258] and summary.tokens_p95 in lengths[484:489]
    assert summary.conversations == summary.samples == 512 and summary.turns == 1024
    assert summary.labels == sum(s.label_count for s in samples) == 2 * 512
    rows = arrange([len(s.ids) for s in samples], 600, RECIPE.seed, 0, True)
    assert summary.rows == len(rows) and summary.efficiency == sum(lengths) / (len(rows) * 600)
    assert done == [256, 512]


def test_efficiency_without_packing_is_that_of_the_batches() -> None:
    recipe = replace(RECIPE, length=600, pack=False, batch=3)
    samples, summary = encode([talk("q" * n, "a") for n in range(1, 30)], Letters(), recipe)
    rows = arrange([len(s.ids) for s in samples], 600, recipe.seed, 0, False)
    batches = [collate(rows[at : at + 3], samples, 0)["segment_ids"] for at in range(0, len(rows), 3)]
    real, computed = sum(int((b > 0).sum()) for b in batches), sum(b.numel() for b in batches)
    assert summary.efficiency == pytest.approx(real / computed) and summary.rows == 29


def test_the_demo_fits_its_rows() -> None:
    talks = conversations.load(Path(__file__).parents[2] / "data" / "demo.jsonl")
    assert encode(talks, Letters(), Recipe(length=256, overlong="error"))[1].samples == len(talks)


PINNED_PLAIN = [[7], [3], [0], [1], [4], [2], [5], [6]]
PINNED_PACKED = [[4, 2], [0, 5, 6], [1, 7], [3]]
