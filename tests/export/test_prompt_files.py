"""An export stops where its training ends an answer, in every file that another program reads it from."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.exports import export
from tests.support.oracles import tiny_checkpoint, tiny_config
from tests.support.runs import tiny_run
from train.commands import quantize
from train.common.files import read_json, write_json
from train.export.manifest import weight_hashes
from train.model.tokenizer import load_tokenizer

CASES = Path(__file__).parents[1] / "assets" / "cases"
ENDOFTEXT, IM_END = 256, 258


def make_base_model(base: Path, eos: Any = "<|endoftext|>") -> None:
    """Give the folder what a published base model has, not an Instruct: every stop is <|endoftext|>."""
    (base / "generation_config.json").write_bytes((CASES / "base-generation_config.json").read_bytes())
    config = read_json(base / "config.json")
    write_json(base / "config.json", {**config, "eos_token_id": ENDOFTEXT})
    load_tokenizer(base).save(base)
    (base / "qwen.tiktoken").unlink()
    settings = read_json(base / "tokenizer_config.json")
    write_json(base / "tokenizer_config.json", {**settings, "eos_token": eos})
    write_json(base / "special_tokens_map.json", {"eos_token": eos, "pad_token": "<|endoftext|>"})


def run_of_base_model(root: Path, template: str, eos: Any = "<|endoftext|>") -> Path:
    """A run in `template` on a base that is not a chat model."""
    folder = tiny_run(root)
    make_base_model(root / "models" / "base-Int4", eos)
    record = read_json(folder / "run.json")
    record["recipe"]["template"] = template
    record["base"]["files"] = weight_hashes(root / "models" / "base-Int4")
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def stops(folder: Path) -> dict[str, Any]:
    """Where each program would stop, by the file that it reads."""
    return {
        name: read_json(folder / file)[key]
        for name, file, key in (
            ("vLLM, transformers", "generation_config.json", "eos_token_id"),
            ("llama.cpp", "config.json", "eos_token_id"),
            ("all of them", "tokenizer_config.json", "eos_token"),
            ("older transformers", "special_tokens_map.json", "eos_token"),
        )
        if (folder / file).is_file()
    }


def test_a_base_model_trained_in_chatml_stops_at_im_end_everywhere(tmp_path: Path) -> None:
    folder = run_of_base_model(tmp_path, "chatml")
    assert set(map(str, stops(tmp_path / "models" / "base-Int4").values())) == {"256", "<|endoftext|>"}
    assert stops(export(folder)) == {
        "vLLM, transformers": [IM_END, ENDOFTEXT],
        "llama.cpp": IM_END,
        "all of them": "<|im_end|>",
        "older transformers": "<|im_end|>",
    }


def test_trained_in_plain_it_stops_at_endoftext(tmp_path: Path) -> None:
    found = stops(export(run_of_base_model(tmp_path, "plain")))
    assert list(found.values()) == [ENDOFTEXT, ENDOFTEXT, "<|endoftext|>", "<|endoftext|>"]


def test_a_token_with_flags_keeps_them(tmp_path: Path) -> None:
    token = {"content": "<|endoftext|>", "lstrip": False, "special": True}
    found = stops(export(run_of_base_model(tmp_path, "chatml", token)))
    assert found["all of them"] == found["older transformers"] == {**token, "content": "<|im_end|>"}


@pytest.mark.parametrize(("layout", "other"), [("qwen", "qwen2"), ("qwen2", "qwen"), ("qwen", "qwen")])
@pytest.mark.parametrize("template", ["chatml", "plain"])
def test_in_the_other_layout_too(tmp_path: Path, layout: str, other: str, template: str) -> None:
    folder = tiny_run(tmp_path, layout)
    base = tmp_path / "models" / "base-Int4"
    (base / "generation_config.json").write_text('{"chat_format": "raw", "eos_token_id": 256}')
    record = read_json(folder / "run.json")
    record["recipe"]["template"] = template
    (folder / "run.json").write_text(json.dumps(record))
    out = export(folder, layout=other)
    end = {"chatml": IM_END, "plain": ENDOFTEXT}[template]
    generation = read_json(out / "generation_config.json")
    if other == "qwen":  # its code takes one id, its tokenizer no eos_token, and model.chat asks for chat_format
        assert generation["eos_token_id"] == end
        assert generation["chat_format"] == {"chatml": "chatml", "plain": "raw"}[template]
        assert "eos_token" not in read_json(out / "tokenizer_config.json")
    else:
        found = stops(out)
        assert found["vLLM, transformers"] == ([IM_END, ENDOFTEXT] if template == "chatml" else 256)
        assert found["llama.cpp"] == end and "chat_format" not in generation
        assert found["all of them"] == {"chatml": "<|im_end|>", "plain": "<|endoftext|>"}[template]


def test_a_folder_without_generation_config_gets_one(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path)
    (tmp_path / "models" / "base-Int4" / "generation_config.json").unlink()
    assert read_json(export(folder) / "generation_config.json") == {"eos_token_id": [258, 256], "pad_token_id": 256}


@pytest.mark.parametrize("chat", [True, False])
def test_quantising_into_the_other_layout_keeps_what_the_model_is(tmp_path: Path, chat: bool) -> None:
    source = tiny_checkpoint(tmp_path / "Tiny", tiny_config())
    if not chat:
        make_base_model(source)
    quantize.run(quantize.Options(model=str(source), models=str(tmp_path), group_size=32, layout="qwen"))
    generation = read_json(tmp_path / "Tiny-Qwen1-Int4" / "generation_config.json")
    assert (generation["chat_format"], generation["eos_token_id"]) == (("chatml", 258) if chat else ("raw", 256))
