"""Options of a command: a frozen dataclass filled from `key=value` words.

This module does not know what an option does. All mistakes of a command line are collected and raised together.
"""

import dataclasses
import difflib
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from train.common.errors import UserError

T = TypeVar("T")
R = TypeVar("R", bound="RecipeOptions")

SWITCH = {"on": True, "true": True, "yes": True, "1": True, "off": False, "false": False, "no": False, "0": False}


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field that can be given as key=value. `help` is its line in --help."""
    return field(default=default, metadata={"help": help, "choices": choices})


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
        UserError: words without "="; all of them are listed.
    """
    bad = [word for word in words if "=" not in word]
    if bad:
        raise UserError(f"expected key=value, found {', '.join(map(repr, bad))}. Example: run=demo")
    return dict(word.split("=", 1) for word in words)


def build(cls: type[T], values: dict[str, str], where: str = "") -> T:
    """An instance of dataclass `cls` from strings.

    Args:
        where: the file or command that the values come from, for the error message.
    Raises:
        UserError: unknown keys and values of the wrong type, all of them.
    """
    types_of = typing.get_type_hints(cls)
    fields = _options(cls)
    problems, converted = [], {}
    for key, text in values.items():
        if key not in fields:
            problems.append(unknown_key(key, list(fields)))
            continue
        try:
            converted[key] = _convert(text, types_of[key], fields[key].metadata.get("choices"))
        except ValueError as error:
            problems.append(f"{key}={text}: {error}")
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
        choices = f" ({' | '.join(c for c in f.metadata['choices'] if c)})" if f.metadata["choices"] else ""
        lines.append(f"  {f'{f.name}={default}':34} {f.metadata['help']}{choices}")
    return "\n".join(lines)


def _options(cls: type) -> "dict[str, dataclasses.Field[Any]]":
    """The fields of a dataclass that `option` made."""
    return {f.name: f for f in dataclasses.fields(cls) if "help" in f.metadata}


def _convert(text: str, kind: Any, choices: tuple[str, ...] | None) -> Any:
    if choices and {"on", "off"} <= set(choices) and text.lower() in SWITCH:  # YAML reads on as True; so do old recipes
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
