"""A disk that fails at a given call: ENOSPC, EIO and SIGKILL at each write, fsync, rename, unlink and mkdir.

    python -m tests.faults.disk [save] [export] [gguf] [gptq] [adapter] [quantize] [quantize-gptq] [every=1]
        [json=FILE.jsonl]

Tried on a save, on an export of each format with its passport, and on making an Int4 model by either method. One
process imports everything with the preloaded shim (shim.c) and forks a child for each case, so a case takes
milliseconds. After each, the last good state must be there without damage, no half of a new one may be visible, and the
same action on a working disk must succeed.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import results

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
KINDS = {"ENOSPC": 1, "EIO": 2, "SIGKILL": 3}


@dataclass(frozen=True)
class Scene:
    """One action that is interrupted.

    prepare(folder): make a good state. act(folder): the action. judge(folder): what is wrong now; empty if nothing.
    again(folder): what is wrong after the action was repeated on a working disk.
    """

    prepare: Callable[[Path], None]
    act: Callable[[Path], None]
    judge: Callable[[Path], str]
    again: Callable[[Path], str]


def build(folder: Path) -> Path:
    """The compiled shim; FileNotFoundError where there is no C compiler."""
    target = folder / "shim.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(target), str(HERE / "shim.c"), "-ldl"], check=True)
    return target


def start(names: list[str], every: int = 1, target: str = "") -> "subprocess.CompletedProcess[str]":
    """This module with the shim, in a process of its own. Only each `every`-th call fails."""
    with tempfile.TemporaryDirectory() as made:
        shim = build(Path(made))
        env = {**os.environ, "LD_PRELOAD": str(shim), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SHIM": "1"}
        words = [
            sys.executable,
            "-m",
            "tests.faults.disk",
            f"every={every}",
            *names,
            *([f"json={target}"] if target else []),
        ]
        return subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True)


# --- one case ---------------------------------------------------------------------------------------------------------


def forked(work: Callable[[], None]) -> int:
    """The status of a child that does `work`: 0, 1 for an exception, -9 if it was killed. Its output is dropped."""
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def armed(folder: Path, kind: int, at: int, act: Callable[[Path], None], name: Path | None = None) -> None:
    """Act with call number `at` failing. The file `name`, if given, gets the number of calls and the name of the last."""
    shim: Any = ctypes.CDLL(None)
    shim.fault_last.restype = ctypes.c_char_p
    shim.fault_arm(str(folder).encode(), kind, at)
    try:
        act(folder)
    finally:
        calls, last = shim.fault_count(), shim.fault_last().decode()
        shim.fault_arm(b"", 0, 0)
        if name is not None:
            name.write_text(f"{calls} {last}")


def count(scene: Scene, folder: Path, every: int) -> tuple[int, dict[int, str]]:
    """The number of calls of an action, and the names of those that will fail: each `every`-th."""
    note, names, total, at = folder.with_name("note"), dict[int, str](), 1, 1
    while at <= total:
        fresh(scene, folder)
        status = forked(lambda at=at: armed(folder, 0, at, scene.act, note))  # type: ignore[misc]
        assert status == 0, "it fails without a fault"
        text = note.read_text().split()
        total, names[at] = int(text[0]), text[1]
        at += every
    return total, names


def fresh(scene: Scene, folder: Path) -> None:
    """Make the good state in `folder`: prepared once, then copied."""
    prepared = folder.with_name(f"{folder.name}-prepared")
    if not prepared.exists():
        prepared.mkdir(parents=True)
        assert forked(lambda: scene.prepare(prepared)) == 0, "it cannot be prepared"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(prepared, folder)


def campaign(title: str, scene: Scene, folder: Path, every: int, target: str = "") -> list[str]:
    """Every call × every kind of fault; prints a line for each kind, returns what went wrong."""
    began = time.monotonic()
    total, names = count(scene, folder, every)
    tally = Counter(names.values())
    print(f"{title}: {total} calls: " + ", ".join(f"{n} {name}" for name, n in tally.items()), flush=True)
    wrong, ended = [], {}
    for kind, number in KINDS.items():
        cases = failed = 0
        for at in names:
            fresh(scene, folder)
            status = forked(lambda: armed(folder, number, at, scene.act))  # noqa: B023
            if kind == "SIGKILL" and status != -9:
                wrong.append(f"{title}, {kind} at call {at} ({names[at]}): was not killed, status {status}")
            cases += 1
            failed += status != 0
            for problem in (scene.judge(folder), scene.again(folder)):
                if problem:
                    wrong.append(f"{title}, {kind} at call {at} ({names[at]}): {problem}")
        print(f"  {kind}: {cases} cases, {failed} of them ended the attempt, {len(wrong)} wrong so far", flush=True)
        ended[kind] = {"cases": cases, "ended_the_attempt": failed}
    report = {"scene": title, "calls": total, "kinds_of_calls": tally, "every": every, "faults": ended, "wrong": wrong}
    results.keep(target, "disk", {**report, "seconds": round(time.monotonic() - began)})
    return wrong


# --- a save -----------------------------------------------------------------------------------------------------------


def saving() -> Scene:
    """Save a checkpoint after step 4 beside the one after step 2, of which one is kept."""
    from tests.runs.test_checkpoint import snapshot
    from train.runs import checkpoint

    def judge(run: Path) -> str:
        newest, notes = checkpoint.newest(run)
        if notes:
            return notes[0]
        if newest is None or checkpoint.step_of(newest) not in (2, 4):
            return f"the newest is {newest}"
        saved, expected = checkpoint.read(newest), snapshot(checkpoint.step_of(newest))
        same = all(saved.trainable[key].equal(value) for key, value in expected.trainable.items())
        return "" if same else f"{newest.name} has other values"

    def again(run: Path) -> str:
        checkpoint.sweep(run)
        checkpoint.write(run, snapshot(6), 1)
        names = [path.name for path in (run / "checkpoints").iterdir()]
        return (
            "" if names == ["step-000006"] and not checkpoint.newest(run)[1] else f"after a good save there are {names}"
        )

    return Scene(
        lambda run: void(checkpoint.write(run, snapshot(2), 1)),
        lambda run: void(checkpoint.write(run, snapshot(4), 1)),
        judge,
        again,
    )


def careless() -> Scene:
    """A faulty save that the campaign must find: it removes the older checkpoint first."""
    from dataclasses import replace

    from tests.runs.test_checkpoint import snapshot
    from train.runs import checkpoint

    def act(run: Path) -> None:
        shutil.rmtree(run / "checkpoints" / "step-000002")
        checkpoint.write(run, snapshot(4), 1)

    return replace(saving(), act=act)


def void(_: object) -> None:
    return None


# --- an export --------------------------------------------------------------------------------------------------------


FORMATS = {"export": "hf", "gguf": "gguf", "gptq": "gptq", "adapter": "adapter"}  # scene -> format= of the command


def export_workspace(root: Path) -> None:
    """models/, runs/tiny, and runs/other: a copy under another name, whose export replaces that of the first."""
    from tests.support.runs import tiny_run
    from train.common.files import read_json, write_json

    tiny = tiny_run(root)
    other = tiny.with_name("other")
    shutil.copytree(tiny, other)
    write_json(other / "run.json", {**read_json(tiny / "run.json"), "run": "other"})


def exporting(workspace: Path, form: str) -> Scene:
    """Export the run `other` over an export of the run `tiny`, in one of FORMATS. `workspace`: see export_workspace."""
    from transformers import GenerationConfig  # noqa: F401  # imported once here, not in each child

    from train.commands import export
    from train.common.files import staged
    from train.model.folder import find_damage, read_manifest

    def act(folder: Path, run: str = "other") -> None:
        keys = {
            "models": str(workspace / "models"),
            "runs": str(workspace / "runs"),
            "out": str(folder / "out"),
            "verify": 1,
            "passport": 1,
        }
        export.run(export.Options(run=run, format=form, **keys))  # type: ignore[arg-type]

    def damage(out: Path) -> list[str]:
        parts = [out, *((out / name for name in ("base", "adapter")) if form == "gptq" else ())]
        if missing := [part.name for part in parts if read_manifest(part) is None]:
            return [f"{name} has no manifest" for name in missing]
        return [text for part in parts for text in find_damage(part, read_manifest(part) or {}, full=True)]

    def judge(folder: Path) -> str:
        out = folder / "out"
        with staged(folder / "other") as aside:  # as the next command that writes in this folder does
            (aside / "x").touch()
        if read_manifest(out) is None:
            return f"no export is there: {[path.name for path in folder.iterdir()]}"
        return "; ".join(damage(out))

    def again(folder: Path) -> str:
        status = forked(lambda: act(folder))
        names = sorted(path.name for path in folder.iterdir() if path.name != "other")
        listed = read_manifest(folder / "out")
        good = status == 0 and names == ["out"] and listed and listed["inputs"]["run"] == "other"
        return "" if good and not damage(folder / "out") else f"again: status {status}, {names}"

    return Scene(lambda folder: act(folder, "tiny"), act, judge, again)


# --- an Int4 model ----------------------------------------------------------------------------------------------------


METHODS = {"quantize": "nearest", "quantize-gptq": "gptq"}  # scene -> method= of the command


def quantizing(workspace: Path, method: str) -> Scene:
    """Make out from a float model, beside a folder that was there before. Nothing of this name is ever replaced."""
    from transformers import GenerationConfig  # noqa: F401  # imported once here, not in each child

    from tests.support.oracles import tiny_checkpoint, tiny_config
    from train.commands import quantize
    from train.common.files import staged
    from train.export.gptq_linear import auto_gptq
    from train.model.folder import find_damage, read_manifest

    source, data = workspace / "Tiny", workspace / "calibration.jsonl"
    tiny_checkpoint(source, tiny_config("qwen2"))
    rows = [{"instruction": f"What is {n} + {n}?", "input": "", "output": f"It is {2 * n}."} for n in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    calibrated = {"data": str(data), "rows": 8, "held_out": 4, "length": 256} if method == "gptq" else {}
    if calibrated:
        auto_gptq()

    def act(folder: Path) -> None:
        given = {"model": str(source), "models": str(folder), "out": "out", "method": method, "group_size": 32}
        quantize.run(quantize.Options(**given, **calibrated))  # type: ignore[arg-type]

    def problems(out: Path) -> list[str]:
        manifest = read_manifest(out)
        return ["a folder without a manifest"] if manifest is None else find_damage(out, manifest, full=True)

    def judge(folder: Path) -> str:
        with staged(folder / "aside") as aside:  # as the next command that writes in this folder does
            (aside / "x").touch()
        if (folder / "kept" / "notes").read_text() != "mine":
            return "another folder was changed"
        return "; ".join(problems(folder / "out")) if (folder / "out").exists() else ""

    def again(folder: Path) -> str:
        status = forked(lambda: act(folder))
        names = sorted(path.name for path in folder.iterdir() if path.name != "aside")
        good = status == 0 and names == ["kept", "out"] and not problems(folder / "out")
        return "" if good else f"again: status {status}, {names}"

    def prepare(folder: Path) -> None:
        (folder / "kept").mkdir()
        (folder / "kept" / "notes").write_text("mine")

    return Scene(prepare, act, judge, again)


def scene_of(name: str, workspace: Path) -> Scene:
    """The scene of a word of the command line."""
    if name in FORMATS:
        return exporting(workspace, FORMATS[name])
    if name in METHODS:
        return quantizing(workspace, METHODS[name])
    return {"save": saving, "careless": careless}[name]()


def main(words: list[str]) -> int:
    more = results.words(words)
    every, target = int(more.get("every", 1)), more.get("json", "")
    names = [word for word in words if "=" not in word] or ["save", *FORMATS, *METHODS]
    if "SHIM" not in os.environ:
        done = start(names, every, target)
        print(done.stdout + done.stderr, end="")
        return done.returncode
    import torch

    torch.set_num_threads(1)
    wrong = []
    with tempfile.TemporaryDirectory() as made:
        workspace = Path(made) / "workspace"
        if FORMATS.keys() & set(names):
            export_workspace(workspace)
        for name in names:
            wrong += campaign(name, scene_of(name, workspace), Path(made) / name, every, target)
    print("\n".join(wrong) or "nothing was lost")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
