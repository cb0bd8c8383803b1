"""Pages: every value is text, whatever is in it; hidden characters are written out; a missing value is an error."""

from pathlib import Path

import jinja2
import pytest

from train.pages import page

HOSTILE = [
    "<script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    "\" onmouseover='alert(1)'",
    "</pre></main></body><h1>",
    "<!-- ",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt;",
    "javascript:alert(1)",
]


@pytest.fixture
def template(monkeypatch: pytest.MonkeyPatch) -> None:
    """A template of one value, in a text and in an attribute."""
    loader = jinja2.DictLoader({"one.html": '<p title="{{ value }}">{{ value }}</p>', "none.html": "{{ absent }}"})
    environment = page._environment().overlay(loader=loader)
    monkeypatch.setattr(page, "_environment", lambda: environment)


@pytest.mark.parametrize("text", HOSTILE)
def test_values_are_escaped_in_texts_and_attributes(template: None, text: str) -> None:
    rendered = page.render("one.html", value=text)
    inside = rendered.removeprefix('<p title="').removesuffix("</p>").split('">')
    assert len(inside) == 2 and inside[0] == inside[1]
    assert not set("<>\"'") & set(inside[0])
    from html import unescape

    assert unescape(inside[0]) == text


def test_hidden_characters_are_written_out(template: None) -> None:
    text = "a\u202eb\0c\ufeffd\u200be\ud800f\u2028g\rh\x1b[31m"
    shown = "a⟪U+202E⟫b⟪U+0000⟫c⟪U+FEFF⟫d⟪U+200B⟫e⟪U+D800⟫f⟪U+2028⟫g⟪U+000D⟫h⟪U+001B⟫[31m"
    assert page.visible(text) == shown
    assert page.render("one.html", value=text) == f'<p title="{shown}">{shown}</p>'


def test_what_a_person_sees_stays() -> None:
    for text in ("你好，世界\n\tx", "👨‍👩‍👧 ❤️ 🇨🇳", "e\u0301", "\u3000全角", "عربي"):
        assert page.visible(text) == text


def test_a_value_that_is_missing_is_an_error(template: None) -> None:
    with pytest.raises(jinja2.UndefinedError):
        page.render("none.html")


def test_a_page_is_replaced_in_one_step(template: None, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    page.write(path, "one.html", value="1")
    with pytest.raises(jinja2.UndefinedError):
        page.write(path, "none.html")
    assert path.read_text() == '<p title="1">1</p>' and [p.name for p in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (12345, "12,345"), (0.01, "0.01"), (2.0, "2"), (1e-5, "1e-05"), (1234.5, "1,234")]
)
def test_numbers(value: float, text: str) -> None:
    assert page.number(value) == text


def test_no_template_turns_escaping_off() -> None:
    for path in page.TEMPLATES.iterdir():
        text = path.read_text(encoding="utf-8")
        assert "|safe" not in text.replace(" ", "") and "autoescape" not in text, path.name
