"""What computes the steps, on imaginary machines with several cards."""

from types import SimpleNamespace

import pytest
import torch

from train.config.recipe import Recipe
from train.training import devices
from train.training.devices import Devices
from train.training.distributed import RankInfo
from train.training.step_setting import Place

GIB = 1 << 30
CARDS = [(80, (9, 0)), (24, (8, 9)), (8, (7, 5))]  # GiB and compute capability; the last is too old to be planned


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(CARDS))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda n: CARDS[n][1])
    sizes = {n: SimpleNamespace(total_memory=size * GIB) for n, (size, _) in enumerate(CARDS)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", sizes.__getitem__)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def place(processes: int, rank_info: RankInfo | None = None) -> Place:
    return devices.place(Devices(torch.device("cuda", 0), torch.bfloat16, processes, rank_info), Recipe())


def test_cards_that_are_not_used_do_not_count() -> None:
    assert place(1) == Place(1, 80 * GIB)
    assert place(2) == Place(2, 24 * GIB)
    assert place(3) == Place(3), "a card that cannot be planned"


def test_under_a_launcher_the_cards_of_this_machine_s_processes_count(monkeypatch: pytest.MonkeyPatch) -> None:
    rank_info = RankInfo(rank=1, local_rank=1, world_size=4)
    assert place(4, rank_info) == Place(4), "it does not say how many of them are here"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert place(4, rank_info) == Place(4, 24 * GIB)
