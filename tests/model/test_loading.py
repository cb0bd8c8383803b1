"""A folder gives back the model that it was written from, or one clear error."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.oracles import tiny_checkpoint, tiny_config, tiny_decoder
from train.common import device as device_module
from train.common.errors import UserError
from train.model import loading
from train.model.int4_linear import Int4Linear
from train.runs import folder as folder_module

IDS = torch.arange(2, 50)[None]
LAYOUTS = ("qwen", "qwen2", "qwen3")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tie", [False, True])
@torch.no_grad()
def test_a_float_folder_gives_the_model_back(tmp_path: Path, layout: str, tie: bool) -> None:
    config = tiny_config(layout, tie_word_embeddings=tie)
    model = loading.load(tiny_checkpoint(tmp_path / "m", config), torch.float32)
    assert torch.equal(model(IDS).logits, tiny_decoder(config)(IDS).logits)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_an_int4_folder_computes_with_its_dequantised_weights(tmp_path: Path, layout: str) -> None:
    model = loading.load(tiny_checkpoint(tmp_path / "m", tiny_config(layout), int4=True), torch.float32)
    plain = tiny_decoder(model.config)
    quantised = {n: m for n, m in model.named_modules() if isinstance(m, Int4Linear)}
    assert len(quantised) == 2 * (5 if layout == "qwen" else 7)
    state = {n: p for n, p in model.state_dict().items() if n in plain.state_dict()}
    state |= {f"{n}.weight": m.dequantized(torch.float32) for n, m in quantised.items()}
    plain.load_state_dict(state)
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)
    kept = loading.load(tmp_path / "m", torch.float32, keep_float=True)
    torch.testing.assert_close(kept(IDS).logits, model(IDS).logits)


def test_the_files_decide_about_biases(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", tiny_config("qwen"))
    state = load_file(folder / "model.safetensors")
    state["transformer.h.0.mlp.w1.bias"] = torch.ones(128)
    save_file(state, folder / "model.safetensors")
    model = loading.load(folder, torch.float32)
    assert model.transformer.h[0].mlp.w1.bias is not None
    assert model.transformer.h[1].mlp.w1.bias is None


def test_old_bin_files_are_read_as_plain_tensors_only(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", tiny_config("qwen2"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert torch.equal(loading.load(folder, torch.float32)(IDS).logits, tiny_decoder(tiny_config("qwen2"))(IDS).logits)


@pytest.mark.parametrize("int4", [False, True])
def test_a_folder_is_described_in_one_line(tmp_path: Path, int4: bool) -> None:
    folder = tiny_checkpoint(tmp_path / "m", tiny_config("qwen2"), int4=int4)
    weights = "Int4 in groups of 32" if int4 else "float32"
    text = loading.describe(folder)
    assert text.startswith(f"layout qwen2, 2 layers of 64, {weights}, 0.00 GB; tokenizer of ")
    config = json.loads((folder / "config.json").read_text())
    changed = {"quantization_config": None} if int4 else {"quantization_config": {"bits": 4, "group_size": 32}}
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(UserError, match=r"has (no|a) quantization_config, but (14|0) linears are Int4"):
        loading.describe(folder)


def test_missing_and_left_over_tensors_are_named(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", tiny_config("qwen2"))
    state = load_file(folder / "model.safetensors")
    state["model.extra.weight"] = state.pop("model.norm.weight")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"missing model.norm.weight; left over model.extra.weight"):
        loading.load(folder, torch.float32)


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", tiny_config("qwen2"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    shapes = r"up_proj.weight: the file has shape \[128, 64\].*\[96, 64\]"
    with pytest.raises(UserError, match=shapes):
        loading.load_structure(folder)  # from the headers: doctor and make model say it before anything is loaded


def test_a_file_that_is_cut_off_names_the_remedy(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", tiny_config("qwen2"))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"not a whole safetensors file.*make model MODEL=m"):
        loading.load(folder, torch.float32)


def test_dtype_follows_the_device() -> None:
    assert device_module.pick_dtype(torch.device("cpu")) == torch.float32
    assert device_module.pick_dtype(torch.device("cpu"), "bf16") == torch.bfloat16


def test_an_unfinished_run_is_told_from_one_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    with pytest.raises(UserError, match=r"'half' is not finished"):
        folder_module.read_run(tmp_path / "half")
    with pytest.raises(UserError, match=r"'none' does not exist"):
        folder_module.read_run(tmp_path / "none")


def test_a_float_copy_is_kept_where_the_cpu_has_twice_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    int4 = tiny_checkpoint(tmp_path / "int4", tiny_config(), int4=True)
    plain = tiny_checkpoint(tmp_path / "float", tiny_config())
    size = 4 * sum(p.numel() for p in loading.load(plain, torch.float32).parameters())
    cpu, kept = torch.device("cpu"), {}
    for free in (2 * size, 2 * size + 1):
        monkeypatch.setattr(loading, "free_memory", lambda free=free: free)
        kept[free] = loading.keeps_float(int4, cpu)
    assert kept == {2 * size: False, 2 * size + 1: True}
    assert not loading.keeps_float(plain, cpu) and not loading.keeps_float(int4, torch.device("cuda"))


def test_a_cpu_without_the_memory_refuses_before_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    int4 = tiny_checkpoint(tmp_path / "int4", tiny_config(), int4=True)
    model = loading.load(int4, torch.float32)
    size = sum(t.numel() * t.itemsize for t in model.state_dict().values())
    if model.config.tie_word_embeddings:
        size -= model.get_input_embeddings().weight.numel() * 4
    assert loading.memory_needed(int4, torch.float32) == size
    kept = loading.memory_needed(int4, torch.float32, keep_float=True) - size
    assert kept == 4 * sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, Int4Linear))
    monkeypatch.setattr(loading, "free_memory", lambda: size)
    loading.load(int4, torch.float32)
    monkeypatch.setattr(loading, "free_memory", lambda: size - 1)
    monkeypatch.setattr(loading, "load_tensors", None)
    with pytest.raises(UserError, match=r"GB of memory are needed to load it, 0.0 GB are free"):
        loading.load(int4, torch.float32)


def test_a_float_model_fits_a_gpu_in_the_type_it_is_loaded_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, gpu = tiny_checkpoint(tmp_path / "m", tiny_config()), torch.device("cuda")
    stored = (folder / "model.safetensors").stat().st_size  # float32
    for free, in_float32, in_float16 in ((stored // 2, False, False), (stored, False, True), (2 * stored, True, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10 * free))
        assert loading.fits(folder, torch.float32, gpu) == in_float32
        assert loading.fits(folder, torch.float16, gpu) == in_float16
    assert loading.fits(folder, torch.float32, torch.device("cpu"))


def _mapped_bytes() -> int:
    """Bytes of files that are mapped and in memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize(("most", "stays_mapped"), [(1 << 20, False), (1 << 40, True)])
def test_a_file_that_was_read_does_not_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, stays_mapped: bool
) -> None:
    file, size = tmp_path / "model.safetensors", 4 << 20
    save_file({f"t{n}": torch.full((size,), n, dtype=torch.uint8) for n in range(12)}, file)
    monkeypatch.setattr(loading, "MAPPED_BYTES", most)
    before, largest = _mapped_bytes(), 0
    for name, tensor in loading.read_tensors({f"t{n}": file for n in range(12)}):
        assert tensor.clone().sum() == size * int(name[1:])
        largest = max(largest, _mapped_bytes() - before)
    assert (largest > 10 * size) == stays_mapped, largest
