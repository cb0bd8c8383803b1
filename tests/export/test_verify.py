"""The verification of an export: one block at a time, on the run's own data, and a wrong merge is refused."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from tests.support.exports import export
from tests.support.oracles import tiny_checkpoint, tiny_config
from tests.support.runs import tiny_run
from train.common.errors import UserError
from train.export import merge, verify
from train.model import block_stream
from train.model.adapter_file import AdapterFile


def test_one_block_of_one_model_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    folder, alive = tiny_run(tmp_path), list[weakref.ref[Any]]()
    load = block_stream.load_tensors

    def loaded(model: Any, files: dict[str, Path], *args: Any) -> None:
        assert [ref for ref in alive if ref() is not None] == []
        load(model, files, *args)
        parts = [(name.rpartition(".")[::2]) for name in files]
        alive.extend(weakref.ref(getattr(model.get_submodule(module), part)) for module, part in parts)

    tiny_checkpoint(tmp_path / "models" / "base", tiny_config("qwen2", tie_word_embeddings=True))
    monkeypatch.setattr(block_stream, "load_tensors", loaded)
    gc.disable()  # the collector would free what a reference cycle keeps
    try:
        export(folder, onto="base", passport=0)
    finally:
        gc.enable()
    assert len(alive) > 3 * 2 * 7
    output = capsys.readouterr().out
    assert "computed in float32 on cpu" in output and "against the adapter on base, computed in float32: " in output


def test_a_merge_with_other_answers_is_not_written(tmp_path: Path, monkeypatch: Any) -> None:
    """The adapter is added with the wrong sign."""
    folder = tiny_run(tmp_path)
    read = AdapterFile.load
    monkeypatch.setattr(AdapterFile, "load", lambda file: {n: (A, -B, s) for n, (A, B, s) in read(file).items()})
    with pytest.raises(UserError, match="does not answer as the adapter"):
        export(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["adapter", "losses.jsonl", "run.json"]


def test_a_merge_without_the_adapter_is_not_written(tmp_path: Path, monkeypatch: Any) -> None:
    folder = tiny_run(tmp_path, scale=0.05)
    monkeypatch.setattr(merge, "add_delta", lambda weight, delta: weight)
    with pytest.raises(UserError, match="does not answer"):
        export(folder)


def test_without_the_data_of_the_run_the_built_in_questions_are_used(tmp_path: Path, capsys: Any) -> None:
    folder = tiny_run(tmp_path)
    export(folder)
    assert "4 conversations of conversations.jsonl" in capsys.readouterr().out
    (tmp_path / "conversations.jsonl").write_text('{"instruction": "a", "input": "", "output": "b"}\n')
    export(folder, out=str(tmp_path / "b"))
    assert "8 conversations of the built-in list" in capsys.readouterr().out


def test_too_little_memory_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    folder = tiny_run(tmp_path)
    monkeypatch.setattr(verify, "free_memory", lambda: 2**30)
    with pytest.raises(UserError, match=r"comparing needs 1\.1 GB of memory, 1\.1 GB are free"):
        export(folder)
    assert not (folder / "merged").exists()
