"""The standard streams: bytes that are no UTF-8, terminals that lack characters, pipes that close."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from train.common import terminal
from train.common.terminal import readable, readable_word

ROOT = Path(__file__).parents[2]
QUESTION = "你叫什么名字？"


def typed(raw: bytes, encoding: str) -> str:
    return raw.decode(encoding, "surrogateescape")


@pytest.mark.parametrize("terminal_encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("written_as", ["utf-8", "gbk", "gb2312", "gb18030"])
def test_chinese_is_read_as_it_was_written(written_as: str, terminal_encoding: str) -> None:
    found = readable(typed(QUESTION.encode(written_as), terminal_encoding), terminal_encoding)
    if terminal_encoding == "latin-1" and written_as != "utf-8":  # any bytes are latin-1: the terminal is believed
        assert found == QUESTION.encode(written_as).decode("latin-1")
    else:
        assert found == QUESTION


@pytest.mark.parametrize("raw", [QUESTION.encode("gbk"), "联通".encode("gbk"), "我".encode(), b"ok"])
def test_a_gbk_terminal_is_believed_where_its_bytes_are_gbk(raw: bytes) -> None:
    expected = raw.decode("utf-8") if raw == "我".encode() else raw.decode("gbk")
    assert readable(typed(raw, "gbk"), "gbk") == expected


@pytest.mark.parametrize("raw", [b"caf\xe9", b"\xff\xfeh\x00i\x00", b"\xff", b"\x80 \x80"])
def test_bytes_of_no_text_are_refused(raw: bytes) -> None:
    assert readable(typed(raw, "utf-8")) is None


def test_a_byte_order_mark_is_no_part_of_the_question() -> None:
    assert readable("\ufeffhi") == "hi"


def test_words_that_are_text_are_made_readable_and_paths_stay_bytes() -> None:
    value = os.fsdecode("数据".encode("gbk"))
    assert readable_word(f"prompt={value}") == "prompt=数据"
    assert readable_word(f"system={value}") == "system=数据"
    assert readable_word(f"data={value}") == f"data={value}"
    with pytest.raises(ValueError, match="prompt=: these bytes are neither"):
        readable_word("prompt=caf\udce9")


@pytest.mark.parametrize(
    ("encoding", "text", "written"),
    [
        ("utf-8", "a\udce9 好 \ud800", b"a\xe9 \xe5\xa5\xbd ?"),  # a path's bytes, and a surrogate that is none
        ("ascii", "a 好…\udce9", b"a ??\xe9"),
        ("gbk", "好 🙂", "好 ?".encode("gbk")),
    ],
)
def test_any_text_can_be_written(
    encoding: str, text: str, written: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    terminal.set_up()
    print(text, end="", flush=True)
    print(text, end="", flush=True)
    assert raw.getvalue() == 2 * written
    said = capsys.readouterr().err
    assert said.count("shown as ?") == (encoding != "utf-8")


def run_and_close(words: list[str], read: int) -> tuple[int, str]:
    """Run the program, read `read` bytes of its output, and close the pipe: exit status and standard error."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "train", *words]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(read)
    process.stdout.close()
    said = process.stderr.read().decode()
    return process.wait(timeout=60), said


@pytest.mark.parametrize(
    "words", [[], ["--help"], ["train", "--help"], ["infer", "--help"], ["needs", "train", "run=x"]]
)
def test_a_reader_that_closes_the_pipe_ends_the_program_quietly(words: list[str]) -> None:
    status, said = run_and_close(words, 0)
    assert said in ("", "stopped: the reader of the output has closed it. The same command continues.\n")
    assert status in (0, 2, terminal.CLOSED_PIPE)


def test_a_broken_pipe_of_something_else_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that the other side closed is no reader of ours."""
    from train import __main__

    def broken(verb: str, words: list[str]) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(__main__, "run", broken)
    with pytest.raises(BrokenPipeError):
        __main__.main(["model"])


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">/dev/full"])
def test_a_stream_that_is_closed_or_full_from_the_start_is_no_traceback(closed: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", "train", "infer", "--help"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and done.returncode in (0, 1)
