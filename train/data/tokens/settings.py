"""The keys of a recipe that decide how conversations become samples: a protocol, so that data/ needs no config/."""

from dataclasses import dataclass
from typing import Protocol


class TemplateSettings(Protocol):
    """Those that decide the ids and the mask of a conversation."""

    @property
    def template(self) -> str: ...

    @property
    def mask(self) -> str: ...

    @property
    def system(self) -> str: ...


class SampleSettings(TemplateSettings, Protocol):
    """These, and those that decide what is cut, and which samples share a row."""

    @property
    def loss(self) -> str: ...

    @property
    def length(self) -> int: ...

    @property
    def overlong(self) -> str: ...

    @property
    def pack(self) -> bool: ...

    @property
    def batch(self) -> int: ...

    @property
    def seed(self) -> int: ...


def row_length(settings: SampleSettings) -> int:
    """Tokens in a row: `length`, or with loss=dpo a pair of two sequences of that length."""
    return 2 * settings.length if settings.loss == "dpo" else settings.length


@dataclass(frozen=True)
class Template:
    """The values of TemplateSettings: for the name of a cache, and for other processes."""

    template: str
    mask: str
    system: str

    @classmethod
    def of(cls, settings: TemplateSettings) -> "Template":
        return cls(settings.template, settings.mask, settings.system)
