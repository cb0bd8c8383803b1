"""`docker stop` in the middle of training: a good checkpoint, and the next `run train` goes on from it to the same
end."""

import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.image.conftest import LEARN, House
from train.common.files import read_json, sha256

pytestmark = pytest.mark.image
STEPS = 900  # seconds of training: `docker stop` must come before the end
NAME = "qwen-test-stop"


def words(run: str) -> list[str]:
    return ["data=data/talk.jsonl", "model=base", f"run={run}", f"steps={STEPS}", "save_every=1000", *LEARN]


def start(house: House, run: str) -> "subprocess.Popen[str]":
    how = {key: value for key, value in house.how().items() if key not in ("input", "timeout")}
    command = ["docker", "compose", "run", "--rm", "-T", "--name", NAME, "train", *words(run)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, **how)  # type: ignore[call-overload, no-any-return]


def wait_for_steps(run: Path, count: int) -> None:
    losses = run / "losses.jsonl"
    for _ in range(1200):
        if losses.is_file() and len(losses.read_text().splitlines()) >= count:
            return
        time.sleep(0.1)
    raise AssertionError(f"{losses}: no {count} steps in two minutes")


def test_stopped_then_gone_on(house: House) -> None:
    process = start(house, "stopped")
    run = house.root / "runs" / "stopped"
    wait_for_steps(run, 3)
    began = time.monotonic()
    subprocess.run(["docker", "stop", NAME], check=True, capture_output=True)
    took = time.monotonic() - began
    out, errors = process.communicate(timeout=60)
    said = house.check(subprocess.CompletedProcess([], process.returncode, out, errors), status=75)
    assert "The same command continues from there" in said
    assert took < 60, "a tiny step and a save; the engine would have waited for 300 s, then killed"
    assert not (run / "run.json").exists()

    found = re.search(r"continues after step (\d+) of", house.compose("train", *words("stopped")))
    assert found and 3 <= int(found[1]) < STEPS
    record = read_json(run / "run.json")
    assert record["steps"] == STEPS

    house.compose("train", *words("whole"))
    one, two = (house.root / "runs" / name / "adapter/adapter_model.safetensors" for name in ("stopped", "whole"))
    assert sha256(one) == sha256(two), "the same bytes as without the stop"
