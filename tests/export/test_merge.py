"""The merge: every weight, every file, the unchanged base, and the stock models that load it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.exports import adapted, equal_logits, exact_merge, export, hashes, merged_state
from tests.support.oracles import llama, modelscope_qwen, tiny_config
from tests.support.runs import tiny_run
from train.commands import quantize
from train.common import threads
from train.common.errors import UserError
from train.common.files import read_json, sha256, write_json
from train.export import merge
from train.model import lora
from train.model.layouts import DecoderConfig, read_config
from train.model.loading import load
from train.ops.gptq import Scheme
from train.ops.gptq import quantize as quantize_weight

TOKENIZER = {"qwen.tiktoken", "tokenizer_config.json"}
WRITTEN = {"README.md", "chat_template.jinja"}
FILES = {
    "passport.json",
    "config.json",
    "generation_config.json",
    "manifest.json",
    "model.safetensors",
    *TOKENIZER,
    *WRITTEN,
}


def ulp(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance from |x| to the next value of `dtype`, as float64."""
    rounded = x.abs().to(dtype)
    return (
        torch.nextafter(rounded.float(), torch.tensor(torch.inf)).double() - rounded.double()
        if dtype is torch.float32
        else ((rounded.view(torch.int16) + 1).view(dtype).double() - rounded.double())
    )


@pytest.mark.parametrize("layout", ["qwen2", "qwen"])
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_every_tensor_is_within_one_ulp_of_float64(tmp_path: Path, layout: str, name: str) -> None:
    folder, dtype = tiny_run(tmp_path, layout), getattr(torch, name)
    state, expected = merged_state(export(folder, dtype=name)), exact_merge(folder)
    assert state.keys() == expected.keys()
    for key, tensor in state.items():
        assert tensor.dtype is dtype
        assert ((tensor.double() - expected[key]).abs() <= ulp(expected[key], dtype)).all(), key
    changed = [key for key in state if key.removesuffix(".weight") in lora.delta(folder / "adapter")]
    assert len(changed) == {"qwen2": 14, "qwen": 10}[layout]


def test_the_base_is_untouched_and_the_files_are_exact(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path, "qwen")
    base = tmp_path / "models" / "base-Int4"
    (base / "modeling_qwen.py").write_bytes(b"raise SystemExit('never run')\r\n")
    (base / "LICENSE").write_text("the licence")
    (base / "quantize_config.json").write_text("{}")
    (base / "README.md").write_text("about another model")
    before, adapter = hashes(base), hashes(folder / "adapter")
    out = export(folder)
    assert hashes(base) == before and hashes(folder / "adapter") == adapter
    assert {p.name for p in out.iterdir()} == FILES | {"modeling_qwen.py", "LICENSE"}
    for name in ("modeling_qwen.py", "qwen.tiktoken", "LICENSE"):
        assert sha256(out / name) == before[name]
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []  # nothing half-written is left


def test_the_config_is_the_base_s_without_the_quantisation(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path, "qwen")
    published = read_json(tmp_path / "models" / "base-Int4" / "config.json")
    written = read_json(export(folder, dtype="bf16") / "config.json")
    published.pop("quantization_config")
    # Qwen-1's code takes one of its switches at most, and its users set it: from_pretrained(…, bf16=True)
    assert written == published | {"torch_dtype": "bfloat16", "bf16": False, "fp16": False, "fp32": False}


def test_qwen2_loads_strictly_into_the_plain_llama(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path, "qwen2")
    out = export(folder, dtype="float32")
    plain, state = llama(read_config(read_json(out / "config.json"))), merged_state(out)
    missing, extra = plain.load_state_dict(state, strict=False)
    # Tied head, no such bias
    assert not extra and all(n.endswith("o_proj.bias") or n == "lm_head.weight" for n in missing)
    assert equal_logits(adapted(folder), plain) and equal_logits(adapted(folder), load(out, torch.float32))


def test_qwen_loads_strictly_into_modelscope_s(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path, "qwen")
    out = export(folder, dtype="float32")
    plain, state = modelscope_qwen(read_config(read_json(out / "config.json"))), merged_state(out)
    missing, extra = plain.load_state_dict(state, strict=False)
    assert not extra and all("rotary" in n or "masked_bias" in n or n.endswith("attn.bias") for n in missing)
    assert equal_logits(adapted(folder), plain)


@pytest.mark.parametrize(("layout", "other"), [("qwen", "qwen2"), ("qwen2", "qwen")])
def test_the_other_layout_has_the_same_logits(tmp_path: Path, layout: str, other: str) -> None:
    folder = tiny_run(tmp_path, layout)
    out = export(folder, dtype="float32", layout=other)
    written = load(out, torch.float32)
    assert written.config.layout == other and equal_logits(adapted(folder), written)
    tokenizer = {"qwen2": {"tokenizer.json"}, "qwen": {"qwen.tiktoken"}}[other]
    assert {p.name for p in out.iterdir()} == (FILES - {"qwen.tiktoken"}) | tokenizer
    stops = read_json(out / "generation_config.json")["eos_token_id"]
    assert stops == ([258, 256] if other == "qwen2" else 258)  # Qwen-1's code takes one id, no list


def random_block(int4: bool, act_order: bool = False) -> tuple[merge.State, merge.Delta]:
    """A linear of 288 rows with its adapter, and a norm."""
    make = torch.Generator().manual_seed(5)
    weight = torch.randn(288, 128, generator=make)
    state = quantize_weight(weight, Scheme(group_size=32)) if int4 else {"weight": weight.half()}
    if act_order:
        state["g_idx"] = state["g_idx"][torch.randperm(128, generator=make)]
    pair = torch.randn(8, 128, generator=make), torch.randn(288, 8, generator=make)
    named = {f"up.{name}": tensor for name, tensor in state.items()} | {"norm.weight": torch.randn(128, generator=make)}
    return named, {"up": (*pair, 0.05)}


BLOCKS = pytest.mark.parametrize(
    ("int4", "act_order"), [(True, False), (True, True), (False, False)], ids=["int4", "act-order", "float"]
)


@BLOCKS
def test_slices_and_cores_change_no_byte(int4: bool, act_order: bool, monkeypatch: Any) -> None:
    state, delta = random_block(int4, act_order)
    whole = merge.merge_block(state, delta, 4, torch.float16)
    monkeypatch.setitem(merge.SLICE, "cpu", 128 * 64)
    monkeypatch.setattr(threads, "workers", lambda: 4)
    assert len(merge._slices(whole["up.weight"], merge.CPU)) == 5
    sliced = merge.merge_block(state, delta, 4, torch.float16)
    assert list(sliced) == list(whole)
    assert all(torch.equal(sliced[name], whole[name]) for name in whole)


@pytest.mark.gpu
@BLOCKS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gpu_writes_the_bytes_of_the_cpu(int4: bool, act_order: bool, dtype: torch.dtype, monkeypatch: Any) -> None:
    state, delta = random_block(int4, act_order)
    expected = merge.merge_block(state, delta, 4, dtype)
    monkeypatch.setitem(merge.SLICE, "cuda", 128 * 64)
    found = merge.merge_block(state, delta, 4, dtype, torch.device("cuda"))
    assert all(found[name].device == merge.CPU and torch.equal(found[name], expected[name]) for name in expected)


def test_float_linears_merge_too(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path, "qwen2", int4=False)
    state, expected = merged_state(export(folder, dtype="float32")), exact_merge(folder)
    assert all(torch.equal(state[n], expected[n].float()) for n in expected) and state.keys() == expected.keys()


def with_biases(folder: Path, value: float) -> None:
    """Give every Int4 linear that has no bias one of `value`, as published GPTQ files do with zeros."""
    file = folder / "model.safetensors"
    state = load_file(file)
    for name in [n for n in state if n.endswith(".qweight")]:
        state.setdefault(name.replace("qweight", "bias"), torch.full((state[name].shape[1],), value).half())
    save_file(state, file, metadata={"format": "pt"})
    record = folder.parent.parent / "runs" / "tiny" / "run.json"
    known = read_json(record)
    known["base"]["files"]["model.safetensors"] = sha256(file)  # it was trained on this file
    record.write_text(json.dumps(known))


@pytest.mark.parametrize("layout", ["qwen", "qwen2", "qwen3"])
def test_zero_biases_of_an_int4_file_are_dropped_and_others_refused(tmp_path: Path, layout: str) -> None:
    folder, base = tiny_run(tmp_path, layout), tmp_path / "models" / "base-Int4"
    plain = merged_state(export(folder))
    with_biases(base, 0.0)
    assert merged_state(export(folder)).keys() == plain.keys()
    tiny_run(tmp_path, layout)
    with_biases(base, 0.5)
    with pytest.raises(UserError, match="bias is not zero"):
        export(folder, out=str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_shards_and_their_index(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path)
    out = export(folder, dtype="float32", shard_size=0.0001)
    index = read_json(out / "model.safetensors.index.json")
    files = sorted(p.name for p in out.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 2
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in merged_state(out).values())
    assert equal_logits(adapted(folder), load(out, torch.float32))


def test_values_outside_float16_are_refused(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path, scale=1e6)
    with pytest.raises(UserError, match="DTYPE=bfloat16"):
        export(folder)


def test_too_little_disk_is_refused_before_the_merge(tmp_path: Path, monkeypatch: Any) -> None:
    folder = tiny_run(tmp_path)
    monkeypatch.setattr(merge, "free_bytes", lambda path: 10**6)
    with pytest.raises(UserError, match="GB of disk"):
        export(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_the_size_is_computed_before_the_merge(tmp_path: Path, tied: bool) -> None:
    folder = tiny_run(tmp_path, "qwen2", tie_word_embeddings=tied)
    out = export(folder, dtype="float32")
    job = merge.MergeJob(tmp_path / "models" / "base-Int4", folder / "adapter", torch.float32, "qwen2", 10**9)
    assert merge.written_bytes(job) == sum(t.nbytes for t in merged_state(out).values())


def test_the_written_config_is_read_as_the_same_architecture(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path, "qwen2")
    config = read_config(json.loads((export(folder) / "config.json").read_text()))
    assert (
        isinstance(config, DecoderConfig)
        and config.to_dict() == tiny_config("qwen2", tie_word_embeddings=True).to_dict()
    )


def rewrite_as_transformers_5(folder: Path, theta: float) -> None:
    """Give a float32 base the config.json that transformers 5 writes."""
    config = read_json(folder / "config.json")
    for key in ("rope_theta", "torch_dtype"):
        config.pop(key)
    config |= {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}, "dtype": "float32"}
    write_json(folder / "config.json", {**config, "layer_types": ["full_attention"] * config["num_hidden_layers"]})


@pytest.mark.parametrize("layout", ["", "qwen"])
@pytest.mark.parametrize("command", ["export", "quantize"])
def test_what_is_written_has_keys_that_old_and_new_readers_agree_on(tmp_path: Path, layout: str, command: str) -> None:
    folder = tiny_run(tmp_path, int4=False, rope_theta=1e6)
    base = tmp_path / "models" / "base-Int4"
    rewrite_as_transformers_5(base, 1e6)
    record = read_json(folder / "run.json")
    record["base"]["files"] = hashes(base)
    (folder / "run.json").write_text(json.dumps(record))
    if command == "export":
        out = export(folder, layout=layout)
    else:
        models = tmp_path / "models"
        quantize.run(quantize.Options(str(base), "out", layout or "keep", group_size=32, models=str(models)))
        out = models / "out"
    config = read_json(out / "config.json")
    assert config["torch_dtype"] == "float16"
    assert not config.keys() & {"dtype", "rope_parameters"}, "transformers 5 would believe them"
    assert config["rotary_emb_base" if layout else "rope_theta"] == 1e6
    assert read_config(config).rope_theta == 1e6
