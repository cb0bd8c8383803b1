"""Options from key=value words: types, errors that name the nearest key, and keys that belong to the recipe."""

import importlib
import math
from dataclasses import dataclass
from typing import Any

import pytest

from train.__main__ import VERBS
from train.common.errors import UserError
from train.config.options import Interval, RecipeOptions, _options, build, build_with_overrides, describe, option, pairs
from train.config.recipe import Recipe


@dataclass(frozen=True)
class Options(RecipeOptions):
    data: str = option("", "the data")
    gpus: int = option(1, "how many GPUs", interval="[0, 8]")
    share: float = option(0.5, "a number", interval="(0, 1]")
    quick: bool = option(False, "a switch")
    mode: str = option("on", "a choice that YAML may turn into a bool", ("on", "off", "offload"))


def test_words_become_values_of_the_declared_type() -> None:
    values = pairs(["data=a=b.json", "gpus=2", "share=1e-4", "quick=yes", "mode=True"])
    assert build(Options, values) == Options(data="a=b.json", gpus=2, share=1e-4, quick=True, mode="on")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gpus": "two"}, "gpus=two: expected a whole number"),
        ({"share": "half"}, "share=half: expected a number"),
        ({"quick": "maybe"}, "quick=maybe: expected on or off"),
        ({"mode": "card"}, "mode=card: expected one of on, off, offload"),
        ({"dat": "x"}, r"unknown key 'dat'. Did you mean data=\?"),
        ({"zzzzzz": "x"}, "unknown key 'zzzzzz'. Known keys: data, gpus, share, quick, mode"),
        ({"overrides": "x"}, "unknown key 'overrides'"),
    ],
)
def test_a_wrong_word_is_refused(values: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(Options, values)


def test_all_wrong_words_are_reported_together() -> None:
    with pytest.raises(UserError) as raised:
        build(Options, {"gpus": "two", "dat": "x"}, where="here")
    assert str(raised.value).splitlines() == [
        "here: gpus=two: expected a whole number",
        "here: unknown key 'dat'. Did you mean data=?",
    ]
    with pytest.raises(UserError, match=r"expected key=value, found 'x', '-v'"):
        pairs(["x", "data=1", "-v"])


def test_keys_of_the_recipe_are_kept_as_typed() -> None:
    options = build_with_overrides(Options, {"data": "x", "length": "9", "gpus": "3"}, Recipe)
    assert options == Options(data="x", gpus=3, overrides={"length": "9"})
    with pytest.raises(UserError, match=r"unknown key 'lenght'. Did you mean length=\?"):
        build_with_overrides(Options, {"lenght": "9"}, Recipe)
    assert build_with_overrides(Options, {"lenght": "9"}).overrides == {"lenght": "9"}


def test_words_give_the_same_options_again() -> None:
    options = Options(data="x", gpus=3, overrides={"length": "9"})
    assert build_with_overrides(Options, pairs(options.words()), Recipe) == options


@pytest.mark.parametrize("line", ["  data= ", "  gpus=1 ", "  quick=off ", "  mode=on "])
def test_help_has_a_line_for_each_option_and_none_for_overrides(line: str) -> None:
    table: Any = describe(Options)
    assert line in table and "overrides" not in table and "(on | off | offload)" in table


# Bounds

EVERY = {name: importlib.import_module(f"train.commands.{name}").Options for name in VERBS}
NUMBERS = [
    (name, key, f.metadata["interval"])
    for name, cls in {**EVERY, "recipe": Recipe}.items()
    for key, f in _options(cls).items()
    if isinstance(f.default, int | float) and not isinstance(f.default, bool) and not f.metadata["choices"]
]


def test_every_number_has_an_interval_that_holds_its_default_and_ends() -> None:
    assert len(NUMBERS) >= 35
    for name, key, interval in NUMBERS:
        field = _options({**EVERY, "recipe": Recipe}[name])[key]
        assert interval and (field.default in interval or field.metadata["auto"]), (name, key)
        assert math.isfinite(interval.low) and math.isfinite(interval.high), (name, key)


@pytest.mark.parametrize(("name", "key", "interval"), NUMBERS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_number_out_of_range_is_refused(name: str, key: str, interval: Interval) -> None:
    cls = {**EVERY, "recipe": Recipe}[name]
    whole = isinstance(_options(cls)[key].default, int)
    outside = ["nan", "inf", "-inf"] if not whole else [str(10**30), str(-(10**30))]
    step = 1 if whole else 1e-6 * max(abs(interval.low), abs(interval.high))
    outside += [f"{interval.low - step:.17g}" if not whole else str(int(interval.low) - 1)]
    outside += [f"{interval.high + step:.17g}" if not whole else str(int(interval.high) + 1)]
    outside += [f"{interval.low:g}"] * (not interval.with_low) + [f"{interval.high:g}"] * (not interval.with_high)
    for text in outside:
        with pytest.raises(UserError, match=rf"^{key}=.*: expected (a|a whole) number (from|above) "):
            build(cls, {key: text})


@pytest.mark.parametrize(
    "words",
    [
        "learning_rate=0", "learning_rate=-1e-4", "dropout=1", "dropout=1.5", "steps=-5", "rank=0", "beta1=1.5",
        "beta2=1", "zero=4", "epochs=inf", "epochs=nan", "batch=0", "accumulation=0", "keep=0", "length=1",
        "alpha=0", "epsilon=0", "clip=-1", "floor=1.1", "warmup=-1", "processes=0", "save_every=-1", "patience=nan",
        "weight_decay=-0.1", "seed=1e9", "rank=100000", "length=99999999999", "targets=", "model=",
    ],
)  # fmt: skip
def test_what_cannot_train_is_refused(words: str) -> None:
    key, _, text = words.partition("=")
    with pytest.raises(UserError, match=f"^{key}={text}: expected "):
        build(Recipe, {key: text})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("near_duplicate", "'near_duplicate' is none of its words. Did you mean near_duplicates[?]"),
        ("empty,xyzzy", "'xyzzy' is none of its words. Known: empty, control_characters"),
        ("on", "'on' is none of its words"),
    ],
)
def test_a_word_that_a_list_does_not_know_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(Recipe, {"clean": text})


def test_bounds_are_in_the_help_and_in_words() -> None:
    assert "empty: none (empty, control_characters, repeated_question" in describe(Recipe)
    assert "LoRA, VeRA: dropout before A (from 0, below 1)" in describe(Recipe)
    assert str(Interval.parse("(0, 1]")) == "above 0, at most 1"


@pytest.mark.parametrize("text", ["a\0b", "\udcc4\udce3"])
def test_texts_that_no_file_can_hold_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"data=.*: expected") as raised:
        build(Options, {"data": text})
    str(raised.value).encode()
    assert "\0" not in str(raised.value)


def test_a_key_with_two_values_is_refused() -> None:
    assert pairs(["rank=4", "rank=4"]) == {"rank": "4"}
    with pytest.raises(UserError, match="rank is given twice, as '4' and as '8'"):
        pairs(["rank=4", "data=x", "rank=8"])
