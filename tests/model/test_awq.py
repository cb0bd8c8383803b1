"""AWQ's gemm packing: read weight for weight, logits by its published formula, trained on, merged and exported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.exports import IDS, adapted, export, merged_state
from tests.support.oracles import tiny_checkpoint, tiny_config, tiny_decoder
from tests.support.runs import tiny_run
from train.common.errors import UserError
from train.common.files import read_json, sha256, write_json
from train.model.awq import unpack
from train.model.int4_linear import Int4Linear
from train.model.loading import check_folder, describe, load
from train.model.published import read_folder_shape
from train.runs.provenance import hash_folder

GROUP = 32
SECTION = {"bits": 4, "group_size": GROUP, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm"}
SECTION |= {"zero_point": True}


def pack(codes: torch.Tensor) -> torch.Tensor:
    """[R, N] -> [R, N / 8] as AutoAWQ's WQLinear_GEMM.from_linear packs: word by word, place by place."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for column in range(codes.shape[1] // 8):
        for place, output in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            words[:, column] |= codes[:, column * 8 + output].long() << (4 * place)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def quantise(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(tensors of a linear [N, K], its weight by the formula): zeros of each group anywhere between 0 and 15."""
    groups = weight.t().unflatten(0, (-1, GROUP))  # [G, GROUP, N]
    low, high = groups.amin(1), groups.amax(1)
    scales = ((high - low) / 15).clamp_min(1e-4).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    codes = (groups / scales.float()[:, None] + zeros[:, None]).round().clamp(0, 15)
    formula = ((codes - zeros[:, None]) * scales.float()[:, None]).flatten(0, 1)
    tensors = {"qweight": pack(codes.flatten(0, 1)), "qzeros": pack(zeros), "scales": scales}
    return tensors, formula.t().contiguous()


def awq_folder(folder: Path, layout: str = "qwen2", **config: Any) -> dict[str, torch.Tensor]:
    """Write an AWQ checkpoint; returns the float state by the formula."""
    made = tiny_config(layout, **config)
    tiny_checkpoint(folder, made)
    state, formula = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("proj.weight"):
            tensors, formula[name] = quantise(tensor)
            state |= {f"{name.removesuffix('weight')}{part}": value for part, value in tensors.items()}
        else:
            state[name] = tensor.half()
            formula[name] = state[name].float()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "quantization_config": SECTION})
    return formula


def test_words_are_unpacked_in_the_published_order() -> None:
    codes = torch.randint(0, 16, (24, 40), generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack(pack(codes)), codes.int())
    assert unpack(torch.tensor([[0x75316420]], dtype=torch.int32)).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize("layout", ["qwen2", "qwen3"])
@torch.no_grad()
def test_weights_and_logits_are_those_of_the_formula(tmp_path: Path, layout: str) -> None:
    formula = awq_folder(tmp_path / "base", layout)
    check_folder(tmp_path / "base")
    model = load(tmp_path / "base", torch.float32)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, Int4Linear)}
    assert len(linears) == 14
    for name, linear in linears.items():
        assert torch.equal(linear.dequantized(), formula[f"{name}.weight"]), name
    reference = tiny_decoder(tiny_config(layout))
    reference.load_state_dict(formula, strict=False)
    ids = torch.arange(5, 60)[None]
    torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-4)
    shape = read_folder_shape(tmp_path / "base")
    assert (shape.bits, shape.group) == (4, GROUP) and "Int4 in groups of 32" in describe(tmp_path / "base")


def test_a_linear_may_be_in_two_files(tmp_path: Path) -> None:
    awq_folder(tmp_path / "base")
    whole = load(tmp_path / "base", torch.float32)(IDS).logits
    state = load_file(tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "model.safetensors").unlink()
    parts = {f"model-0000{n}-of-00002.safetensors": [] for n in (1, 2)}  # type: dict[str, list[str]]
    for name in state:
        parts[f"model-0000{1 + name.endswith('qzeros')}-of-00002.safetensors"].append(name)
    for file, names in parts.items():
        save_file({name: state[name] for name in names}, tmp_path / "base" / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(load(tmp_path / "base", torch.float32)(IDS).logits, whole)


@pytest.mark.parametrize("change", [{"version": "gemv"}, {"bits": 8}, {"zero_point": False}, {"version": "marlin"}])
def test_other_packings_are_refused_with_the_reason(tmp_path: Path, change: dict[str, Any]) -> None:
    awq_folder(tmp_path / "base")
    config = read_json(tmp_path / "base/config.json")
    write_json(tmp_path / "base/config.json", {**config, "quantization_config": {**SECTION, **change}})
    with pytest.raises(UserError, match=r"expected version gemm, bits 4, zero_point true"):
        load(tmp_path / "base", torch.float32)


@torch.no_grad()
def test_a_training_on_it_is_merged_and_exported(tmp_path: Path) -> None:
    folder, base = tiny_run(tmp_path), tmp_path / "models/base-Int4"
    for path in base.iterdir():
        path.unlink()
    formula = awq_folder(base, tie_word_embeddings=True)
    record = read_json(folder / "run.json")
    record["base"]["files"] = hash_folder(base)
    write_json(folder / "run.json", record)
    trained = adapted(folder)(IDS).logits
    out = export(folder, dtype="float32")
    assert merged_state(out)["model.norm.weight"].equal(formula["model.norm.weight"])
    torch.testing.assert_close(load(out, torch.float32)(IDS).logits, trained, rtol=1e-4, atol=1e-4)
    packed = export(folder, format="gptq", out=str(tmp_path / "packed")) / "base"
    assert read_json(packed / "config.json")["quantization_config"]["quant_method"] == "gptq"
    again = load(packed, torch.float32)
    for name, module in again.named_modules():
        if isinstance(module, Int4Linear):
            assert torch.equal(module.dequantized(), formula[f"{name}.weight"])
    assert sha256(packed / "config.json") != sha256(base / "config.json")
