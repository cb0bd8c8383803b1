"""A damaged file of a base gives one sentence, the same from every reader: what is wrong, where, what to do."""

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.oracles import tiny_checkpoint, tiny_config, tiny_decoder
from train.common.errors import UserError
from train.model import base_files
from train.model.base_files import read_index, read_object, weight_files
from train.model.folder import INDEX, ShardWriter
from train.model.loading import check_folder, describe, load, load_structure
from train.model.published import check_without_torch, read_folder_shape

CASES = Path(__file__).parents[1] / "assets" / "cases"
POINTER = (CASES / "pytorch_model.bin").read_bytes()
IDS = torch.arange(2, 50)[None]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "m", tiny_config())


def plan(folder: Path) -> None:
    read_folder_shape(folder)
    check_without_torch(folder)


# doctor, plan, model, export and quantize, and what loads the weights
EVERYBODY: list[Callable[[Path], Any]] = [
    load_structure,
    plan,
    describe,
    check_folder,
    lambda folder: load(folder, torch.float32),
]


def refused_by_all(folder: Path, message: str) -> None:
    """Every reader says the same, in one sentence and its remedy."""
    for read in EVERYBODY:
        with pytest.raises(UserError, match=message) as caught:
            read(folder)
        assert "\n" not in str(caught.value)
        assert "make model MODEL=" in str(caught.value)


DAMAGE = [
    ((CASES / "config-bom.json").read_bytes(), r"config.json: begins with a byte order mark \(BOM\)"),
    ((CASES / "config-trailing-comma.json").read_bytes(), r"config.json:1:\d+: not JSON: a comma before }: remove it"),
    (b"", "config.json: empty"),
    (b'{"model_type": "qwen2", ', r"config.json:1:\d+: not JSON: the file is cut off"),
    (b"\xff\xfe{\x00}\x00", "config.json: UTF-16: save it as UTF-8"),
    (b'{"a": "\xc4\xe3"}', "config.json: not UTF-8 at byte 7"),
    (b"[]", "config.json: holds a list, expected a JSON object"),
    (b"null", "config.json: holds null"),
    (b'{"rope_theta": NaN}', "config.json: not JSON: NaN is not a JSON number"),
    (b'{"a": ' + b"9" * 5000 + b"}", "config.json: not JSON"),
    (b"[" * 100_000, "config.json: not JSON"),
    (POINTER, "config.json: a pointer of Git LFS, not the file itself: run `git lfs pull`"),
    (b"<!DOCTYPE html><html>", "config.json: a web page, not the file itself"),
]


@pytest.mark.parametrize(("content", "message"), DAMAGE, ids=[message[:40] for _, message in DAMAGE])
def test_a_damaged_config_is_said_alike_by_all(base: Path, content: bytes, message: str) -> None:
    (base / "config.json").write_bytes(content)
    refused_by_all(base, message)


@pytest.mark.parametrize(
    "name", ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "quantize_config.json"]
)
@pytest.mark.parametrize(("content", "message"), [(b"", "empty"), (b"{,}", "not JSON"), (b"7", "holds a number")])
def test_the_small_files_beside_it_too(base: Path, name: str, content: bytes, message: str) -> None:
    (base / name).write_bytes(content)
    refused_by_all(base, f"{name}(:1:2)?: {message}")


@pytest.mark.parametrize("value", ["eos", [1.5], {"a": 1}, -1, 2**40, True, [None]])
def test_token_ids_of_another_kind_are_named(base: Path, value: Any) -> None:
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    for read in (load_structure, check_folder, describe):
        with pytest.raises(UserError, match=r"generation_config.json: eos_token_id is .*expected a token id"):
            read(base)


def test_what_transformers_does_not_read_is_named(base: Path) -> None:
    (base / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 258, "early_stopping": 5, "max_new_tokens": 0})
    )
    with pytest.raises(UserError, match=r"generation_config.json: transformers does not read it"):
        check_folder(base)


def test_files_that_are_only_copied_are_checked_before_they_are(base: Path) -> None:
    (base / "added_tokens.json").write_text("{")
    with pytest.raises(UserError, match=r"added_tokens.json:1:2: not JSON: the file is cut off"):
        check_folder(base)


def as_bin(folder: Path) -> Path:
    """The same folder with pytorch_model.bin."""
    path = folder / "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors"), path)
    (folder / "model.safetensors").unlink()
    return path


def test_a_bin_that_is_an_lfs_pointer_truncated_or_empty(base: Path) -> None:
    path = as_bin(base)
    whole = path.read_bytes()
    load(base, torch.float32)
    for content, message in (
        (POINTER, "a pointer of Git LFS"),
        (whole[: len(whole) // 2], "not a whole .bin file of torch.save"),
        (b"", "empty"),
        (b"weights", "not a whole .bin file"),
        (base_files.TORCH_LEGACY + b"cut", "of the form before torch 1.6"),
    ):
        path.write_bytes(content)
        for read in EVERYBODY:
            with pytest.raises(UserError, match=f"pytorch_model.bin: {message}"):
                read(base)


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {"a": 1}}, {1: torch.ones(2)}, torch.ones(2)])
def test_a_bin_of_anything_else_than_tensors_by_name_is_refused(base: Path, content: Any) -> None:
    torch.save(content, as_bin(base))
    with pytest.raises(UserError, match=r"pytorch_model.bin: not read: it does not hold tensors by name"):
        load_structure(base)


def test_a_bin_of_the_form_before_torch_1_6_gets_the_command_that_converts_it(base: Path) -> None:
    path = as_bin(base)
    expected = load(base, torch.float32).state_dict()
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    with pytest.raises(
        UserError, match=r"pytorch_model.bin: of the form before torch 1\.6, which is not read"
    ) as error:
        load(base, torch.float32)
    code = str(error.value).split('python -c "')[1].removesuffix('"')
    subprocess.run([sys.executable, "-c", code], cwd=base, check=True)
    converted = load(base, torch.float32).state_dict()
    assert converted.keys() == expected.keys() and all(torch.equal(converted[n], t) for n, t in expected.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b"abc", "not a whole safetensors file"), (POINTER, "a pointer of Git LFS"), (None, "missing")],
)
def test_weights_that_are_no_safetensors(base: Path, content: bytes | None, message: str) -> None:
    path = base / "model.safetensors"
    if content is None:
        path.unlink()
        path.symlink_to("../../blobs/abc")
        message = "a link to ../../blobs/abc, which is missing .*models--"
    else:
        path.write_bytes(content)
    refused_by_all(base, f"model.safetensors: {message}")


def test_safetensors_cut_anywhere(base: Path) -> None:
    whole = (base / "model.safetensors").read_bytes()
    for size in (4, 8, 100, len(whole) // 2, len(whole) - 1):
        (base / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(UserError, match="not a whole safetensors file"):
            load_structure(base)


def sharded(folder: Path) -> None:
    """The weights in several files with an index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    writer = ShardWriter(folder, 100_000)
    for name, tensor in state.items():
        writer.add(name, tensor)
    writer.close()


@torch.no_grad()
def test_the_index_says_which_files_are_read(base: Path) -> None:
    expected = load(base, torch.float32)(IDS).logits
    sharded(base)
    save_file({"model.norm.weight": torch.zeros(64)}, base / "consolidated.safetensors")
    assert torch.equal(load(base, torch.float32)(IDS).logits, expected), "a file that the index does not name"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("", "empty"),
        ("{", "not JSON: the file is cut off"),
        ("{}", "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {"a": 5}}', "weight_map names 5, expected a file of this folder"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "weight_map names '../x.safetensors'"),
        ('{"weight_map": {"a": "model-00001-of-00009.safetensors"}}', "missing"),
    ],
)
def test_a_broken_index(base: Path, change: str, message: str) -> None:
    sharded(base)
    (base / INDEX).write_text(change)
    refused_by_all(base, message)


def test_a_missing_shard_is_named(base: Path) -> None:
    sharded(base)
    gone = sorted(base.glob("model-*.safetensors"))[1]
    gone.unlink()
    refused_by_all(base, f"{gone.name}: missing")


def test_a_tensor_of_the_wrong_kind_is_found_in_the_headers(base: Path, tmp_path: Path) -> None:
    int4 = tiny_checkpoint(tmp_path / "int4", tiny_config(), int4=True)
    for folder, name in ((base, "model.norm.weight"), (int4, "model.layers.0.mlp.up_proj.qweight")):
        state = load_file(folder / "model.safetensors")
        state[name] = state[name].float() if "qweight" in name else state[name].int()
        save_file(state, folder / "model.safetensors")
        with pytest.raises(UserError, match=f"{name} holds (floats, expected integers|integers, expected floats)"):
            load_structure(folder)


def test_a_missing_bias_of_q_k_and_v_is_no_model_without_it(base: Path, tmp_path: Path) -> None:
    for folder in (base, tiny_checkpoint(tmp_path / "int4", tiny_config(), int4=True)):
        state = load_file(folder / "model.safetensors")
        del state["model.layers.1.self_attn.q_proj.bias"]
        save_file(state, folder / "model.safetensors")
        with pytest.raises(UserError, match=r"missing model.layers.1.self_attn.q_proj.bias"):
            load_structure(folder)


def test_groups_without_a_scale_are_found_when_loading(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "int4", tiny_config(), int4=True)
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.mlp.up_proj.g_idx"][5] = 99
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"up_proj.g_idx: names a group outside 0 to 1"):
        load(folder, torch.float32)


@pytest.mark.parametrize("name", ["qwen.tiktoken", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", POINTER, b"<html></html>", b"{", b"IQ== 0"])
def test_a_damaged_tokenizer_is_said_by_all_but_those_that_read_weights_alone(
    base: Path, name: str, content: bytes
) -> None:
    (base / "qwen.tiktoken").unlink()
    (base / name).write_bytes(content)
    for read in (plan, describe, check_folder):
        with pytest.raises(UserError, match=f"{name}.*make model MODEL="):
            read(base)


def test_more_tokens_than_rows_are_refused(tmp_path: Path) -> None:
    check_folder(tiny_checkpoint(tmp_path / "m", tiny_config(vocab_size=264)))  # <|extra_n|> need no row: text has none
    folder = tiny_checkpoint(tmp_path / "m", tiny_config(vocab_size=258))
    with pytest.raises(UserError, match=r"qwen.tiktoken: has 259 tokens, vocab_size in config.json is 258"):
        check_folder(folder)


def test_the_remedy_names_the_hub_id_where_the_manifest_has_it(base: Path) -> None:
    (base / "manifest.json").write_text(json.dumps({"source": {"hub": "Qwen/X"}, "files": {}}))
    (base / "config.json").write_text("")
    with pytest.raises(UserError, match=r"make model MODEL=Qwen/X$"):
        read_object(base / "config.json")


def test_weights_under_the_names_of_autogptq_are_found(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", tiny_config(), int4=True)
    shutil.move(folder / "model.safetensors", folder / "gptq_model-4bit-32g.safetensors")
    assert [path.name for path in weight_files(folder)] == ["gptq_model-4bit-32g.safetensors"]
    torch.save(load_file(folder / "gptq_model-4bit-32g.safetensors"), folder / "gptq_model-4bit-32g.bin")
    (folder / "gptq_model-4bit-32g.safetensors").unlink()
    load(folder, torch.float32)


def test_one_file_of_the_usual_name_comes_before_all_others(base: Path) -> None:
    save_file({"x": torch.zeros(1)}, base / "adapter_model.safetensors")
    assert torch.equal(load(base, torch.float32)(IDS).logits, tiny_decoder(tiny_config())(IDS).logits)


def test_the_index_names_every_shard(base: Path) -> None:
    sharded(base)
    assert set(read_index(base / INDEX).values()) == {path.name for path in base.glob("*.safetensors")}


def test_a_tiktoken_file_that_is_cut_off_at_the_end_of_a_line(base: Path) -> None:
    """It would be a smaller vocabulary, with other ids for every control token, and nothing else would show it."""
    tokens = [*(bytes([n]) for n in range(256)), b"ab", b"abc", b"abcd"]
    lines = [base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens)]
    (base / "generation_config.json").write_text('{"eos_token_id": 259}')
    (base / "qwen.tiktoken").write_bytes(b"".join(lines))
    check_folder(base)
    for kept in (256, 258):
        (base / "qwen.tiktoken").write_bytes(b"".join(lines[:kept]))
        with pytest.raises(
            UserError, match=rf"<\|endoftext\|> is {kept} in it, the stop token in .* is 259: .*cut off"
        ):
            check_folder(base)
