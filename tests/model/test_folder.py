"""Shards and their index, the manifest and the damage that it shows, and which folder a name means."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.oracles import tiny_checkpoint, tiny_config
from train.common.errors import UserError
from train.common.files import read_json
from train.model.folder import INDEX, ShardWriter, copy_companions, find_damage, read_manifest, resolve, write_manifest


def test_small_models_are_one_file_and_large_ones_have_an_index(tmp_path: Path) -> None:
    tensors = {f"t{n}": torch.full((100,), float(n)) for n in range(5)}  # 400 bytes each
    for limit, files in {4000: 1, 900: 3, 100: 5}.items():
        folder = tmp_path / str(limit)
        folder.mkdir()
        writer = ShardWriter(folder, limit)
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.close()
        paths = sorted(folder.glob("*.safetensors"))
        assert len(paths) == files
        read = {name: t for path in paths for name, t in load_file(path).items()}
        assert all(torch.equal(read[name], t) for name, t in tensors.items())
        assert (folder / INDEX).is_file() == (files > 1)
        if files > 1:
            index = read_json(folder / INDEX)
            assert index["metadata"]["total_size"] == 2000
            assert all(name in load_file(folder / file) for name, file in index["weight_map"].items())
    assert (tmp_path / "4000" / "model.safetensors").is_file()
    assert (tmp_path / "900" / "model-00003-of-00003.safetensors").is_file()


def test_only_the_small_files_are_copied_and_as_bytes(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    target.mkdir()
    content = b"raise SystemExit('never run') \xff\xfe"
    for name in (
        "modeling_qwen.py",
        "qwen.tiktoken",
        "config.json",
        "manifest.json",
        INDEX,
        "model.safetensors",
        "x.bin",
    ):
        (source / name).write_bytes(content)
    assert copy_companions(source, target, without=["config.json"]) == ["modeling_qwen.py", "qwen.tiktoken"]
    assert sorted(p.name for p in target.iterdir()) == ["modeling_qwen.py", "qwen.tiktoken"]
    assert (target / "modeling_qwen.py").read_bytes() == content


def test_the_manifest_shows_damage(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    assert read_manifest(tmp_path) is None
    write_manifest(tmp_path, {"source": {"folder": "here"}})
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert manifest["source"] == {"folder": "here"}
    assert set(manifest["files"]) == {"a.txt", "b.txt"}
    assert find_damage(tmp_path, manifest, full=True) == []
    (tmp_path / "a.txt").write_text("eno")
    assert find_damage(tmp_path, manifest, full=False) == []
    assert find_damage(tmp_path, manifest, full=True) == ["a.txt has another sha256 than when it was written"]
    (tmp_path / "a.txt").write_text("longer")
    (tmp_path / "b.txt").unlink()
    assert find_damage(tmp_path, manifest, full=False) == ["a.txt has 6 bytes, expected 3", "b.txt is missing"]
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="not a manifest"):
        read_manifest(tmp_path)


def test_resolve_takes_a_folder_or_a_name_and_prints_the_remedy(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "models" / "Tiny-Int4", tiny_config("qwen2"))
    assert resolve(str(folder), tmp_path) == folder
    assert resolve("Someone/Tiny-Int4", tmp_path / "models") == folder
    with pytest.raises(UserError, match=r"make model MODEL=Someone/Else"):
        resolve("Someone/Else", tmp_path / "models")


def test_another_model_of_the_same_last_name_is_refused(tmp_path: Path) -> None:
    models = tmp_path / "models"
    folder = tiny_checkpoint(models / "Tiny-Int4", tiny_config("qwen2"))
    for source, origin in (
        ({"hub": "Someone/Tiny-Int4"}, "Someone/Tiny-Int4"),
        ({"folder": "Tiny"}, "made here from Tiny"),
    ):
        write_manifest(folder, {"source": source})
        with pytest.raises(UserError, match=f"'Else/Tiny-Int4': .*Tiny-Int4 holds another model, {origin}"):
            resolve("Else/Tiny-Int4", models)
        for name in ("Tiny-Int4", "models/Tiny-Int4", str(folder)):
            assert resolve(name, models) == folder
    write_manifest(folder, {"source": {"hub": "Someone/Tiny-Int4"}})
    assert resolve("Someone/Tiny-Int4", models) == folder
