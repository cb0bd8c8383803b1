"""Short forms of the long campaigns: they run, count correctly, and would find a loss. Whole ones are marked slow."""

import json
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from tests.faults import base, kills, soak, worlds

ROOT = Path(__file__).parent.parent.parent


def campaign(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_few_kills(tmp_path: Path) -> None:
    """Divided between two processes, with a report as JSON."""
    printed = campaign(
        "tests.faults.kills", "3", "steps=12", "sizes=1", "parallel=2", f"json={tmp_path / 'kills.json'}"
    )
    kept = json.loads((tmp_path / "kills.json").read_text())
    assert sum(kept["kills"].values()) >= 3 and kept["wrong"] == [] and kept["runs"] >= 2
    assert "every run ended in the bytes of the undisturbed one" in printed
    assert int(re.findall(r"most steps computed again: (\d+)", printed)[0]) <= kills.INTERVAL


def test_a_campaign_that_is_stopped_kills_its_attempts() -> None:
    code = (
        "import subprocess, time; from tests.faults import kills; kills.kill_attempts_on_sigterm()\n"
        "print(subprocess.Popen(['sleep', '600'], start_new_session=True).pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as one:
        assert one.stdout is not None
        attempt = psutil.Process(int(one.stdout.readline()))
        one.terminate()
        assert one.wait(60) == 143
    with suppress(psutil.NoSuchProcess):
        assert attempt.status() == psutil.STATUS_ZOMBIE


def test_the_tally_of_another_process_is_added() -> None:
    tally = kills.Tally(kills.Counter({"any moment": 2}), inside=1, lost=2, runs=1, wrong=["a"])
    tally.add({"kills": {"any moment": 1, "one of two": 1}, "inside": 1, "lost": 4, "runs": 2, "wrong": ["b"]})
    tally.add({"wrong": ["share-2 did not end well"]})
    assert (dict(tally.kills), tally.inside, tally.lost, tally.runs) == ({"any moment": 3, "one of two": 1}, 2, 4, 3)
    assert tally.wrong == ["a", "b", "share-2 did not end well"]


def test_the_loader_reads_a_base_of_random_weights(tmp_path: Path) -> None:
    from train.model.int4_linear import Int4Linear
    from train.model.loading import load

    model = load(base.write("tiny", tmp_path / "base"), torch.float32)
    assert sum(isinstance(m, Int4Linear) for m in model.modules()) == 2 * 5, "qkv in one, out, gate, up, down"
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.slow
def test_a_step_gives_the_same_bytes_in_two_starts() -> None:
    report = json.loads(
        campaign("tests.faults.deterministic", "shape=tiny", "batch=2", "length=64", "steps=2").splitlines()[-1]
    )
    assert report["same_bytes"] and report["same_bytes_deterministic"]
    assert len(report["rows"]) == 4 and all(row["step_ms"] > 0 for row in report["rows"])


def test_another_outcome_would_be_found(tmp_path: Path) -> None:
    for name, loss in (("a", 1.0), ("b", 1.0000001)):
        (tmp_path / name / "adapter").mkdir(parents=True)
        (tmp_path / name / "adapter" / "adapter_model.safetensors").write_bytes(b"x")
        (tmp_path / name / "losses.jsonl").write_text(json.dumps({"step": 1, "loss": loss, "seconds": loss}) + "\n")
    assert kills.outcome(tmp_path / "a") == kills.outcome(tmp_path / "a")
    assert kills.outcome(tmp_path / "a") != kills.outcome(tmp_path / "b")


def test_a_leak_would_be_found(capsys: pytest.CaptureFixture[str]) -> None:
    flat = soak.Watcher([*range(80)], [700.0] * 80, [30] * 80, [9] * 80, [n / 50 for n in range(80)])
    assert soak.judge(flat, [0.02] * 80) == []
    assert soak.judge(flat, [0.02 + n / 4000 for n in range(80)], timed=False) == [], "slower by the clock alone"
    slower = soak.Watcher(flat.steps, flat.megabytes, flat.files, flat.threads, [n * n / 4000 for n in range(80)])
    assert "processor's seconds a step grew" in soak.judge(slower, [0.02] * 80, timed=False)[0]
    leaking = soak.Watcher(flat.steps, [700.0 + n for n in range(80)], [30 + n // 20 for n in range(80)], [9] * 80)
    assert len(soak.judge(leaking, [0.02 + n / 4000 for n in range(80)])) == 3
    capsys.readouterr()


def test_a_file_that_a_save_has_open_is_no_leak() -> None:
    """Where the disk is slow, most samples of a quarter fall into a save."""
    files = [42, 43, 42, 42, 42, 42, 42, 43, 42, 43, 42, 42, 43, 43, 42, 43]
    watcher = soak.Watcher(list(range(16)), [700.0] * 16, files, [9] * 16, [0.02 * n for n in range(16)])
    assert soak.judge(watcher, [0.02] * 16) == []
    watcher.files = [n + (k >= 12) for k, n in enumerate(files)]
    assert soak.judge(watcher, [0.02] * 16) == ["open files grew from 42 to 43"]


def test_a_short_soak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too short to judge its time: the first steps are slow."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(soak, "EVERY", 0.05)
    soak.workspace(tmp_path)
    watcher = soak.train(160, {"save_every": "10"})
    assert watcher.cpu == sorted(watcher.cpu)
    watcher.cpu = [0.0] * len(watcher.steps)
    assert soak.judge(watcher, soak.seconds(), timed=False) == []
    assert watcher.steps[-1] > 100


@pytest.mark.slow
def test_a_hundred_kills() -> None:
    printed = campaign("tests.faults.kills", "100")
    assert int(re.findall(r"(\d+) of them left a half-written checkpoint", printed)[0]) >= 25


@pytest.mark.slow
def test_kills_of_the_command_itself_with_saves_in_the_background() -> None:
    campaign("tests.faults.kills", "6", "command", "slack=4", "background=on")


@pytest.mark.slow
def test_the_same_twice_and_in_changing_numbers_of_processes() -> None:
    assert "losses within" in campaign("tests.faults.worlds")
    assert worlds.CHANGES == (4, 2, 1, 4)


@pytest.mark.slow
def test_twenty_thousand_steps(tmp_path: Path) -> None:
    campaign("tests.faults.soak", "20000", str(tmp_path / "soak.png"), "time=off")
