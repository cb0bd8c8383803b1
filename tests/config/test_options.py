"""Options from key=value words: types, errors that name the nearest key, and keys that belong to the recipe."""

from dataclasses import dataclass
from typing import Any

import pytest

from train.common.errors import UserError
from train.config.options import RecipeOptions, build, build_with_overrides, describe, option, pairs
from train.config.recipe import Recipe


@dataclass(frozen=True)
class Options(RecipeOptions):
    data: str = option("", "the data")
    gpus: int = option(1, "how many GPUs")
    share: float = option(0.5, "a number")
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
