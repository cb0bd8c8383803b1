"""make data HTML=1: the page, where it is, what is in it; nothing of a row is ever HTML."""

import json
from pathlib import Path

import pytest

from tests.pages.reading import Reader, check_loads_nothing
from tests.support.oracles import small_tokenizer
from train.__main__ import VERBS, main
from train.commands.needs import paths

HOSTILE = [
    "<script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    '" onmouseover="alert(1)" x=\'',
    "</pre></main></body></html><h1>out</h1>",
    "<!-- <style> ]]> &lt;b&gt; &#60;i&#62;",
    "<a href='javascript:alert(1)'>javascript:alert(1)</a>",
    "{{ 7 * 7 }}{% include 'x' %}",
    "turn \u202e around \u2066 and \u200f",
    "NUL \0 and ESC \x1b[31m 👨‍👩‍👧 🙂 你好",
    "w" * 20_000,
]


def run(*words: object) -> int:
    return main(["data", *(str(word) for word in words)])


def write(path: Path, texts: list[str], **keys: str) -> Path:
    rows = [{"instruction": text, "output": text[::-1] if text.isalpha() else text, **keys} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with one base, whose tokens are bytes."""
    folder = tmp_path / "models" / "bytes"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    small_tokenizer(folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def page_of(path: Path) -> Reader:
    return check_loads_nothing(path.read_text(encoding="utf-8"))


def without_widths(reader: Reader) -> list[tuple[str, dict[str, str | None]]]:
    """The elements without the style of a bar's width, which is a number of the data."""
    return [(tag, {key: value for key, value in a.items() if key != "style"}) for tag, a in reader.elements]


def test_where_the_page_is_stands_in_the_last_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(here / "my data.jsonl", ["one", "two"])
    assert run("data=my data.jsonl", "html=1", "model=bytes") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "runs/my-data.data.html: the page of this data, for a browser."
    assert [path.name for path in (here / "runs").iterdir()] == ["my-data.data.html"]
    first = (here / "runs/my-data.data.html").read_bytes()
    assert run("data=my data.jsonl", "html=other.html", "model=bytes") == 0
    assert (here / "other.html").read_bytes() == first, "equal data give equal bytes"


@pytest.mark.parametrize("model", ["bytes", "absent"])
def test_nothing_of_a_row_is_html(here: Path, model: str) -> None:
    """A page of hostile rows has the elements of a page of plain ones, and the very same attributes."""
    plain = [text if len(text) > 1000 else f"plain text {n}" for n, text in enumerate(HOSTILE)]
    pages = []
    for texts, key in ((HOSTILE, "<b>key</b>"), (plain, "key")):
        write(here / "rows.jsonl", texts, **{key: "1"})
        assert run("data=rows.jsonl", "html=1", f"model={model}", "near=1") == 0
        pages.append(page_of(here / "runs/rows.data.html"))
    hostile, harmless = pages
    assert hostile.tags - {"path"} == harmless.tags - {"path"}  # the mark in the picture of lengths
    if model == "absent":  # with tokens there is an element for each
        assert without_widths(hostile) == without_widths(harmless)
    assert all(text in hostile.text.replace("⏎\n", "\n") for text in HOSTILE[:7])
    assert "turn ⟪U+202E⟫ around ⟪U+2066⟫ and ⟪U+200F⟫" in hostile.text and "NUL ⟪U+0000⟫" in hostile.text
    assert '"<b>key</b>" (10 rows)' in hostile.text


def test_hostile_names_and_mistakes_are_text_too(here: Path) -> None:
    name = "<img src=x onerror=alert(1)>.jsonl"
    (here / name).write_text('{"instruction": "q", "output": 5}\n{"<script>": "\\u202e"}\n')
    assert run(f"data={name}", "html=page.html") == 2
    reader = page_of(here / "page.html")
    assert "<img src=x onerror=alert(1)>.jsonl:1:" in reader.text and '"<script>"' in reader.text


def test_samples_show_tokens_and_what_is_learnt(here: Path) -> None:
    write(here / "rows.jsonl", ["ab"])
    run("data=rows.jsonl", "html=1", "model=bytes", "system=")
    page = (here / "runs/rows.data.html").read_text(encoding="utf-8")
    sample = page.partition("<pre")[2].partition("</pre>")[0]
    learnt = sample.partition('<span class="learnt">')[2].partition("</span>")[0]
    assert learnt == "<i>b</i><i>a</i><i>&lt;|im_end|&gt;</i>"
    assert "<i>&lt;|im_start|&gt;</i><i>u</i>" in sample
    assert "25 tokens" in page


def test_the_page_has_the_numbers_of_the_terminal(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(here / "rows.jsonl", ["one", "two", "two", "a question of some length", "a question of some length!"])
    words = ("data=rows.jsonl", "html=1", "model=bytes", "clean=exact_duplicates", "held_out=1", "overlong=skip")
    assert run(*words, "length=90") == 0
    printed = capsys.readouterr().out
    text = " ".join(page_of(here / "runs/rows.data.html").text.split())
    assert "exact_duplicates 1; 4 of 5 rows stay" in printed
    for part in ("exact_duplicates1 left out:", "held out留出1 of 4 conversations", "trained on用于训练的对话3"):
        assert part in text, part


def test_mistakes_are_all_on_the_page_with_their_places(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*['{"instruction": "q", "output": "a", "tag": 1}'] * 3, *['{"instruction": "q"}'] * 80, '{"a": 1}']
    (here / "bad.jsonl").write_text("\n".join(rows) + "\n")
    assert run("data=bad.jsonl", "html=1", "model=bytes") == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1] == "runs/bad.data.html: the page of these problems, for a browser."
    reader = page_of(here / "runs/bad.data.html")
    assert "bad.jsonl:4:1" in reader.text and '"tag" (3 rows)' in reader.text and "sound conversations" in reader.text
    assert "bad.jsonl:84:1" in reader.text and 'Alpaca: {"instruction": ' in reader.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("html=page.txt",), "expected 1, or the name of a page: HTML=data.html"),
        (("html=rows.html",), "is a file that was read"),
        (("html=none/page.html",), "mkdir -p none"),
        (("html=1", "fix=1"), "html= is for its result"),
    ],
)
def test_a_page_never_replaces_something_else(
    here: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(here / "rows.html", ["a"]).read_bytes()
    assert run("data=rows.html", *words) == 2
    assert message in capsys.readouterr().err
    assert (here / "rows.html").read_bytes() == rows and not (here / "runs").exists()


def test_off_is_no_page(here: Path) -> None:
    write(here / "rows.jsonl", ["a"])
    assert run("data=rows.jsonl", "html=0", "model=bytes") == 0 and not (here / "runs").exists()


def test_a_container_gets_the_folder_of_a_named_page() -> None:
    data = VERBS["data"]
    assert ("write", "/x") in paths("data", data, ["data=a", "html=/x/y.html"])
    assert paths("data", data, ["data=a", "html=1"]) == [("read", "a")]
