"""Write tests/assets/old_runs: a working directory as today's program leaves it, for later programs to continue.

python -m tests.old_runs        from a clean checkout; writes the folder anew

It runs the real command line on a CPU, in float32, with relative paths only: the folder works wherever it is copied to.
"""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.oracles import tiny_checkpoint, tiny_config

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tests" / "assets" / "old_runs"
SMALL = ["length=96", "rank=1", "batch=2", "accumulation=1", "keep=1", "precision=fp32", "zero=0"]
SMOKE = ["data=data/knowledge.jsonl", "recipe=recipes/smoke.yaml", "learning_rate=1e-2", "steps=20", *SMALL]
VOICE = ["data=data/knowledge.jsonl", "recipe=recipes/voice.yaml", "model=tiny-Int4", "save_every=2", *SMALL]
COMMANDS = {  # run -> the words after `python -m train train`
    "whole": [*SMOKE, "model=tiny-Int4", "save_every=8", "run=whole"],
    "cut": [*SMOKE, "model=tiny-Int4", "save_every=8", "run=cut"],
    "qwen": [*SMOKE, "model=tiny-qwen-Int4", "save_every=20", "run=qwen"],
    "voice": [*VOICE, "run=voice"],
    "voice-cut": [*VOICE, "run=voice-cut"],
}
README = """# Runs of an earlier program

A working directory (`data/`, `recipes/`, `models/`, `runs/`), written by `python -m tests.old_runs` at commit
{commit}. `tests/test_old_runs.py` copies it and continues its runs:
what users have on their disks must keep working. Every path in it is relative. `run.json` names the system without its
kernel's version. Keep these files as they are: only files of the earlier program can test this. For a new format, write
a second folder beside this one.

| run | what it is |
| --- | --- |
| whole | 20 steps on a base in the qwen2 layout, then `export` and `compare` |
| cut | the same command, ended by SIGTERM (status 75) after at least 6 steps, with its checkpoint |
| qwen | 20 steps on a base in the qwen layout |
| voice | two stages of the recipe `voice` |
| voice-cut | the same command, killed (SIGKILL) in its second stage after at least 5 steps |

`commands.json`: what was typed for each after `python -m train train`.
"""


def inputs(folder: Path) -> None:
    """Two bases, two data sets, two recipes. Hidden 32, two blocks, two heads of 16: some 30 kB a base."""
    small = {"vocab_size": 264, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    qwen2 = tiny_config(num_key_value_heads=1, tie_word_embeddings=True, **small)
    tiny_checkpoint(folder / "models" / "tiny-Int4", qwen2, int4=True)
    tiny_checkpoint(
        folder / "models" / "tiny-qwen-Int4", tiny_config("qwen", num_key_value_heads=2, **small), int4=True
    )
    (folder / "data").mkdir()
    for name, count in (("knowledge", 24), ("demo", 2)):
        rows = [{"instruction": f"Question {n}?", "output": f"Answer {n}. " * (1 + n % 4)} for n in range(count)]
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipes").mkdir()
    for name, copy in (("smoke", "smoke"), ("two_stage", "voice")):
        shutil.copy(ROOT / "train" / "recipes" / f"{name}.yaml", folder / "recipes" / f"{copy}.yaml")


def start(folder: Path, *words: str) -> "subprocess.Popen[bytes]":
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, "-m", "train", *words], cwd=folder, env=env)


def finish(folder: Path, *words: str) -> None:
    if status := start(folder, *words).wait():
        raise SystemExit(f"{words}: status {status}")


def cut_off(folder: Path, run: str, sent: signal.Signals, steps: int, status: int) -> None:
    """Send a signal to a run once it has written `steps` losses and a checkpoint (SIGTERM writes its own)."""
    process, path = start(folder, "train", *COMMANDS[run]), folder / "runs" / run
    losses = path / "losses.jsonl"
    while process.poll() is None and (not losses.is_file() or losses.read_bytes().count(b"\n") < steps):
        time.sleep(0.001)
    process.send_signal(sent)
    if process.wait() != status or (path / "run.json").is_file():
        raise SystemExit(f"{run} ended with status {process.returncode}, expected {status}: try again")


def leave_out(folder: Path) -> None:
    """Remove what identifies this machine (tensorboard's files, the kernel's version), locks and half-written folders,
    and what is large and not needed: a picture, and the checkpoints of all finished runs but one.
    """
    for path in sorted(folder.rglob("*")):
        if path.exists() and (path.name in ("tensorboard", "loss.png") or path.name.startswith(".")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for finished in folder.rglob("run.json"):
        text = finished.read_text(encoding="utf-8")
        finished.write_text(text.replace(platform.platform(), platform.system()), encoding="utf-8")
        if finished.parent.name != "whole":
            shutil.rmtree(finished.parent / "checkpoints")


def main() -> None:
    commit = subprocess.check_output(["git", "-C", str(ROOT), "rev-parse", "HEAD"], text=True).strip()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "old_runs"
        inputs(folder)
        for run in ("whole", "qwen", "voice"):
            finish(folder, "train", *COMMANDS[run])
        finish(folder, "export", "run=whole")
        finish(folder, "compare", "run=whole", "max_tokens=16")
        cut_off(folder, "cut", signal.SIGTERM, steps=6, status=75)
        cut_off(folder, "voice-cut", signal.SIGKILL, steps=5, status=-signal.SIGKILL)
        leave_out(folder)
        (folder / "commands.json").write_text(json.dumps(COMMANDS, indent=1) + "\n")
        (folder / "README.md").write_text(README.format(commit=commit))
        shutil.rmtree(FOLDER, ignore_errors=True)
        shutil.copytree(folder, FOLDER)


if __name__ == "__main__":
    main()
