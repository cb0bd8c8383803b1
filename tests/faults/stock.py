"""The same faults on the stock Trainer (transformers 4.34.1), as a script written with it would meet them.

    python -m tests.faults.stock

A tiny Llama is trained by transformers.Trainer with a checkpoint every few steps; each fault is one that the tests of our own runs make.
Then the script is started again as people do: the last checkpoint that `get_last_checkpoint` finds, and `resume_from_checkpoint`. The
outcome is compared with an undisturbed run, bit for bit. Pickles are loaded as torch < 2.6 did where `unpickle=1`: on the pinned
torch 2.7.1 no resume gets past them at all, which is the first line of the table.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
STEPS, EVERY = 24, 4
SCRIPT = """
import os, sys
import numpy, torch
torch.set_num_threads(1)
if os.environ.get("UNPICKLE"):
    load = torch.load
    torch.load = lambda *a, **k: load(*a, **{**k, "weights_only": False})
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint
set_seed(1)
model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=300))
draw = torch.Generator().manual_seed(2)
rows = [torch.randint(0, 300, (24,), generator=draw) for _ in range(48)]
data = [{"input_ids": row, "labels": row} for row in rows]
arguments = TrainingArguments("out", max_steps=STEPS, save_steps=EVERY, save_total_limit=2, per_device_train_batch_size=4,
    logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, learning_rate=1e-3)
last = get_last_checkpoint("out") if os.path.isdir("out") else None
print("resumes from", last, flush=True)
Trainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=last)
torch.save(model.state_dict(), "final.bin.new"); os.replace("final.bin.new", "final.bin")
"""


def start(folder: Path, unpickle: bool, **more: str) -> "subprocess.Popen[str]":
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(SCRIPT.replace("STEPS", str(STEPS)).replace("EVERY", str(EVERY)))
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **({"UNPICKLE": "1"} if unpickle else {}),
        **more,
    }
    command = [sys.executable, "-W", "ignore", "script.py"]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def final(folder: Path) -> dict[str, "object"] | None:
    import torch

    path = folder / "final.bin"
    return torch.load(path, weights_only=True) if path.is_file() else None


def equal(one: dict, two: dict) -> bool:  # type: ignore[type-arg]
    return all(one[key].equal(two[key]) for key in one)


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "out").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))


# --- faults: each is given the folder of a script that was started, and leaves it stopped ----------------------------------


def killed(folder: Path, unpickle: bool, ready: Callable[[], bool], number: int = signal.SIGKILL) -> int:
    """Send a signal when it is time; the status."""
    process = start(folder, unpickle)
    while process.poll() is None and not ready():
        time.sleep(0.0002)
    process.send_signal(number)
    process.communicate()
    return process.returncode


def reached(folder: Path, step: int, file: str = "trainer_state.json") -> Callable[[], bool]:
    path = folder / "out" / f"checkpoint-{step}" / file
    return lambda: path.exists()


def between(folder: Path, unpickle: bool) -> None:
    killed(folder, unpickle, reached(folder, 12))
    time.sleep(0.2)


def in_a_save(folder: Path, unpickle: bool) -> None:
    """The second checkpoint's folder is there, its last file is not."""
    killed(folder, unpickle, reached(folder, 8, "config.json"))


def terminated(folder: Path, unpickle: bool) -> None:
    killed(folder, unpickle, reached(folder, 8), signal.SIGTERM)


def spoilt(name: str, how: str) -> Callable[[Path, bool], None]:
    """A file of the newest checkpoint of two, after a kill."""

    def act(folder: Path, unpickle: bool) -> None:
        between(folder, unpickle)
        *_, before, newest = checkpoints(folder)
        path = newest / name
        if how == "missing":
            path.unlink()
        elif how == "truncated":
            path.write_bytes(path.read_bytes()[:-64])
        elif how == "zeroed":
            path.write_bytes(bytes(path.stat().st_size))
        elif how == "one bit flipped":
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 4
            path.write_bytes(bytes(data))
        else:
            shutil.copyfile(before / name, path)

    return act


def full(folder: Path, unpickle: bool) -> None:
    """No file may grow beyond what a disk with 100 kB left takes: the second checkpoint does not fit."""
    process = start(folder, unpickle)
    ready = reached(folder, 4)
    while process.poll() is None and not ready():
        time.sleep(0.0002)
    if process.poll() is None:
        subprocess.run(["prlimit", "--pid", str(process.pid), "--fsize=100000"], check=True)
    process.communicate()


FILES = ("pytorch_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
HOWS = ("missing", "truncated", "zeroed", "one bit flipped", "another step's")
FAULTS: dict[str, Callable[[Path, bool], None]] = {
    "SIGKILL between two saves": between,
    "SIGKILL in a save": in_a_save,
    "SIGTERM (docker stop, a time limit)": terminated,
    "the disk full in a save": full,
    **{f"{name} {how}": spoilt(name, how) for how in HOWS for name in FILES},
}


def outcome(folder: Path, whole: dict, unpickle: bool) -> str:  # type: ignore[type-arg]
    """Start it again, as a person would, and say in words what came of it."""
    there = [path.name for path in checkpoints(folder)]
    process = start(folder, unpickle)
    said, _ = process.communicate()
    resumed = next((line.rpartition(" ")[2] for line in said.splitlines() if line.startswith("resumes from")), "None")
    found = final(folder)
    if process.returncode or found is None:
        return f"does not go on: {said.strip().splitlines()[-1][:90]}"
    lost = "" if resumed != "None" or not there else ", from step 0"
    return f"same weights{lost}" if equal(found, whole) else f"OTHER WEIGHTS, silently (from {Path(resumed).name})"


def main(words: list[str]) -> int:
    with tempfile.TemporaryDirectory() as made:
        begun = Path(made)
        undisturbed = begun / "whole"
        start(undisturbed, True).communicate()
        whole = final(undisturbed)
        assert whole is not None
        (begun / "plain").mkdir()
        between(begun / "plain", False)
        print(
            f"as installed (torch 2.7.1), SIGKILL and the same command: {outcome(begun / 'plain', whole, False)}",
            flush=True,
        )
        for name, fault in FAULTS.items():
            folder = begun / name.replace(" ", "-").replace("/", "-")
            folder.mkdir()
            fault(folder, True)
            print(f"{name}: {outcome(folder, whole, True)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
