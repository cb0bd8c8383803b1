"""The few widgets of all pages, made of plain HTML elements: their texts are texts, whatever is in them.

An element gets its text as a text node and its attributes as values; no string of a person or of a file is read as HTML.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlencode

from nicegui import ui
from nicegui.element import Element
from nicegui.elements.mixins.text_element import TextElement

from train.pages.charts import Chart

Handler = Callable[[Any], Any]


def tag(name: str, css: str = "", /, **attributes: Any) -> Element:
    """An element for `with`; for_ and aria_label are the attributes for and aria-label."""
    return _dressed(ui.element(name), css, attributes)


def text(name: str, content: str, css: str = "", /, **attributes: Any) -> TextElement:
    """An element with a text."""
    element = TextElement(tag=name, text=content)
    _dressed(element, css, attributes)
    return element


def _dressed(element: Element, css: str, attributes: Mapping[str, Any]) -> Element:
    for key, value in attributes.items():
        element.props[key.rstrip("_").replace("_", "-")] = value
    for one in css.split():
        element.classes(one)
    return element


def address(page: str, **query: str) -> str:
    """Of a page of the studio."""
    return f"/{page}?{urlencode(query)}" if query else f"/{page}"


def link(label: str, to: str, css: str = "", **attributes: Any) -> TextElement:
    """A link within the studio."""
    return text("a", label, css, href=to, **attributes)


def button(label: str, on_click: Callable[[], Any], css: str = "") -> TextElement:
    element = text("button", label, f"button {css}", type="button")
    element.on("click", lambda _: on_click(), args=[])
    return element


def select(
    label: str, choices: Iterable[tuple[str, str]], value: str, on_change: Handler, name: str, hint: str = ""
) -> Element:
    """A labelled list of (value, text); `on_change` is told the value."""
    with tag("div", "field"):
        text("label", label, for_=name)
        with tag("select", id=name, name=name) as chosen:
            for key, shown in choices:
                option = text("option", shown, value=key)
                if key == value:
                    option.props["selected"] = True
        if hint:
            text("small", hint)
    chosen.on("change", lambda event: on_change(event.args), js_handler="(event) => emit(event.target.value)")
    return chosen


def entry(label: str, value: str, on_change: Handler, name: str, hint: str = "", placeholder: str = "") -> Element:
    """A labelled line of text; `on_change` is told it at each key."""
    with tag("div", "field"):
        text("label", label, for_=name)
        field = tag("input", id=name, name=name, type="text", placeholder=placeholder, autocomplete="off")
        field.props["defaultValue"] = value  # drawn again, `value` would undo what was typed since
        if hint:
            text("small", hint)
    field.on("input", lambda event: on_change(event.args), js_handler="(event) => emit(event.target.value)")
    return field


def box(label: str, value: bool, on_change: Handler, name: str) -> Element:
    """A box to tick; `on_change` is told whether it is."""
    with tag("div", "tick"):
        field = tag("input", id=name, name=name, type="checkbox")
        if value:
            field.props["checked"] = True
        text("label", label, for_=name)
    field.on("change", lambda event: on_change(bool(event.args)), js_handler="(event) => emit(event.target.checked)")
    return field


def command(label: str, line: str) -> None:
    """The command that a part of a page stands for."""
    with tag("div", "command"):
        text("small", label)
        text("code", line)


def table(label: str, heads: Sequence[str], rows: Iterable[Sequence[str]], css: str = "") -> None:
    """A table of texts that scrolls in itself on a narrow screen."""
    with tag("div", "wide", tabindex=0, role="region", aria_label=label), tag("table", css):
        if heads:
            with tag("thead"), tag("tr"):
                for head in heads:
                    text("th", head, scope="col")
        with tag("tbody"):
            for row in rows:
                with tag("tr"):
                    for cell in row:
                        text("td", cell)


def chart(title: str, drawn: Chart, keys: Sequence[tuple[str, str]] = ()) -> None:
    """A picture of numbers. keys: (class of a curve, its name)."""
    with tag("figure"):
        with tag("figcaption"):
            text("span", title)
            for css, name in keys:
                with tag("span", "keyed"):
                    tag("i", f"key {css}", aria_hidden="true")
                    text("span", name)
        with tag("div", "chart", role="img", aria_label=title):
            # charts.py makes this from numbers alone; all else on the pages is text
            ui.html(str(drawn.svg), sanitize=False).props["aria-hidden"] = "true"
            for tick in drawn.x_ticks:
                text("span", tick.text, "x").style(f"left: {tick.at:.2f}%")
            for tick in drawn.y_ticks:
                text("span", tick.text, "y").style(f"bottom: {tick.at:.2f}%")


def note(content: str, css: str = "", role: str = "status") -> TextElement:
    """A sentence that stands out; screen readers read it when it appears."""
    return text("p", content, f"note {css}", role=role)


@contextmanager
def section(title: str) -> Any:
    """A part of a page under a heading."""
    with tag("section") as element:
        text("h2", title)
        yield element
