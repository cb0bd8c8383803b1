"""The program's own part of the image, built a second time from another place: the same, to the bit. The whole: make
image-repro."""

import os
import re
import subprocess
import sys

import pytest

from tests.image import repro

pytestmark = pytest.mark.image


def test_the_program_built_again_elsewhere_is_the_same(image: str) -> None:
    """Builds HEAD: on a checkout with changes that are not committed, or with an image of another commit, it rightly
    fails."""
    command = [sys.executable, "tests/image/repro.py", "quick"]
    done = subprocess.run(command, cwd=repro.ROOT, env={**os.environ, "IMAGE": image}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    count = re.search(r"(\d+) files and folders of the program, 0 differ", done.stdout)
    assert count, done.stdout
    assert int(count[1]) > 100
    one, other = re.findall(r"sha256:[0-9a-f]{64}", done.stdout)
    assert one == other
