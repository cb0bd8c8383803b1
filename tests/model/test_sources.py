"""Bases from a hub, a mirror and ModelScope, by servers on this machine that go wrong in every way that servers do.

In each case: a complete folder whose bytes are the published ones, or none, and never a bad file under its final name.
"""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.model_hub import ModelHub, commit_of, model_hub
from tests.support.oracles import tiny_checkpoint, tiny_config
from train.commands import model as command
from train.common import download
from train.common.errors import UserError, explain
from train.common.files import read_json
from train.model import fetch_files
from train.model.folder import find_damage

ROOT = Path(__file__).resolve().parents[2]
NOWHERE = "http://127.0.0.1:9"  # the discard port, where no server listens
NAME = "Qwen-1_8B-Chat-Int4"  # of data/models.lock, with this id on both hubs
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("published") / "m", tiny_config("qwen"), int4=True)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def hubs(published: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModelHub, ModelHub]]:
    """(the hub, ModelScope), as the environment names them."""
    with (
        model_hub({f"Qwen/{NAME}": dict(published)}) as (address, hub),
        model_hub({f"qwen/{NAME}": dict(published)}) as (other, modelscope),
    ):
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", other)
        monkeypatch.setattr(download, "TIMEOUT", (2.0, 1.0))
        monkeypatch.setattr(download, "SLOW_SECONDS", 0.5)
        yield hub, modelscope


def run(tmp_path: Path, model: str = f"Qwen/{NAME}", **options: Any) -> Path:
    command.run(command.Options(model=model, models=str(tmp_path / "models"), **options))
    return tmp_path / "models" / NAME


def check(folder: Path, published: dict[str, bytes], source: str) -> None:
    """The folder is the published one, and its record says where it is from."""
    manifest = read_json(folder / "manifest.json")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"} == published
    assert manifest["source"]["from"] == source and manifest["source"]["hub"] == f"Qwen/{NAME}"
    assert find_damage(folder, manifest, full=True) == []
    assert set(manifest["files"]) == set(published)
    assert list((folder.parent / ".cache").iterdir()) == []


def check_nothing_bad(tmp_path: Path, published: dict[str, bytes]) -> None:
    """No folder has the model's name, and no file its own name unless its bytes are the published ones."""
    assert not (tmp_path / "models" / NAME).exists()
    for path in (tmp_path / "models").rglob("*"):
        assert path.is_dir() or path.suffix == ".part" or path.read_bytes() == published[path.name], path


# One source


def test_the_hub_is_asked_first_then_nobody(
    tmp_path: Path, hubs: Any, published: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    hub, modelscope = hubs
    check(run(tmp_path), published, "hub")
    assert f"is commit {commit_of(published)}" in capsys.readouterr().out and modelscope.requests == []
    hub.requests.clear()
    for name in (f"Qwen/{NAME}", f"qwen/{NAME}", NAME, NAME.lower()):
        run(tmp_path, name)
        run(tmp_path, name, verify=True)
        assert capsys.readouterr().out.count("Nothing to do.") == 2
    assert hub.requests == modelscope.requests == []


def test_modelscope_alone(tmp_path: Path, hubs: Any, published: dict[str, bytes]) -> None:
    hub, modelscope = hubs
    check(run(tmp_path, source="modelscope"), published, "modelscope")
    assert hub.requests == []
    assert all(name in modelscope.names() for name in published)


def test_the_next_source_is_taken_where_the_hub_does_not_answer(
    tmp_path: Path, hubs: Any, published: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    check(run(tmp_path, f"qwen/{NAME}"), published, "modelscope")
    output = capsys.readouterr().out
    assert "hub: http://127.0.0.1:9 does not answer" in output and f"qwen/{NAME} at http://127.0.0.1" in output


def test_an_id_that_the_lock_does_not_know_is_not_looked_for_elsewhere(tmp_path: Path, hubs: Any) -> None:
    """The same id on another hub may be another person's."""
    with pytest.raises(UserError, match=r"answers 404. Is the name spelt right"):
        run(tmp_path, "Someone/Else")
    assert hubs[1].requests == []


def test_no_source_at_all_names_each_reason(tmp_path: Path, hubs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    hubs[1].models.clear()
    with pytest.raises(UserError, match=r"(?s)no source gave it.*hub: .*not answer.*modelscope: .*404.*Remedies"):
        run(tmp_path)
    with pytest.raises(UserError, match=r"source=wheels: Qwen/.* give hub, modelscope, or nothing"):
        run(tmp_path, source="wheels")


# Faults


PASSING = {  # the same source gives the file after all
    "cut": ["cut"],
    "cut five times": ["cut"] * 5,
    "cut, then from the start": ["cut", "no ranges"],
    "cut, then other bytes than asked for": ["cut", "other range"],
    "429 with a second to wait": ["busy:429,1"],
    "503 without a time": ["busy:503"],
    "503 with a date that is over": ["busy:503,Wed, 21 Oct 2015 07:28:00 GMT"],
    "a stall after half": ["stall"],
    "an error of the gateway, then cut": ["busy:502", "cut"],
}
LASTING = {  # the other source gives the file
    "429 for an hour": "busy:429,3600",
    "503 for ever": "busy:503",
    "429 that may come back at once, for ever": "busy:429,0",
    "another file": "wrong",
    "too short": "short",
    "too long": "long",
    "empty": "empty",
    "a page to log in": "page",
    "redirects in a loop": "loop",
    "a byte now and then": "trickle",
    "more than it should be, without a length": "endless",
    "404": "gone",
}


@pytest.mark.parametrize("case", PASSING)
def test_a_fault_that_passes_is_waited_for_or_resumed(
    tmp_path: Path, hubs: Any, published: dict[str, bytes], case: str
) -> None:
    hub, modelscope = hubs
    hub.faults[WEIGHTS] = list(PASSING[case])
    check(run(tmp_path), published, "hub")
    assert modelscope.requests == [] and hub.faults[WEIGHTS] == []
    ranges = [wanted for path, wanted in hub.requests if path.endswith(WEIGHTS)]
    assert len(ranges) > len(PASSING[case]) - 1
    if PASSING[case][0] in ("cut", "stall"):
        assert ranges[1] is not None and int(ranges[1][6:-1]) > 0


@pytest.mark.parametrize("case", LASTING)
@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_fault_that_lasts_leads_to_the_next_source(
    tmp_path: Path, hubs: Any, published: dict[str, bytes], case: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "RETRIES", 2)
    monkeypatch.setattr(download, "PATIENCE", 2.5)
    hub, _ = hubs
    hub.always[name] = LASTING[case]
    if LASTING[case] == "gone":
        hub.models[f"Qwen/{NAME}"] = Disappearing(hub.models[f"Qwen/{NAME}"], name)
    check(run(tmp_path), published, "modelscope")


class Disappearing(dict[str, bytes]):
    """Files of which one is listed, but not there."""

    def __init__(self, files: dict[str, bytes], name: str) -> None:
        super().__init__(files)
        self.name = name

    def get(self, name: str, default: Any = None) -> Any:
        return default if name == self.name else super().get(name, default)


@pytest.mark.parametrize("fault", ["busy:503", "page", "loop", "cut", "empty"])
def test_a_list_that_is_none_leads_to_the_next_source(
    tmp_path: Path, hubs: Any, published: dict[str, bytes], fault: str
) -> None:
    hubs[0].always["*"] = fault
    check(run(tmp_path), published, "modelscope")


@pytest.mark.parametrize("case", LASTING)
def test_nothing_bad_stays_where_both_sources_have_the_fault(
    tmp_path: Path, hubs: Any, published: dict[str, bytes], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "RETRIES", 2)
    monkeypatch.setattr(download, "PATIENCE", 2.5)
    for hub, model in zip(hubs, (f"Qwen/{NAME}", f"qwen/{NAME}"), strict=True):
        hub.always[WEIGHTS] = LASTING[case]
        hub.models[model] = Disappearing(published, WEIGHTS) if LASTING[case] == "gone" else hub.models[model]
    with pytest.raises(UserError, match=r"(?s)no source gave it.*hub: .*modelscope: .*Remedies"):
        run(tmp_path)
    check_nothing_bad(tmp_path, published)
    for hub, model in zip(hubs, (f"Qwen/{NAME}", f"qwen/{NAME}"), strict=True):
        hub.always.clear()
        hub.models[model] = dict(published)
    check(run(tmp_path), published, "hub")  # and the same command succeeds when the fault is over


def test_what_one_source_began_the_next_one_finishes(
    tmp_path: Path, hubs: Any, published: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_files, "PARALLEL", 1)  # in order: the weights are last
    hub, modelscope = hubs
    hub.faults[WEIGHTS] = ["cut", "busy:429,3600"]
    monkeypatch.setattr(download, "BLOCK", 512)
    check(run(tmp_path), published, "modelscope")
    ranges = [wanted for path, wanted in modelscope.requests if f"FilePath={WEIGHTS}" in path]
    assert len(ranges) == 1 and ranges[0] is not None and int(ranges[0][6:-1]) > 0
    assert hub.models != modelscope.models


def test_files_come_several_at_once(tmp_path: Path, hubs: Any, published: dict[str, bytes]) -> None:
    more = {f"model-{n}.safetensors": published[WEIGHTS] for n in range(4)}
    hubs[0].models["Some/Many"] = {**published, **more}
    for name in more:
        hubs[0].faults[name] = ["busy:503,1"]
    start = time.monotonic()
    command.run(command.Options(model="Some/Many", models=str(tmp_path / "models")))
    assert time.monotonic() - start < 3.5, "one after the other they would wait four seconds"


def test_a_full_disk_is_said_and_the_same_command_continues(
    tmp_path: Path, hubs: Any, published: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, modelscope = hubs
    copy = download._copy

    def full(response: Any, file: Any, *rest: Any) -> None:
        if WEIGHTS in file.name:
            file.write(response.raw.read1(5000))
            file.flush()
            raise OSError(28, "No space left on device", file.name)
        copy(response, file, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(download, "_copy", full)
        with pytest.raises(OSError, match="No space left") as caught:
            run(tmp_path)
    assert "the disk is full. Free some space" in (explain(caught.value, "model") or "")
    assert modelscope.requests == []
    check_nothing_bad(tmp_path, published)
    hub.requests.clear()
    check(run(tmp_path), published, "hub")
    assert [wanted for path, wanted in hub.requests if path.endswith(WEIGHTS)] != [None]


def test_killed_in_the_middle_and_started_again(tmp_path: Path, hubs: Any, published: dict[str, bytes]) -> None:
    hub, _ = hubs
    hub.faults[WEIGHTS] = ["trickle"]
    words = [sys.executable, "-m", "train", "model", f"model=Qwen/{NAME}", f"models={tmp_path}/models"]
    process = subprocess.Popen(words, cwd=ROOT, env=dict(os.environ), stdout=subprocess.DEVNULL)
    try:
        parts: list[Path] = []
        end = time.monotonic() + 60
        while time.monotonic() < end and not any(part.stat().st_size for part in parts):
            parts = list((tmp_path / "models").rglob(f"{WEIGHTS}.part"))
            time.sleep(0.02)
        time.sleep(0.3)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    check_nothing_bad(tmp_path, published)
    hub.requests.clear()
    check(run(tmp_path), published, "hub")
    resumed = [wanted for path, wanted in hub.requests if path.endswith(WEIGHTS)]
    assert len(resumed) == 1 and resumed[0] is not None and int(resumed[0][6:-1]) > 0
    assert "config.json" not in hub.names()


def test_bytes_of_an_earlier_attempt_that_are_of_another_file_are_dropped(
    tmp_path: Path, hubs: Any, published: dict[str, bytes]
) -> None:
    cache = tmp_path / "models" / ".cache" / f"{NAME}-{commit_of(published)[:12]}"
    cache.mkdir(parents=True)
    (cache / f"{WEIGHTS}.part").write_bytes(bytes(1000))
    (cache / "config.json").write_bytes(b"x" * len(published["config.json"]))  # right size, other bytes
    with pytest.raises(UserError, match="its content is not the published one"):
        run(tmp_path, source="hub")
    check(run(tmp_path), published, "hub")


# Hostile lists


def test_names_that_lead_elsewhere_are_left_out(tmp_path: Path, hubs: Any, published: dict[str, bytes]) -> None:
    for hub, model in zip(hubs, (f"Qwen/{NAME}", f"qwen/{NAME}"), strict=True):
        hub.models[model] |= {"../evil.json": b"{}", "/tmp/evil.json": b"{}", "a\\evil.json": b"{}", "..": b""}
    check(run(tmp_path), published, "hub")
    command.run(command.Options(model=NAME, models=str(tmp_path / "more" / "models"), source="modelscope"))
    assert {path.name for path in tmp_path.rglob("*evil*")} == set()


def test_hashes_of_the_record_are_those_of_the_files(tmp_path: Path, hubs: Any, published: dict[str, bytes]) -> None:
    files = read_json(run(tmp_path) / "manifest.json")["files"]
    assert {name: entry["sha256"] for name, entry in files.items()} == {
        name: hashlib.sha256(content).hexdigest() for name, content in published.items()
    }
