"""What the page of a run shows, read from its folder: finished, under way, stopped, or damaged.

Every file may be missing or cut off: what is left is shown, and what is missing is said. Nothing is written. Knows no
HTML.
"""

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.common.errors import UserError
from train.common.files import read_json, read_json_lines
from train.evaluation import scores
from train.evaluation.report import AnsweredQuestion, smoothed
from train.runs import losses
from train.runs.folder import ANSWERS, CHECKPOINTS, INPUTS, LOSSES, RECORD, SCORES, is_locked, read_run
from train.runs.record_form import INPUTS as INPUTS_FORM
from train.runs.record_form import PARITY, find_problem

Point = tuple[float, float]
EXPORT = "merged"  # the export's folder in a run's


@dataclass(frozen=True)
class Curves:
    """(step, value) of what losses.jsonl has of each step. Steps without a value have no point."""

    loss: Sequence[Point]
    mean: Sequence[Point]  # the running mean
    held_out: Sequence[Point]  # 0 steps: before training
    learning_rate: list[Point]
    grad_norm: list[Point]
    speed: list[Point]  # tokens per second


@dataclass(frozen=True)
class RunFacts:
    """A run as its folder has it. state: finished, running, stopped (a checkpoint is there) or begun (none is).

    record: run.json of a finished run. damage: a sentence for each file that is not what it should be.
    """

    name: str
    state: str
    record: dict[str, Any] | None
    inputs: dict[str, Any]  # inputs.json, or what run.json says of it
    steps: int
    planned: int | None  # steps; None: not known before the run ends
    epoch: int  # of the last step, from 1; 0 before it
    checkpoint: int | None  # steps that the newest checkpoint has
    curves: Curves
    skipped: list[int]  # steps that the guard left out
    seconds: float  # of all steps
    tokens: int
    starts: list[dict[str, Any]]
    answers: Sequence[AnsweredQuestion]
    answered_by: str
    scores: dict[str, Any] | None  # scores.json
    parity: dict[str, Any] | None  # of the export
    damage: list[str] = field(default_factory=list)
    stages: list["RunFacts"] = field(default_factory=list)

    @property
    def recipe(self) -> dict[str, Any]:
        recipe: dict[str, Any] = self.inputs.get("recipe", {})
        return recipe


def collect(run: Path) -> RunFacts:
    """What is known of the run in folder `run`, and of its stages.

    Raises:
        UserError: there is no such folder, or no run was started in it.
    """
    if not any((run / name).is_file() for name in (RECORD, INPUTS)):
        found = "holds no run" if run.is_dir() else "does not exist"
        raise UserError(f"run {run.name!r} {found}: neither {RECORD} nor {INPUTS} is in {run}.")
    damage: list[str] = []
    record, inputs = _record(run, damage), _inputs(run, damage)
    rows = [row for row in losses.read(run) if _is_whole(row)]
    _note_torn_losses(run, record, rows, damage)
    checkpoint, starts = _newest_checkpoint(run)
    answers, answered_by = _answers(run, damage)
    inputs = {**inputs, **(record or {})}
    return RunFacts(
        name=run.name,
        state=_state(run, record, checkpoint),
        record=record,
        inputs=inputs,
        steps=len(rows),
        planned=len(rows) if record else inputs.get("recipe", {}).get("steps") or None,
        epoch=rows[-1].get("epoch", 0) + 1 if rows else 0,
        checkpoint=checkpoint,
        curves=_curves(rows),
        skipped=[row["step"] for row in rows if row["loss"] is None],
        seconds=math.fsum(row.get("seconds", 0.0) for row in rows),
        tokens=sum(row.get("tokens", 0) for row in rows),
        starts=record.get("starts", []) if record else starts,
        answers=answers,
        answered_by=answered_by,
        scores=_scores(run, damage) if answers else None,
        parity=_parity(run),
        damage=damage,
        stages=[collect(stage) for stage in _stages(run)],
    )


def _stages(run: Path) -> Iterable[Path]:
    """The folders of the stages before the last one, which is the run itself."""
    found = (path for path in (run / "stages").glob("*") if path.name.isdigit() and (path / INPUTS).is_file())
    return sorted(found, key=lambda path: int(path.name))


def _state(run: Path, record: dict[str, Any] | None, checkpoint: int | None) -> str:
    if record:
        return "finished"
    if is_locked(run):
        return "running"
    return "begun" if checkpoint is None else "stopped"


# The files of a run


def _record(run: Path, damage: list[str]) -> dict[str, Any] | None:
    if not (run / RECORD).is_file():
        return None
    try:
        return read_run(run)
    except UserError as error:
        damage.append(str(error))
        return None


def _inputs(run: Path, damage: list[str]) -> dict[str, Any]:
    try:
        inputs: dict[str, Any] = read_json(run / INPUTS)
        problem = find_problem(inputs, INPUTS_FORM)
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        problem = f"not JSON ({error})"
    if problem:
        damage.append(f"{INPUTS} is damaged: {problem}.")
        return {}
    return inputs


def _is_whole(row: dict[str, Any]) -> bool:
    """Whether a row of losses.jsonl has numbers where the page needs them."""
    numbers = (row.get(key) for key in ("loss", "learning_rate", "grad_norm", "tokens", "seconds", "epoch"))
    return "loss" in row and all(value is None or isinstance(value, (int, float)) for value in numbers)


def _note_torn_losses(
    run: Path, record: dict[str, Any] | None, rows: Sequence[dict[str, Any]], damage: list[str]
) -> None:
    path = run / LOSSES
    lines = len(path.read_bytes().splitlines()) if path.is_file() else 0
    torn = 0 if record else 1  # the line that is being written, or was when the process ended
    wanted = max(lines - torn, int(record.get("steps", 0)) if record else 0)
    if len(rows) < wanted:
        damage.append(f"{LOSSES} has {len(rows):,} whole lines; {wanted:,} are expected.")


def _newest_checkpoint(run: Path) -> tuple[int | None, list[dict[str, Any]]]:
    """(steps of the newest checkpoint, the starts of the command that led to it). Its hashes are not checked here."""
    names = [path.name[5:] for path in (run / CHECKPOINTS).glob("step-*") if path.name[5:].isdigit()]
    if not names:
        return None, []
    newest = max(names, key=int)
    starts: list[dict[str, Any]] = []
    with suppress(OSError, ValueError, RecursionError, AttributeError):
        starts = read_json(run / CHECKPOINTS / f"step-{newest}" / "state.json").get("starts", [])
    good = isinstance(starts, list) and all(isinstance(one, dict) for one in starts)
    return int(newest), starts if good else []


def _answers(run: Path, damage: list[str]) -> tuple[list[AnsweredQuestion], str]:
    """The questions with both answers, and the model that gave those after training; none before `compare`."""
    if not (run / ANSWERS).is_file():
        return [], ""
    by = ""
    with suppress(OSError, ValueError, RecursionError, AttributeError):
        by = str(read_json(run / "compare.json").get("after", ""))
    try:
        answered = [AnsweredQuestion(**row) for row in read_json_lines(run / ANSWERS)]
        if all(isinstance(text, str) for one in answered for text in (one.question, one.before, one.after)):
            return answered, by
    except (ValueError, TypeError, RecursionError):
        pass
    damage.append(f"{ANSWERS} is damaged: `compare` asks the questions again.")
    return [], ""


def _scores(run: Path, damage: list[str]) -> dict[str, Any] | None:
    """What `compare` measured; None if it was an older one."""
    if not (run / SCORES).is_file():
        return None
    try:
        found: dict[str, Any] = read_json(run / SCORES)
        scores.rows(found)
        return found
    except (ValueError, TypeError, KeyError, RecursionError):
        damage.append(f"{SCORES} is damaged: `compare` measures it again.")
        return None


def _parity(run: Path) -> dict[str, Any] | None:
    """How the export agrees with the adapter on its base; None where there is no whole export."""
    with suppress(OSError, ValueError, RecursionError, AttributeError):
        parity: dict[str, Any] = read_json(run / EXPORT / "manifest.json").get("parity")
        if not find_problem(parity, PARITY, "parity"):
            return parity
    return None


def _curves(rows: Sequence[dict[str, Any]]) -> Curves:
    def points(key: str) -> list[Point]:
        found = ((row["step"], row.get(key)) for row in rows)
        return [(step, float(value)) for step, value in found if value is not None and math.isfinite(value)]

    loss = points("loss")
    mean = list(zip((step for step, _ in loss), smoothed([value for _, value in loss])))
    timed = [row for row in rows if row.get("seconds") and row.get("tokens") and row["loss"] is not None]
    speed = [(row["step"], row["tokens"] / row["seconds"]) for row in timed]
    held_out = [(step, value) for step, value in losses.held_out(rows) if isinstance(value, (int, float))]
    return Curves(loss, mean, held_out, points("learning_rate"), points("grad_norm"), speed)


def as_text(value: Any) -> str:
    """A value of a recipe or of a record, as a page shows it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
