"""The one table of dtypes."""

import pytest
import torch

from train.common import device
from train.common.device import DTYPES, dtype_name, pick_dtype

CPU = torch.device("cpu")


def test_every_dtype_has_a_long_and_a_short_name() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        names = [name for name, value in DTYPES.items() if value == dtype]
        assert len(names) == 2 and dtype_name(dtype) in names
        assert all(pick_dtype(CPU, name) == dtype for name in names)


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_the_gpu_decides_between_the_two_16_bit_types(
    capability: tuple[int, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device.torch.cuda, "get_device_capability", lambda _: capability)
    assert pick_dtype(torch.device("cuda", 0)) == expected
    assert pick_dtype(CPU) == torch.float32
