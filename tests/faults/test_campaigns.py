"""The long campaigns, short: they run, they count what they should, and they would see a loss. Whole, they are
`slow`."""

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
    """Shared out to two processes, and kept as JSON."""
    said = campaign("tests.faults.kills", "3", "steps=12", "sizes=1", "parallel=2", f"json={tmp_path / 'kills.json'}")
    kept = json.loads((tmp_path / "kills.json").read_text())
    assert sum(kept["kills"].values()) >= 3 and kept["wrong"] == [] and kept["runs"] >= 2
    assert "every run ended in the bytes of the undisturbed one" in said
    assert int(re.findall(r"most steps computed again: (\d+)", said)[0]) <= kills.INTERVAL


def test_a_campaign_that_is_ended_takes_its_lives_along() -> None:
    code = (
        "import subprocess, time; from tests.faults import kills; kills.tidy()\n"
        "print(subprocess.Popen(['sleep', '600'], start_new_session=True).pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as one:
        assert one.stdout is not None
        life = psutil.Process(int(one.stdout.readline()))
        one.terminate()
        assert one.wait(60) == 143
    with suppress(psutil.NoSuchProcess):
        assert life.status() == psutil.STATUS_ZOMBIE


def test_what_another_process_found_is_added() -> None:
    tally = kills.Tally(kills.Counter({"any moment": 2}), inside=1, lost=2, runs=1, wrong=["a"])
    tally.add({"kills": {"any moment": 1, "one of two": 1}, "inside": 1, "lost": 4, "runs": 2, "wrong": ["b"]})
    tally.add({"wrong": ["share-2 did not end well"]})
    assert (dict(tally.kills), tally.inside, tally.lost, tally.runs) == ({"any moment": 3, "one of two": 1}, 2, 4, 3)
    assert tally.wrong == ["a", "b", "share-2 did not end well"]


def test_a_base_of_random_weights_is_one_that_the_loader_reads(tmp_path: Path) -> None:
    from train.model.int4_linear import Int4Linear
    from train.model.loading import load

    model = load(base.write("tiny", tmp_path / "base"), torch.float32)
    assert sum(isinstance(m, Int4Linear) for m in model.modules()) == 2 * 5, "qkv in one, out, gate, up, down"
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.slow
def test_a_steps_bytes_are_the_same_in_two_starts() -> None:
    said = json.loads(
        campaign("tests.faults.deterministic", "shape=tiny", "batch=2", "length=64", "steps=2").splitlines()[-1]
    )
    assert said["same_bytes"] and said["same_bytes_deterministic"]
    assert len(said["rows"]) == 4 and all(row["step_ms"] > 0 for row in said["rows"])


def test_another_outcome_would_be_seen(tmp_path: Path) -> None:
    for name, loss in (("a", 1.0), ("b", 1.0000001)):
        (tmp_path / name / "adapter").mkdir(parents=True)
        (tmp_path / name / "adapter" / "adapter_model.safetensors").write_bytes(b"x")
        (tmp_path / name / "losses.jsonl").write_text(json.dumps({"step": 1, "loss": loss, "seconds": loss}) + "\n")
    assert kills.outcome(tmp_path / "a") == kills.outcome(tmp_path / "a")
    assert kills.outcome(tmp_path / "a") != kills.outcome(tmp_path / "b")


def test_a_leak_would_be_seen(capsys: pytest.CaptureFixture[str]) -> None:
    flat = soak.Watcher([*range(80)], [700.0] * 80, [30] * 80, [9] * 80, [n / 50 for n in range(80)])
    assert soak.judge(flat, [0.02] * 80) == []
    assert soak.judge(flat, [0.02 + n / 4000 for n in range(80)], timed=False) == [], "by the clock alone"
    slower = soak.Watcher(flat.steps, flat.megabytes, flat.files, flat.threads, [n * n / 4000 for n in range(80)])
    assert "processor's seconds a step grew" in soak.judge(slower, [0.02] * 80, timed=False)[0]
    leaking = soak.Watcher(flat.steps, [700.0 + n for n in range(80)], [30 + n // 20 for n in range(80)], [9] * 80)
    assert len(soak.judge(leaking, [0.02 + n / 4000 for n in range(80)])) == 3
    capsys.readouterr()


def test_a_short_soak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So short that its first steps still count in the time of one: that is not judged."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(soak, "EVERY", 0.05)
    soak.house(tmp_path)
    watcher = soak.train(160, {"save_every": "10"})
    assert watcher.cpu == sorted(watcher.cpu)
    watcher.cpu = [0.0] * len(watcher.steps)
    assert soak.judge(watcher, soak.seconds(), timed=False) == []
    assert watcher.steps[-1] > 100


@pytest.mark.slow
def test_a_hundred_kills() -> None:
    said = campaign("tests.faults.kills", "100")
    assert int(re.findall(r"(\d+) of them found a half-written checkpoint", said)[0]) >= 25


@pytest.mark.slow
def test_kills_of_the_command_itself_with_saves_in_the_background() -> None:
    campaign("tests.faults.kills", "6", "command", "slack=4", "background=on")


@pytest.mark.slow
def test_the_same_twice_and_in_changing_worlds() -> None:
    assert "losses within" in campaign("tests.faults.worlds")
    assert worlds.CHANGES == (4, 2, 1, 4)


@pytest.mark.slow
def test_twenty_thousand_steps(tmp_path: Path) -> None:
    campaign("tests.faults.soak", "20000", str(tmp_path / "soak.png"), "time=off")
