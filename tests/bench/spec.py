"""What one worker is asked to measure, and the row that comes of it: the words that the parent process and its workers
share."""

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
    warm: int
    counted: int
    device: str
    again: bool = False  # measure once more what was built for the last one, which was told to `keep` it
    keep: bool = False
    alone: bool = True  # whether nobody else holds memory of the card

    @property
    def shape(self) -> Shape:
        return self.batch, self.length

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> "Spec":
        return cls(**json.loads(text))

    def row(self, **found: Any) -> dict[str, Any]:
        """A row of the report; `found` has tokens_per_s and peak_gib, or skipped: why there are none."""
        same = ("model", "batch", "length", "checkpointing", "dropout", "rank")
        row = {"arm": f"{self.arm} again" if self.again else self.arm, **{name: getattr(self, name) for name in same}}
        return {**row, **({"embedding": "host"} if (self.arm, self.embedding) == ("ours", "host") else {}), **found}


def heading() -> dict[str, Any]:
    """What a report says of where and with what it was made."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    today = datetime.date.today().isoformat()
    return {"device": name, "date": today, "versions": provenance.versions(), "code": provenance.code()}


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
