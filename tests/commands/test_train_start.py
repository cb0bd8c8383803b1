"""The beginning of `train`: the first line comes before libraries of several seconds, while the base is hashed already."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("workspace")
ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys, threading
from train.commands import train
hashed, said = threading.Event(), train._say
train.early_work.hash_folder = lambda folder: hashed.set()
train._say = lambda rank_info, text: said(rank_info, f"{text}, torch={'torch' in sys.modules}")
def pick(*arguments):
    print("hashed:", hashed.wait(10))
    raise SystemExit
sys.modules["train.training.devices"] = devices = type(sys)("devices")
devices.pick, devices.Devices = pick, object
train.run(train.parse({"data": "data.jsonl", "model": "tiny-Int4"}))
"""


def test_the_first_line_comes_before_torch_and_the_base_is_hashed_meanwhile() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    expected = ["checking data.jsonl and tiny-Int4, torch=False", "hashed: True"]
    assert done.stdout.splitlines() == expected, done.stderr
