"""Options of a command: frozen dataclasses filled from `key=value` words.

Refuses to know what an option does. All problems of one command line are gathered and raised once.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import field
from typing import Any, TypeVar

from train.common.errors import UserError

T = TypeVar("T")


SWITCH = {"on": True, "true": True, "yes": True, "1": True, "off": False, "false": False, "no": False, "0": False}


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field with the line that --help prints."""
    return field(default=default, metadata={"help": help, "choices": choices})


def pairs(words: Sequence[str]) -> dict[str, str]:
    """["a=1", "b=x y"] -> {"a": "1", "b": "x y"}; raises one UserError that lists every word without '='."""
    bad = [word for word in words if "=" not in word]
    if bad:
        raise UserError(f"expected key=value, found {', '.join(map(repr, bad))}. Example: run=demo")
    return dict(word.split("=", 1) for word in words)


def build(cls: type[T], values: dict[str, str], where: str = "") -> T:
    """An instance of dataclass `cls` from strings; gathers all problems into one UserError."""
    kinds = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    problems, done = [], {}
    for key, text in values.items():
        if key not in fields:
            problems.append(unknown_key(key, list(fields)))
            continue
        try:
            done[key] = _convert(text, kinds[key], fields[key].metadata.get("choices"))
        except ValueError as error:
            problems.append(f"{key}={text}: {error}")
    if problems:
        prefix = f"{where}: " if where else ""
        raise UserError("\n".join(prefix + p for p in problems))
    return cls(**done)


def unknown_key(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.5)
    return f"unknown key {key!r}." + (f" Did you mean {near[0]}=?" if near else f" Known keys: {', '.join(known)}")


def _convert(text: str, kind: Any, choices: tuple[str, ...] | None) -> Any:
    if isinstance(kind, types.UnionType):  # only `X | None` is used: an empty value is None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
        if text == "":
            return None
    if choices and {"on", "off"} <= set(choices) and text.lower() in SWITCH:  # YAML's own words, and older recipes'
        text = "on" if SWITCH[text.lower()] else "off"
    if choices and text not in choices:
        raise ValueError(f"expected one of {', '.join(choices)}")
    if kind is bool:
        if text.lower() not in SWITCH:
            raise ValueError("expected on or off")
        return SWITCH[text.lower()]
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"expected {'a whole number' if kind is int else 'a number'}") from None


def describe(cls: type) -> str:
    """The table of keys that --help prints: `key=default  help (choices)`."""
    lines = []
    for f in dataclasses.fields(cls):
        default = {True: "on", False: "off"}[f.default] if isinstance(f.default, bool) else f.default
        choices = f" ({' | '.join(c for c in f.metadata['choices'] if c)})" if f.metadata.get("choices") else ""
        lines.append(f"  {f'{f.name}={default}':34} {f.metadata.get('help', '')}{choices}")
    return "\n".join(lines)
