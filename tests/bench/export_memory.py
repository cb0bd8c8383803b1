"""Exports of random Int4 bases in published shapes: seconds, memory of the host by kind, memory of the GPU, output.

    python -m tests.bench.export_memory [cases=7b:4:0,72b:1:0,72b:2:0] [control=CHECKOUT] [work=FOLDER] [verify=30]
                                        [rank=64] [length=256] [gpu_gib=0] [out=FILE.json]

On a card (60 GB of disk), and in ten minutes on two cores:

    python -m tests.bench.export_memory cases=7b:0,72b:1:0,72b:3:0 seconds=105 out=export-memory.json
    python -m tests.bench.export_memory cases=7b:4:0,72b:1:0,72b:2:0 verify=4 length=48

cases: SHAPE:LAYERS[:PROMPTS] with commas between. A shape of tests/bench/shapes.py; 0 layers: all of the shape's.
PROMPTS: of the passport, as export's option; its answers need the whole model in memory, so 0 shows what the rest
takes. Each case makes a base and a run with a random adapter, exports it with `make export`'s command in a process of
its own, and removes both. control: the root of another checkout of this program, which exports the same run before.

anon_gb and file_gb are the largest resident sets, sampled ten times a second over the process and its children:
memory that no file backs, and pages of mapped files; peak_gb is the largest sum of both at one time, and
phases_peak_gb_until_s has it for each part of the export, with the second at which it ended. gpu_gb: what torch had
allocated. disk_gb_s: of 2 GB written and flushed before the first case. sampled_equal: two linears of the output have
the bytes that the CPU computes. same_output: the files of both arms are equal.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from tests.bench import random_base, shapes
from tests.bench.data_rates import machine, said
from tests.bench.gptq_memory import write_data
from tests.bench.spec import heading
from tests.support.oracles import small_tokenizer
from train.common.device import pick_device
from train.common.files import sha256, write_json
from train.config.options import build, describe, option, pairs
from train.config.recipe import Recipe
from train.export import merge
from train.model.adapter_file import read_adapter
from train.model.layouts import DecoderConfig
from train.model.loading import read_folder_config, read_tensors, tensor_files
from train.model.lora import attach, save_adapter
from train.runs.provenance import hash_folder

ROOT, GB, SAMPLED, DISK_BYTES = Path(__file__).parents[2], 10**9, 0.1, 2 * 10**9
KINDS = {"anon": "RssAnon", "file": "RssFile", "shmem": "RssShmem"}
PHASES = ("Merging", "merging", "greedy answers", "Comparing", "comparing", "Counting")  # how lines of the export begin
# The export in the checkout that is the working folder; its last line has what only the process itself knows
EXPORT = """
import json, sys
import torch
from train.commands.export import Options, run
options, gib = json.loads(sys.argv[1]), float(sys.argv[2])
if gib and torch.cuda.is_available():
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / torch.cuda.get_device_properties(0).total_memory))
run(Options(**options))
cuda = torch.cuda.is_available()
peaks = {"gpu_gb": torch.cuda.max_memory_allocated, "gpu_reserved_gb": torch.cuda.max_memory_reserved} if cuda else {}
print("peaks", json.dumps({name: round(peak() / 1e9, 2) for name, peak in peaks.items()}), flush=True)
"""


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    cases: str = option("7b:4:0,72b:1:0,72b:2:0", "SHAPE:LAYERS[:PROMPTS], with commas between; 0 layers: all")
    control: str = option("", "root of another checkout, which exports the same before")
    work: str = option("", "folder for bases and outputs; empty: a temporary one")
    verify: int = option(30, "conversations that are compared", interval="[1, 1000]")
    rank: int = option(64, "of the adapter", interval="[1, 1024]")
    length: int = option(256, "bytes of a conversation's answer, a token each", interval="[16, 4096]")
    gpu_gib: float = option(0.0, "GiB of the GPU that torch may take; 0: all", interval="[0, 1000]")
    seconds: int = option(0, "begin no case after so many; 0: all are measured", interval="[0, 100000]")
    out: str = option("", "the report; empty: none")


def main(words: list[str]) -> int:
    if {"-h", "--help"} & set(words):
        print(f"{__doc__}\n{describe(Settings)}")
        return 0
    settings = build(Settings, pairs(words))
    began, rows = time.monotonic(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(dir=settings.work or None) as temporary:
        disk = disk_speed(Path(temporary))
        print(f"the disk writes {disk} GB/s", flush=True)
        for case in settings.cases.split(","):
            if rows and settings.seconds and time.monotonic() - began > settings.seconds:
                print(f"{case} is left out: {settings.seconds} s are over")
                continue
            rows += measure_case(case, settings, Path(temporary, case.replace(":", "x")))
            if settings.out:
                report = {**heading(), "machine": machine(), "options": said(settings), "disk_gb_s": disk, "rows": rows}
                write_json(Path(settings.out), report)
    print(f"{time.monotonic() - began:.1f} s in all")
    return 0


def disk_speed(folder: Path) -> float:
    """GB/s of a file of DISK_BYTES, flushed to the disk."""
    path, part = folder / "speed", os.urandom(1 << 24)
    began = time.monotonic()
    with path.open("wb") as file:
        for _ in range(DISK_BYTES // len(part)):
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.monotonic() - began
    path.unlink()
    return round(DISK_BYTES / seconds / GB, 2)


def measure_case(case: str, settings: Settings, work: Path) -> list[dict[str, Any]]:
    """A row for each arm."""
    shape, layers, *prompts = case.split(":")
    config = shapes.config(shape)
    config = dataclasses.replace(config, num_hidden_layers=int(layers) or config.num_hidden_layers)
    began, rows, written = time.monotonic(), list[dict[str, Any]](), list[dict[str, str]]()
    make_run(work, config, settings)
    made = round(time.monotonic() - began, 1)
    for arm, root in (("control", settings.control), ("here", str(ROOT))):
        if not root:
            continue
        out = work / arm
        found = _export(Path(root), work, out, settings, int(prompts[0]) if prompts else -1)
        row = {"case": case, "arm": arm, "made_seconds": made, **found}
        files = sorted(out.glob("*.safetensors"))
        row |= {"output_gb": round(sum(file.stat().st_size for file in files) / GB, 2), "files": len(files)}
        row["sampled_equal"] = sample_is_equal(work, out)
        if settings.control:
            written.append({file.name: sha256(file) for file in files})
            row |= {"same_output": written[0] == written[-1]}
        rows.append(row)
        print(json.dumps(row), flush=True)
        shutil.rmtree(out)
    shutil.rmtree(work)
    return rows


# What is exported


def make_run(work: Path, config: DecoderConfig, settings: Settings) -> None:
    """models/base with random Int4 weights and runs/measured with a random adapter, below `work`."""
    base, run, device = work / "models/base", work / "runs/measured", pick_device()
    torch.manual_seed(0)
    random_base.write(base, config, base, device)
    small_tokenizer(base)
    write_data(work / "data.jsonl", settings.verify, settings.length)
    recipe = Recipe(model="base", rank=settings.rank, alpha=2.0 * settings.rank)
    write_adapter(run / "adapter", config, recipe)
    record = {
        "run": "measured",
        "recipe": asdict(recipe),
        "data": {"path": str(work / "data.jsonl"), "sha256": sha256(work / "data.jsonl")},
        "base": {"name": "base", "files": hash_folder(base)},
        "machine": {"processor": "", "cores": os.cpu_count(), "memory_gb": 0.0, "gpus": []},
        "versions": {"torch": torch.__version__},
        "code": {"version": "0", "commit": None, "dirty": None},
        "timings": {"steps_seconds": 1.0},
        "tokens": 1,
    }
    write_json(run / "run.json", record)
    (run / "losses.jsonl").write_text('{"step": 1, "loss": 1.0, "learning_rate": 0.0001}\n', encoding="utf-8")


def write_adapter(folder: Path, config: DecoderConfig, recipe: Recipe) -> None:
    """A random adapter on every linear of the blocks, which changes the answers a little."""
    with torch.device("meta"):
        model = attach(shapes.meta_decoder(config), recipe)
    values = {
        name: torch.randn(p.shape) * (p.shape[-1] ** -0.5 if ".lora_A." in name else 0.02 / recipe.rank**0.5)
        for name, p in model.named_parameters()
        if ".lora_" in name
    }
    save_adapter(model, folder, values)


# The measured process


def _export(root: Path, work: Path, out: Path, settings: Settings, prompts: int) -> dict[str, Any]:
    options: dict[str, Any] = {
        "run": "measured",
        "models": str(work / "models"),
        "runs": str(work / "runs"),
        "out": str(out),
    }
    options |= {"verify": settings.verify, "passport": prompts}
    command = [sys.executable, "-u", "-c", EXPORT, json.dumps(options), str(settings.gpu_gib)]
    lines: list[str] = []
    began, phase, peaks, phases = time.monotonic(), ["start"], dict[str, int](), dict[str, list[float]]()
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with subprocess.Popen(command, cwd=root, **pipes) as child:
        reader = threading.Thread(target=_read, args=(child, lines, phase))
        reader.start()
        while child.poll() is None:
            now = resident(child.pid)
            peaks = {kind: max(peaks.get(kind, 0), now[kind]) for kind in now}
            most, _ = phases.get(phase[0], (0.0, 0.0))
            phases[phase[0]] = [max(most, round(now["sum"] / GB, 2)), round(time.monotonic() - began, 1)]
            time.sleep(SAMPLED)
        reader.join()
    if child.returncode:
        raise SystemExit(f"{root}: status {child.returncode}\n{''.join(lines[-40:])}")
    row = {"seconds": round(time.monotonic() - began, 1), "peak_gb": round(peaks.pop("sum") / GB, 2)}
    row |= {f"{kind}_gb": round(value / GB, 2) for kind, value in peaks.items()}
    said_so = next((line.strip() for line in lines if "answer tokens equal" in line), "")
    gpu = next(line.removeprefix("peaks ") for line in reversed(lines) if line.startswith("peaks "))
    return row | json.loads(gpu) | {"phases_peak_gb_until_s": phases, "parity": said_so}


def _read(child: Any, lines: list[str], phase: list[str]) -> None:
    """Collect the child's lines; `phase` holds the part of the export that they tell of."""
    for line in child.stdout:
        lines.append(line)
        phase[0] = next((name.lower() for name in PHASES if line.startswith(name)), phase[0])


def resident(pid: int) -> dict[str, int]:
    """Resident bytes of a process and all below it: by kind, and their sum."""
    found = dict.fromkeys(KINDS, 0)
    try:
        processes = [pid, *(one.pid for one in psutil.Process(pid).children(recursive=True))]
    except psutil.Error:
        processes = []
    for one in processes:
        try:
            status = Path(f"/proc/{one}/status").read_text(encoding="utf-8")
        except OSError:  # it has ended
            continue
        for kind, key in KINDS.items():
            match = re.search(rf"^{key}:\s+(\d+) kB", status, flags=re.M)
            found[kind] += int(match[1]) << 10 if match else 0
    return {**found, "sum": sum(found.values())}


# The output


def sample_is_equal(work: Path, out: Path) -> bool:
    """Whether a linear of the first block and of the last one have the bytes that the CPU computes."""
    base = work / "models/base"
    files, config = tensor_files(base), read_folder_config(base)[0]
    delta = read_adapter(work / "runs/measured/adapter").load()
    names = config.names
    for block in (0, config.num_hidden_layers - 1):
        module = f"{names.block(block)}.{names.attention}.{names.out}"
        state = dict(read_tensors({name: file for name, file in files.items() if name.startswith(f"{module}.")}))
        expected = merge.merge_block(state, delta, 4, torch.float16)[f"{module}.weight"]
        if not torch.equal(_read_tensor(out, f"{module}.weight").view(torch.int16), expected.view(torch.int16)):
            return False
    return True


def _read_tensor(folder: Path, name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(tensor_files(folder)[name], "pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
