"""What one worker measures, and the row that comes of it: the words that the parent process and its workers share."""

import datetime
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from train import manifest

Shape = tuple[int, int]  # batch, length


@dataclass(frozen=True)
class Spec:
    """One arm in one setting, over several shapes, in one process (or one a GPU)."""

    arm: str
    model: str
    shapes: tuple[Shape, ...]
    checkpointing: bool
    dropout: float
    rank: int
    warm: int
    counted: int
    device: str
    rows: str  # file that takes a line of JSON for each shape as soon as it is measured

    def with_shapes(self, shapes: list[Shape]) -> "Spec":
        return replace(self, shapes=tuple(shapes))

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> "Spec":
        values = json.loads(text)
        return cls(**{**values, "shapes": tuple((b, n) for b, n in values["shapes"])})

    def row(self, shape: Shape, **found: Any) -> dict[str, Any]:
        """A row of the report; `found` has tokens_per_s and peak_gib, or skipped: why there are none."""
        setting = {"checkpointing": self.checkpointing, "dropout": self.dropout, "rank": self.rank}
        return {"arm": self.arm, "model": self.model, "batch": shape[0], "length": shape[1], **setting, **found}


def heading() -> dict[str, Any]:
    """What a report says of where and with what it was made."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    today = datetime.date.today().isoformat()
    return {"device": name, "date": today, "versions": manifest.versions(), "code": manifest.code()}


def shapes_of(text: str) -> list[Shape]:
    """ "1x512,8x512" -> [(1, 512), (8, 512)]; ValueError on anything else."""
    found = []
    for word in text.replace("×", "x").split(","):
        batch, _, length = word.strip().partition("x")
        found.append((int(batch), int(length)))
    return found


def beyond(shape: Shape, refused: list[Shape]) -> Shape | None:
    """The one of `refused`, if any, that `shape` is as large as in both ways: it cannot fit either."""
    return next((r for r in refused if shape[0] >= r[0] and shape[1] >= r[1]), None)
