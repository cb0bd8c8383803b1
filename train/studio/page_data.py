"""The data page: upload or pick a file, its mistakes by line, mending, its counts, lengths and mask."""

import json

from fastapi import Request
from nicegui import ui

from train.common import commands
from train.common.errors import UserError
from train.config.recipe import load_recipe
from train.pages.token_text import Shown
from train.studio import widgets
from train.studio.data_view import DataView, look, mended_name
from train.studio.folders import KINDS
from train.studio.guard import UPLOAD
from train.studio.layout import Say, Studio, aside, follow, frame

RECIPE = "qlora"  # whose length and template count
SENDS = """async (event) => {
  const file = event.target.files[0], status = document.getElementById('upload-status');
  if (!file) return;
  status.textContent = STARTED;
  const reply = await fetch(PATH + '?name=' + encodeURIComponent(file.name), {method: 'PUT', body: file});
  const found = await reply.text();
  if (reply.ok) window.location = PAGE + '?file=' + encodeURIComponent(found);
  else status.textContent = found;
}"""


def register(studio: Studio) -> None:
    """Add the page to the application."""

    @ui.page(widgets.address("data"))
    def data_page(request: Request, file: str = "", base: str = "") -> None:
        with frame(request, "data") as say:
            _upload(studio, say)
            names, bases = studio.folders.data_files(), studio.folders.bases()
            if not names:
                widgets.note(say("no files"))
                return
            base = base if base in bases else bases[0] if bases else ""
            _pick(names, bases, file, base, say)
            if file:
                _file(studio, file, base, say)


def _upload(studio: Studio, say: Say) -> None:
    with widgets.tag("div", "field"):
        widgets.text("label", say("upload"), for_="upload")
        field = widgets.tag("input", type="file", id="upload", accept=",".join(KINDS))
        script = SENDS.replace("STARTED", json.dumps(say("uploading"))).replace("PATH", json.dumps(UPLOAD))
        script = script.replace("PAGE", json.dumps(widgets.address("data")))
        field.on("change", js_handler=script)
        widgets.text("small", say("upload note", studio.upload >> 20, " ".join(KINDS)))
        widgets.text("p", "", id="upload-status", role="status")


def _pick(names: list[str], bases: list[str], file: str, base: str, say: Say) -> None:
    chosen = {"file": file if file in names else names[0], "base": base}
    with widgets.tag("div", "form"):
        widgets.select(say("file"), ((n, n) for n in names), chosen["file"], lambda v: chosen.update(file=v), "file")
        if bases:
            pairs = ((n, n) for n in bases)
            widgets.select(say("base for tokens"), pairs, base, lambda v: chosen.update(base=v), "base")
        widgets.button(say("check"), lambda: ui.navigate.to(widgets.address("data", **chosen)))


def _file(studio: Studio, name: str, base: str, say: Say) -> None:
    try:
        path = studio.folders.data_file(name)
    except UserError as error:
        widgets.note(str(error), "bad", role="alert")
        return
    with widgets.section(name):
        words = {"model": base} if base else {}
        widgets.command(say("command"), commands.make("data", data=path, **words))
        waiting = widgets.note(say("checking"))
        found = widgets.tag("div")

    async def fill() -> None:
        recipe = load_recipe(RECIPE, words)
        view = await aside(look, path, recipe, studio.folders)
        waiting.delete()
        with found:
            _show(studio, name, view, say)

    ui.timer(0.05, fill, once=True)


def _show(studio: Studio, name: str, view: DataView, say: Say) -> None:
    if view.error:
        widgets.note(view.error, "bad", role="alert")
    elif view.problems:
        _mistakes(view, say)
        _mend(studio, name, view, say)
    else:
        widgets.note(say("no mistakes"), "good")
        _sound(name, view, say)


def _mistakes(view: DataView, say: Say) -> None:
    widgets.note(say("mistakes", f"{view.problems:,}"), "bad", role="alert")
    heads = [say(key) for key in ("where", "found", "expected", "remedy")]
    widgets.table(
        say("mistakes", ""),
        heads,
        ((one.where, one.found, one.expected, one.remedy) for one in view.mistakes),
        "mistakes",
    )
    if view.problems > len(view.mistakes):
        widgets.text("p", say("more", f"{view.problems - len(view.mistakes):,}"))


def _mend(studio: Studio, name: str, view: DataView, say: Say) -> None:
    if not view.can_mend:
        return
    path = studio.folders.data_file(name)
    words = [f"data={path}", "fix=1"]
    mended = mended_name(name)
    with widgets.section(say("fix")):
        widgets.text("p", say("fix note"))
        place = widgets.tag("div")

        def offer() -> None:
            if (studio.folders.data / mended).is_file():
                widgets.link(say("open mended"), widgets.address("data", file=mended), "button")

        def start() -> None:
            place.clear()
            with place:
                job = studio.jobs.start("data", words)
                after = widgets.tag("div")

                def ended() -> None:
                    with after:
                        offer()

                follow(studio, job, say, ended)

        with place:
            widgets.command(say("command"), commands.make("data", data=path, fix=1))
            widgets.button(say("fix"), start)
            offer()


def _sound(name: str, view: DataView, say: Say) -> None:
    if view.reason:
        widgets.note(say("no tokens", view.reason), "warn")
    widgets.table(say("summary"), (), ((say(key), f"{number:,}") for key, number in view.counts), "facts")
    widgets.link(say("train on it"), widgets.address("train", data=name), "button")
    if view.lengths:
        widgets.chart(say("lengths"), view.lengths)
        if view.lengths.has_mark:
            widgets.text("p", say("lengths note"), "soft")
    with widgets.section(say("mask")):
        for shown in view.samples:
            _sample(shown)


def _sample(shown: Shown) -> None:
    """A conversation; what is learnt is marked."""
    widgets.text("h3", shown.location)
    with widgets.tag("div", "sample"):
        for stretch in shown.stretches:
            piece = "".join(stretch.pieces)
            widgets.text("mark" if stretch.trained else "span", piece, "learnt" if stretch.trained else "")
        if shown.left:
            widgets.text("span", " …")
