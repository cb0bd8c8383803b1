"""The form of a training run: fields from the recipe, words for `train` and `plan`, and how long it will take.

Knows no widgets and no meaning of a key.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from train.common.errors import UserError
from train.common.names import below
from train.config.recipe import RECIPES, Recipe, check_measured, check_preference, load_recipe
from train.data.tokens.settings import row_length
from train.pages import run_facts
from train.pages.run_facts import as_text
from train.studio.folders import Folders

MAIN = ("epochs", "steps", "learning_rate", "method", "rank", "length", "batch", "held_out", "seed")
OF_THE_PAGE = ("model",)  # has a list of its own
MOST_RUNS = 50  # whose speed is looked at


@dataclass(frozen=True)
class Field:
    """A key of the recipe. value: what the recipe has. choices: none for a number or a text."""

    key: str
    help: str
    value: str
    choices: Sequence[str]

    @property
    def is_main(self) -> bool:
        return self.key in MAIN


@dataclass(frozen=True)
class Form:
    """What a person chose. values: keys of the recipe, as typed; empty ones are the recipe's."""

    data: str
    model: str
    recipe: str
    run: str
    parent: str = ""  # a run whose adapter or model is the start
    card: str = ""
    values: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def overrides(self) -> dict[str, str]:
        """The keys that differ from the recipe."""
        given = {key: value.strip() for key, value in self.values.items() if value.strip()}
        own = {field.key: field.value for field in fields(self.recipe)}
        return {key: value for key, value in given.items() if value != own.get(key)}


def recipes() -> list[str]:
    """Names of the recipes that are a single run, and those of several stages."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def fields(recipe: str) -> list[Field]:
    """Every key of a recipe, the main ones first."""
    values = load_recipe(recipe, {})
    found = []
    for one in dataclasses.fields(values):
        if one.name not in OF_THE_PAGE:
            value = getattr(values, one.name)
            shown = "auto" if one.metadata["auto"] and value == 0 else as_text(value)
            choices = ("on", "off") if isinstance(value, bool) else one.metadata["choices"] or ()
            found.append(Field(one.name, one.metadata["help"], shown, choices))
    return sorted(found, key=lambda field: MAIN.index(field.key) if field.is_main else len(MAIN))


def check(form: Form, folders: Folders) -> Recipe:
    """The recipe with what was typed.

    Raises:
        UserError: a name or a value that is none, in the words of the command.
    """
    if not form.run.strip() or form.run.startswith(".") or "," in form.run:
        raise UserError(f"run={form.run}: expected the name of a folder below {folders.runs}/. Example: run=demo")
    below(folders.runs, form.run, "run")
    folders.data_file(form.data)
    if form.model not in folders.bases():
        raise UserError(f"model={form.model}: no such base in {folders.models}/.")
    if form.recipe not in recipes():
        raise UserError(f"recipe={form.recipe}: no such recipe.")
    if form.parent:
        folders.run(form.parent)
    recipe = load_recipe(form.recipe, {**form.overrides(), "model": form.model})
    check_measured(recipe)
    check_preference(recipe)
    return recipe


def train_words(form: Form, folders: Folders) -> list[str]:
    """The words of `train`."""
    words = [f"data={folders.data / form.data}", f"model={form.model}", f"recipe={form.recipe}", f"run={form.run}"]
    words += [f"from_run={form.parent}"] if form.parent else []
    return [*words, *(f"{key}={value}" for key, value in form.overrides().items()), *places(folders)]


def plan_words(form: Form, folders: Folders) -> list[str]:
    """The words of `plan`."""
    words = [
        f"model={form.model}",
        f"recipe={form.recipe}",
        *([f"gpu={form.card.strip()}"] if form.card.strip() else []),
    ]
    models = [word for word in places(folders) if word.startswith("models=")]
    return [*words, *(f"{key}={value}" for key, value in form.overrides().items()), *models]


def places(folders: Folders) -> list[str]:
    """models= and runs=, where they are not the usual ones."""
    usual = Folders()
    pairs = (("models", folders.models, usual.models), ("runs", folders.runs, usual.runs))
    return [f"{key}={path}" for key, path, other in pairs if path != other]


@dataclass(frozen=True)
class Speed:
    """Tokens per second that a run on the same base had here."""

    run: str
    tokens_per_second: float


def known_speed(model: str, folders: Folders) -> Speed | None:
    """The speed of the newest run on this base; None if there is none."""
    for name in folders.run_names()[:MOST_RUNS]:
        try:
            facts = run_facts.collect(folders.run(name))
        except (UserError, OSError):
            continue
        speeds = [value for _, value in facts.curves.speed]
        if speeds and facts.recipe.get("model") == model:
            return Speed(name, statistics.median(speeds))
    return None


def tokens_of(recipe: Recipe, tokens: int) -> float:
    """Tokens that a run computes. tokens: of the data, once."""
    both = recipe.batch * recipe.accumulation
    return (
        recipe.steps * (both or recipe.rows_per_step) * row_length(recipe) if recipe.steps else recipe.epochs * tokens
    )


def duration(seconds: float) -> str:
    """90 -> "1 min 30 s"."""
    hours, rest = divmod(int(seconds + 0.5), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s" if minutes else f"{left} s"


def resume_words(name: str, inputs: Mapping[str, Any], started: Sequence[str], folders: Folders) -> list[str]:
    """The words that continue a run: those of its start, else what its folder says.

    Args:
        started: the words that a page started it with; empty if none did.
    """
    if started:
        return list(started)
    data = inputs.get("data", {})
    path = str(data.get("path", "")) if isinstance(data, Mapping) else ""
    recipe = folders.runs / name / "recipe.yaml"
    return [f"data={path}", f"recipe={recipe}", f"run={name}", *places(folders)]
