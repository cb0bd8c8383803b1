"""Options of a command: a frozen dataclass filled from `key=value` words.

This module does not know what an option does. All mistakes of a command line are collected and raised together.
"""

import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from train.common.errors import UserError

T = TypeVar("T")
R = TypeVar("R", bound="RecipeOptions")

MAX_SHOWN = 80  # characters of a value in a message
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # a byte of the command line that is not UTF-8
SEEDS = "[-9007199254740991, 9007199254740991]"  # whole numbers that every reader of JSON keeps (2^53 - 1)
AUTO, AUTO_WORD = 0, "auto"  # a number that the program chooses, and how it is written
SWITCH = {"on": True, "true": True, "yes": True, "1": True, "off": False, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class Interval:
    """The numbers from `low` to `high`; with_low, with_high: whether the ends belong to it. NaN is in no interval."""

    low: float
    high: float
    with_low: bool
    with_high: bool

    @classmethod
    def parse(cls, text: str) -> "Interval":
        """ "[0, 1)" -> from 0 to below 1."""
        low, high = (float(part) for part in text[1:-1].split(","))
        return cls(low, high, text[0] == "[", text[-1] == "]")

    def __contains__(self, value: float) -> bool:
        above = self.low <= value if self.with_low else self.low < value
        return above and (value <= self.high if self.with_high else value < self.high)

    def __str__(self) -> str:
        low, high = _plain(self.low), _plain(self.high)
        if self.with_low and self.with_high:
            return f"from {low} to {high}"
        return f"{'from' if self.with_low else 'above'} {low}, {'at most' if self.with_high else 'below'} {high}"


def _plain(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"


def option(
    default: Any,
    help: str,
    choices: tuple[str, ...] | None = None,
    interval: str = "",
    may_be_empty: bool | None = None,
    each: tuple[str, ...] | None = None,
    auto: bool = False,
) -> Any:
    """A dataclass field that can be given as key=value.

    Args:
        help: its line in --help.
        interval: the values of a number, in mathematical notation: "[0, 1)" is from 0 to below 1. Every number has
            one, so that infinity, NaN and absurd sizes are refused before anything is loaded.
        may_be_empty: whether a text may be ""; None: only if its default is.
        each: the text is a list of these words, with commas between.
        auto: `auto` may be given instead of a number; its value is then AUTO.
    """
    values = Interval.parse(interval) if interval else None
    empty = default == "" if may_be_empty is None else may_be_empty
    metadata = {"help": help, "choices": choices, "interval": values, "empty": empty, "each": each, "auto": auto}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """Base class for the options of a command that also accepts every key of a recipe."""

    overrides: dict[str, str] = field(default_factory=dict)  # keys of the recipe, as typed

    def words(self) -> list[str]:
        """The command line that gives these options."""
        own = {name: str(getattr(self, name)) for name in _options(type(self))}
        return [f"{key}={value}" for key, value in {**self.overrides, **own}.items()]


def pairs(words: Sequence[str]) -> dict[str, str]:
    """["a=1", "b=x y"] -> {"a": "1", "b": "x y"}.

    Raises:
        UserError: words without "=", or a key with two values; all of them are listed.
    """
    bad = [word for word in words if "=" not in word]
    if bad:
        raise UserError(f"expected key=value, found {', '.join(map(repr, bad))}. Example: run=demo")
    values: dict[str, str] = {}
    twice = []
    for key, value in (word.split("=", 1) for word in words):
        if values.setdefault(key, value) != value:
            twice.append(f"{key} is given twice, as {values[key]!r} and as {value!r}. Give it once.")
    if twice:
        raise UserError("\n".join(twice))
    return values


def build(cls: type[T], values: dict[str, str], where: str = "", bounded: bool = True) -> T:
    """An instance of dataclass `cls` from strings.

    Args:
        where: the file or command that the values come from, for the error message.
        bounded: refuse values outside their interval. False to read the record of an old run, whatever it trained with.
    Raises:
        UserError: unknown keys, values of the wrong type and values out of range, all of them.
    """
    types_of = typing.get_type_hints(cls)
    fields = _options(cls)
    problems, converted = [], {}
    for key, text in values.items():
        if key not in fields:
            problems.append(unknown_key(key, list(fields)))
            continue
        try:
            converted[key] = _convert(text, types_of[key], fields[key].metadata, bounded)
        except ValueError as error:
            problems.append(f"{key}={shown(text)}: {error}")
    if problems:
        prefix = f"{where}: " if where else ""
        raise UserError("\n".join(prefix + p for p in problems))
    return cls(**converted)


def build_with_overrides(cls: type[R], values: dict[str, str], recipe: type | None = None) -> R:
    """Options of `cls` from strings; every key that is not an option of the command goes into `overrides`.

    Args:
        recipe: the dataclass that has these other keys. None = accept any key: the command checks them itself.
    Raises:
        UserError: keys that neither has, or options of the wrong type.
    """
    own = _options(cls)
    if recipe is not None:
        known = sorted({*own, *_options(recipe)})
        if unknown := [key for key in values if key not in known]:
            raise UserError("\n".join(unknown_key(key, known) for key in unknown))
    options = build(cls, {key: value for key, value in values.items() if key in own})
    overrides = {key: value for key, value in values.items() if key not in own}
    return dataclasses.replace(options, overrides=overrides)


def unknown_key(key: str, known: list[str]) -> str:
    """The error message for a key that does not exist: it names the nearest one that does."""
    near = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.5)
    return f"unknown key {key!r}." + (f" Did you mean {near[0]}=?" if near else f" Known keys: {', '.join(known)}")


def describe(cls: type) -> str:
    """The table of keys that --help prints: `key=default  help (choices)`."""
    lines = []
    for f in _options(cls).values():
        default = {True: "on", False: "off"}[f.default] if isinstance(f.default, bool) else f.default
        default = AUTO_WORD if f.metadata["auto"] and default == AUTO else default
        choices = f" ({' | '.join(c for c in f.metadata['choices'] if c)})" if f.metadata["choices"] else ""
        choices = choices or (f" ({f.metadata['interval']})" if f.metadata["interval"] else "")
        choices = choices or (f" ({', '.join(f.metadata['each'])})" if f.metadata["each"] else "")
        lines.append(f"  {f'{f.name}={default}':34} {f.metadata['help']}{choices}")
    return "\n".join(lines)


def _options(cls: type) -> "dict[str, dataclasses.Field[Any]]":
    """The fields of a dataclass that `option` made."""
    return {f.name: f for f in dataclasses.fields(cls) if "help" in f.metadata}


def shown(text: str) -> str:
    """`text` as a message shows it: short, and characters that cannot be printed as their code."""
    short = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}… ({len(text):,} characters)"
    return short.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def _convert(text: str, kind: Any, metadata: Mapping[str, Any], bounded: bool) -> Any:
    choices: tuple[str, ...] | None = metadata["choices"]
    if choices and {"on", "off"} <= set(choices) and text.lower() in SWITCH:  # YAML reads on as True; so do old recipes
        text = "on" if SWITCH[text.lower()] else "off"
    if choices and text not in choices:
        raise ValueError(f"expected one of {', '.join(filter(None, choices))}")
    if kind is bool:
        if text.lower() not in SWITCH:
            raise ValueError("expected on or off")
        return SWITCH[text.lower()]
    if metadata["each"]:
        return _check_words(text, metadata["each"])
    if kind is str:
        return _check_text(text, metadata["empty"] or not bounded)
    if metadata["auto"] and text.lower() == AUTO_WORD:
        return AUTO
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"expected {'a whole number' if kind is int else 'a number'}") from None
    if bounded and metadata["interval"] and value not in metadata["interval"]:
        raise ValueError(f"expected {'a whole number' if kind is int else 'a number'} {metadata['interval']}")
    return value


def _check_words(text: str, known: tuple[str, ...]) -> str:
    """A list of words with commas between, each once, without spaces."""
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    for word in words:
        if word not in known:
            near = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}"
            raise ValueError(f"{shown(word)!r} is none of its words. {hint}")
    return ",".join(words)


def _check_text(text: str, may_be_empty: bool) -> str:
    if not may_be_empty and not text.strip():
        raise ValueError("expected a text that is not empty. Leave the key out for its default")
    if "\0" in text:
        raise ValueError("expected a text without the character NUL")
    if LONE_SURROGATE.search(text):
        raise ValueError("expected UTF-8. For a file, rename it; for a text, set the terminal to UTF-8")
    return text
