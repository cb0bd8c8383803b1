"""Settings of sampling that cannot work; what each of them does is in test_generate.py."""

import pytest

from train.common.errors import UserError
from train.inference.sampling import Sampling


def test_settings_without_meaning_are_refused_together() -> None:
    with pytest.raises(UserError, match=r"temperature=-1(.|\n)*top_p=0(.|\n)*top_k=-2(.|\n)*repetition_penalty=0"):
        Sampling(temperature=-1, top_p=0, top_k=-2, repetition_penalty=0)
