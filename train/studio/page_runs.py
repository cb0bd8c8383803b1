"""The pages of runs: the list, several laid over each other, and one run with its live curves and its commands."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import Request
from nicegui import ui
from nicegui.element import Element
from nicegui.elements.mixins.text_element import TextElement

from train.common.errors import UserError
from train.pages.run_facts import RunFacts
from train.runs.folder import REPORT, is_locked
from train.studio import recipe_form, run_view, widgets
from train.studio.folders import is_inside
from train.studio.jobs import Job, command
from train.studio.layout import OFTEN, Say, Studio, follow, frame
from train.studio.page_train import begin

MOST_OVERLAID = 12
MOST_ANSWERS = 50
ACTIONS = {  # key of texts.py -> verb and words
    "do compare": ("compare", ()),
    "do report": ("report", ()),
    "do export": ("export", ()),
    "do gguf": ("export", ("format=gguf",)),
    "do verify": ("verify", ()),
}


def register(studio: Studio) -> None:
    """Add the pages to the application."""

    @ui.page("/runs")
    def runs_page(request: Request, names: str = "") -> None:
        with frame(request, "runs") as say:
            _list(studio, [name for name in names.split(",") if name][:MOST_OVERLAID], say)

    @ui.page("/run")
    def run_page(request: Request, name: str = "") -> None:
        with frame(request, "runs") as say:
            _run(studio, name, say)


def _list(studio: Studio, names: list[str], say: Say) -> None:
    rows = run_view.rows(studio.folders)
    if not rows:
        widgets.note(say("no runs"))
        return
    chosen = [name for name in names if any(row.name == name for row in rows)]
    heads = ("", "name", "state", "steps", "loss")
    with widgets.tag("div", "wide", tabindex=0, role="region", aria_label=say("runs")), widgets.tag("table"):
        with widgets.tag("thead"), widgets.tag("tr"):
            for head in heads:
                widgets.text("th" if head else "td", say(head) if head else "")
        with widgets.tag("tbody"):
            for number, row in enumerate(rows):
                with widgets.tag("tr"):
                    _row(row, number, chosen, say)
    widgets.button(say("lay over"), lambda: ui.navigate.to(widgets.address("runs", names=",".join(chosen))))
    if names:
        _overlay(studio, names, say)


def _row(row: run_view.Row, number: int, chosen: list[str], say: Say) -> None:
    def tick(on: bool) -> None:
        if row.name in chosen:
            chosen.remove(row.name)
        if on:
            chosen.append(row.name)

    with widgets.tag("td"):
        widgets.box(say("choose", row.name), row.name in chosen, tick, f"run-{number}")
    with widgets.tag("td"):
        widgets.link(row.name, widgets.address("run", name=row.name))
    for cell in (say(f"state {row.state}"), row.steps, row.loss):
        widgets.text("td", cell)


def _overlay(studio: Studio, names: list[str], say: Say) -> None:
    runs = [facts for facts in (run_view.read(name, studio.folders) for name in names) if facts]
    keys = [(run_view.colour(n), run.name) for n, run in enumerate(runs)]
    widgets.chart(say("loss by step"), run_view.loss_chart(runs), keys)
    widgets.chart(say("speed by step"), run_view.speed_chart(runs), keys)


# --- one run


def _run(studio: Studio, name: str, say: Say) -> None:
    try:
        known = run_view.read(name, studio.folders) if name else None
        job = studio.jobs.of_run(name)
        if known is None and job is None:
            studio.folders.run(name)
    except UserError as error:
        widgets.note(str(error), "bad", role="alert")
        return
    with widgets.section(name):
        _live(studio, name, say)
    facts = run_view.read(name, studio.folders)
    if job:
        with widgets.tag("details"):
            widgets.text("summary", say("output"))
            follow(studio, job, say, stop=False)
    if facts:
        _commands(studio, facts, say)
        _answers(facts, say)
        with widgets.section(say("made of")):
            widgets.table(say("made of"), (), run_view.made_of(facts), "facts")
            with widgets.tag("details"):
                widgets.text("summary", say("all keys"))
                widgets.table(say("recipe"), (), run_view.recipe_of(facts), "facts")


@dataclass(frozen=True)
class Now:
    """A run at this moment. job: the command that trains it, if a page started it. memory: bytes of that command."""

    facts: RunFacts | None
    job: Job | None
    is_locked: bool
    memory: int

    @classmethod
    def of(cls, studio: Studio, name: str) -> "Now":
        job = studio.jobs.of_run(name)
        job = job if job and studio.jobs.is_running(job) else None
        memory = studio.jobs.memory(job) if job else 0
        return cls(run_view.read(name, studio.folders), job, is_locked(studio.folders.runs / name), memory)

    @property
    def state(self) -> str:
        return "running" if self.job else self.facts.state if self.facts else "begun"

    @property
    def numbers(self) -> tuple[int, int]:
        """What the curves and the tiles follow."""
        return self.facts.steps if self.facts else 0, self.memory >> 26


def _live(studio: Studio, name: str, say: Say) -> None:
    """Numbers and curves, drawn again whenever they change; the button only with the state, so that no click is lost."""
    tiles, action = widgets.tag("div"), widgets.tag("div")
    problem, curves = widgets.text("p", "", "problem", role="alert"), widgets.tag("div")
    widgets.text("p", say("stop note"), "soft")
    before: list[tuple[object, ...]] = []

    def look() -> None:
        now = Now.of(studio, name)
        state, seen = (now.state, now.is_locked), before[-1] if before else ()
        if seen and seen[:2] != state and now.state == "finished":
            ui.navigate.reload()  # with the commands of a finished run
            return
        if seen[:2] != state:
            action.clear()
            with action:
                _stop_or_go_on(studio, name, now, problem, say)
        if seen != (*state, now.numbers):
            _draw_tiles(now, tiles, say)
            _draw_curves(now, curves, say)
        before[:] = [(*state, now.numbers)]

    look()
    ui.timer(OFTEN, look)


def _draw_tiles(now: Now, place: Element, say: Say) -> None:
    facts = now.facts
    tiles = [("state", say(f"state {now.state}"))]
    if facts:
        tiles += [("steps", run_view.steps(facts)), ("loss", _last(facts.curves.mean))]
        tiles += [("held out", _last(facts.curves.held_out))] if facts.curves.held_out else []
        tiles += [("speed", run_view.speed(facts))]
    if now.memory:
        tiles.append(("memory", f"{now.memory / 2**30:.2f} GiB"))
    elif peak := run_view.peak_memory(facts) if facts else "":
        tiles.append(("peak memory", peak))
    place.clear()
    with place, widgets.tag("dl", "tiles"):
        for key, value in tiles:
            with widgets.tag("div"):
                widgets.text("dt", say(key))
                widgets.text("dd", value, key.replace(" ", "-"))


def _draw_curves(now: Now, place: Element, say: Say) -> None:
    facts = now.facts
    place.clear()
    with place:
        for one in facts.damage if facts else ():
            widgets.note(f"{say('damage')}: {one}", "bad", role="alert")
        if facts and facts.steps:
            widgets.chart(say("loss by step"), run_view.loss_chart([facts]))
            widgets.chart(say("speed by step"), run_view.speed_chart([facts]))
        else:
            widgets.note(say("waiting"))


def _last(points: Any) -> str:
    return f"{points[-1][1]:.4f}" if points else "–"


def _stop_or_go_on(studio: Studio, name: str, now: Now, problem: TextElement, say: Say) -> None:
    facts, job = now.facts, now.job
    if job:
        widgets.button(say("stop"), lambda: studio.jobs.stop(job), "main")
        return
    if facts and facts.state in ("finished", "running"):
        return
    started = studio.jobs.of_run(name)
    words = recipe_form.resume_words(
        name, facts.inputs if facts else {}, started.words if started else (), studio.folders
    )
    widgets.command(say("command"), command("train", words))
    data = next((word.removeprefix("data=") for word in words if word.startswith("data=")), "")
    if not started and not is_inside(studio.folders.data, Path(data)):
        return  # its data are elsewhere: the command is for a shell

    def go_on() -> None:
        try:
            begin(studio, name, words)
        except UserError as error:
            problem.set_text(str(error))
            return
        ui.navigate.reload()

    widgets.button(say("go on"), go_on, "main")


# --- what can be done with it


def _commands(studio: Studio, facts: RunFacts, say: Say) -> None:
    if facts.state != "finished":
        return
    with widgets.section(say("commands")):
        for key, (verb, more) in ACTIONS.items():
            words = [f"run={facts.name}", *more, *recipe_form.places(studio.folders)]
            _action(studio, say(key), verb, words, say)
        if (studio.folders.runs / facts.name / REPORT).is_file():
            address = widgets.address("report", run=facts.name)
            widgets.link(say("open report"), address, "button", target="_blank", rel="noopener")
        widgets.link(say("chat"), widgets.address("chat", run=facts.name), "button")


def _action(studio: Studio, label: str, verb: str, words: list[str], say: Say) -> None:
    place = widgets.tag("div", "action")

    def start() -> None:
        show(studio.jobs.start(verb, words))

    def show(job: Job) -> None:
        place.clear()
        with place:
            widgets.text("h3", label)
            follow(studio, job, say)

    same: Callable[[Job], bool] = lambda job: job.verb == verb and job.words == words  # noqa: E731
    running = next((job for job in studio.jobs.all() if same(job) and studio.jobs.is_running(job)), None)
    if running:
        show(running)
        return
    with place:
        widgets.command(say("command"), command(verb, words))
        widgets.button(label, start, "quiet")


def _answers(facts: RunFacts, say: Say) -> None:
    with widgets.section(say("before after")):
        if not facts.answers:
            widgets.text("p", say("no answers"), "soft")
            return
        heads = [say(key) for key in ("question", "before", "after")]
        widgets.table(
            say("before after"),
            heads,
            ((a.question, a.before, a.after) for a in facts.answers[:MOST_ANSWERS]),
            "answers",
        )
