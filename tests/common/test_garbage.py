"""The collector rests while a command starts; what is made later is collected as before."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from train.common import garbage


class Ring:
    """An object that only the collector frees."""

    def __init__(self) -> None:
        self.own = self


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.set_threshold(*garbage.USUAL)


def test_few_objects_are_not_looked_at_while_a_command_starts() -> None:
    garbage.collect_seldom()
    gc.collect()  # counts from zero: a test before this one may have made objects under this threshold too
    rings = weakref.WeakSet([Ring()])
    objects = [[] for _ in range(50_000)]  # type: ignore[var-annotated]
    assert objects and len(rings) == 1
    garbage.collect_as_usual()
    objects = [[] for _ in range(50_000)]
    assert objects and not rings


def test_what_is_made_after_the_start_is_freed() -> None:
    garbage.leave_alone_what_exists()
    rings = weakref.WeakSet([Ring()])
    gc.collect()
    assert not rings
    assert gc.get_freeze_count() > 0


def test_the_model_of_an_earlier_stage_is_collected() -> None:
    garbage.leave_alone_what_exists()
    rings = weakref.WeakSet([Ring()])
    garbage.leave_alone_what_exists()
    gc.collect()
    assert not rings
