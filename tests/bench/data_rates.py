"""How fast data become packed tokens, in how much memory, beside `datasets` and a fast tokenizer of transformers.

    python -m tests.bench.data_rates tokenizer=FOLDER [rows=1000000] [rounds=1] [out=FILE.json] [work=FOLDER]

cold       this program: rows checked, tokenised into the cache, packed
warm       the same again, three times: the cache is found
data       `python -m train data` on the same file, cache found: the whole command
datasets   load_dataset("json"), then map() in batches with PreTrainedTokenizerFast: template, mask and ids; packed by
           the same function as ours, so that the number of packed rows has to be equal. Nothing is checked

Every arm has a process of its own, one after another, on PROCESSES cores; `cold` and `datasets` take turns, ROUNDS times,
because other programs may use the machine too. CPU seconds are those of the arm and its children, start included. Memory is the largest sum of the resident
sets of a process and its children, sampled ten times a second; pages that they share count twice, and so do pages of
files that are mapped. The first rows of the control are compared with ours: ids and mask have to be equal. The report
is written after each round. The control has the settings that took it the fewest CPU seconds (20,000 rows): a process a
core with the library's own threads off, int32 and int8 columns.

The rows are made up, with a seed: about 1 KB each, half of them Chinese. English is from Python's own documentation,
with rare words between; Chinese are words of the tokenizer's vocabulary, the frequent ones often, and single characters.
"""

import itertools
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from tests.bench.spec import heading
from train.common.files import write_json
from train.config.options import build, describe, option, pairs
from train.config.recipe import Recipe
from train.data.tokens.packing import pack_epoch
from train.data.tokens.samples import samples_of
from train.data.tokens.training_set import load_tokens
from train.model.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).parents[2]
ARMS = ("cold", "warm", "data", "datasets")
AGAIN = ("warm", "warm", "warm", "data")  # after the last round
SEED = 20261128
COMPARED = 2000  # rows
SAMPLED = 0.1  # seconds between two looks at the memory
RECIPE = Recipe(length=2048, overlong="cut")


@dataclass(frozen=True)
class Options:
    """What is measured."""

    tokenizer: str = option("", "folder of a base, for its tokenizer")
    rows: int = option(1_000_000, "rows to make up", interval="[100, 100000000]")
    data: str = option("", "measure on this file instead")
    rounds: int = option(1, "times that cold and datasets take turns", interval="[1, 100]")
    processes: int = option(2, "cores that an arm may use")
    out: str = option("data_rates.json", "the report")
    work: str = option("", "folder for the data and the caches, which is removed; empty: a temporary one")
    only: str = option("", "one arm, in this process", ("", *ARMS))


def main(words: list[str]) -> int:
    if {"-h", "--help"} & set(words):
        print(f"{__doc__}\n{describe(Options)}")
        return 0
    options = build(Options, pairs(words))
    if options.only:
        arms: dict[str, Callable[[Options], dict[str, Any]]] = {"cold": _load, "warm": _load, "datasets": _datasets}
        print(json.dumps(arms[options.only](options)))
        return 0
    with tempfile.TemporaryDirectory(dir=options.work or None) as work:
        run(options, Path(work))
    return 0


def run(options: Options, work: Path) -> None:
    """All arms, and the report."""
    data = Path(options.data) if options.data else work / "rows.jsonl"
    if not options.data:
        write_rows(data, options.rows, load_tokenizer(Path(options.tokenizer)))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.processes])
    report = {**heading(), "machine": machine(), "options": said(options), "bytes": data.stat().st_size}
    arms: list[dict[str, Any]] = []

    def measure(number: int, names: Sequence[str]) -> None:
        for arm in names:
            arms.append({"round": number, **_measured(replace(options, data=str(data), work=str(work)), arm)})
            print(_line(arms[-1]), flush=True)
        report.update(rows=arms, rows_compared=_compare(work), **_summary(arms))
        write_json(Path(options.out), report)

    for number in range(1, options.rounds + 1):
        shutil.rmtree(work / ".cache", ignore_errors=True)
        shutil.rmtree(work / "datasets", ignore_errors=True)
        measure(number, ("cold", "datasets"))
    measure(options.rounds, AGAIN)
    print(
        f"{arms[0]['rows']:,} rows, {report['bytes'] / 1e9:.2f} GB; ids and masks of {report['rows_compared']:,} are equal"
    )
    print(f"times as fast as the control: {report['times_the_control']}, in CPU {report['times_the_control_in_cpu']}")


def _summary(arms: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the rounds so far say, in medians and by round; the packed rows of both programs have to be as many."""
    ours, control = ([one for one in arms if one["arm"] == arm] for arm in ("cold", "datasets"))
    if len(found := {one["packed_rows"] for one in (*ours, *control)}) > 1:
        raise SystemExit(f"the programs packed different numbers of rows: {sorted(found)}")
    both = {"cold": ours, "datasets": control}
    rates = {name: round(median(one["rows"] / one["seconds"] for one in some)) for name, some in both.items()}
    rounds = list(zip(ours, control, strict=True))
    return {
        "rows_per_second": rates,
        "cpu_seconds": {name: median(one["cpu_seconds"] for one in some) for name, some in both.items()},
        "second_start_seconds": [arm["seconds"] for arm in arms if arm["arm"] == "warm"],
        "times_the_control": [round(b["seconds"] / a["seconds"], 2) for a, b in rounds],
        "times_the_control_in_cpu": [round(b["cpu_seconds"] / a["cpu_seconds"], 2) for a, b in rounds],
    }


def _line(arm: dict[str, Any]) -> str:
    rate = f"{arm['rows'] / arm['seconds']:,.0f} rows/s" if "rows" in arm else ""
    return (
        f"  {arm['arm']:10} {arm['seconds']:8.1f} s  {arm['cpu_seconds']:8.1f} CPU s  {arm['peak_mb']:7,.0f} MB  {rate}"
    )


def said(options: Any) -> dict[str, Any]:
    """Options without the folders of this machine."""
    return {key: Path(value).name if isinstance(value, str) else value for key, value in asdict(options).items()}


def machine() -> str:
    """The processor and the memory."""
    names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return f"{names[0] if names else 'unknown'}, {psutil.virtual_memory().total / 1e9:.0f} GB"


def _measured(options: Options, arm: str) -> dict[str, Any]:
    """What an arm prints, with its seconds and its largest memory."""
    words = [f"{key}={value}" for key, value in asdict(options).items() if key != "only"]
    command = [sys.executable, "-m", "tests.bench.data_rates", *words, f"only={arm}"]
    if arm == "data":
        model = Path(options.tokenizer).resolve()
        command = [
            sys.executable,
            "-m",
            "train",
            "data",
            f"data={options.data}",
            f"model={model}",
            f"runs={options.work}",
        ]
        command += [f"length={RECIPE.length}", f"overlong={RECIPE.overlong}"]
    began, peak = time.monotonic(), 0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, _resident(process.pid))
            time.sleep(SAMPLED)
        printed = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit(f"{arm} failed with status {process.returncode}")
    wall = round(time.monotonic() - began, 2)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2)
    found = json.loads(printed.splitlines()[-1]) if arm != "data" else {"seconds": wall}
    return {"arm": arm, "peak_mb": round(peak / 1e6), "wall_seconds": wall, "cpu_seconds": cpu, **found}


def _resident(pid: int) -> int:
    """Bytes of a process and of all below it."""
    total = 0
    try:
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            total += one.memory_info().rss
    except psutil.Error:
        pass
    return total


# This program


def _load(options: Options) -> dict[str, Any]:
    """Read, check, tokenise, pack; the caller's folder holds the cache."""
    began = time.monotonic()
    tokenizer = load_tokenizer(Path(options.tokenizer))
    loading = time.monotonic() - began
    cache = Path(options.work, ".cache", "tokens")
    checked, tokens = load_tokens(options.data, tokenizer, RECIPE, cache)
    samples, summary = samples_of(tokens, RECIPE)
    seconds = time.monotonic() - began
    some = (
        {"ids": samples[n].ids.tolist(), "mask": samples[n].mask.tolist()} for n in range(min(COMPARED, len(samples)))
    )
    write_json(Path(options.work, "ours.json"), list(some))
    return {
        "rows": len(checked.conversations),
        "seconds": round(seconds, 2),
        "tokenizer_seconds": round(loading, 2),
        "tokens": summary.tokens,
        "packed_rows": summary.rows,
        "cache_mb": round(sum(path.stat().st_size for path in cache.rglob("*")) / 1e6),
    }


# The control


def _datasets(options: Options) -> dict[str, Any]:
    """The same ids, masks and packed rows with datasets.map and a fast tokenizer of transformers."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core for each process of map()
    import datasets
    import pyarrow.compute
    from transformers import PreTrainedTokenizerFast

    folder = Path(options.work, "tokenizer")
    folder.mkdir(exist_ok=True)
    load_tokenizer(Path(options.tokenizer)).save(folder)
    stock = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    datasets.disable_progress_bar()
    began = time.monotonic()
    rows = datasets.load_dataset(
        "json", data_files=options.data, split="train", cache_dir=str(Path(options.work, "datasets"))
    )
    loading = time.monotonic() - began
    columns = {name: datasets.Sequence(datasets.Value(dtype)) for name, dtype in (("ids", "int32"), ("mask", "int8"))}
    mapped = rows.map(
        Chat(stock),
        batched=True,
        features=datasets.Features(columns),
        num_proc=options.processes,
        remove_columns=rows.column_names,
        load_from_cache_file=False,
    )
    mapping = time.monotonic() - began - loading
    lengths = pyarrow.compute.list_value_length(mapped.data.column("ids")).to_numpy()
    packed = pack_epoch(np.minimum(lengths, RECIPE.length), RECIPE.length, RECIPE.seed, 0, RECIPE.pack)
    seconds = time.monotonic() - began
    write_json(Path(options.work, "control.json"), [mapped[n] for n in range(min(COMPARED, len(mapped)))])
    return {
        "rows": len(mapped),
        "seconds": round(seconds, 2),
        "packed_rows": len(packed),
        "map_seconds": round(mapping, 2),
        "load_seconds": round(loading, 2),
    }


class Chat:
    """ChatML of a batch of rows, all of their texts in one call of the tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.start, self.end = (tokenizer.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>"))

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        fixed = ["\n", "system\n", "user\n", "assistant\n", RECIPE.system]
        texts = [*fixed, *batch["instruction"], *batch["output"]]
        ids = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        line, system, user, assistant, default = ids[:5]
        count = len(batch["instruction"])
        before = [self.start, *system, *default, self.end, *line, self.start, *user]
        between = [self.end, *line, self.start, *assistant]
        rows, masks = [], []
        for question, answer in zip(ids[5 : 5 + count], ids[5 + count :], strict=True):
            prompt = before + question + between
            rows.append([*prompt, *answer, self.end, *line])
            masks.append([0] * len(prompt) + [1] * (len(answer) + 1) + [0] * len(line))
        return {"ids": rows, "mask": masks}


def _compare(work: Path) -> int:
    """How many rows of both were compared; they have to be equal."""
    ours, control = (json.loads((work / name).read_text()) for name in ("ours.json", "control.json"))
    for number, (one, other) in enumerate(zip(ours, control, strict=True)):
        if one != {"ids": other["ids"][: RECIPE.length], "mask": other["mask"][: RECIPE.length]}:
            raise SystemExit(f"row {number + 1} differs from the control")
    return len(ours)


# Rows


def write_rows(path: Path, count: int, tokenizer: Tokenizer) -> None:
    """`count` rows of the Alpaca format, about 1 KB each."""
    draw = random.Random(SEED)
    english, chinese = _english(draw), _chinese(draw, tokenizer)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            text = chinese if number % 2 else english
            row = {"instruction": text(draw.randint(60, 200)), "input": "", "output": text(draw.randint(400, 1400))}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _english(draw: random.Random) -> Callable[[int], str]:
    """text(bytes): sentences of Python's documentation; one word in forty is new."""
    import pydoc_data.topics

    text = "\n".join(pydoc_data.topics.topics.values())
    words = [re.findall(r"\S+", sentence) for sentence in re.split(r"(?<=[.:])\s+", text)]
    words = [sentence for sentence in words if 4 < len(sentence) < 40]

    def rare() -> str:
        return "".join(draw.choices("aeioulnrstkmdp", k=draw.randint(4, 11)))

    def english(size: int) -> str:
        found: list[str] = []
        while size > 0:
            sentence = " ".join(rare() if draw.random() < 0.025 else word for word in draw.choice(words))
            found.append(sentence)
            size -= len(sentence) + 1
        return " ".join(found)

    return english


def _chinese(draw: random.Random, tokenizer: Tokenizer) -> Callable[[int], str]:
    """text(bytes): words of the vocabulary by Zipf's law, with single characters and punctuation."""
    words: list[str] = []
    single: list[str] = []
    for token in range(tokenizer.backend.get_vocab_size()):
        word = tokenizer.bytes_of(token).decode("utf-8", "ignore")
        if re.fullmatch("[\u4e00-\u9fff]+", word):
            (words if len(word) > 1 else single).append(word)
    some = words + single
    draw.shuffle(some)
    weights = list(itertools.accumulate(1 / (rank + 10) for rank in range(len(some))))

    def chinese(size: int) -> str:
        found: list[str] = []
        while size > 0:
            phrase = "".join(draw.choices(some, cum_weights=weights, k=draw.randint(2, 6))) + draw.choice(
                "，，，。、；：！？"
            )
            found.append(phrase)
            size -= 3 * len(phrase)
        return "".join(found)

    return chinese


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
