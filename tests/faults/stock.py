"""The same faults on the stock Trainer (transformers 4.34.1), as a script that uses it meets them.

    python -m tests.faults.stock [part of a fault's name …] [json=FILE]

transformers.Trainer trains a tiny Llama with a checkpoint every few steps; the faults are those of the tests of our own
runs. Then the script is started again as people do it: `get_last_checkpoint`, then `resume_from_checkpoint`. The outcome
is compared with an undisturbed run, bit for bit. `unpickle` loads pickles as torch < 2.6 did: on the pinned torch 2.7.1
no resume gets past them, which is the first line of the table.
"""

import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from tests.faults import results

STEPS, EVERY = 120, 4
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
config = LlamaConfig(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=300)
model = LlamaForCausalLM(config)
draw = torch.Generator().manual_seed(2)
rows = [torch.randint(0, 300, (24,), generator=draw) for _ in range(52)]
data = [{"input_ids": row, "labels": row} for row in rows]
arguments = TrainingArguments(
    "out", max_steps=STEPS, save_steps=EVERY, save_total_limit=2, per_device_train_batch_size=4,
    logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, learning_rate=1e-3)
last = get_last_checkpoint("out") if os.path.isdir("out") else None
print("resumes from", last, flush=True)
Trainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=last)
torch.save(model.state_dict(), "final.bin.new"); os.replace("final.bin.new", "final.bin")
"""


class Attempt:
    """One start of the script in a child of this process, which has imported everything."""

    def __init__(self, folder: Path, unpickle: bool) -> None:
        folder.mkdir(exist_ok=True)
        self.log, self.returncode = folder / "log", None
        self.pid = os.fork()
        if self.pid == 0:
            self._run(folder, unpickle)

    def _run(self, folder: Path, unpickle: bool) -> None:
        os.chdir(folder)
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        os.environ.pop("UNPICKLE", None)
        os.environ.update({"UNPICKLE": "1"} if unpickle else {})
        status = 1
        try:
            code = SCRIPT.replace("STEPS", str(STEPS)).replace("EVERY", str(EVERY))
            exec(compile(code, "script.py", "exec"), {"__name__": "__main__"})
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {' '.join(str(error).split())}")
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if done else None
        return self.returncode

    def wait(self) -> str:
        """Its output, after it has ended."""
        while self.poll() is None:
            time.sleep(0.005)
        return self.log.read_text() if self.log.is_file() else ""

    def signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def final(folder: Path) -> dict[str, "object"] | None:
    import torch

    path = folder / "final.bin"
    return torch.load(path, weights_only=True) if path.is_file() else None


def equal(one: dict, two: dict) -> bool:  # type: ignore[type-arg]
    return all(one[key].equal(two[key]) for key in one)


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "out").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))


# --- faults: each starts the script in a folder, and leaves it stopped ------------------------------------------------


def killed(folder: Path, unpickle: bool, ready: Callable[[], bool], number: int = signal.SIGKILL) -> int:
    """Start the script and send a signal once `ready`; the exit status."""
    process = Attempt(folder, unpickle)
    while process.poll() is None and not ready():
        time.sleep(0.0002)
    process.signal(number)
    process.wait()
    assert not (folder / "final.bin").exists(), "the script ended before the signal"
    return process.returncode or 0


def reached(folder: Path, step: int, file: str) -> Callable[[], bool]:
    path = folder / "out" / f"checkpoint-{step}" / file
    return lambda: path.exists()


def saved(folder: Path, step: int) -> Callable[[], bool]:
    """Whether the checkpoint is complete: its last file was written a while ago."""
    last = folder / "out" / f"checkpoint-{step}" / "rng_state.pth"  # the last file of a checkpoint
    return lambda: last.exists() and last.stat().st_size > 10_000 and time.time() - last.stat().st_mtime > 0.01


def between(folder: Path, unpickle: bool) -> None:
    killed(folder, unpickle, saved(folder, 12))


def in_a_save(folder: Path, unpickle: bool) -> None:
    """The folder of the second checkpoint exists, its last file does not."""
    killed(folder, unpickle, reached(folder, 8, "config.json"))


def terminated(folder: Path, unpickle: bool) -> None:
    killed(folder, unpickle, saved(folder, 8), signal.SIGTERM)


def damaged(name: str, kind: str) -> Callable[[Path, bool], None]:
    """Damage to a file of the newer of two checkpoints, after a kill."""

    def act(folder: Path, unpickle: bool) -> None:
        between(folder, unpickle)
        *_, before, newest = checkpoints(folder)
        path = newest / name
        if kind == "missing":
            path.unlink()
        elif kind == "truncated":
            path.write_bytes(path.read_bytes()[:-64])
        elif kind == "zeroed":
            path.write_bytes(bytes(path.stat().st_size))
        elif kind == "one bit flipped":
            data = bytearray(path.read_bytes())
            data[len(data) // 3] ^= 64
            path.write_bytes(bytes(data))
        else:
            shutil.copyfile(before / name, path)

    return act


def full(folder: Path, unpickle: bool) -> None:
    """A limit of 100 kB per file stands for a full disk: the second checkpoint does not fit."""
    process = Attempt(folder, unpickle)
    ready = saved(folder, 4)
    while process.poll() is None and not ready():
        time.sleep(0.0002)
    if process.poll() is None:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    process.wait()


FILES = ("pytorch_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
KINDS = ("missing", "truncated", "zeroed", "one bit flipped", "another step's")
FAULTS: dict[str, Callable[[Path, bool], None]] = {
    "SIGKILL between two saves": between,
    "SIGKILL in a save": in_a_save,
    "SIGTERM (docker stop, a time limit)": terminated,
    "the disk full in a save": full,
    **{f"{name} {kind}": damaged(name, kind) for kind in KINDS for name in FILES},
}


def outcome(folder: Path, whole: dict, unpickle: bool) -> str:  # type: ignore[type-arg]
    """Start the script again, as a person would; the outcome in words."""
    names = [path.name for path in checkpoints(folder)]
    process = Attempt(folder, unpickle)
    printed = process.wait()
    resumed = next(
        (line.rpartition(" ")[2] for line in printed.splitlines() if line.startswith("resumes from")), "None"
    )
    weights = final(folder)
    if process.returncode or weights is None:
        return f"does not continue: {printed.strip().splitlines()[-1][:90]}"
    lost = "" if resumed != "None" or not names else ", from step 0"
    return (
        f"same weights{lost} (from {Path(resumed).name})"
        if equal(weights, whole)
        else f"OTHER WEIGHTS, silently (from {Path(resumed).name})"
    )


def main(words: list[str]) -> int:
    target, words = results.words(words).get("json", ""), [word for word in words if "=" not in word]
    outcomes: dict[str, str] = {}

    def note(name: str, text: str) -> None:
        outcomes[name] = text
        print(f"{name}: {text}", flush=True)

    warnings.simplefilter("ignore")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch
    from transformers import LlamaForCausalLM, Trainer  # noqa: F401

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folders = Path(made)
        undisturbed = folders / "whole"
        print(Attempt(undisturbed, True).wait(), end="")
        whole = final(undisturbed)
        assert whole is not None
        between(folders / "plain", False)
        note("as installed (torch 2.7.1), SIGKILL and the same command", outcome(folders / "plain", whole, False))
        for name, fault in FAULTS.items():
            if words and not any(word in name for word in words):
                continue
            folder = folders / name.replace(" ", "-").replace("/", "-")
            folder.mkdir()
            fault(folder, True)
            note(name, outcome(folder, whole, True))
    results.keep(target, "stock", {"trainer": "transformers 4.34.1", "outcomes": outcomes})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
