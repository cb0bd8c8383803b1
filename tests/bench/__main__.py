"""Our training step against the published recipe's stack, on this machine's card: tokens/s and peak memory, side by side.

make bench [ARMS=ours,stock] [MODEL=1.8b] [SHAPES=1x512,8x512] …

A step is forward, backward, clipping and the optimizer's update, every token learnt; random Int4 weights in the model's shape,
LoRA on every linear of the blocks. Each arm runs in processes of its own, one after another; a shape that the card has no room for
is named and left out. Rows are on the disk as soon as they are measured: OUT.rows.jsonl, then OUT itself.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.bench.spec import Shape, Spec, beyond, heading, shapes_of
from tests.bench.table import show
from train.config import SWITCH, build, describe, option, pairs
from train.errors import UserError
from train.files import write_json

ROOT = Path(__file__).parent.parent.parent
ALL = ("ours", "stock", "stock-lean")
MODELS = ("", "tiny", "0.5b", "1.8b", "7b", "14b", "72b")


@dataclass(frozen=True)
class Options:
    """What is measured."""

    arms: str = option("ours,stock", f"which, by comma: {', '.join(ALL)}; tests/bench/arms.py says what each is")
    model: str = option("", "shape; empty: 1.8b on a GPU, tiny on a CPU", MODELS)
    shapes: str = option("", "batch x length, by comma; empty: 1x512,1x2048,8x512,4x2048 (a CPU: 1x32,2x64)")
    checkpointing: str = option("off,on", "off, on, or both by comma")
    dropout: str = option("0,0.05", "LoRA's dropout, by comma")
    rank: int = option(64, "LoRA: r")
    warm: int = option(4, "steps that do not count")
    counted: int = option(9, "steps of which the median is taken")
    gpus: int = option(1, "GPUs, one process each; tokens/s are of all together")
    seconds: int = option(0, "begin nothing new after so many seconds; 0 = no limit")
    patience: int = option(300, "seconds after which a shape without an answer is given up")
    out: str = option("", "the report; empty: runs/bench/DATE-DEVICE.json")


def main(words: list[str]) -> int:
    if {"-h", "--help", "help"} & set(words):
        print(f"{__doc__}\n{describe(Options)}")
        return 0
    try:
        run(build(Options, pairs(words)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: Options) -> None:
    import torch

    # what is measured, where, and where to
    cuda, report = torch.cuda.is_available(), heading()
    name, today = report["device"], report["date"]
    specs = list(_specs(_filled(options, cuda), "cuda" if cuda else "cpu"))
    out = Path(options.out or f"runs/bench/{today}-{name.lower().replace(' ', '-')}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    rows_file = out.with_suffix(".rows.jsonl")
    rows_file.write_text("")
    if not cuda:
        print("no GPU here: a tiny shape on the CPU, which shows that everything runs and says nothing about speed.")
    print(f"{name}, torch {torch.__version__}; rows go to {rows_file}", flush=True)

    # one process after another; the report is whole after each
    until = time.monotonic() + options.seconds if options.seconds else float("inf")
    rows: list[dict[str, Any]] = []
    for spec in specs:
        rows += _group(replace(spec, rows=str(rows_file)), options, until)
        write_json(out, {**report, "rows": rows})
    show(rows)
    print(f"report: {out}")


def _filled(options: Options, cuda: bool) -> Options:
    """Options with the machine's defaults in the place of what is empty."""
    model = options.model or ("1.8b" if cuda else "tiny")
    shapes = options.shapes or ("1x512,1x2048,8x512,4x2048" if cuda else "1x32,2x64")
    return replace(options, model=model, shapes=shapes)


def _specs(options: Options, device: str) -> list[Spec]:
    """A worker's task for each arm, dropout and checkpointing.

    Raises:
        UserError: an arm, a shape or a switch that is none.
    """
    try:
        shapes = tuple(shapes_of(options.shapes))
        switches = [SWITCH[word.strip()] for word in options.checkpointing.split(",")]
        rates = [float(word) for word in options.dropout.split(",")]
    except (ValueError, KeyError) as error:
        raise UserError(
            f"not understood: {error}. Example: shapes=1x512,8x512 checkpointing=off,on dropout=0"
        ) from error
    arms = [word.strip() for word in options.arms.split(",")]
    if strange := [arm for arm in arms if arm not in ALL]:
        raise UserError(f"arms={options.arms}: no arm is called {', '.join(strange)}. There are: {', '.join(ALL)}.")
    fixed = (options.rank, options.warm, options.counted, device, "")
    return [Spec(a, options.model, shapes, c, d, *fixed) for d in rates for c in switches for a in arms]


def _group(spec: Spec, options: Options, until: float) -> list[dict[str, Any]]:
    """The rows of one arm in one setting, over as many workers as it takes."""
    done: list[dict[str, Any]] = []
    todo: list[Shape] = list(spec.shapes)
    refused: list[Shape] = []
    while todo:
        if time.monotonic() > until:
            done += [_skip(spec, shape, f"not begun: seconds={options.seconds} are over") for shape in todo]
            break
        found = _worker(spec.with_shapes(todo), options)
        if not found:
            found = [_skip(spec, todo[0], f"failed: {_last_words(Path(spec.rows))}")]
        done += found
        todo = todo[len(found) :]
        refused += [(r["batch"], r["length"]) for r in found if "out of memory" in r.get("skipped", "")]
        for shape in [s for s in todo if beyond(s, refused)]:
            batch, length = beyond(shape, refused) or shape
            done.append(_skip(spec, shape, f"does not fit: {batch}x{length} did not"))
            todo.remove(shape)
    return done


def _skip(spec: Spec, shape: Shape, why: str) -> dict[str, Any]:
    row = spec.row(shape, skipped=why)
    with Path(spec.rows).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    _say(row)
    return row


def _worker(spec: Spec, options: Options) -> list[dict[str, Any]]:
    """Run one worker, show its rows as they come, and return them; it is ended when it stays silent for too long."""
    path, read = Path(spec.rows), 0
    before = len(path.read_text().splitlines())
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.gpus}"]
    words = [sys.executable, *(launcher if options.gpus > 1 else []), "-m", "tests.bench.worker", spec.dump()]
    with path.with_suffix(".log").open("w") as log:
        child = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            heard = time.monotonic()
            while child.poll() is None and time.monotonic() - heard < options.patience:
                time.sleep(0.2)
                for row in _rows(path)[before + read :]:
                    read, heard = read + 1, time.monotonic()
                    _say(row)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    found = _rows(path)[before:]
    for row in found[read:]:
        _say(row)
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def _last_words(rows: Path) -> str:
    """What the worker said last, for a row that has nothing else to say."""
    lines = rows.with_suffix(".log").read_text(errors="replace").splitlines()
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "the worker ended without a word")


def _say(row: dict[str, Any]) -> None:
    setting = f"checkpointing={'on' if row['checkpointing'] else 'off'} dropout={row['dropout']:g}"
    found = row.get("skipped") or f"{row['tokens_per_s']:>8,} tokens/s  {row['peak_gib']:6.2f} GiB"
    print(f"{row['arm']:10} {row['model']:5} {row['batch']}x{row['length']:<5} {setting:32} {found}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
