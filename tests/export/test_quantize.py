"""A float folder gives an Int4 folder with its rounded weights, in either layout."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.oracles import tiny_checkpoint, tiny_config
from train.commands import quantize as command
from train.common.errors import UserError
from train.common.files import read_json
from train.config.options import build
from train.export import quantize as quantization
from train.export.quantize import pack_linear
from train.model import loading
from train.model.int4_linear import Int4Linear
from train.model.layouts import LAYOUTS
from train.model.tokenizer import load_tokenizer
from train.ops.gptq import Scheme, dequantize, quantize

IDS = torch.arange(2, 50)[None]


def quantized(models: Path, model: Path, **options: str) -> Path:
    """Run the command as the command line does; returns the folder that it made."""
    before = {*models.glob("*")}
    values = {"model": str(model), "models": str(models), "group_size": "32", **options}
    command.run(build(command.Options, values))
    (new,) = {*models.glob("*")} - before
    return new


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = loading.load(folder, torch.float32)(IDS).logits
    return result


@pytest.mark.parametrize("layout", ["qwen", "qwen2", "qwen3"])
def test_every_linear_of_a_block_is_rounded_and_nothing_else_changes(tmp_path: Path, layout: str) -> None:
    source = tiny_checkpoint(tmp_path / "Tiny", tiny_config(layout))
    (source / "modeling_qwen.py").write_bytes(b"raise SystemExit  # \xff")
    folder = quantized(tmp_path, source)
    assert folder.name == "Tiny-Int4"
    state, old = load_file(folder / "model.safetensors"), load_file(source / "model.safetensors")
    linears = LAYOUTS[layout].linears
    for name, tensor in old.items():
        stem = name.removesuffix(".weight")
        if stem.split(".")[-1] in linears and name.endswith("weight"):
            expected = quantize(tensor, Scheme(group_size=32))
            assert all(torch.equal(state.pop(f"{stem}.{key}"), value) for key, value in expected.items())
        else:
            assert torch.equal(state.pop(name), tensor.half())
    if layout == "qwen":  # published: a bias for every linear, zero where the float model has none
        assert len(state) == 2 * 4
    assert all(name.endswith(".bias") and not tensor.any() for name, tensor in state.items())
    assert (folder / "modeling_qwen.py").read_bytes() == b"raise SystemExit  # \xff"
    assert (folder / "qwen.tiktoken").read_bytes() == (source / "qwen.tiktoken").read_bytes()
    config = read_json(folder / "config.json")
    assert config["quantization_config"]["group_size"] == 32
    assert {**config, "quantization_config": 0, "torch_dtype": 0} == {
        **read_json(source / "config.json"),
        "quantization_config": 0,
        "torch_dtype": 0,
    }


@pytest.mark.parametrize("tie", [False, True])
def test_in_the_layout_of_qwen_1_it_is_the_same_model(tmp_path: Path, tie: bool) -> None:
    source = tiny_checkpoint(tmp_path / "Tiny", tiny_config("qwen2", tie_word_embeddings=tie))
    plain, converted = quantized(tmp_path, source), quantized(tmp_path, source, layout="qwen")
    assert converted.name == "Tiny-Qwen1-Int4"
    model = loading.load(converted, torch.float32)
    assert model.config.layout == "qwen"
    assert sum(isinstance(m, Int4Linear) for m in model.modules()) == 2 * 5
    torch.testing.assert_close(logits(converted), logits(plain), rtol=1e-4, atol=1e-4)
    assert load_tokenizer(converted).encode("naïve 你好") == load_tokenizer(source).encode("naïve 你好")


def test_in_the_layout_of_qwen2_it_is_the_same_model(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "Tiny", tiny_config("qwen"))
    (source / "modeling_qwen.py").write_text("of the other layout")
    plain, converted = quantized(tmp_path, source), quantized(tmp_path, source, layout="qwen2")
    assert converted.name == "Tiny-Qwen2-Int4"
    torch.testing.assert_close(logits(converted), logits(plain), rtol=1e-4, atol=1e-4)
    assert not {"qwen.tiktoken", "modeling_qwen.py"} & {p.name for p in converted.iterdir()}
    assert load_tokenizer(converted).encode("naïve 你好") == load_tokenizer(source).encode("naïve 你好")


def test_a_second_run_has_nothing_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_checkpoint(tmp_path / "Tiny", tiny_config("qwen2"))
    folder = quantized(tmp_path, source)
    assert "down_proj" in capsys.readouterr().out  # the error of each kind of linear
    manifest = read_json(folder / "manifest.json")
    assert set(manifest["files"]) == {p.name for p in folder.iterdir()} - {"manifest.json"}
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    command.run(command.Options(model=str(source), models=str(tmp_path), group_size=32))
    assert "nothing to do" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_other_settings_damage_and_quantised_bases_are_refused(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "Tiny", tiny_config("qwen2"))
    folder = quantized(tmp_path, source)
    with pytest.raises(UserError, match=r"other settings[^$]*OUT="):
        command.run(command.Options(model=str(source), models=str(tmp_path), group_size=64))
    with pytest.raises(UserError, match="quantised already"):
        command.run(command.Options(model=str(folder), models=str(tmp_path)))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        command.run(command.Options(model=str(source), models=str(tmp_path), group_size=32))


def test_a_linear_that_does_not_fit_the_groups_leaves_nothing_behind(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "Tiny", tiny_config("qwen2", intermediate_size=96))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.down_proj: 96 inputs"):
        command.run(command.Options(model=str(source), models=str(tmp_path), group_size=64))
    assert sorted(tmp_path.iterdir()) == before


def test_without_the_memory_it_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_checkpoint(tmp_path / "base", tiny_config(), int4=False)
    monkeypatch.setattr(quantization, "free_memory", lambda: 10**8)
    with pytest.raises(UserError, match=r"0\.\d GB of memory are needed to quantise it, 0\.1 GB are free"):
        quantized(tmp_path, source)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_the_reported_error_is_that_of_the_weights(tmp_path: Path) -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    packed, error = pack_linear(weight, Scheme(group_size=32), "x")
    rounded = dequantize(packed["qweight"], packed["qzeros"], packed["scales"], packed["g_idx"]).t()
    assert error == pytest.approx(float((rounded - weight).norm() / weight.norm()))
    assert 0.02 < error < 0.15


def test_manifest_and_output_tell_that_it_only_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = quantized(tmp_path, tiny_checkpoint(tmp_path / "Tiny", tiny_config("qwen2")))
    assert "no calibration data" in read_json(folder / "manifest.json")["method"]
    output = capsys.readouterr().out
    assert "rounded to nearest. Mean relative error of the weights:" in output and "q_proj" in output
    assert command.__doc__ is not None and "published GPTQ checkpoint" in command.__doc__
