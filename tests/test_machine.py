"""tests/support/machine.py and the markers, in one process and in two: what cannot run is skipped, counted and named once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TESTS = """
import pytest

@pytest.mark.image
@pytest.mark.parametrize("n", [1, 2])
def test_image(n):
    raise AssertionError

def test_plain():
    pass

def test_too():
    pass
"""
SETTINGS = "[pytest]\naddopts = --strict-markers --strict-config\nmarkers =\n    image: an engine\n"
in_one_and_two = pytest.mark.parametrize(
    "processes", [(), ("-n", "2", "--dist", "loadfile")], ids=["one process", "two"]
)


def run(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """pytest over what is in `folder`, with this project's plugin, on a machine without a Docker engine."""
    (folder / "pytest.ini").write_text(SETTINGS)
    (folder / "docker").write_text("#!/bin/sh\nexit 1\n")
    (folder / "docker").chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment = {**kept, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.support.machine", *words, "."]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@in_one_and_two
def test_what_cannot_run_is_counted_and_named(tmp_path: Path, processes: tuple[str, ...]) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    done = run(tmp_path, *processes)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, first, second, third, last = done.stdout.splitlines()
    assert first == "not run here, no Docker engine: 2 tests"
    assert (second, third) == ("  test_it.py::test_image[1]", "  test_it.py::test_image[2]")
    assert done.stdout.count("not run here") == 1
    assert last.startswith("2 passed, 2 skipped")


@in_one_and_two
def test_an_unknown_marker_is_an_error(tmp_path: Path, processes: tuple[str, ...]) -> None:
    (tmp_path / "test_it.py").write_text(TESTS.replace("mark.image", "mark.imge"))
    done = run(tmp_path, *processes)
    assert done.returncode != 0
    assert "'imge' not found in `markers`" in done.stdout


def test_each_process_of_the_tests_has_as_many_threads_as_it_is_told() -> None:
    """One, unless OMP_NUM_THREADS says otherwise: two processes with two threads each are slower on two cores."""
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])


def test_files_with_a_tolerance_are_marked(request: pytest.FixtureRequest) -> None:
    """This file has one: it names pytest.approx here."""
    assert request.node.get_closest_marker("numeric") is not None
