"""An unchanged run passes; each file that changes is named; a replay gives the same bytes, or names the difference."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.oracles import tiny_checkpoint, tiny_config
from tests.support.tiny_training import TINY, signal_at_step, write_rows
from train.commands import train, verify
from train.commands.verify import Options
from train.common.errors import UserError
from train.common.files import read_json, write_json


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and one that was trained on from it."""
    folder = tmp_path_factory.mktemp("verified")
    tiny_checkpoint(folder / "models" / "tiny-Int4", tiny_config(), int4=True)
    write_rows(folder / "data.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        auto = dict.fromkeys(("batch", "accumulation", "checkpointing", "embedding"), "auto") | {"rows_per_step": "4"}
        for more in ({"run": "first"}, {"run": "second", "from": "first", "save_every": "2", **auto}):
            keys = {"data": "data.jsonl", "model": "tiny-Int4", "recipe": "smoke", **TINY, "steps": "3", **more}
            train.run(train.parse(keys))
    return folder


@pytest.fixture
def copy(two_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the same folder, which a test may change."""
    shutil.copytree(two_runs, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def test_an_unchanged_run_passes(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    verify.run(Options(run="second"))
    output = capsys.readouterr().out
    for name in (
        "losses.jsonl",
        "recipe.yaml",
        "adapter",
        "base tiny-Int4",
        "data data.jsonl",
        "adapter of runs/first",
    ):
        assert f"same     {name}\n" in output
    assert "same     checkpoint step-000003" in output
    assert "DIFFERS" not in output
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("runs/second/inputs.json", "inputs.json"),
        ("runs/second/recipe.yaml", "recipe.yaml"),
        ("runs/second/losses.jsonl", "losses.jsonl"),
        ("runs/second/adapter/adapter_model.safetensors", "adapter"),
        ("runs/second/adapter/adapter_config.json", "adapter"),
        ("runs/second/adapter/tokenizer_config.json", "adapter"),
        ("runs/second/checkpoints/step-000003/optimizer.safetensors", "checkpoint step-000003"),
        ("runs/first/adapter/adapter_model.safetensors", "adapter of runs/first"),
        ("models/tiny-Int4/model.safetensors", "base tiny-Int4"),
        ("models/tiny-Int4/qwen.tiktoken", "base tiny-Int4"),
        ("data.jsonl", "data data.jsonl"),
    ],
)
@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_every_file_that_changes_is_named(
    name: str, title: str, damage: Callable[[Path], None], copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(copy / name)
    with pytest.raises(UserError, match="'second' is not what its record says"):
        verify.run(Options(run="second"))
    output = capsys.readouterr().out
    assert f"DIFFERS  {title}\n" in output
    assert output.count("DIFFERS") == 1


def test_a_changed_lock_or_program_is_a_note_not_an_error(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = read_json(copy / "runs/first/run.json")
    write_json(
        copy / "runs/first/run.json", {**record, "lock": "0" * 64, "code": {**record["code"], "commit": "another"}}
    )
    verify.run(Options(run="first"))
    output = capsys.readouterr().out
    assert "note     env.lock: was 0000" in output
    assert "note     program: was {" in output and "'commit': 'another'" in output


@pytest.mark.parametrize("text", ["", "{", "{}", "[]"])
def test_a_run_without_a_record_is_refused(text: str, copy: Path) -> None:
    path = copy / "runs/first/run.json"
    path.write_text(text) if text else path.unlink()
    with pytest.raises(UserError, match=r"run.json(: no such file| is damaged)"):
        verify.run(Options(run="first"))


def in_this_process(monkeypatch: pytest.MonkeyPatch, change: Callable[[], None] = lambda: None) -> None:
    """The replay's command runs in this process, without another start of Python."""

    def run(command: list[str]) -> Any:
        change()
        train.run(train.parse(dict(word.split("=", 1) for word in command[4:])))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(verify.subprocess, "run", run)


def test_the_record_of_a_run_with_auto_has_numbers(copy: Path) -> None:
    record = json.loads((copy / "runs/second/run.json").read_text())
    keys = ("rows_per_step", "batch", "accumulation", "checkpointing", "embedding")
    assert tuple(record["recipe"][key] for key in keys) == (4, 2, 2, "on", "device")
    assert "batch: 2\n" in (copy / "runs/second/recipe.yaml").read_text()


def test_a_replay_is_the_same_and_leaves_nothing(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify.provenance, "code", lambda: {})
    in_this_process(monkeypatch)
    verify.run(Options(run="second", replay=True))
    assert "the replay is the same: 3 losses, and the adapter's bytes." in capsys.readouterr().out
    assert not (copy / "runs/second/replay").exists()


def test_the_adapter_of_an_older_run_without_a_tokenizer_is_replayed(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The replay saves a tokenizer beside the adapter, which is no difference."""
    folder, record = copy / "runs/first", read_json(copy / "runs/first/run.json")
    for path in (folder / "adapter").glob("tokenizer*"):
        path.unlink()
    hashes = verify.provenance.hash_folder(folder / "adapter")
    assert len(hashes) == 2
    write_json(folder / "run.json", {**record, "adapter": hashes})
    monkeypatch.setattr(verify.provenance, "code", lambda: {})
    in_this_process(monkeypatch)
    verify.run(Options(run="first", replay=True))
    assert "the replay is the same: 3 losses, and the adapter's bytes." in capsys.readouterr().out


def test_a_run_that_started_from_a_folder_is_verified_and_replayed(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the other files in that folder nothing is asked."""
    folder = Path(shutil.copytree("runs/first/adapter", "checkpoint-500"))
    (folder / "optimizer.pt").touch()
    begin("from-folder", **{"from": "checkpoint-500"})
    (folder / "optimizer.pt").unlink()
    monkeypatch.setattr(verify.provenance, "code", lambda: {})
    in_this_process(monkeypatch)
    verify.run(Options(run="from-folder", replay=True))
    output = capsys.readouterr().out
    assert "same     adapter of checkpoint-500\n" in output and "the replay is the same" in output
    flip(folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="is not what its record says"):
        verify.run(Options(run="from-folder"))
    assert "DIFFERS  adapter of checkpoint-500\n" in capsys.readouterr().out


def begin(run: str, **keys: str) -> None:
    base = {"data": "data.jsonl", "model": "tiny-Int4", "recipe": "smoke", **TINY, "steps": "6", "save_every": "2"}
    train.run(train.parse({**base, "dropout": "0.05", "run": run, **keys}))


def test_a_run_that_was_interrupted_twice_is_replayed_to_the_same_bytes(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 4):
        with monkeypatch.context() as patch:
            signal_at_step(step, signal.SIGTERM, patch)
            with pytest.raises(SystemExit):
                begin("cut")
    begin("cut")
    assert [start["after"] for start in read_json(copy / "runs/cut/run.json")["starts"]] == [0, 3, 5]
    monkeypatch.setattr(verify.provenance, "code", lambda: {})
    in_this_process(monkeypatch)
    verify.run(Options(run="cut", replay=True))
    assert "the replay is the same: 6 losses, and the adapter's bytes." in capsys.readouterr().out


STAGED = "stages:\n  - data: data.jsonl\n    steps: 2\n  - data: more.jsonl\n    steps: 3\n    learning_rate: 1.0e-4\n"


def test_the_stages_of_a_run_are_verified_and_replayed(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(copy / "more.jsonl", 7)
    keep = {"model": "tiny-Int4", "length": 96, "rank": 4, "batch": 2, "accumulation": 2, "dropout": 0.05, "zero": 0}
    text = "".join(f"{key}: {value}\n" for key, value in keep.items())
    (copy / "two.yaml").write_text(text + STAGED)
    train.run(train.parse({"recipe": "two.yaml", "run": "staged"}))
    monkeypatch.setattr(verify.provenance, "code", lambda: {})
    in_this_process(monkeypatch)
    verify.run(Options(run="staged", replay=True))
    output = capsys.readouterr().out
    assert "the replay is the same: 2 losses" in output and "the replay is the same: 3 losses" in output
    flip(copy / "runs/staged/stages/1/losses.jsonl")
    with pytest.raises(UserError, match="is not what its record says"):
        verify.run(Options(run="staged"))
    assert "DIFFERS  stage 1: losses.jsonl" in capsys.readouterr().out


def test_a_changed_number_of_processes_is_tolerated_or_refused(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for run, dropout in (("mixed", "0"), ("drawn", "0.05")):
        begin(run, dropout=dropout)
        path = copy / "runs" / run / "run.json"
        record = read_json(path)
        write_json(path, {**record, "starts": [{"after": 0, "processes": 2}, {"after": 3, "processes": 1}]})
    monkeypatch.setattr(verify.provenance, "code", lambda: {})
    in_this_process(monkeypatch)
    verify.run(Options(run="mixed", replay=True))
    assert "the replay is the same: 6 losses within 1e-05, in 1 processes" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"in 2, then 1 processes: dropout drew other masks"):
        verify.run(Options(run="drawn", replay=True))
    assert (
        verify._same(1.0, 1.000005, 1e-5)
        and not verify._same(1.0, 1.00002, 1e-5)
        and not verify._same(1.0, 1.000005, 0)
    )


@pytest.mark.slow
def test_a_run_of_two_processes_is_replayed_by_the_command(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(verify.__file__).parents[2]))
    begin("both", processes="2", accumulation="1", zero="2")
    verify.run(Options(run="both", replay=True))
    assert "the replay is the same: 6 losses, and the adapter's bytes." in capfd.readouterr().out


def test_a_replay_that_differs_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from train.training.deepspeed_engine import Engine

    real_micro, calls = Engine.forward_backward, []

    def wrong(self: Engine, batch: Any, labels: int) -> torch.Tensor:
        calls.append(labels)
        return real_micro(self, batch, labels) * (1.001 if len(calls) == 3 else 1.0)

    monkeypatch.setattr(verify.provenance, "code", lambda: {})
    in_this_process(monkeypatch, lambda: monkeypatch.setattr(Engine, "forward_backward", wrong))
    with pytest.raises(UserError, match=r"replay is not the same: step 2: loss was \d(.|\n)*is kept in runs/first"):
        verify.run(Options(run="first", replay=True))
    assert json.loads((copy / "runs/first/replay/again/run.json").read_text())["steps"] == 3
