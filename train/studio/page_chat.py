"""The chat page: base and tuned model side by side, streaming, with stop, history, sampling and a blind vote."""

import secrets
import socket
from collections.abc import Callable
from typing import Any

from fastapi import Request
from nicegui import ui

from train.pages.page import visible
from train.runs.folder import finished
from train.studio import answering, recipe_form, widgets
from train.studio.chats import EQUAL, Answer, Chat, Turn
from train.studio.jobs import Job
from train.studio.layout import OFTEN, Say, Studio, follow, frame

LETTERS = "AB"
FAST = 0.15  # seconds between two looks at an answer that streams
MOST_MESSAGE = 100_000  # characters
NUMBERS = {"temperature": (0.0, 2.0), "top_p": (0.01, 1.0), "max_tokens": (1, 8192)}


def register(studio: Studio) -> None:
    """Add the page to the application."""

    @ui.page("/chat")
    def chat_page(request: Request, run: str = "", chat: str = "") -> None:
        with frame(request, "chat") as say:
            names = [name for name in studio.folders.run_names() if finished(studio.folders.runs / name)]
            if not names:
                widgets.note(say("no finished"))
                return
            opened = studio.chats.get(chat)
            run = opened.run if opened else run if run in names else names[0]
            _pick(names, run, say)
            job = server_of(studio, run)
            _server(studio, run, job, say)
            talk = widgets.tag("div")
            if job:
                _when_ready(studio, job, run, opened, talk, say)
            elif opened:
                with talk:
                    _turns(studio, opened, say)
            _history(studio, say)


def server_of(studio: Studio, run: str) -> Job | None:
    """The `serve` that answers for a run now."""
    return next((j for j in studio.jobs.all() if _serves(j, run) and studio.jobs.is_running(j)), None)


def _serves(job: Job, run: str) -> bool:
    return job.verb == "serve" and job.values.get("run") == run


def start_server(studio: Studio, run: str) -> Job:
    """Start `serve` for a run, on a free loopback port and with a key of its own; another one ends, for its memory.

    Raises:
        UserError: no such run.
    """
    studio.folders.run(run)
    for job in studio.jobs.all():
        if job.verb == "serve" and studio.jobs.is_running(job):
            studio.jobs.stop(job)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    words = [f"run={run}", "host=127.0.0.1", f"port={port}", "slots=4", *recipe_form.places(studio.folders)]
    return studio.jobs.start("serve", words, port=port, key=secrets.token_hex(16))


def _pick(names: list[str], run: str, say: Say) -> None:
    def other(value: str) -> None:
        ui.navigate.to(widgets.address("chat", run=value))

    widgets.select(say("model"), ((name, name) for name in names), run, other, "chat-run")


def _server(studio: Studio, run: str, job: Job | None, say: Say) -> None:
    if job:
        with widgets.tag("details"):
            widgets.text("summary", say("output"))
            follow(studio, job, say)
        return
    last = next((one for one in studio.jobs.all() if _serves(one, run)), None)
    if last and studio.jobs.status(last):  # it failed, and says why
        follow(studio, last, say)

    def load() -> None:
        start_server(studio, run)
        ui.navigate.reload()

    widgets.button(say("load"), load, "main")


def _when_ready(studio: Studio, job: Job, run: str, opened: Chat | None, talk: Any, say: Say) -> None:
    """The conversation, once the server has loaded."""
    with talk:
        waiting = widgets.note(say("loading"))

    async def look() -> None:
        if not studio.jobs.is_running(job):
            timer.deactivate()
            ui.navigate.reload()
            return
        models = await answering.models(job)
        if models is None:
            return
        timer.deactivate()
        waiting.set_text(say("ready"))
        with talk:
            _Talk(studio, job, run, models, opened, say)

    timer = ui.timer(OFTEN / 2, look)


class _Talk:
    """A conversation on a page: its settings, its turns, the line to type in."""

    def __init__(
        self, studio: Studio, job: Job, run: str, models: list[dict[str, Any]], opened: Chat | None, say: Say
    ) -> None:
        self.studio, self.job, self.say = studio, job, say
        names = [str(model["id"]) for model in models]
        tuned = next((name for name in names if name == run), names[-1])
        base = next((name for name in names if name != tuned), tuned)
        self.chat = opened or studio.chats.new(run, base, tuned, blind=False)
        self.names = (run, base, tuned)
        self._settings()
        self.turns = widgets.tag("div", "turns")
        self.seen = ""
        self.message = ""
        with widgets.tag("div", "send"):
            widgets.text("label", say("message"), for_="message")
            self.box = widgets.tag("textarea", id="message", rows=3)
            self.box.on("input", lambda e: self._typed(e.args), js_handler="(e) => emit(e.target.value)")
            self.send = widgets.button(say("send"), self._send, "main")
            self.stop = widgets.button(say("stop"), lambda: studio.answering.stop(self.chat), "main")
        self.problem = widgets.text("p", "", "problem", role="alert")
        self._look()
        ui.timer(FAST, self._look)

    def _typed(self, value: Any) -> None:
        self.message = str(value)

    def _settings(self) -> None:
        say, chat = self.say, self.chat
        with widgets.tag("details"):
            widgets.text("summary", say("settings"))
            widgets.entry(say("system"), chat.system, lambda v: setattr(chat, "system", str(v)), "system")
            for key in NUMBERS:
                widgets.entry(say(key), str(getattr(chat, key)), self._setter(key), key)
            if not chat.turns:
                widgets.box(say("blind"), chat.blind, self._blind, "blind")

    def _setter(self, key: str) -> Callable[[Any], None]:
        low, high = NUMBERS[key]

        def change(value: Any) -> None:
            try:
                number = type(low)(str(value))
            except ValueError:
                return
            setattr(self.chat, key, min(max(number, low), high))

        return change

    def _blind(self, on: bool) -> None:
        if not self.chat.turns:
            fresh = self.studio.chats.new(*self.names, blind=on)
            self.chat.sides, self.chat.blind = fresh.sides, on

    def _send(self) -> None:
        text = self.message.strip()
        if not text or self.chat.is_streaming:
            return
        if len(text) > MOST_MESSAGE:
            self.problem.set_text(f"{len(text):,} > {MOST_MESSAGE:,}")
            return
        self.message = ""
        ui.run_javascript("document.getElementById('message').value = ''")
        is_first = not self.chat.turns
        self.chat.turns.append(Turn(text, [Answer() for _ in self.chat.sides]))
        self.studio.chats.save(self.chat)
        self.studio.answering.start(self.chat, self.job)
        if is_first:  # so that a reload opens this chat again
            ui.run_javascript(f"history.replaceState(history.state, '', '/chat?chat={self.chat.id}')")

    def _look(self) -> None:
        """Draw what has changed."""
        now = repr(self.chat.turns)
        if now == self.seen:
            return
        self.seen = now
        self.send.set_visibility(not self.chat.is_streaming)
        self.stop.set_visibility(self.chat.is_streaming)
        self.turns.clear()
        with self.turns:
            _turns(self.studio, self.chat, self.say)


def _turns(studio: Studio, chat: Chat, say: Say) -> None:
    for number, turn in enumerate(chat.turns):
        with widgets.tag("article", "turn"):
            with widgets.tag("div", "message"):
                widgets.text("strong", say("you"))
                widgets.text("p", turn.message, "said")
            with widgets.tag("div", "sides"):
                for side, answer in enumerate(turn.answers):
                    _side(chat, turn, side, answer, say)
            if all(answer.state != "streaming" for answer in turn.answers):
                _vote(studio, chat, number, say)
    counts = studio.chats.votes(chat.run)
    if any(counts.values()):
        widgets.text("p", say("votes", counts["tuned"], counts["base"], counts["equal"]), "soft votes")


def _name(chat: Chat, side: int, say: Say) -> str:
    kind = say("base model") if chat.sides[side] == chat.base else say("tuned model")
    return f"{kind}: {chat.sides[side]}"


def _side(chat: Chat, turn: Turn, side: int, answer: Answer, say: Say) -> None:
    hidden = chat.blind and turn.vote is None
    with widgets.tag("div", "side"):
        widgets.text("strong", say("side", LETTERS[side]) if hidden else _name(chat, side, say))
        widgets.text("p", visible(answer.text) + ("▍" if answer.state == "streaming" else ""), "said answer")
        if answer.state == "stopped":
            widgets.text("p", say("stopped"), "soft")
        if answer.error:
            widgets.text("p", answer.error, "problem", role="alert")


def _vote(studio: Studio, chat: Chat, number: int, say: Say) -> None:
    if chat.turns[number].vote is not None:
        return

    def give(side: int) -> Callable[[], None]:
        return lambda: studio.chats.vote(chat, number, side)

    with widgets.tag("div", "vote"):
        for side in range(len(chat.sides)):
            name = LETTERS[side] if chat.blind else _name(chat, side, say)
            widgets.button(say("better", name), give(side), "quiet")
        widgets.button(say("same"), give(EQUAL), "quiet")


def _history(studio: Studio, say: Say) -> None:
    chats = studio.chats.latest()
    with widgets.section(say("history")):
        widgets.link(say("new chat"), "/chat", "button")
        with widgets.tag("ul"):
            for one in chats:
                with widgets.tag("li"):
                    widgets.link(f"{one.run}: {one.title}", widgets.address("chat", chat=one.id))
