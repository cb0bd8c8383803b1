"""The tokens of a data set, interrupted while several processes make them: by Ctrl-C, or killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.data.samples import Letters
from train.config.recipe import Recipe
from train.data.checked import conversations
from train.data.json_text import json_stream
from train.data.tokens import training_set
from train.data.tokens.encoding import DTYPES
from train.data.tokens.sample_cache import MANIFEST
from train.data.tokens.training_set import load_tokens

ROWS, PATIENCE = 3000, 30.0  # seconds
RECIPE = Recipe(system="", length=60)


class Slow(Letters):
    """Every character is a token, and every batch takes a while."""

    pause = 0.0

    def encode_batch(self, texts: Any) -> list[bytes]:
        time.sleep(self.pause)
        return [np.array(self.encode(text), np.int32).tobytes() for text in texts]

    def fingerprint(self) -> str:
        return "letters"


def make(data: str, cache: str, pause: float) -> Any:
    """What a command does with large data; here a block is ten rows, so that there are many."""
    training_set.SMALL = conversations.KEPT = 0
    json_stream.BLOCK = 500
    tokenizer = Slow()
    tokenizer.pause = pause
    return load_tokens(data, tokenizer, RECIPE, Path(cache))[1]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    rows = [{"instruction": f"q{n}" * (n % 9 + 1), "output": "答" * (n % 13 + 1)} for n in range(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make` changes these also in this process."""
    for module, name in ((training_set, "SMALL"), (conversations, "KEPT"), (json_stream, "BLOCK")):
        monkeypatch.setattr(module, name, getattr(module, name))


def wait_for(what: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """What it says, as soon as that is true; or what it says in the end."""
    end = time.monotonic() + seconds
    while not (said := what()) and time.monotonic() < end:
        time.sleep(0.02)
    return said


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_half_written_is_used_and_no_process_stays(data: Path, tmp_path: Path, how: signal.Signals) -> None:
    cache = tmp_path / "cache"
    code = f"from tests.data.tokens.test_interrupted_cache import make; make({str(data)!r}, {str(cache)!r}, 0.05)"
    command = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.PIPE)
    assert wait_for(lambda: sum(path.stat().st_size for path in cache.glob(".*.tmp/ids"))), "nothing is written"
    workers = psutil.Process(command.pid).children(recursive=True)
    assert len(workers) >= 2 and not list(cache.glob(f"*/{MANIFEST}"))
    if how is signal.SIGINT:  # Ctrl-C reaches all processes
        os.killpg(command.pid, how)
    else:
        command.send_signal(how)
    command.communicate(timeout=PATIENCE)
    assert command.returncode == -how
    assert wait_for(lambda: not any(worker.is_running() for worker in workers)), "a process stays"
    left = list(cache.glob(".*.tmp"))
    assert not list(cache.glob(f"*/{MANIFEST}")) and (how is not signal.SIGINT or not left)

    again = make(str(data), str(cache), pause=0)
    training_set.SMALL = 1 << 30
    fresh = load_tokens(str(data), Slow(), RECIPE, cache)[1]  # in this process, without a cache
    assert len(again.lengths) == ROWS and again.places == fresh.places
    for name in DTYPES:
        assert np.array_equal(getattr(again, name), getattr(fresh, name))
    assert len(list(cache.glob(f"*/{MANIFEST}"))) == 1 and not list(cache.glob(".*.tmp"))
