"""A pytest plugin (`-p tests.support.machine`): skips what this machine cannot run, and says at the end what that was, counted and named.

Refuses to decide which tests are wanted: that is `-m`. A skip here is for a missing GPU, Docker engine or image only,
never for a failure. Under pytest-xdist the workers collect the tests, each of them all, and the process that prints the
summary collects none: they send it.
"""

import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MISSING: dict[str, list[str]] = {}


@cache
def lacks(marker: str) -> str:
    """Why a test so marked cannot run here; empty if it can."""
    if marker == "gpu":
        import torch

        return "" if torch.cuda.is_available() else "no CUDA device"
    if marker == "image":
        if not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True).returncode:
            return "no Docker engine"
        there = 'docker image inspect "$(image_name)"'
        found = subprocess.run(["bash", "-c", f". docker/common.sh; {there}"], cwd=ROOT, capture_output=True)
        return "" if found.returncode == 0 else "no image: make image"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker in ("gpu", "image"):
            if item.get_closest_marker(marker) and (reason := lacks(marker)):
                item.add_marker(pytest.mark.skip(reason=reason))
                MISSING.setdefault(reason, []).append(item.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a worker of xdist
        session.config.workeroutput["missing"] = MISSING


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """xdist: a worker has ended. Each has collected every test, so the last one's list is the list."""
    MISSING.update(getattr(node, "workeroutput", {}).get("missing", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for reason, names in sorted(MISSING.items()):
        terminalreporter.write_line(f"not run here, {reason}: {len(names)} tests")
        for name in names:
            terminalreporter.write_line(f"  {name}")
