"""The standard streams in any locale: no encoding of a terminal, no byte that is typed, no closed pipe ends in a traceback.

`set_up` is called once, by __main__.py. What a terminal's encoding lacks is shown as ?, and this is said once. Bytes of
the input that are not text in its encoding are kept (PEP 383), and `readable` makes text of them.
"""

import codecs
import io
import os
import select
import sys
from contextlib import suppress

CHINESE = {"gb2312", "gbk", "gb18030", "big5", "big5hkscs", "hz"}  # encodings in which two bytes are a character
CLOSED_PIPE = 141  # exit status, as a shell has it for a program that a closed pipe ends (128 + SIGPIPE)
HANDLER = "train.terminal"  # the error handler of this module


def set_up() -> None:
    """Let the standard streams read any bytes and write any text."""
    codecs.register_error(HANDLER, _Replacer())
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, HANDLER), (sys.stderr, HANDLER)):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(io.UnsupportedOperation):  # it was read before
                stream.reconfigure(errors=errors)


def understands_escapes() -> bool:
    """Whether the standard output is a terminal with colours and a cursor that moves."""
    return sys.stdout.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


class _Replacer:
    """Error handler of an encoder: bytes that came with a path go out as they are; what the encoding lacks becomes ?"""

    def __init__(self) -> None:
        self.said = False

    def __call__(self, error: UnicodeError) -> tuple[str | bytes, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        character = error.object[error.start]
        if "\udc80" <= character <= "\udcff":
            return bytes([ord(character) - 0xDC00]), error.start + 1
        if not self.said and "utf" not in error.encoding:
            self.said = True
            note = f"(this terminal's encoding is {error.encoding}: what it lacks is shown as ?. UTF-8: LC_ALL=C.UTF-8)"
            print(note, file=sys.stderr, flush=True)
        return "?", error.start + 1


def readable(text: str, encoding: str = "utf-8") -> str | None:
    """`text` as it was meant: bytes that are no text in `encoding` are read as UTF-8, else as GB18030 (GBK, GB2312).

    Args:
        text: decoded from `encoding` with surrogateescape.
    Returns:
        None if the bytes are text in none of these encodings.
    """
    name = codecs.lookup(encoding).name
    try:
        raw = text.encode(name, "surrogateescape")
    except UnicodeEncodeError:  # a lone surrogate of another kind
        return None
    own = [] if name in ("ascii", "utf-8") else [name]
    for candidate in [*own, "utf-8", "gb18030"] if name in CHINESE else ["utf-8", *own, "gb18030"]:
        with suppress(UnicodeDecodeError):
            found = raw.decode(candidate)
            return None if "\0" in found else found.removeprefix("\ufeff")  # NUL: UTF-16
    return None


def readable_word(word: str, keys: tuple[str, ...] = ("prompt", "system")) -> str:
    """A word of the command line; of `keys`, whose values are text and no paths, the value is made readable.

    Raises:
        ValueError: its bytes are no text.
    """
    key, equals, value = word.partition("=")
    if key not in keys or not any("\ud800" <= c <= "\udfff" for c in value):
        return word
    if (found := readable(os.fsencode(value).decode("utf-8", "surrogateescape"))) is None:
        raise ValueError(f"{key}=: these bytes are neither UTF-8 nor GB18030.")
    return f"{key}{equals}{found}"


def is_closed_pipe(error: BaseException) -> bool:
    """Whether `error` says that the reader of our output has closed it; a connection that broke is another matter.

    rich's Console closes the output itself, and raises SystemExit from BrokenPipeError.
    """
    if isinstance(error, SystemExit):
        return isinstance(error.__context__, BrokenPipeError)
    return isinstance(error, BrokenPipeError) and output_is_closed()


def output_is_closed() -> bool:
    """Whether the reader of the standard output or standard error has closed it."""
    return any(_is_closed(stream) for stream in (sys.stdout, sys.stderr))


def _is_closed(stream: object) -> bool:
    try:
        number = stream.fileno()  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False
    poll = select.poll()
    poll.register(number, select.POLLOUT)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def discard_output() -> None:
    """Send further output of a closed pipe nowhere, so that Python's own end does not complain either."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if _is_closed(stream):
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
