"""METHOD=gptq: auto-gptq's codes, block by block on our decoder; measured; the same bytes again; nothing half done."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.exports import hashes
from tests.support.oracles import tiny_checkpoint, tiny_config
from train.commands import quantize as command
from train.common.errors import UserError
from train.common.files import read_json
from train.config.options import build
from train.export import gptq_linear, gptq_memory, quantize
from train.export.calibrated_model import CalibratedModel, load_block, unpacked
from train.export.calibration import Calibration, read_rows
from train.export.gptq_export import base_blocks
from train.export.gptq_linear import SearchedScales, quantize_linears
from train.model import loading
from train.model.int4_linear import Int4Linear
from train.model.tokenizer import load_tokenizer
from train.ops.gptq import Scheme, dequantize, groups_in_order
from train.ops.gptq import quantize as to_nearest

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
IDS = torch.arange(2, 50)[None]
ROWS = [(f"Question {n}: what is {n} + {n * n}?", f"It is {n + n * n}, as {n} and {n * n} say.") for n in range(40)]


def data_file(folder: Path) -> Path:
    path = folder / "conversations.jsonl"
    path.write_text("".join(json.dumps({"instruction": q, "input": "", "output": a}) + "\n" for q, a in ROWS))
    return path


def gptq(models: Path, model: Path, **options: str) -> Path:
    """`make quantize METHOD=gptq`; returns the folder that it made."""
    data = models / "conversations.jsonl"
    values = {"model": str(model), "models": str(models), "group_size": "32", "method": "gptq", "out": "out"}
    values |= {
        "data": str(data if data.exists() else data_file(models)),
        "rows": "16",
        "held_out": "8",
        "length": "256",
    }
    command.run(build(command.Options, {**values, **options}))
    return models / options.get("out", "out")


def correlated(rows: int, width: int) -> Tensor:
    """Inputs whose columns depend on one another, as those of a model do."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(width // 4, width, generator=generator)
    return torch.randn(rows, width // 4, generator=generator) @ mix + 0.1 * torch.randn(
        rows, width, generator=generator
    )


def output_error(weight: Tensor, packed: dict[str, Tensor], x: Tensor, bits: int) -> float:
    found = dequantize(packed["qweight"], packed["qzeros"], packed["scales"], packed["g_idx"], bits).t()
    return float((x @ (found - weight).T).norm() / (x @ weight.T).norm())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 128, -1])
def test_outputs_are_nearer_than_those_of_rounding_to_nearest(bits: int, group: int) -> None:
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(0))
    x, scheme = correlated(1024, 256), Scheme(bits, group)
    packed = quantize_linears({"a": weight}, [x[:512], x[512:]], scheme, CPU)["a"]
    nearest = to_nearest(weight, scheme)
    assert packed.keys() == nearest.keys()
    assert all(packed[key].shape == value.shape and packed[key].dtype == value.dtype for key, value in nearest.items())
    assert torch.equal(packed["qzeros"], nearest["qzeros"]) and groups_in_order(packed["g_idx"], len(packed["scales"]))
    assert output_error(weight, packed, x, bits) < 0.7 * output_error(weight, nearest, x, bits)


def test_codes_are_those_of_the_package_alone() -> None:
    """Two linears together have the codes that auto-gptq's class gives each of them."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(size, 128, generator=generator) for name, size in (("a", 32), ("b", 16))}
    x, scheme = correlated(512, 128), Scheme(4, 32)
    together = quantize_linears(weights, [x], scheme, CPU)
    for name, weight in weights.items():
        layer = nn.Linear(128, len(weight), bias=False)
        layer.weight.data = weight.clone()
        one = gptq_linear.auto_gptq().GPTQ(layer)
        one.quantizer = SearchedScales(scheme)
        one.add_batch(x, None)
        with gptq_linear._ready_for(CPU):
            one.fasterquant(blocksize=32, percdamp=0.01, group_size=32)
        assert torch.equal(unpacked(together[name], scheme, CPU), layer.weight.data), name


def test_a_hessian_that_cannot_be_inverted_gets_more_damping(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []
    real = gptq_linear.auto_gptq().GPTQ.fasterquant

    def fails_at_first(self: Any, **options: Any) -> Any:
        tried.append(options["percdamp"])
        if len(tried) < 2:
            raise torch.linalg.LinAlgError("not positive-definite")
        return real(self, **options)

    monkeypatch.setattr(gptq_linear.auto_gptq().GPTQ, "fasterquant", fails_at_first)
    quantize_linears({"a": torch.randn(32, 64)}, [torch.randn(8, 64)], Scheme(4, 32), CPU)
    assert tried == [0.01, 0.1]
    tried.clear()
    monkeypatch.setattr(gptq_linear.auto_gptq().GPTQ, "fasterquant", lambda *a, **k: tried[0])
    with pytest.raises(IndexError):  # another error is not swallowed
        quantize_linears({"a": torch.randn(32, 64)}, [torch.randn(8, 64)], Scheme(4, 32), CPU)


def test_debug_of_other_programs_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x, scheme = torch.randn(32, 64), torch.randn(128, 64), Scheme(4, 32)
    expected = quantize_linears({"a": weight}, [x], scheme, CPU)["a"]
    monkeypatch.setenv("DEBUG", "1")
    found = quantize_linears({"a": weight}, [x], scheme, CPU)["a"]
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert os.environ["DEBUG"] == "1"


def test_inputs_and_weights_that_are_not_finite_are_refused() -> None:
    weight, x = torch.randn(32, 64), torch.randn(8, 64)
    with pytest.raises(UserError, match="a: its inputs have infinities"):
        quantize_linears({"a": weight}, [x * float("nan")], Scheme(4, 32), CPU)
    with pytest.raises(UserError, match="a: the weight has infinities"):
        quantize_linears({"a": weight * float("inf")}, [x], Scheme(4, 32), CPU)


@pytest.mark.parametrize(
    ("layout", "to"), [("qwen2", "qwen2"), ("qwen", "qwen"), ("qwen2", "qwen"), ("qwen", "qwen2"), ("qwen3", "qwen3")]
)
def test_the_folder_is_the_model_that_was_measured(
    tmp_path: Path, layout: str, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_checkpoint(tmp_path / "Tiny", tiny_config(layout))
    folder = gptq(tmp_path, source, layout=to)
    model = loading.load(folder, torch.float32)
    assert model.config.layout == to and any(isinstance(m, Int4Linear) for m in model.modules())
    manifest = read_json(folder / "manifest.json")
    rows = read_rows(Calibration(str(tmp_path / "conversations.jsonl"), 16, 256, 8), load_tokenizer(source), 512)
    for name, judged in (("gptq", model), ("float", loading.load(source, torch.float32))):
        loss, count = 0.0, 0
        with torch.no_grad():
            for one in rows.held_out:  # the model as a whole, by its own sum of losses
                labels = one.ids.masked_fill(~one.labelled, -100)
                found = int((labels[:, 1:] >= 0).sum())
                loss += float(judged(one.ids, labels=labels, segment_ids=one.segments).loss)
                count += found
        assert manifest["perplexity"][name] == pytest.approx(float(torch.tensor(loss / count).exp()), rel=2e-3)
    assert manifest["rows"]["rows"] == 16 and manifest["rows"]["held_out_rows"] == 8
    assert "GPTQ by auto-gptq" in manifest["method"] and manifest["calibration"]["seed"] == 0
    out = capsys.readouterr().out
    assert "layer 2 of 2" in out and "Perplexity of the answers in 8 held-out conversations" in out


def test_bits_8_is_read_and_nearly_exact(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "Tiny", tiny_config("qwen2"))
    folder = gptq(tmp_path, source, bits="8")
    assert read_json(folder / "config.json")["quantization_config"]["bits"] == 8
    with torch.no_grad():
        found, expected = (loading.load(path, torch.float32)(IDS).logits for path in (folder, source))
    assert (found - expected).norm() < 0.02 * expected.norm()
    nearest = tmp_path / "nearest"
    values = {"model": str(source), "models": str(tmp_path), "group_size": "32", "bits": "8", "out": "nearest"}
    command.run(build(command.Options, values))
    assert loading.load(nearest, torch.float32).config.layout == "qwen2"


def test_same_seed_and_rows_give_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_checkpoint(tmp_path / "Tiny", tiny_config("qwen2"))
    one, two, other = (gptq(tmp_path, source, out=out, seed=seed) for out, seed in (("1", "0"), ("2", "0"), ("3", "1")))
    first, second, third = (hashes(folder) for folder in (one, two, other))
    assert first["model.safetensors"] == second["model.safetensors"] != third["model.safetensors"]
    capsys.readouterr()
    gptq(tmp_path, source, out="1")
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="other settings"):
        gptq(tmp_path, source, out="1", rows="15")


def test_no_row_is_in_both_parts_and_small_data_keeps_a_fifth(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_checkpoint(tmp_path / "Tiny", tiny_config("qwen2")))
    path = data_file(tmp_path)
    path.write_text(path.read_text() * 3)  # each row three times
    rows = read_rows(Calibration(str(path), 128, 256, 32), tokenizer, 512)
    assert (rows.counts["rows"], rows.counts["held_out_rows"]) == (32, 8)
    split = [
        [tuple(one.ids[one.segments == n].tolist()) for one in part for n in one.segments.unique()]
        for part in (rows.calibration, rows.held_out)
    ]
    assert not set(split[0]) & set(split[1])
    path.write_text(json.dumps({"instruction": "a", "input": "", "output": "b"}) + "\n")
    with pytest.raises(UserError, match="1 different conversations with an answer, expected 2 or more"):
        read_rows(Calibration(str(path)), tokenizer, 512)


def test_an_export_is_calibrated_in_its_own_prompt_and_data_without_gptq_is_refused(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "Tiny", tiny_config("qwen2"))
    options = command.Options(model=str(source), method="gptq", data="x")
    (source / "manifest.json").write_text(
        json.dumps({"inputs": {"system": "Be brief.", "template": "plain"}, "files": {}})
    )
    found = command._calibration(options, source)
    assert found is not None and (found.system, found.template) == ("Be brief.", "plain")
    folder = gptq(tmp_path, source, layout="qwen")
    assert read_json(folder / "manifest.json")["inputs"] == {"system": "Be brief.", "template": "plain"}
    with pytest.raises(UserError, match="Add METHOD=gptq"):
        command.run(command.Options(model=str(source), models=str(tmp_path), data="x"))


def test_without_data_the_demo_calibrates_and_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_checkpoint(tmp_path / "Tiny", tiny_config("qwen2"))
    gptq(tmp_path, source, data="")
    assert "No DATA= is given: calibrating on the demo's few conversations" in capsys.readouterr().out


def test_memory_and_disk_are_asked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_checkpoint(tmp_path / "Tiny", tiny_config("qwen2"))
    with monkeypatch.context() as patch:
        patch.setattr(gptq_memory, "free_memory", lambda: 10**8)
        with pytest.raises(UserError, match=r"GB of memory are needed to quantise it, 0\.1 GB are free"):
            gptq(tmp_path, source)
    with monkeypatch.context() as patch:
        patch.setattr(quantize, "free_bytes", lambda path: 10)
        with pytest.raises(UserError, match="GB free"):
            gptq(tmp_path, source)
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_of_a_stopped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_checkpoint(tmp_path / "Tiny", tiny_config("qwen2"))
    data_file(tmp_path)
    before = sorted(tmp_path.iterdir())

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CalibratedModel, "perplexities", stop)
    with pytest.raises(KeyboardInterrupt):
        gptq(tmp_path, source)
    assert sorted(tmp_path.iterdir()) == before


def test_killed_it_leaves_nothing_under_its_name_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "Tiny", tiny_config("qwen2", num_hidden_layers=12))
    data = data_file(tmp_path)
    words = [f"model={source}", f"models={tmp_path}", "group_size=32", "method=gptq", "out=out", f"data={data}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "train", "quantize", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("layer 2 of"):
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists() and list(tmp_path.glob(".out.*"))
    time.sleep(0.1)
    assert (gptq(tmp_path, source) / "manifest.json").exists() and not list(tmp_path.glob(".out.*"))


def test_a_block_is_that_of_the_decoder(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "Tiny", tiny_config("qwen"), int4=False)
    model = loading.load(source, torch.float32)
    state = {n.removeprefix("transformer.h.1."): t for n, t in model.state_dict().items() if ".h.1." in n}
    block = load_block(model.config, state, CPU)
    own = dict(block.named_parameters())
    assert own.keys() == state.keys()
    assert all(torch.equal(own[n].data, t if t.ndim == 2 else t.half().float()) for n, t in state.items())


@pytest.mark.parametrize("bits", ["4", "8"])
def test_stock_auto_gptq_gives_the_same_logits(tmp_path: Path, bits: str) -> None:
    """Its own linear, with the tensors of the file, in float32."""
    from auto_gptq.nn_modules.qlinear.qlinear_cuda_old import QuantLinear

    folder = gptq(tmp_path, tiny_checkpoint(tmp_path / "Tiny", tiny_config("qwen")), bits=bits)
    model = loading.load(folder, torch.float32)
    checked = 0
    for state in base_blocks(folder, "qwen"):
        for name in [name.removesuffix(".qweight") for name in state if name.endswith(".qweight")]:
            ours: Any = model.get_submodule(name)
            stock = QuantLinear(
                int(bits), 32, ours.in_features, ours.out_features, bias=True, weight_dtype=torch.float32
            )
            own = {key: state[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx", "bias")}
            stock.load_state_dict(own, strict=False)
            stock = stock.float()
            x = torch.randn(3, ours.in_features)
            torch.testing.assert_close(stock(x), ours(x), rtol=1e-4, atol=1e-4)
            checked += 1
    assert checked == 10


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
def test_a_gpu_gives_as_good_codes(tmp_path: Path, bits: int) -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    x, scheme = correlated(2048, 512), Scheme(bits, 128)
    here = quantize_linears({"a": weight}, [x], scheme, CPU)["a"]
    there = quantize_linears({"a": weight}, [x.cuda()], scheme, torch.device("cuda"))["a"]
    errors = [output_error(weight, packed, x, bits) for packed in (here, there)]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
    source = tiny_checkpoint(tmp_path / "Tiny", tiny_config("qwen2"))
    assert read_json(gptq(tmp_path, source, bits=str(bits)) / "manifest.json")["device"] == "cuda"
