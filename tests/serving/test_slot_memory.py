"""Slots and lengths from free memory."""

import pytest

from train.common.errors import UserError
from train.serving.slot_memory import MAX_SLOTS, fit

TOKEN = 200_000  # bytes, as of a 1.8B model


def test_as_many_slots_as_fit_at_the_whole_length() -> None:
    plan = fit(40e9, TOKEN, 8192, 0, 0)
    assert (plan.length, plan.capacity, plan.slots) == (8192, 8192, 23)
    assert plan.size <= 40e9
    assert fit(400e9, TOKEN, 8192, 0, 0).slots == MAX_SLOTS
    assert fit(400e9, TOKEN, 32768, 0, 0).length == 8192


def test_on_a_small_card_slots_come_before_length() -> None:
    plan = fit(2e9, TOKEN, 8192, 0, 0)
    assert (plan.length, plan.slots) == (4096, 1)
    assert fit(1e9, TOKEN, 8192, 0, 0).slots >= 1


def test_wishes_are_kept_or_refused() -> None:
    assert fit(40e9, TOKEN, 8192, 4, 1000) == fit(400e9, TOKEN, 8192, 4, 1000)
    assert fit(40e9, TOKEN, 8192, 4, 1000).capacity == 1024
    for slots, length in ((64, 8192), (0, 0), (1, 0)):
        with pytest.raises(UserError, match="slots= or a smaller length="):
            fit(40e9 if slots > 1 else 1e7, TOKEN, 8192, slots, length)
    with pytest.raises(UserError, match="context"):
        fit(40e9, TOKEN, 8192, 0, 9000)
