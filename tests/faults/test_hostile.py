"""Hostile files, which would run code or write elsewhere: nothing runs, and nothing is written."""

import io
import json
import pickle
import random
import shutil
import signal
import struct
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.test_gguf_reader import write_gguf
from tests.support.oracles import tiny_checkpoint, tiny_config, tiny_decoder
from tests.support.tiny_training import options, signal_at_step, train, write_rows
from train.commands import export
from train.commands import train as command
from train.common import download
from train.common.errors import UserError
from train.common.hub import HubFile
from train.model import gguf_reader, lora, sources
from train.model.loading import load
from train.runs import checkpoint

TRAP: list[str] = []


def spring(text: str) -> None:
    TRAP.append(text)


class Bomb:
    """Unpickling it runs `spring`."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return spring, ("a pickle was run",)


def bomb() -> bytes:
    """A file as torch.save writes it; a plain unpickler runs it too."""
    out = io.BytesIO()
    torch.save(Bomb(), out)
    return out.getvalue()


HOSTILE = "import tests.faults.test_hostile as there\nthere.spring(__file__)\nraise SystemExit(9)\n"


@pytest.fixture(autouse=True)
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work three folders deep: what climbs out stays in tmp_path, and is found without a look at other tests' files."""
    place = tmp_path / "folder" / "in" / "folder"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    TRAP.clear()


def workspace(hostile: bool = False) -> Path:
    """A base and data. hostile: with Python files in the base, and a config that names them."""
    base = tiny_checkpoint(Path("models/tiny-Int4"), tiny_config(), int4=True)
    write_rows(Path("data.jsonl"))
    if hostile:
        names = (
            "modeling_qwen.py",
            "configuration_qwen.py",
            "tokenization_qwen.py",
            "__init__.py",
            "conftest.py",
            "setup.py",
        )
        for name in names:
            (base / name).write_text(HOSTILE)
        config = json.loads((base / "config.json").read_text())
        config["auto_map"] = {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        }
        (base / "config.json").write_text(json.dumps(config))
    return base


def test_the_bomb_works() -> None:
    """Otherwise the tests below would prove nothing."""
    torch.load(io.BytesIO(bomb()), weights_only=False)
    pickle.loads(pickle.dumps(Bomb()))
    exec(compile("there.spring('x')", "x.py", "exec"), {"there": sys.modules[__name__]})
    assert len(TRAP) == 3


def test_pickles_beside_a_checkpoint_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    workspace()
    with monkeypatch.context() as patch:
        signal_at_step(1, signal.SIGTERM, patch)
        with pytest.raises(SystemExit):
            train(run="r", steps=4)
    folder = checkpoint.folder_of(Path("runs/r"), 2)
    for name in (
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "pytorch_model.bin",
        "training_args.bin",
        "state.pkl",
    ):
        (folder / name).write_bytes(bomb())
    train(run="r", steps=4)
    assert TRAP == []


def test_a_pickle_in_place_of_a_checkpoints_file_is_refused_even_with_a_correct_hash() -> None:
    workspace()
    train(run="r", steps=2, save_every=1)
    run = Path("runs/r")
    shutil.rmtree(run / "adapter")
    (run / "run.json").unlink()
    for folder in checkpoint.folders(run):
        for name in checkpoint.TENSORS:
            (folder / f"{name}.safetensors").write_bytes(bomb())
        (folder / checkpoint.SUMS).write_text(checkpoint.checksums(folder))
    with pytest.raises(UserError, match=r"step-000002: .*not a checkpoint of this program"):
        train(run="r", steps=2, save_every=1)
    assert TRAP == []


def test_a_pickle_in_an_adapter_is_not_read() -> None:
    base = workspace()
    train(run="r", steps=1)
    folder = Path("runs/r/adapter")
    for name in ("adapter_model.bin", "pytorch_model.bin", "optimizer.pt"):
        (folder / name).write_bytes(bomb())
    lora.load_adapter(load(base, torch.float32), folder)
    command.run(command.parse(options(**{"run": "on", "steps": 1, "from": "r"})))
    (folder / lora.WEIGHTS).write_bytes(bomb())
    for attempt in (lambda: lora.delta(folder), lambda: train(**{"run": "on2", "steps": 1, "from": "r"})):
        with pytest.raises(UserError, match=r"adapter is damaged"):
            attempt()
    (folder / lora.WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"adapter_model\.bin, a pickle, which is not read here"):
        lora.load_adapter(load(base, torch.float32), folder)
    assert TRAP == []


def test_an_adapter_that_names_a_module_to_import_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft imports the module in an adapter's `megatron_core`, from the working folder too."""
    base = workspace()
    train(run="r", steps=1)
    folder = Path("runs/r/adapter")
    Path("evil_module.py").write_text(HOSTILE)
    (folder / "evil_module.py").write_text(HOSTILE)
    whole = json.loads((folder / lora.CONFIG).read_text())
    monkeypatch.syspath_prepend(".")
    for module in ("evil_module", "runs.r.adapter.evil_module"):
        more = {"megatron_config": {"tensor_model_parallel_size": 1}, "megatron_core": module}
        (folder / lora.CONFIG).write_text(json.dumps({**whole, **more}))
        with pytest.raises(UserError, match="only LoRA, rsLoRA and DoRA are computed here:\n  megatron_config="):
            lora.load_adapter(load(base, torch.float32), folder)
        with pytest.raises(UserError, match="only LoRA, rsLoRA and DoRA are computed here:\n  megatron_config="):
            export.run(export.Options(run="r"))
    more = {"auto_mapping": {"base_model_class": "spring", "parent_library": "evil_module"}}
    (folder / lora.CONFIG).write_text(json.dumps({**whole, **more}))
    lora.load_adapter(load(base, torch.float32), folder)
    assert TRAP == []


def test_python_files_of_a_model_are_copied_as_bytes_and_never_run() -> None:
    workspace(hostile=True)
    train(run="r", steps=1)
    export.run(export.Options(run="r", verify=1))
    assert Path("runs/r/merged/modeling_qwen.py").read_text() == HOSTILE
    load(Path("runs/r/merged"), torch.float32)
    assert TRAP == []


def test_weights_in_a_pickle_are_read_as_tensors_or_not_at_all() -> None:
    base = workspace()
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(bomb())
    with pytest.raises(Exception, match=r"not read: it names"):
        load(base, torch.float32)
    assert TRAP == []


def small_gguf(path: Path) -> bytes:
    config = tiny_config("qwen2")
    write_gguf(path, config, state=dict(tiny_decoder(config).state_dict()))
    return path.read_bytes()


@pytest.mark.parametrize("name", [b"../../../climbed.bias", b"/tmp/climbed-out.bias", b"blk.0.attn_q/../../.x"])
def test_a_gguf_whose_tensors_are_called_like_paths_is_refused(name: bytes, tmp_path: Path) -> None:
    whole = small_gguf(Path("m.gguf"))
    old = b"blk.0.attn_output.weight"
    Path("m.gguf").write_bytes(whole.replace(old, name.ljust(len(old), b"x")))
    Path("out").mkdir()
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="a Qwen2 or Qwen3 model has no tensor"):
        gguf_reader.convert(Path("m.gguf"), Path("out"))
    assert {path.parent for path in set(tmp_path.rglob("*")) - before} <= {Path("out").absolute()}
    assert not Path("/tmp/climbed-out.bias").exists()


def test_a_gguf_with_any_header_is_read_or_refused_in_words() -> None:
    """Random bytes among names, types and counts; and arrays nested deeper than Python's recursion limit."""
    whole, draw, outcomes = small_gguf(Path("m.gguf")), random.Random(1), Counter[str]()
    assert b"{{ messages }}" in whole, "a chat template is text, which nothing here renders"
    nested = (
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q1sI", 1, b"a", 9) + struct.pack("<IQ", 9, 1) * 10**5
    )
    changed = [nested]
    for _ in range(250):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 2, 8])):
            data[draw.randrange(14_000)] = draw.choice([0, 1, 2, 8, 9, 255, draw.randrange(256)])
        changed.append(bytes(data))
    for number, data in enumerate(changed):
        folder = Path(f"out-{number}")
        folder.mkdir()
        Path("x.gguf").write_bytes(data)
        try:
            gguf_reader.convert(Path("x.gguf"), folder)
            outcomes["read"] += 1
        except UserError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 50 and outcomes["read"] > 50, outcomes
    assert TRAP == []


@pytest.mark.parametrize("name", ["../climbed", "/tmp/climbed-out", "a/../../climbed"])
def test_a_path_that_climbs_out_of_an_archive_is_not_followed(name: str, tmp_path: Path) -> None:
    wheel = Path("evil-1.0-py3-none-any.whl")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(name, b"evil")
        archive.writestr("piece.bin", b"good")
    before = set(tmp_path.rglob("*"))
    taken, out = io.BytesIO(), io.BytesIO()
    download._unzip(wheel, "piece.bin", taken)
    download._unzip(wheel, name, out)  # asked for by its name it is only bytes: no path is made of the name
    assert taken.getvalue() == b"good" and out.getvalue() == b"evil"
    assert set(tmp_path.rglob("*")) == before
    assert not Path("/tmp/climbed-out").exists()


def test_a_hub_that_lists_climbing_names_is_not_followed() -> None:
    names = ["config.json", "model.safetensors", "../evil.json", "/etc/evil.json", "a/evil.py", "vocab.txt"]
    listed = {name: HubFile(name, 1, None, None, "") for name in names}
    taken = [file.name for file in sources._files_to_fetch(listed)]
    assert taken == ["config.json", "vocab.txt", "model.safetensors"]
