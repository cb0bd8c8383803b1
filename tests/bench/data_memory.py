"""How much memory and time it takes to clean data, to set questions aside, and to read data again as compare does.

    python -m tests.bench.data_memory [rows=1000000] [arms=reading,cleaning,near,held_out,again,excel] [out=FILE.json]

reading    every row once, as `make data` does
cleaning   the steps that look at a row, and exact duplicates
near       near duplicates too, of questions and answers
held_out   a hundredth of the questions set aside, with near duplicates of them
again      the conversations of a finished run, as compare and export read them: all are walked through once
excel      EXCEL_ROWS rows of a workbook, most of whose texts are different

Every arm has a process of its own. Memory is the largest sum of the resident sets of it and its children, sampled ten
times a second; `anonymous` is the part of it that no file backs, which the system cannot take back. The rows are made
up, with a seed: ROW_BYTES each, half of them Chinese, one in fifty a copy and one in fifty nearly one.
"""

import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from tests.bench.data_rates import machine, said
from tests.bench.spec import heading
from tests.data.samples import write_shared_workbook
from train.common.files import write_json
from train.config.options import build, describe, option, pairs
from train.config.recipe import Recipe
from train.data.checked import conversations
from train.data.choice.cleaning import clean
from train.data.choice.held_out import split
from train.data.files import excel_table
from train.data.origins.sources import hash_data
from train.data.rows.data_row import GUESS, DataFile
from train.data.tokens import training_set

ROOT = Path(__file__).parents[2]
ARMS = ("reading", "cleaning", "near", "held_out", "again", "excel")
SEED, ROW_BYTES, EXCEL_ROWS, SAMPLED = 20261128, 300, 200_000, 0.1
ROW_STEPS = "empty,control_characters,repeated_question,exact_duplicates"


@dataclass(frozen=True)
class Options:
    """What is measured."""

    rows: int = option(1_000_000, "rows to make up", interval="[100, 100000000]")
    arms: str = option(",".join(ARMS), "which arms, with commas between")
    out: str = option("data_memory.json", "the report")
    work: str = option("", "folder for the data, which stays; empty: a temporary one")
    only: str = option("", "one arm, in this process", ("", *ARMS))


def main(words: list[str]) -> int:
    if {"-h", "--help"} & set(words):
        print(f"{__doc__}\n{describe(Options)}")
        return 0
    options = build(Options, pairs(words))
    if options.only:
        _run_arm(options.only, Path(options.work))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        options = replace(options, work=options.work or temporary)
        work = Path(options.work)
        if not (work / "rows.jsonl").exists():
            write_rows(work / "rows.jsonl", options.rows)
        if "excel" in options.arms and not (work / "rows.xlsx").exists():
            write_workbook(work / "rows.jsonl", work / "rows.xlsx")
        rows = []
        for arm in options.arms.split(","):
            rows.append(_measured(options, arm))
            print(rows[-1], flush=True)
    write_json(Path(options.out), {**heading(), "machine": machine(), "options": said(options), "rows": rows})
    return 0


def _measured(options: Options, arm: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.bench.data_memory", f"work={options.work}", f"only={arm}"]
    began, peak, anonymous = time.monotonic(), 0, 0
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            resident, shared = _memory(process.pid)
            peak, anonymous = max(peak, resident), max(anonymous, resident - shared)
            time.sleep(SAMPLED)
        said = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit(f"{arm} failed with status {process.returncode}")
    seconds = round(time.monotonic() - began, 1)
    found = json.loads(said.splitlines()[-1])
    return {"arm": arm, "peak_mib": peak >> 20, "anonymous_mib": anonymous >> 20, "seconds": seconds, **found}


def _memory(pid: int) -> tuple[int, int]:
    """(bytes that are resident, those of them that a file backs) of a process and of all below it."""
    resident = shared = 0
    try:
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            memory = one.memory_info()
            resident, shared = resident + memory.rss, shared + memory.shared
    except psutil.Error:
        pass
    return resident, shared


def _run_arm(arm: str, work: Path) -> None:
    data = str(work / "rows.jsonl")
    recipe = Recipe()
    if arm == "excel":
        rows = sum(row.readable for row in excel_table.read(DataFile.of(work / "rows.xlsx"), GUESS))
        print(json.dumps({"rows": rows}))
        return
    if arm == "again":
        record = {"data": {"path": data, **hash_data(data)}, "recipe": asdict(recipe)}
        again, _ = conversations.training_data(record)
        print(json.dumps({"rows": sum(1 for _ in again)}))
        return
    found = training_set.read(data).conversations
    result: dict[str, Any] = {"rows": len(found)}
    if arm in ("cleaning", "near"):
        steps = ROW_STEPS + (",near_duplicates" if arm == "near" else "")
        result["removed"] = clean(found, replace(recipe, clean=steps)).counts
    elif arm == "held_out":
        result["held_out"] = len(split(found, 0.01, recipe.near).held_out)
    print(json.dumps(result))


# Data


def write_rows(path: Path, count: int) -> None:
    """`count` rows of the Alpaca format, about ROW_BYTES each."""
    draw, earlier = random.Random(SEED), [("What is it?", "It is one of many.")]
    han = [chr(code) for code in range(0x4E00, 0x5400)]
    words = ["".join(draw.choices("abcdefghilmnoprstu", k=draw.randint(2, 9))) for _ in range(5000)]

    def text(size: int, chinese: bool) -> str:
        return "".join(draw.choices(han, k=size // 3)) if chinese else " ".join(draw.choices(words, k=size // 7))

    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            question, answer = text(60, number % 2 > 0), text(190, number % 2 > 0)
            kind = draw.random()
            if kind < 0.04:
                question, answer = draw.choice(earlier)
                answer += "" if kind < 0.02 else "!?"[number % 2] + "ok"
            elif len(earlier) < 1000:
                earlier.append((question, answer))
            file.write(json.dumps({"instruction": question, "output": answer}, ensure_ascii=False) + "\n")


def write_workbook(source: Path, path: Path) -> None:
    """The first EXCEL_ROWS rows, as Excel saves them."""
    with source.open(encoding="utf-8") as lines:
        rows = (list(json.loads(line).values()) for line, _ in zip(lines, range(EXCEL_ROWS), strict=False))
        write_shared_workbook(path, itertools.chain([["question", "answer"]], rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
