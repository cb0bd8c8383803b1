"""A disk that fails at each call: every fourth call of a save here, all calls of all actions in the slow tests."""

import re
import shutil

import pytest

from tests.faults import disk

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler for the shim")


def test_a_save_that_fails_anywhere_loses_nothing() -> None:
    """And the campaign can fail: it finds a save that removes the older checkpoint first."""
    done = disk.start(["save", "careless"], every=4)
    killed = re.search(r"SIGKILL: (\d+) cases, (\d+) of them ended the attempt, 0 wrong so far", done.stdout)
    assert killed and killed[1] == killed[2] and int(killed[1]) >= 8, done.stdout + done.stderr
    wrong = [line for line in done.stdout.splitlines() if " at call " in line]
    assert done.returncode == 1
    assert {line.split(",")[0] for line in wrong} == {"careless"}
    assert any("the newest is None" in line for line in wrong)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["save", *disk.FORMATS, *disk.METHODS])
def test_every_call_of_it(name: str) -> None:
    done = disk.start([name])
    assert done.returncode == 0, done.stdout + done.stderr
