"""`docker compose up studio` with a real engine: caged, its pages served, a training started in it by a real browser,
and ended in order."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.image.cage import Project, check_cage, check_end, check_inside
from tests.image.conftest import House
from train.studio.texts import text

pytestmark = pytest.mark.image
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE = 240_000  # ms


@pytest.fixture
def studio(house: House, tmp_path: Path) -> Iterator[Project]:
    project = Project(tmp_path / "checkout", house, "studio", "/runs")
    yield project
    project.remove()


def test_a_studio_in_its_cage(studio: Project) -> None:
    """It writes data, models and runs, and nothing else."""
    name = studio.up()
    check_cage(json.loads(studio.say("docker", "inspect", name))[0], studio.port, {"data", "models", "runs"})
    check_inside(studio, name)
    for page in ("/data", "/train", "/runs", "/chat"):
        assert "<html" in studio.ask(page), page
    check_end(studio, name)
    assert "stopped" in studio.say("docker", "logs", name)
    studio.say("docker", "rm", name)


def test_a_browser_trains_in_the_cage(studio: Project, house: House) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine")
    name = studio.up()
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        _train(browser.new_page(locale="en-GB"), studio)
        browser.close()
    assert (house.root / "runs/caged/run.json").is_file()
    check_end(studio, name)
    studio.say("docker", "rm", name)


def _train(page: Any, studio: Project) -> None:
    page.set_default_timeout(PATIENCE)
    query = "data=talk.jsonl&model=base&run=caged&recipe=smoke&steps=6&batch=2&accumulation=2&rank=4"
    page.goto(f"http://127.0.0.1:{studio.port}/train?{query}")
    page.get_by_role("button", name=text("en", "start"), exact=True).click()
    page.wait_for_url("**/run?name=caged")
    page.get_by_text(text("en", "state finished")).locator("visible=true").first.wait_for()
