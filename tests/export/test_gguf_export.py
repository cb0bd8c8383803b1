"""GGUF files, read back by the `gguf` package's own reader: every weight, the tokenizer, the prompt, the adapter."""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import jinja2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.exports import exact_merge, export, merged_state
from tests.support.runs import tiny_run
from train.common.errors import UserError
from train.common.files import read_json, write_json
from train.data.rows.formats import Turn
from train.data.tokens.chat_template import chat_template, prompt
from train.export import gguf_export
from train.export.gguf_files import ModelCard, modelfile, write_adapter
from train.export.gguf_tensors import why_not_q4_0
from train.model import lora
from train.model.gguf_reader import published_name
from train.model.layouts import convert_tensors, stock_layout
from train.model.loading import read_folder_config
from train.model.tokenizer import load_tokenizer


def read(path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    """(metadata, tensors) of a file, by an independent reader."""
    reader = gguf.GGUFReader(path)
    return (
        {name: field.contents() for name, field in reader.fields.items()},
        {tensor.name: tensor for tensor in reader.tensors},
    )


def floats(tensor: gguf.ReaderTensor) -> np.ndarray[Any, Any]:
    return gguf.dequantize(tensor.data, tensor.tensor_type)


def base_weights(root: Path) -> dict[str, torch.Tensor]:
    """The base's weights in float64 under Qwen2's names, computed independently: an adapter that changes nothing."""
    folder = tiny_run(root, scale=0.0) if not (root / "runs").exists() else root / "runs" / "tiny"
    config, _ = read_folder_config(root / "models" / "base-Int4")
    merged = exact_merge(folder)
    delta = lora.delta(folder / "adapter")
    for module, (a, b, scale) in delta.items():
        merged[f"{module}.weight"] = merged[f"{module}.weight"] - scale * (b.double() @ a.double())
    return convert_tensors(merged, config, stock_layout(config.layout))


@pytest.mark.parametrize("layout", ["qwen2", "qwen", "qwen3"])
def test_an_int4_base_is_written_bit_for_bit(tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_run(tmp_path, layout)
    export(folder, format="gguf")
    _, tensors = read(folder / "gguf" / "base-Q4_0.gguf")
    expected = {name: t for name, t in base_weights(tmp_path).items() if not name.endswith("proj.bias") or t.any()}
    found = {published_name(name): tensor for name, tensor in tensors.items()}
    assert found.keys() == expected.keys()
    types = {tensor.tensor_type.name for name, tensor in tensors.items() if "attn_q.weight" in name or "ffn" in name}
    assert {"Q4_0"} <= types <= {"Q4_0", "F32"}
    for name, tensor in found.items():
        weights = torch.from_numpy(floats(tensor).copy()).reshape(expected[name].shape).double()
        if tensor.tensor_type.name == "Q4_0":  # what is subtracted above leaves rounding errors of float64
            assert (weights - expected[name]).abs().max() < 1e-12, name
        else:
            assert torch.equal(weights, expected[name]), name
    out = capsys.readouterr().out
    assert "Int4 weights were read back and dequantised: equal to the base's, bit for bit" in out
    assert "llama-cli -m" in out and "--lora" in out and "ollama create tiny" in out


@pytest.mark.parametrize("layout", ["qwen2", "qwen", "qwen3"])
def test_the_adapter_adds_what_the_merge_adds(tmp_path: Path, layout: str) -> None:
    folder = tiny_run(tmp_path, layout)
    export(folder, format="gguf")
    fields, tensors = read(folder / "gguf" / "base-tiny-F32-LoRA.gguf")
    assert (fields["general.type"], fields["adapter.type"], fields["general.architecture"]) == (
        "adapter",
        "lora",
        stock_layout(layout),
    )
    config, _ = read_folder_config(tmp_path / "models" / "base-Int4")
    updates = {
        f"{m}.weight": scale * (b.double() @ a.double()) for m, (a, b, scale) in lora.delta(folder / "adapter").items()
    }
    expected = convert_tensors(updates, config, stock_layout(layout))
    names = {name.rpartition(".lora_")[0] for name in tensors}
    assert {published_name(name) for name in names} == expected.keys()
    for name in names:
        a, b = (torch.from_numpy(tensors[f"{name}.lora_{part}"].data.copy()).double() for part in "ab")
        update = fields["adapter.lora.alpha"] / len(a) * (b @ a)
        assert (update - expected[published_name(name)]).abs().max() < 1e-6


def test_modules_with_scales_of_their_own_share_one_alpha(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path)
    config, _ = read_folder_config(tmp_path / "models" / "base-Int4")
    delta = {m: (a, b, scale * n) for n, (m, (a, b, scale)) in enumerate(lora.delta(folder / "adapter").items(), 1)}
    write_adapter(tmp_path / "a.gguf", delta, config, ModelCard("a", "b", "", "chatml"))
    fields, tensors = read(tmp_path / "a.gguf")
    for module, (a, b, scale) in delta.items():
        name = next(n for n in tensors if published_name(n.rpartition(".lora_")[0]) == f"{module}.weight")[:-1]
        found = [torch.from_numpy(tensors[name + part].data.copy()).double() for part in "ab"]
        update = fields["adapter.lora.alpha"] / len(a) * (found[1] @ found[0])
        assert torch.allclose(update, scale * (b.double() @ a.double()), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("template", ["chatml", "plain", "qwen3", "qwen3_thinking"])
def test_tokenizer_prompt_and_stops_are_inside(tmp_path: Path, template: str) -> None:
    folder = tiny_run(tmp_path)
    record = read_json(folder / "run.json")
    record["recipe"] |= {"system": 'Say """less""".', "template": template}
    write_json(folder / "run.json", record)
    export(folder, format="gguf")
    fields, tensors = read(folder / "gguf" / "base-Q4_0.gguf")
    tokenizer = load_tokenizer(tmp_path / "models" / "base-Int4")
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == tensors["token_embd.weight"].shape[1]
    assert [tokens[n] for n in (tokenizer.im_start, tokenizer.im_end)] == ["<|im_start|>", "<|im_end|>"]
    content = json.loads(tokenizer.backend.to_str())["model"]
    assert all(tokens[number] == token for token, number in content["vocab"].items())
    assert len(fields.get("tokenizer.ggml.merges", [])) == len(content["merges"])
    assert fields["tokenizer.ggml.pre"] == "qwen2" and not fields["tokenizer.ggml.add_bos_token"]
    end = tokenizer.endoftext if template == "plain" else tokenizer.im_end
    assert fields["tokenizer.ggml.eos_token_id"] == end
    assert fields["tokenizer.chat_template"] == chat_template('Say """less""".', template)
    text = (folder / "gguf" / "Modelfile").read_text()
    assert "FROM ./base-Q4_0.gguf\nADAPTER ./base-tiny-F32-LoRA.gguf\n" in text
    assert "SYSTEM \"\"\"Say '''less'''.\"\"\"" in text and 'PARAMETER stop "<|im_end|>"' in text
    assert ("<|im_start|>user" in text) == (template != "plain")
    assert ("<think>\n\n</think>\n\n" in text) == (template == "qwen3")


def test_the_numbers_of_the_model_are_inside(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path, "qwen")
    export(folder, format="gguf")
    fields, _ = read(folder / "gguf" / "base-Q4_0.gguf")
    config, _ = read_folder_config(tmp_path / "models" / "base-Int4")
    assert fields["qwen2.block_count"] == config.num_hidden_layers
    assert fields["qwen2.context_length"] == config.seq_length
    assert fields["qwen2.feed_forward_length"] == config.intermediate_size
    assert fields["qwen2.attention.head_count_kv"] == config.num_key_value_heads
    assert fields["qwen2.rope.freq_base"] == pytest.approx(config.rope_theta)
    assert fields["qwen2.attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps)


@pytest.mark.parametrize(("encoding", "name", "error"), [("float", "F16", 0.0), ("q8_0", "Q8_0", 0.01)])
def test_the_merged_model_is_written_where_q4_0_is_not_wanted(
    tmp_path: Path, encoding: str, name: str, error: float
) -> None:
    folder = tiny_run(tmp_path)
    export(folder, format="gguf", encoding=encoding)
    fields, tensors = read(folder / "gguf" / f"base-tiny-{name}.gguf")
    assert not list((folder / "gguf").glob("*LoRA*"))
    expected = merged_state(folder / "merged")
    for key, tensor in tensors.items():
        want = expected[published_name(key)].float()
        found = torch.from_numpy(floats(tensor).astype(np.float32)).reshape(want.shape)
        assert (found - want).abs().max() <= error * want.abs().max(), key
    assert fields["general.file_type"] == {"F16": 1, "Q8_0": 7}[name]


def change_base(root: Path, change: str) -> None:
    """Make the Int4 base one that is not Q4_0."""
    base = root / "models" / "base-Int4"
    config, state = read_json(base / "config.json"), load_file(base / "model.safetensors")
    if change == "order":
        for name in [name for name in state if name.endswith("g_idx")]:
            state[name] = state[name].flip(0).contiguous()
    elif change == "zeros":
        name = next(name for name in state if name.endswith("qzeros"))
        state[name] = state[name] ^ 1
    else:
        config["quantization_config"]["sym"] = False
    save_file(state, base / "model.safetensors", {"format": "pt"})
    write_json(base / "config.json", config)


@pytest.mark.parametrize(("change", "reason"), [("order", "activation order"), ("sym", "a zero point for each group")])
def test_why_a_base_is_no_q4_0(tmp_path: Path, change: str, reason: str) -> None:
    tiny_run(tmp_path)
    assert not why_not_q4_0(tmp_path / "models" / "base-Int4")
    change_base(tmp_path, change)
    assert reason in why_not_q4_0(tmp_path / "models" / "base-Int4")


def test_a_float_base_gives_the_merged_model_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_run(tmp_path, int4=False)
    export(folder, format="gguf")
    assert "Q4_0 would lose precision: base-Int4 has float weights. Writing the merged model" in capsys.readouterr().out
    assert len(list((folder / "gguf").glob("base-tiny-F*.gguf"))) == 1
    with pytest.raises(UserError, match="encoding=q4_0 would lose precision: base-Int4 has float weights"):
        export(folder, format="gguf", encoding="q4_0")


def test_the_same_command_again_does_nothing_and_a_changed_adapter_is_written_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_run(tmp_path)
    export(folder, format="gguf")
    first = (folder / "gguf" / "base-Q4_0.gguf").stat().st_mtime_ns
    export(folder, format="gguf")
    assert "nothing to do" in capsys.readouterr().out
    assert (folder / "gguf" / "base-Q4_0.gguf").stat().st_mtime_ns == first
    (folder / "gguf" / "Modelfile").write_text("mine")
    export(folder, format="gguf")
    assert "FROM" in (folder / "gguf" / "Modelfile").read_text()


def test_nothing_is_left_of_a_stopped_export_and_nothing_of_the_user_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_run(tmp_path)

    def stop(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf_export, "check", stop)
        with pytest.raises(KeyboardInterrupt):
            export(folder, format="gguf")
    assert not [path for path in folder.iterdir() if "gguf" in path.name]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="has no GGUF files of this program"):
        export(folder, format="gguf", out=str(tmp_path / "mine"))
    with pytest.raises(UserError, match="add FORMAT=gguf"):
        export(folder, encoding="q8_0")


def test_a_damaged_file_is_found_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, write = tiny_run(tmp_path), gguf_export.write

    def damaged(job: gguf_export.GgufJob, into: Path, advance: Any) -> None:
        write(job, into, advance)
        content = bytearray((into / job.model_name).read_bytes())
        content[-40] ^= 1
        (into / job.model_name).write_bytes(content)

    monkeypatch.setattr(gguf_export, "write", damaged)
    with pytest.raises(UserError, match=r"is not what was to be written"):
        export(folder, format="gguf")
    assert not (folder / "gguf").exists()


def test_the_disk_is_asked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_run(tmp_path)
    monkeypatch.setattr(gguf_export, "free_bytes", lambda path: 10**6)
    with pytest.raises(UserError, match=r"GB of disk, 0\.0 GB are free"):
        export(folder, format="gguf")


def test_a_merged_model_has_no_adapter_in_its_modelfile() -> None:
    text = modelfile("m.gguf", "", "", "chatml", 32768)
    assert "ADAPTER" not in text and "SYSTEM" not in text and "PARAMETER num_ctx 4096" in text


def rendered(template: str, system: str, turns: list[tuple[str, str]]) -> str:
    """What Ollama makes of a TEMPLATE: Go's actions, as far as ours uses them, rewritten as Jinja's."""
    for go, jinja in (
        (r"{{ if \.System }}", "{% if System %}"),
        (r"{{ range \.Messages }}", "{% for one in Messages %}"),
        (r'{{ (if|else if) eq \.Role ("\w+") }}', r"{% \1 one.Role == \2 %}"),
        (r"{{ \.Content }}", "{{ one.Content }}"),
        (r"{{ \.System }}", "{{ System }}"),
    ):
        template = re.sub(go, jinja, template)
    template = template.replace("{% else if", "{% elif")
    open_blocks, parts = [], []
    for part in re.split(r"({%.*?%}|{{ end }})", template):
        if match := re.match(r"{% (if|for)", part):
            open_blocks.append(match[1])
        parts.append(f"{{% end{open_blocks.pop()} %}}" if part == "{{ end }}" else part)
    messages = [{"Role": role, "Content": text} for role, text in turns]
    environment = jinja2.Environment(keep_trailing_newline=True)  # a prompt is no HTML
    return environment.from_string("".join(parts)).render(System=system, Messages=messages)


@pytest.mark.parametrize("template", ["chatml", "plain"])
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_the_modelfile_writes_turns_as_they_were_trained(tmp_path: Path, template: str, system: str) -> None:
    tiny_run(tmp_path)
    tokenizer = load_tokenizer(tmp_path / "models" / "base-Int4")
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "And now?")]
    ids = prompt([Turn(role, text) for role, text in turns], tokenizer, system, template)  # type: ignore[arg-type]
    written = re.search(r'^TEMPLATE """(.*?)"""', modelfile("m", "a", system, template, 64), flags=re.M | re.S)
    assert written is not None
    assert rendered(written[1], system, turns) == tokenizer.decode(ids, skip_control=False)
