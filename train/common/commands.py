"""Commands that are printed for a person to paste into a shell: quoted, with the folders that are not the usual ones."""

import re
import shlex
from collections.abc import Sequence

USUAL = {"models": "models", "runs": "runs"}  # folders that a command need not name


def make(target: str, args: Sequence[str] = (), /, **keys: object) -> str:
    """`make TARGET KEY=value …`, each value quoted for the shell; empty values and the usual folders are left out.

    Args:
        args: key=value words without a key of make's own, for ARGS=.
    """
    given = {key: str(value) for key, value in keys.items() if str(value) != USUAL.get(key, "")}
    words = [f"{key.upper()}={_quote(value)}" for key, value in given.items()]
    return " ".join(["make", target, *words, *([f"ARGS={_quote_args(args)}"] if args else [])])


def _quote(value: str) -> str:
    return value if re.fullmatch("[\\w@%+=:,./…-]*", value) else shlex.quote(value)  # \w: Chinese needs no quotes


def _quote_args(args: Sequence[str]) -> str:
    """Words for ARGS=, which the shell splits once more."""
    text = " ".join(shlex.quote(word) for word in args)
    return shlex.quote(text) if re.search(r'["$`\\!]', text) else f'"{text}"'
