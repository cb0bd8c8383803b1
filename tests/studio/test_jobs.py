"""Commands as processes of their own: they outlive the studio, their status is known later, secrets stay out."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from train.studio.jobs import JOB, LOG, Jobs, command

FAKE = """import os, signal, sys, time
print("words", sys.argv[1:], "token", os.environ.get("STUDIO_TOKEN"), "key", os.environ.get("API_KEY"), flush=True)
def stop(*_):
    print("checkpoint written", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print("bar 1\\rbar 2\\rbar 3", flush=True)
time.sleep(60 if "run=long" in sys.argv else 0)
"""


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    """A studio whose `python -m train` is FAKE."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train/__main__.py").write_text(FAKE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("STUDIO_TOKEN", "secret-token")
    one = Jobs(tmp_path / "runs/.studio/jobs")
    yield one
    one.stop_and_wait()


def wait_for(jobs: Jobs, text: str) -> None:
    end = time.monotonic() + 20
    while text not in jobs.log(jobs.all()[0]):
        assert time.monotonic() < end, jobs.log(jobs.all()[0])
        time.sleep(0.05)


def test_a_command_ends_with_its_status_and_its_output(jobs: Jobs) -> None:
    job = jobs.start("train", ["data=a b'c.jsonl", "run=short"])
    while jobs.is_running(job):
        time.sleep(0.05)
    assert jobs.status(job) == 0
    assert "['train', \"data=a b'c.jsonl\", 'run=short'] token None key None" in jobs.log(job)
    assert "bar 3" in jobs.log(job) and "bar 2" not in jobs.log(job)


def test_a_command_goes_on_without_the_studio_and_stops_with_a_checkpoint(jobs: Jobs) -> None:
    started = jobs.start("train", ["run=long"])
    wait_for(jobs, "bar 3")
    later = Jobs(jobs.folder)  # the studio was closed and opened again
    found = later.of_run("long")
    assert found is not None and found.id == started.id and later.is_running(found)
    assert os.getsid(found.pid) == found.pid != os.getsid(0)
    assert later.memory(found) > 1 << 20
    later.stop(found)
    end = time.monotonic() + 20
    while jobs.is_running(found) and time.monotonic() < end:
        time.sleep(0.05)
    assert jobs.status(found) == later.status(found) == 75
    assert "checkpoint written" in later.log(found)


def test_a_killed_command_has_a_status_too(jobs: Jobs) -> None:
    job = jobs.start("train", ["run=long"])
    wait_for(jobs, "bar 3")
    os.killpg(job.pid, signal.SIGKILL)
    end = time.monotonic() + 20
    while jobs.is_running(job) and time.monotonic() < end:
        time.sleep(0.05)
    assert jobs.status(job) == -1


def test_another_process_with_the_same_number_is_never_stopped(jobs: Jobs) -> None:
    job = jobs.start("train", ["run=long"])
    wait_for(jobs, "bar 3")
    path = jobs.folder / job.id / JOB
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "created": values["created"] - 100}))
    other = jobs.get(job.id)
    assert other is not None and jobs.status(other) == -1
    jobs.stop(other)
    assert jobs.is_running(job)


def test_the_key_of_a_server_is_in_its_environment_and_not_in_its_words(jobs: Jobs) -> None:
    job = jobs.start("serve", ["run=a"], port=1, key="secret-key")
    wait_for(jobs, "key secret-key")
    assert "secret-key" not in str(job) + str(job.words)
    assert (jobs.folder / job.id / JOB).stat().st_mode & 0o077 == 0


def test_a_damaged_note_is_left_out(jobs: Jobs) -> None:
    for number, text in enumerate(("", "[]", '{"id": 1}')):
        (jobs.folder / str(number)).mkdir(parents=True)
        (jobs.folder / str(number) / JOB).write_text(text)
        (jobs.folder / str(number) / LOG).write_text("")
    assert jobs.all() == []


def test_the_command_that_is_shown_is_what_a_person_types() -> None:
    words = ["data=data/my file.jsonl", "model=m", "run=r", "from_run=old", "epochs=3", "system=You are Ada."]
    line = "make train DATA='data/my file.jsonl' MODEL=m RUN=r FROM=old ARGS=\"epochs=3 'system=You are Ada.'\""
    assert command("train", words) == line
    assert command("export", ["run=r", "format=gguf"]) == "make export RUN=r FORMAT=gguf"
    assert command("data", ["data=data/x.json", "fix=1"]) == "make data DATA=data/x.json FIX=1"
