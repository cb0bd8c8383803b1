"""A disk that fails at a given call: ENOSPC, EIO and SIGKILL at every write, fsync, rename, unlink and mkdir of a save
and of an export.

    python -m tests.faults.disk [save] [export] [every=1] [json=FILE.jsonl]

One process imports everything under the preloaded shim (shim.c) and forks a child for each case: a case takes
milliseconds. After each, the last good state must be there, whole, with no half of a new one in sight, and the same
thing done again must succeed.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import time
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
    """What is tried. prepare(folder): a good state. act(folder): what is cut off. judge(folder): what is wrong now,
    empty if nothing.

    again(folder): what is wrong after the same has been done once more, on a disk that works.
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
    """This module under the shim, in a process of its own; each `every`-th call only."""
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
    """The status of a child that does `work`: 0, 1 for an exception, -9 if it was killed. What it prints is not
    shown."""
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
    """Do it under the shim; where a `name` is given, leave there which call it was."""
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


def count(scene: Scene, folder: Path) -> tuple[int, list[str]]:
    """How many calls there are, and which."""
    note, names, total, at = folder.with_name("note"), [], 1, 1
    while at <= total:
        fresh(scene, folder)
        assert forked(lambda at=at: armed(folder, 0, at, scene.act, note)) == 0, "it fails without a fault"  # type: ignore[misc]
        text = note.read_text().split()
        total = int(text[0])
        names.append(text[1])
        at += 1
    return total, names


def fresh(scene: Scene, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    assert forked(lambda: scene.prepare(folder)) == 0, "it cannot be prepared"


def campaign(title: str, scene: Scene, folder: Path, every: int, target: str = "") -> list[str]:
    """Every call × every kind; prints a line a kind, returns what went wrong."""
    began = time.monotonic()
    total, names = count(scene, folder)
    tally = {name: names.count(name) for name in dict.fromkeys(names)}
    print(f"{title}: {total} calls: " + ", ".join(f"{n} {name}" for name, n in tally.items()), flush=True)
    wrong, ended = [], {}
    for kind, number in KINDS.items():
        cases = failed = 0
        for at in range(1, total + 1, every):
            fresh(scene, folder)
            status = forked(lambda: armed(folder, number, at, scene.act))  # noqa: B023
            if kind == "SIGKILL" and status != -9:
                wrong.append(f"{title}, {kind} at call {at} ({names[at - 1]}): was not killed, status {status}")
            cases += 1
            failed += status != 0
            for found in (scene.judge(folder), scene.again(folder)):
                if found:
                    wrong.append(f"{title}, {kind} at call {at} ({names[at - 1]}): {found}")
        print(f"  {kind}: {cases} cases, {failed} of them ended the attempt, {len(wrong)} wrong so far", flush=True)
        ended[kind] = {"cases": cases, "ended_the_attempt": failed}
    found = {"scene": title, "calls": total, "kinds_of_calls": tally, "every": every, "faults": ended, "wrong": wrong}
    results.keep(target, "disk", {**found, "seconds": round(time.monotonic() - began)})
    return wrong


# --- a save -----------------------------------------------------------------------------------------------------------


def saving() -> Scene:
    """A checkpoint after step 4 where the one after step 2 is; one is kept."""
    from tests.runs.test_checkpoint import snapshot
    from train.runs import checkpoint

    def judge(run: Path) -> str:
        found, notes = checkpoint.newest(run)
        if notes:
            return notes[0]
        if found is None or checkpoint.step_of(found) not in (2, 4):
            return f"the newest is {found}"
        held, meant = checkpoint.read(found), snapshot(checkpoint.step_of(found))
        same = all(held.trainable[key].equal(value) for key, value in meant.trainable.items())
        return "" if same else f"{found.name} holds something else"

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
    """A save as it must not be, to see that it is found out: the older one goes first."""
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


def exporting(house: Path) -> Scene:
    """A bfloat16 export where a float16 one is. `house` holds models/ and runs/tiny."""
    from train.commands import export
    from train.common.files import staged
    from train.model.folder import find_damage, read_manifest

    def act(folder: Path, dtype: str = "bfloat16") -> None:
        keys = {
            "models": str(house / "models"),
            "runs": str(house / "runs"),
            "out": str(folder / "merged"),
            "verify": 1,
        }
        export.run(export.Options(run="tiny", dtype=dtype, **keys))  # type: ignore[arg-type]

    def judge(folder: Path) -> str:
        out = folder / "merged"
        with staged(folder / "other") as aside:  # any command that comes to this folder next
            (aside / "x").touch()
        listed = read_manifest(out)
        if listed is None:
            return f"no export is there: {[path.name for path in folder.iterdir()]}"
        return "; ".join(find_damage(out, listed, full=True))

    def again(folder: Path) -> str:
        status = forked(lambda: act(folder))
        names = sorted(path.name for path in folder.iterdir() if path.name != "other")
        listed = read_manifest(folder / "merged")
        good = status == 0 and names == ["merged"] and listed and listed["inputs"]["dtype"] == "bfloat16"
        return (
            ""
            if good and not find_damage(folder / "merged", listed or {}, full=True)
            else f"again: status {status}, {names}"
        )

    return Scene(lambda folder: act(folder, "float16"), act, judge, again)


def main(words: list[str]) -> int:
    more = results.words(words)
    every, target = int(more.get("every", 1)), more.get("json", "")
    names = [word for word in words if "=" not in word] or ["save", "export"]
    if "SHIM" not in os.environ:
        done = start(names, every, target)
        print(done.stdout + done.stderr, end="")
        return done.returncode
    import torch

    torch.set_num_threads(1)
    wrong = []
    with tempfile.TemporaryDirectory() as made:
        house = Path(made) / "house"
        if "export" in names:
            from tests.support.runs import tiny_run

            tiny_run(house)
        for name in names:
            scene = exporting(house) if name == "export" else {"save": saving, "careless": careless}[name]()
            wrong += campaign(name, scene, Path(made) / name, every, target)
    print("\n".join(wrong) or "nothing was lost")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
