"""Qwen's published chat models as data/models.lock lists them: ids on both hubs, licence, shape. No torch, no network."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.model.architecture import Shape, published
from train.model.names import hub_name

LOCK = Path(__file__).parents[2] / "data" / "models.lock"
OWNER = "Qwen"  # on the hub


@dataclass(frozen=True)
class PublishedModel:
    """A model of a hub. Sizes follow from its shape."""

    name: str
    modelscope: str  # its id there
    license: str
    shape: Shape

    @property
    def hub(self) -> str:
        return f"{OWNER}/{self.name}"


def read_entries(path: Path) -> tuple[dict[str, Any], list[PublishedModel]]:
    """(name of a model that is one file -> its entry: license, file, bytes, sha256, sources; the models of hubs)."""
    import yaml

    entries: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    families: dict[str, Any] = entries.pop("published", {})
    return entries, [model for name, family in families.items() for model in _models(name, family)]


def _models(family: str, lines: dict[str, Any]) -> Iterator[PublishedModel]:
    quantised = "Int" if lines["layout"] == "qwen" else "GPTQ-Int"
    for size, line in lines["sizes"].items():
        chat = f"{family}-{size}-{lines['chat']}".removesuffix("-")
        for name in (chat, *(f"{chat}-{quantised}{bits}" for bits in line["int"])):
            yield PublishedModel(name, f"{lines['modelscope']}/{name}", line["license"], published(name))


def find_published(model: str, models: list[PublishedModel]) -> PublishedModel | None:
    """The model that `model` means: its id on either hub, in small or capital letters, or its name without an owner."""
    wanted = hub_name(model).lower()
    return next((m for m in models if wanted in (m.hub.lower(), m.modelscope.lower(), m.name.lower())), None)
