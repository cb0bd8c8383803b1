"""What a worker is asked to measure, and the row of the report that it gives: shared by the parent and its workers."""

import datetime
import json
from dataclasses import asdict, dataclass
from typing import Any

from train.runs import provenance

Shape = tuple[int, int]  # batch, length


@dataclass(frozen=True)
class Spec:
    """One arm in one setting at one shape."""

    arm: str
    model: str
    batch: int
    length: int
    checkpointing: str  # off | on | offload
    dropout: float
    rank: int
    embedding: str  # device | host
    warm: int  # steps before the counted ones
    counted: int  # steps that count, at least
    device: str
    again: bool = False  # measure once more the arm that the last order said to `keep`
    keep: bool = False
    alone: bool = True  # whether no other arm holds memory of the card

    @property
    def shape(self) -> Shape:
        return self.batch, self.length

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> "Spec":
        return cls(**json.loads(text))

    def row(self, **result: Any) -> dict[str, Any]:
        """A row of the report; `result` has tokens_per_s and peak_gib, or skipped: why there are none."""
        same = ("model", "batch", "length", "checkpointing", "dropout", "rank")
        row = {"arm": f"{self.arm} again" if self.again else self.arm, **{name: getattr(self, name) for name in same}}
        return {**row, **({"embedding": "host"} if (self.arm, self.embedding) == ("ours", "host") else {}), **result}


def heading() -> dict[str, Any]:
    """Where, when and with what a report was made."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    today = datetime.date.today().isoformat()
    return {"device": name, "date": today, "versions": provenance.versions(), "code": provenance.code()}


def parse_shapes(text: str) -> list[Shape]:
    """ "1x512,8x512" -> [(1, 512), (8, 512)].

    Raises:
        ValueError: anything else.
    """
    shapes = []
    for word in text.replace("×", "x").split(","):
        batch, _, length = word.strip().partition("x")
        shapes.append((int(batch), int(length)))
    return shapes


def smaller_refused(shape: Shape, refused: list[Shape]) -> Shape | None:
    """One of the `refused` shapes that is no larger than `shape` in batch and length, so that `shape` cannot fit."""
    return next((r for r in refused if shape[0] >= r[0] and shape[1] >= r[1]), None)
