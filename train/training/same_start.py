"""Several processes of a run agree, before the first step, that they start from the same inputs and checkpoint."""

import hashlib
import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from train.runs.provenance import lock
from train.runs.resume import resume_point
from train.training import distributed
from train.training.distributed import AgreedError, RankInfo

OPEN = ("batch", "accumulation", "checkpointing", "embedding")  # keys of the recipe that `auto` may choose
CHOSEN = "a step"

if TYPE_CHECKING:
    from train.training.prepare import PreparedRun


def agree_on_start(prepared: "PreparedRun", rank_info: RankInfo | None, device: torch.device) -> Path | None:
    """The checkpoint to continue from, the same in all processes; None for a new run, and for a finished one.

    Checkpoints that are not used are added to the notes. The processes meet here, if a launcher has started them.

    Raises:
        AgreedError: the processes would start from different things.
    """
    checkpoint, notes = (None, []) if prepared.finished else resume_point(prepared.folder)
    prepared.notes.extend(notes)
    if rank_info is not None:
        distributed.join(rank_info, device.type == "cuda")
        check_same_start(distributed.all_gather((socket.gethostname(), start_summary(prepared, checkpoint))))
    return checkpoint


def start_summary(prepared: "PreparedRun", checkpoint: Path | None) -> dict[str, str]:
    """What all processes of a run must have in common before the first step, each from its own disk; short texts."""
    inputs = prepared.inputs
    return {
        "env.lock": (lock() or "none")[:12],
        "finished": "yes" if prepared.finished else "no",
        "checkpoint": checkpoint.name if checkpoint else "none",
        "data": inputs["data"]["sha256"][:12],
        "base": _digest(inputs["base"]["files"]),
        "adapter of FROM=": (inputs["from"] or {}).get("sha256", "none")[:12],
        "recipe": _digest({key: value for key, value in inputs["recipe"].items() if key not in OPEN}),
        CHOSEN: " ".join(f"{key}={inputs['recipe'][key]}" for key in OPEN),
        "rows of the data": inputs.get("rows", "all")[:12],
        "rows a step": str(inputs["rows_per_step"]),
        "computed in": inputs["dtype"],
    }


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def check_same_start(starts: list[tuple[str, dict[str, str]]]) -> None:
    """Refuse processes that would start from different things. `starts`: (machine, start_summary) of each.

    Raises:
        AgreedError: what differs, and between which machines.
    """
    host, first = starts[0]
    other_host, other = next((start for start in starts if start[1] != first), (host, first))
    differ = [
        f"{key}: {value} on {host}, {other[key]} on {other_host}" for key, value in first.items() if value != other[key]
    ]
    if [key for key in first if first[key] != other[key]] == [CHOSEN]:
        raise AgreedError(
            f"the processes would not compute a step in the same way: {first[CHOSEN]} on {host}, {other[CHOSEN]} on "
            f"{other_host}. Each takes what fits its own cards, and these differ. Nothing was changed. Give all of "
            f'them the one that fits the smaller card: ARGS="{first[CHOSEN]}", or the other.'
        )
    if differ:
        listed = "\n  ".join(differ)
        raise AgreedError(
            f"the processes would not start from the same:\n  {listed}\nNothing was changed. Put runs/, models/ and "
            "the data in a folder that all machines share (runs=FOLDER models=FOLDER), or copy them to each; the program "
            "and its env.lock must be the same everywhere."
        )
