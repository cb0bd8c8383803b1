"""A person's way through the studio in a real browser, at desktop and phone width, in both languages.

From an uploaded file with a mistake to a mended one, a short training with its live curve, stop and go on, two runs
over each other, a chat with stop and a blind vote. It needs Chromium (CHROMIUM= or on the path). With AXE= (the file
axe.min.js of the npm package axe-core) each page is checked for faults of accessibility; with SHOTS= (a folder)
pictures of the pages are written there.
"""

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import tiny_run
from tests.support.studio import BASE, BROKEN, Opened, opened, studio_folder
from train.studio.texts import text

pytestmark = pytest.mark.slow
sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
WIDTHS = {"desktop": 1200, "phone": 390}
PATIENCE = 150_000  # ms
SHORT = {"recipe": "smoke", "steps": "80", "save_every": "0", "batch": "2", "accumulation": "2", "rank": "4"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Walk:
    """A page of the browser, and what a person does on it."""

    def __init__(self, browser: Any, studio: Opened, language: str, width: str) -> None:
        locale = {"en": "en-GB", "zh": "zh-CN"}[language]
        self.page = browser.new_page(viewport={"width": WIDTHS[width], "height": 844}, locale=locale)
        self.page.set_default_timeout(PATIENCE)
        self.studio, self.language, self.name = studio, language, f"{language}-{width}"
        self.elsewhere: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", self._note)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _note(self, request: Any) -> None:
        if not re.match(rf"(http|ws)://127\.0\.0\.1:{self.studio.port}/|data:|blob:", request.url):
            self.elsewhere.append(request.url)

    def say(self, key: str, *values: object) -> str:
        return text(self.language, key, *values)

    def open(self, path: str) -> None:
        self.page.goto(self.studio.url + path)

    def press(self, key: str, *values: object) -> None:
        self.page.get_by_role("button", name=self.say(key, *values), exact=True).click()

    def see(self, content: str) -> None:
        self.page.get_by_text(content).locator("visible=true").first.wait_for()

    def steps(self) -> int:
        """Steps that the run's page says."""
        found = self.page.locator("dd.steps")
        return int(re.sub(r"\D.*", "", found.inner_text().replace(",", ""))) if found.count() else 0

    def wait_steps(self, least: int) -> None:
        self.page.wait_for_function(
            "least => parseInt((document.querySelector('dd.steps') || {innerText: '0'}).innerText) >= least", arg=least
        )

    def check(self, name: str) -> None:
        """Nothing wider than the window, no serious fault of accessibility; a picture, if one is wanted."""
        width = self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert width <= 0, (name, width)
        if shots := os.environ.get("SHOTS"):
            self.page.screenshot(path=Path(shots, f"{name}-{self.name}.png"), full_page=True)
        if axe := os.environ.get("AXE"):
            self.page.evaluate(Path(axe).read_text())
            found = self.page.evaluate("axe.run()")["violations"]
            serious = [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in found
                       if one["impact"] in ("serious", "critical")]  # fmt: skip
            assert not serious, (name, serious)

    def close(self) -> None:
        """The page was in its language, asked no other host and had no error of a script."""
        assert self.page.locator("html").get_attribute("lang") == {"en": "en", "zh": "zh-CN"}[self.language]
        assert self.elsewhere == [] and self.errors == []
        self.page.close()


@pytest.mark.parametrize(("language", "width"), [("en", "desktop"), ("zh", "phone")])
def test_from_a_mistake_to_two_runs(browser: Any, tmp_path: Path, language: str, width: str) -> None:
    with opened(studio_folder(tmp_path)) as studio:
        walk = Walk(browser, studio, language, width)
        _mend(walk, tmp_path)
        _train(walk, tmp_path)
        _overlay(walk)
        walk.close()


@pytest.mark.parametrize(("language", "width"), [("en", "phone"), ("zh", "desktop")])
def test_a_chat_with_both_models(browser: Any, tmp_path: Path, language: str, width: str) -> None:
    tiny_run(tmp_path)
    with opened(tmp_path) as studio:
        walk = Walk(browser, studio, language, width)
        _chat(walk)
        walk.close()


def _mend(walk: Walk, folder: Path) -> None:
    """Upload a file with mistakes, see them by line, mend it, see what is learnt of it."""
    own = folder / "mine.jsonl"
    own.write_text(BROKEN)
    walk.open("/data")
    walk.page.locator("#upload").set_input_files(own)
    walk.see("'Where?' in single quotes")
    assert walk.page.locator(".mistakes tbody tr").count() == 2
    assert walk.page.locator(".mistakes td").first.inner_text() == "2:17"
    walk.check("data-mistakes")
    walk.press("fix")
    walk.page.get_by_role("link", name=walk.say("open mended")).first.click()
    walk.see(walk.say("no mistakes"))
    assert "Here.<|im_end|>" in walk.page.locator("mark").nth(1).inner_text()
    walk.check("data")


def _train(walk: Walk, folder: Path) -> None:
    """Plan, train, watch, reload, stop, go on to the end."""
    walk.page.get_by_role("link", name=walk.say("train on it")).click()
    walk.page.locator("#recipe").select_option("smoke")
    walk.page.wait_for_url("**/train?*recipe=smoke*")
    walk.page.locator("#run").fill("first")
    walk.page.locator("summary").click()
    for key, value in SHORT.items():
        if key != "recipe":
            walk.page.locator(f"#{key}").fill(value)
    walk.page.locator("#card").fill("8G")
    walk.page.wait_for_url("**card=8G*")
    walk.page.reload()  # what was typed is still there
    assert walk.page.locator("#run").input_value() == "first" and walk.page.locator("#steps").input_value() == "80"
    walk.press("plan button")
    walk.see("GiB on the card")
    walk.see(walk.say("no time"))
    walk.see(walk.say("ended well"))
    walk.check("train")
    walk.press("start")
    walk.page.wait_for_url("**/run?name=first")
    walk.wait_steps(3)
    walk.page.reload()  # the run goes on, and its page has it again
    walk.wait_steps(8)
    assert walk.page.locator(".chart path.c0").count() >= 1
    before = walk.page.locator(".chart path.c0").first.get_attribute("d")
    walk.wait_steps(walk.steps() + 3)
    assert walk.page.locator(".chart path.c0").first.get_attribute("d") != before  # the curve is alive
    walk.check("run-live")
    walk.press("stop")
    walk.see(walk.say("state stopped"))
    done = walk.steps()
    assert done < 80 and list((folder / "runs/first/checkpoints").glob("step-*"))
    walk.check("run-stopped")
    walk.press("go on")
    walk.see(walk.say("state finished"))
    walk.wait_steps(80)
    assert (folder / "runs/first/run.json").is_file()
    walk.press("do report")
    end = time.monotonic() + PATIENCE / 1000
    while not (folder / "runs/first/report.html").is_file():  # the training's "ended well" is on the page already
        assert time.monotonic() < end
        walk.page.wait_for_timeout(200)
    walk.page.reload()
    walk.page.get_by_role("link", name=walk.say("open report")).first.wait_for()
    walk.check("run")


def _overlay(walk: Walk) -> None:
    """A second run that starts from the first one's adapter, and both in one picture."""
    query = "&".join(f"{key}={value}" for key, value in {**SHORT, "steps": "12"}.items())
    walk.open(f"/train?data=good.jsonl&model={BASE}&run=second&parent=first&{query}")
    walk.press("start")
    walk.see(walk.say("state finished"))
    walk.open("/runs")
    for number in (0, 1):
        walk.page.locator(f"#run-{number}").check()
    walk.press("lay over")
    walk.page.wait_for_url("**/runs?names=*")
    walk.page.locator(".chart path.c1").first.wait_for()
    assert walk.page.locator(".keyed").first.inner_text() in ("first", "second")
    walk.check("runs")


def _chat(walk: Walk) -> None:
    """Base and tuned model answer at the same time; stop, reload, a blind vote."""
    page = walk.page
    walk.open("/chat?run=tiny")
    walk.press("load")
    page.locator("#message").wait_for()
    page.locator("summary").last.click()
    page.locator("#max_tokens").fill("4000")
    page.locator("#blind").check()
    page.locator("#message").fill("Who are you? <b>bold</b>")
    walk.press("send")
    page.wait_for_function("[...document.querySelectorAll('.answer')].some(e => e.innerText.length > 1)")
    stop = page.get_by_role("button", name=walk.say("stop"), exact=True)
    if stop.is_visible():  # a tiny model may have said all that it has to say (test_answering.py stops it for sure)
        stop.click()
    page.locator(".vote").wait_for()
    assert page.locator("#max_tokens").input_value() == "4000"  # what was typed is not undone by what is drawn
    assert page.locator(".said b").count() == 0 and "<b>bold</b>" in page.locator(".said").first.inner_text()
    assert walk.say("tuned model") not in page.locator(".turn").inner_text()  # it is blind
    walk.check("chat-blind")
    walk.press("better", "A")
    walk.see("base-Int4")
    said = page.locator(".answer").first.inner_text()
    page.reload()
    page.locator(".answer").first.wait_for()
    assert page.locator(".answer").first.inner_text() == said
    assert walk.say("tuned model") in page.locator(".turn").inner_text()
    walk.check("chat")
