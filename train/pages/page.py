"""Self-contained pages: one HTML file with its style and its pictures, without a script, which loads nothing.

Knows templates and text, nothing of data sets and runs. Whatever a page shows of a data set or a run is text: jinja2
escapes every value, and `visible` writes out characters that would act on the text around them. Both languages are in
the page, and a switch of CSS alone shows one of them.
"""

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.common.files import write_text

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).with_name("templates")
# Control characters but tab and line feed, marks of direction, line and paragraph separators, invisible format
# characters, halves of a surrogate pair. Joiners stay: emoji and some scripts need them.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff"
    "\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """`text` with its hidden characters as ⟪U+202E⟫: they cannot turn, cut or hide the text around them."""
    return HIDDEN.sub(lambda match: f"⟪U+{ord(match.group()):04X}⟫", text)


def render(template: str, **values: Any) -> str:
    """The page of a file in templates/, with these values. Only values of `markup` are taken as HTML."""
    return _environment().get_template(template).render(values)


def write(path: Path, template: str, **values: Any) -> None:
    """Replace `path` by the page in one step."""
    write_text(path, render(template, **values))


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": "{:.1%}".format}
    return environment


def _shown(value: Any) -> Any:
    """What jinja2 escapes and writes in place of a value of a template."""
    return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def number(value: float) -> str:
    """12,345 for a whole number, otherwise four digits: 0.01234."""
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"
