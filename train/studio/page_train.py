"""The train page: the recipe as a form, the prediction of memory and time beside it, and the start of a run."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from fastapi import Request
from nicegui import ui

from train.common import commands
from train.common.errors import UserError
from train.studio import recipe_form, widgets
from train.studio.data_view import look
from train.studio.folders import Folders
from train.studio.jobs import command
from train.studio.layout import Say, Studio, aside, follow, frame
from train.studio.recipe_form import Field, Form

DEFAULT_RECIPE = "qlora"
EXAMPLE_BASE = "Qwen/Qwen-1_8B-Chat-Int4"


@dataclass
class Typed:
    """What a person has chosen so far; the widgets write to it."""

    form: Form
    on_change: list[Callable[[], None]] = field(default_factory=list)

    def set(self, **values: str) -> None:
        self.form = replace(self.form, **values)  # type: ignore[arg-type]
        self.changed()

    def set_key(self, key: str, value: str) -> None:
        self.form = replace(self.form, values={**self.form.values, key: value})
        self.changed()

    def changed(self) -> None:
        for function in self.on_change:
            function()


def register(studio: Studio) -> None:
    """Add the page to the application."""

    @ui.page("/train")
    def train_page(request: Request) -> None:
        with frame(request, "train") as say:
            names, bases = studio.folders.data_files(), studio.folders.bases()
            if not bases:
                widgets.note(say("no base"), "warn")
                widgets.command(say("command"), commands.make("model", model=EXAMPLE_BASE))
            if not names:
                widgets.note(say("no files"), "warn")
            _running(studio, say)
            if names and bases:
                _page(studio, from_query(dict(request.query_params), names, bases, studio.folders), say)


def from_query(query: dict[str, str], names: list[str], bases: list[str], folders: Folders) -> Form:
    """The form that an address stands for; what it does not say has its usual value."""
    data, model, recipe = query.get("data", ""), query.get("model", ""), query.get("recipe", "")
    data = data if data in names else names[0]
    model = model if model in bases else bases[0]
    recipe = recipe if recipe in recipe_form.recipes() else DEFAULT_RECIPE
    known = {one.key for one in recipe_form.fields(recipe)}
    values = {key: value for key, value in query.items() if key in known}
    run = query.get("run", "") or free_run(data, folders)
    return Form(data, model, recipe, run, query.get("parent", ""), query.get("card", ""), values)


def to_address(form: Form) -> str:
    """The address of a form, so that a reload loses nothing."""
    own = {"data": form.data, "model": form.model, "recipe": form.recipe, "run": form.run}
    more = {"parent": form.parent, "card": form.card, **form.values}
    return widgets.address("train", **own, **{key: value for key, value in more.items() if value})


def free_run(data: str, folders: Folders) -> str:
    """A name for a run on this file that no run has."""
    stem = re.sub(r"[^\w-]+", "-", data.rsplit("/", 1)[-1].split(".", 1)[0]).strip("-") or "run"
    name, number = stem, 2
    while (folders.runs / name).exists():
        name, number = f"{stem}-{number}", number + 1
    return name


def _running(studio: Studio, say: Say) -> None:
    for job in studio.jobs.all():
        if job.verb == "train" and studio.jobs.is_running(job):
            name = job.values.get("run", "")
            with widgets.tag("p", "note"):
                widgets.text("span", f"{name}: {say('running')}. ")
                widgets.link(say("show"), widgets.address("run", name=name))


def _page(studio: Studio, form: Form, say: Say) -> None:
    typed = Typed(form)
    with widgets.tag("div", "two"):
        with widgets.tag("div"):
            _choices(studio, typed, say)
            _keys(typed, say)
        with widgets.tag("div", "beside"):
            _plan(studio, typed, say)
            _start(studio, typed, say)

    def show_address() -> None:
        """The address says what was typed, without loading the page again."""
        ui.run_javascript(f"history.replaceState(history.state, '', {json.dumps(to_address(typed.form))})")

    typed.on_change.append(show_address)


def _choices(studio: Studio, typed: Typed, say: Say) -> None:
    form, folders = typed.form, studio.folders
    pairs = ((name, name) for name in folders.data_files())
    widgets.select(say("data"), pairs, form.data, lambda v: typed.set(data=v), "data")
    widgets.select(say("base"), ((n, n) for n in folders.bases()), form.model, lambda v: typed.set(model=v), "model")
    recipes = ((name, name) for name in recipe_form.recipes())

    def other_recipe(value: str) -> None:
        typed.form = replace(typed.form, recipe=value)
        ui.navigate.to(to_address(typed.form))  # with that recipe's values in the fields

    widgets.select(say("recipe"), recipes, form.recipe, other_recipe, "recipe")
    widgets.entry(say("run name"), form.run, lambda v: typed.set(run=v), "run")
    parents = [("", say("none")), *((name, name) for name in folders.run_names())]
    widgets.select(say("from run"), parents, form.parent, lambda v: typed.set(parent=v), "parent")


def _keys(typed: Typed, say: Say) -> None:
    fields = recipe_form.fields(typed.form.recipe)
    with widgets.tag("div", "pairs"):
        for one in fields:
            if one.is_main:
                _key(one, typed)
    with widgets.tag("details"):
        widgets.text("summary", say("all keys"))
        with widgets.tag("div", "pairs"):
            for one in fields:
                if not one.is_main:
                    _key(one, typed)


def _key(one: Field, typed: Typed) -> None:
    given = typed.form.values.get(one.key, "")

    def changed(value: str) -> None:
        typed.set_key(one.key, value)

    if one.choices:
        widgets.select(one.key, ((c, c) for c in one.choices), given or one.value, changed, one.key, one.help)
    else:
        widgets.entry(one.key, given, changed, one.key, one.help, placeholder=one.value)


def _plan(studio: Studio, typed: Typed, say: Say) -> None:
    with widgets.section(say("plan")):
        widgets.entry(say("card"), typed.form.card, lambda v: typed.set(card=v), "card", placeholder="8G")
        line = _command_line(say, lambda: command("plan", recipe_form.plan_words(typed.form, studio.folders)), typed)
        widgets.button(say("plan button"), lambda: predict(), "quiet")
        place = widgets.tag("div")

    async def predict() -> None:
        place.clear()
        line()
        form = typed.form
        with place:
            waiting = widgets.note(say("planning"))
            follow(studio, studio.jobs.start("plan", recipe_form.plan_words(form, studio.folders)), say, stop=False)
        found = await aside(_time, form, studio.folders, say)
        waiting.set_text(found)


def _time(form: Form, folders: Folders, say: Say) -> str:
    """How long it will take, in words."""
    try:
        recipe, path = recipe_form.check(form, folders), folders.data_file(form.data)
        speed = recipe_form.known_speed(form.model, folders)
        tokens = 0 if recipe.steps or not speed else look(path, recipe, folders).tokens
    except UserError as error:
        return str(error)
    needed = recipe_form.tokens_of(recipe, tokens)
    if not speed or not needed:
        return say("no time")
    seconds = recipe_form.duration(needed / speed.tokens_per_second)
    return say("time", seconds, speed.run, f"{speed.tokens_per_second:,.0f}")


def _command_line(say: Say, line: Callable[[], str], typed: Typed) -> Callable[[], None]:
    """A command that follows what is typed."""
    with widgets.tag("div", "command"):
        widgets.text("small", say("command"))
        shown = widgets.text("code", _safely(line))

    def update() -> None:
        shown.set_text(_safely(line))

    typed.on_change.append(update)
    return update


def _safely(line: Callable[[], str]) -> str:
    try:
        return line()
    except UserError as error:
        return str(error)


def _start(studio: Studio, typed: Typed, say: Say) -> None:
    with widgets.section(say("start")):
        _command_line(say, lambda: command("train", recipe_form.train_words(typed.form, studio.folders)), typed)
        problem = widgets.text("p", "", "problem", role="alert")

        def start() -> None:
            try:
                recipe_form.check(typed.form, studio.folders)
                begin(studio, typed.form.run, recipe_form.train_words(typed.form, studio.folders))
            except UserError as error:
                problem.set_text(str(error))
                return
            ui.navigate.to(widgets.address("run", name=typed.form.run))

        widgets.button(say("start"), start, "main")


def begin(studio: Studio, run: str, words: list[str]) -> None:
    """Start `train` unless the run is being trained already.

    Raises:
        UserError: it is.
    """
    job = studio.jobs.of_run(run)
    if job and studio.jobs.is_running(job):
        raise UserError(f"run={run} is being trained already.")
    studio.jobs.start("train", words)
