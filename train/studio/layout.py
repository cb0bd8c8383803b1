"""What all pages share: the studio's parts, the frame with its navigation, the language, and a command while it runs."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import Request
from nicegui import ui

from train.studio import widgets
from train.studio.answering import Answering
from train.studio.chats import ChatStore
from train.studio.folders import Folders
from train.studio.jobs import Job, Jobs
from train.studio.texts import LANGUAGES, text

LANGUAGE_COOKIE = "studio_language"
PAGES = ("data", "train", "runs", "chat")
STYLE = Path(__file__).with_name("style.css")
OFTEN = 1.0  # seconds between two looks at what changes
Say = Callable[..., str]  # a sentence of texts.py in the language of the page


@dataclass
class Studio:
    """What the pages work with. upload: bytes of a file at most."""

    folders: Folders
    upload: int
    jobs: Jobs = field(init=False)
    chats: ChatStore = field(init=False)
    answering: Answering = field(init=False)

    def __post_init__(self) -> None:
        self.jobs = Jobs(self.folders.own / "jobs")
        self.chats = ChatStore(self.folders.own / "chats")
        self.answering = Answering(self.chats)


def language(request: Request) -> str:
    """The language that was chosen, else the browser's, else English."""
    chosen = request.cookies.get(LANGUAGE_COOKIE, "")
    if chosen in LANGUAGES:
        return chosen
    return "zh" if request.headers.get("accept-language", "").lower().startswith("zh") else "en"


@contextmanager
def frame(request: Request, here: str) -> Iterator[Say]:
    """A page around what is in `with`; gives the function for its sentences."""
    chosen = language(request)
    say: Say = partial(text, chosen)
    ui.page_title(f"{say(here)} · {say('studio')}")
    ui.add_css(STYLE.read_text(encoding="utf-8"))
    ui.add_body_html(f'<script>document.documentElement.lang = "{"zh-CN" if chosen == "zh" else "en"}"</script>')
    widgets.link(say("skip"), "#content", "skip")
    with widgets.tag("div", "top"), widgets.tag("nav", aria_label=say("pages")):
        for page in PAGES:
            current = {"aria_current": "page"} if page == here else {}
            widgets.link(say(page), f"/{page}", **current)
        for code, name in LANGUAGES.items():
            if code != chosen:
                to = f"{request.url.path}?{request.url.query}" if request.url.query else request.url.path
                widgets.link(name, f"/language/{code}?to={_quoted(to)}", "language", lang=code)
    with widgets.tag("div", "content", id="content", tabindex=-1):
        widgets.text("h1", say(here))
        yield say


def _quoted(address: str) -> str:
    from urllib.parse import quote

    return quote(address, safe="/")


def status_text(studio: Studio, job: Job, say: Say) -> str:
    """How a command stands, in words."""
    status = studio.jobs.status(job)
    if status is None:
        return say("running")
    return say("ended well") if status == 0 else say("killed") if status < 0 else f"{say('ended')} {status}"


def follow(studio: Studio, job: Job, say: Say, on_end: Callable[[], Any] = lambda: None, stop: bool = True) -> None:
    """A command with its output, until it ends: also after the page is opened again."""
    with widgets.tag("div", "job", role="group", aria_label=job.verb):
        widgets.command(say("command"), job.command)
        state = widgets.text("p", status_text(studio, job, say), "state", role="status")
        output = widgets.text("pre", studio.jobs.log(job), "log", tabindex=0, aria_label=say("output"))
        if not studio.jobs.is_running(job):
            return
        ending = widgets.button(say("stop"), lambda: studio.jobs.stop(job), "quiet") if stop else None

    def look() -> None:
        output.set_text(studio.jobs.log(job))
        state.set_text(status_text(studio, job, say))
        if not studio.jobs.is_running(job):
            timer.deactivate()
            if ending:
                ending.set_visibility(False)
            on_end()

    timer = ui.timer(OFTEN / 2, look)


async def aside(function: Callable[..., Any], *values: Any) -> Any:
    """Work that takes longer than a page may wait, in a thread."""
    return await asyncio.to_thread(function, *values)
