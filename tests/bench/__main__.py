"""Our training step and that of the published recipe's stack on this machine's card: tokens/s and peak memory.

make bench [ARMS=ours,stock] [MODEL=1.8b] [SHAPES=1x512,8x512] …

A step is forward, backward, clipping and the optimizer's update, with every token in the loss; random Int4 weights in
the model's shape, LoRA on every linear of the blocks. Each arm has a process of its own. In every setting the arms are
measured one after another, and the first one once more at the end, because a card's speed changes within minutes; each
row has the speed that was measured beside it. A shape that does not fit the card is named and left out. Rows are on the
disk as soon as they are measured.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.bench.pool import WorkerPool
from tests.bench.spec import Spec, heading, parse_shapes, smaller_refused
from tests.bench.table import norm, show
from train.common.errors import UserError
from train.common.files import write_json
from train.config.options import build, describe, option, pairs

ALL = ("ours", "ours-fp8", "stock", "stock-lean")
MODELS = ("", "tiny", "0.5b", "1.8b", "7b", "14b", "72b")
CHECKPOINTING = ("off", "on", "offload")


@dataclass(frozen=True)
class Options:
    """What is measured. The order of settings: by dropout, then by shape, then by checkpointing, each as named."""

    arms: str = option("ours,stock", f"which, by comma: {', '.join(ALL)}; tests/bench/arms.py says what each is")
    model: str = option("", "shape; empty: 1.8b on a GPU, tiny on a CPU", MODELS)
    shapes: str = option("", "batch x length, by comma; empty: 4x2048,1x2048,8x512,1x512 (a CPU: 1x32,2x64)")
    checkpointing: str = option("off,on", "off, on, offload, by comma")
    dropout: str = option("0,0.05", "LoRA's dropout, by comma")
    rank: int = option(64, "LoRA: r")
    embedding: str = option("device", "where our arm keeps the embedding's table", ("device", "host"))
    warm: int = option(4, "steps that do not count")
    counted: int = option(9, "steps of which the median is taken, or as many as take 1.5 s")
    control: bool = option(True, "where there are several arms: the first once more after the others")
    gpus: int = option(1, "GPUs, one process each; tokens/s are of all together")
    seconds: int = option(0, "begin nothing new after so many seconds; 0 = no limit")
    patience: int = option(300, "seconds after which a shape without an answer is given up")
    out: str = option("", "the report; empty: runs/bench/DATE-DEVICE.json")


def main(arguments: list[str]) -> int:
    if {"-h", "--help", "help"} & set(arguments):
        print(f"{__doc__}\n{describe(Options)}")
        return 0
    try:
        run(build(Options, pairs(arguments)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: Options) -> None:
    import torch

    # --- what is measured, where, and into which report
    cuda, report = torch.cuda.is_available(), heading()
    name, today = report["device"], report["date"]
    options = _with_defaults(options, cuda)
    settings = list(_settings(options, "cuda" if cuda else "cpu"))
    out = Path(options.out or f"runs/bench/{today}-{name.lower().replace(' ', '-')}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not cuda:
        print("no GPU here: a tiny shape on the CPU shows that everything runs; it says nothing about speed.")
    print(f"{name}, torch {torch.__version__}; report: {out}", flush=True)

    # --- one setting after another; the report is complete after each row
    until = time.monotonic() + options.seconds if options.seconds else float("inf")
    pool = WorkerPool(out.with_suffix(".workers"), options.gpus, options.patience)
    rows: list[dict[str, Any]] = []
    try:
        for row in _measure(settings, pool, options.seconds, until):
            rows.append(row)
            _print(row)
            write_json(out, {**report, "rows": rows})
    finally:
        pool.end()
    show(rows)
    print(f"report: {out}")


def _with_defaults(options: Options, cuda: bool) -> Options:
    """Options with the machine's defaults where they are empty."""
    model = options.model or ("1.8b" if cuda else "tiny")
    shapes = options.shapes or ("4x2048,1x2048,8x512,1x512" if cuda else "1x32,2x64")
    return replace(options, model=model, shapes=shapes)


def _settings(options: Options, device: str) -> Iterator[list[Spec]]:
    """The orders of each setting, in turn: one for each arm, and the first arm once more.

    Raises:
        UserError: an unknown arm, shape or kind of checkpointing.
    """
    try:
        shapes = parse_shapes(options.shapes)
        kinds = [word.strip() for word in options.checkpointing.split(",")]
        rates = [float(word) for word in options.dropout.split(",")]
    except ValueError as error:
        raise UserError(
            f"not understood: {error}. Example: shapes=1x512,8x512 checkpointing=off,on dropout=0"
        ) from error
    if unknown := [kind for kind in kinds if kind not in CHECKPOINTING]:
        raise UserError(
            f"checkpointing={options.checkpointing}: {', '.join(unknown)} is none of {', '.join(CHECKPOINTING)}."
        )
    arms = [word.strip() for word in options.arms.split(",")]
    if unknown := [arm for arm in arms if arm not in ALL]:
        raise UserError(f"arms={options.arms}: no arm is called {', '.join(unknown)}. There are: {', '.join(ALL)}.")
    for rate in rates:
        for batch, length in shapes:
            for checkpointing in kinds:
                setting = (batch, length, checkpointing, rate, options.rank, options.embedding)
                able = [arm for arm in arms if checkpointing != "offload" or arm.startswith("ours")]
                steps = (options.warm, options.counted)
                specs = [Spec(arm, options.model, *setting, *steps, device) for arm in able]
                if options.control and len(specs) > 1:
                    specs = [replace(specs[0], keep=True), *specs[1:], replace(specs[0], again=True)]
                yield specs


def _measure(settings: list[list[Spec]], pool: WorkerPool, seconds: int, until: float) -> Iterator[dict[str, Any]]:
    """A row for every order. Shapes that cannot fit, and those for which no time is left, are not begun."""
    refused: dict[Any, list[Any]] = {}
    for spec in (spec for specs in settings for spec in specs):
        same_setting = refused.setdefault((spec.arm, spec.checkpointing, spec.dropout), [])
        if time.monotonic() > until:
            yield spec.row(skipped=f"not begun: seconds={seconds} are over")
        elif smaller := smaller_refused(spec.shape, same_setting):
            yield spec.row(skipped=f"does not fit: {smaller[0]}x{smaller[1]} did not")
        else:
            row = pool.measure(spec)
            if "out of memory" in row.get("skipped", ""):
                same_setting.append(spec.shape)
            yield row


def _print(row: dict[str, Any]) -> None:
    setting = f"checkpointing={row['checkpointing']} dropout={row['dropout']:g}"
    peak = f"{row['peak_gib']:6.2f} GiB" if "peak_gib" in row else " " * 10
    result = (
        row.get("skipped")
        or f"{row['tokens_per_s']:>8,} tokens/s  {peak}  gradient norm {norm(row)}  {_card_state(row['card'])}"
    )
    print(f"{row['arm']:10} {row['model']:5} {row['batch']}x{row['length']:<5} {setting:34} {result}", flush=True)


def _card_state(card: dict[str, Any]) -> str:
    """What is printed of the card beside a row; the report has the rest."""
    if "sm_mhz" not in card:
        return str(card["seen"])
    held = ", ".join(f"{word} {share:.0%}" for word, share in card["held_back"].items())
    state = f"{card['sm_mhz'][1]} MHz  {card['watts'][1]} W  {card['celsius'][1]} °C"
    return f"{state}  product {card['product_tflops']} TFLOP/s  {held}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
