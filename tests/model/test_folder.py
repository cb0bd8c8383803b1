"""Shards and their index, the manifest and the damage that it shows, and which folder a name means."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.oracles import tiny_checkpoint, tiny_config
from train.common.errors import UserError
from train.common.files import read_json, write_json
from train.model import folder as folder_module
from train.model.folder import (
    INDEX,
    ShardWriter,
    cached_commit,
    check_revision,
    copy_companions,
    display_name,
    find_damage,
    read_manifest,
    resolve,
    write_manifest,
)
from train.model.loading import describe, load
from train.model.published import read_folder_shape, read_published


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


def test_the_manifest_shows_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert find_damage(tmp_path, manifest, full=False) == ["a.txt has another sha256 than when it was written"]
    monkeypatch.setattr(folder_module, "HASHED_ALWAYS", 2)  # a file larger than that is hashed on demand
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


# What a name means


def hub_cache(root: Path, commits: tuple[str, ...] = ("abc",), main: str = "abc") -> Path:
    """A hub's cache with tiny models in its snapshots, as links to blobs."""
    cache = root / "models--Qwen--Tiny"
    for commit in commits:
        folder = tiny_checkpoint(cache / "snapshots" / commit, tiny_config())
        (cache / "blobs").mkdir(exist_ok=True)
        for number, path in enumerate(sorted(folder.iterdir())):
            path.rename(cache / "blobs" / f"{commit}{number}")
            path.symlink_to(Path("..") / ".." / "blobs" / f"{commit}{number}")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(main)
    return cache


def test_a_slash_and_an_address_mean_the_folder_of_that_name(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "models" / "Tiny", tiny_config())
    names = ("Tiny", "Tiny/", "Qwen/Tiny", "Qwen/Tiny/", "https://huggingface.co/Qwen/Tiny/tree/main", f"{folder}/")
    for name in (*names, str(folder / "config.json")):
        assert resolve(name, tmp_path / "models").samefile(folder), name


def test_the_root_of_a_hub_cache_means_its_snapshot(tmp_path: Path) -> None:
    cache = hub_cache(tmp_path / "models")
    for name in (str(cache), f"{cache}/", str(cache / "snapshots" / "abc"), "Qwen/Tiny", "models--Qwen--Tiny"):
        folder = resolve(name, tmp_path / "models")
        assert folder == cache / "snapshots" / "abc", name
        assert (display_name(folder), cached_commit(folder)) == ("Tiny", "abc")
    check_revision(cache / "snapshots" / "abc", "ab")
    with pytest.raises(UserError, match=r"\(commit abc\)"):
        check_revision(cache / "snapshots" / "abc", "v2")


def test_of_several_snapshots_the_branch_main_decides(tmp_path: Path) -> None:
    cache = hub_cache(tmp_path, commits=("abc", "def"), main="def\n")
    assert resolve(str(cache), tmp_path / "models").name == "def"
    (cache / "refs" / "main").write_text("elsewhere")
    with pytest.raises(UserError, match=r"these snapshots: abc, def. Name one: MODEL=.*/snapshots/"):
        resolve(str(cache), tmp_path / "models")
    for commit in ("abc", "def"):
        (cache / "snapshots" / commit / "config.json").unlink()
    (cache / "refs" / "main").write_text("abc")
    with pytest.raises(UserError, match=r"abc: has no config.json: the download is not complete"):
        resolve(str(cache), tmp_path / "models")


def test_a_snapshot_without_its_blobs_is_told_from_a_damaged_file(tmp_path: Path) -> None:
    """As in a container that was shown the snapshot alone."""
    cache = hub_cache(tmp_path)
    (cache / "blobs").rename(tmp_path / "blobs")
    with pytest.raises(UserError, match=r"a link to \.\./\.\./blobs/abc\d, which is missing .*whole models--… folder"):
        read_published(resolve(str(cache), tmp_path))


@pytest.mark.parametrize("name", ["x" * 300, "owner/" + "x" * 300, "\0", "…" * 200])
def test_a_name_that_no_folder_can_have_is_only_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"no folder with a config.json at this path"):
        resolve(name, tmp_path)


@pytest.mark.parametrize("name", ["", " "])
def test_no_name_at_all(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="which model"):
        resolve(name, tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        '{"files": {"a": 5}}',
        '{"files": {"../a": {"bytes": 1, "sha256": "0"}}}',
        '{"files": {}, "source": "hub"}',
        '{"files": {}, "revision": 5}',
        '{"files": {}, "inputs": []}',
        '{"files": null}',
        "{}",
        "null",
        "",
        "[" * 100_000,
    ],
)
def test_a_manifest_of_another_form_is_refused_whole(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest.json: not a manifest: .*Remove"):
        read_manifest(tmp_path)


# quantize_config.json


def without_section(folder: Path) -> Path:
    config = read_json(folder / "config.json")
    write_json(folder / "quantize_config.json", {**config.pop("quantization_config"), "model_name_or_path": None})
    write_json(folder / "config.json", config)
    return folder


@torch.no_grad()
def test_the_quantisation_may_stand_in_quantize_config_json(tmp_path: Path) -> None:
    ids = torch.arange(9)[None]
    expected = load(tiny_checkpoint(tmp_path / "m", tiny_config(), int4=True), torch.float32)(ids).logits
    folder = without_section(tmp_path / "m")
    assert torch.equal(load(folder, torch.float32)(ids).logits, expected)
    assert read_folder_shape(folder).bits == 4
    assert "Int4 in groups of 32" in describe(folder)


def test_it_says_nothing_of_a_float_folder(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", tiny_config())
    write_json(folder / "quantize_config.json", {"bits": 4, "group_size": 128})
    assert "quantization_config" not in read_published(folder)
    assert "float32" in describe(folder)


def test_a_scheme_that_is_not_computed_is_named_with_its_file(tmp_path: Path) -> None:
    folder = without_section(tiny_checkpoint(tmp_path / "m", tiny_config(), int4=True))
    write_json(folder / "quantize_config.json", {"bits": "four"})
    with pytest.raises(UserError, match=r"quantize_config.json: quantization_config.bits is 'four'"):
        describe(folder)
