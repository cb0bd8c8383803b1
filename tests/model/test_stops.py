"""Which bases are chat models, and the stop tokens of a template in generation_config.json."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.oracles import small_tokenizer, tiny_checkpoint, tiny_config
from train.common.files import read_json
from train.model.stops import generation_for, no_chat_model, thinking_note, usual_template
from train.model.tokenizer import Tokenizer, load_tokenizer

CASES = Path(__file__).parents[1] / "assets" / "cases"
END, IM_END = 256, 258  # of the small tokenizer: <|endoftext|>, <|im_end|>
BASE = read_json(CASES / "base-generation_config.json")


def folder_with(root: Path, layout: str, generation: dict[str, Any] | None, eos: Any = None) -> Path:
    folder = tiny_checkpoint(root / "Tiny", tiny_config(layout))
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": eos}))
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize(
    ("layout", "generation", "eos", "is_chat"),
    [
        ("qwen2", BASE, IM_END, False),
        ("qwen2", {"eos_token_id": [END]}, None, False),
        ("qwen2", None, END, False),
        ("qwen2", {}, [END], False),
        ("qwen2", {"eos_token_id": [IM_END, END]}, END, True),
        ("qwen2", {"eos_token_id": IM_END}, None, True),
        ("qwen2", None, None, True),  # nothing says that it is none
        ("qwen", {"chat_format": "raw", "eos_token_id": END}, None, False),
        ("qwen", {"chat_format": "raw"}, None, False),
        ("qwen", {"chat_format": "chatml", "eos_token_id": END}, None, True),
    ],
)
def test_a_base_that_never_learnt_chatml_is_told(
    tmp_path: Path, layout: str, generation: dict[str, Any] | None, eos: Any, is_chat: bool
) -> None:
    folder = folder_with(tmp_path, layout, generation, eos)
    tokenizer = load_tokenizer(folder)
    text = no_chat_model(folder, tokenizer, "chatml")
    assert bool(text) != is_chat
    assert is_chat or ("Tiny is not a chat model" in text and "Instruct" in text and "template=plain" in text)
    assert no_chat_model(folder, tokenizer, "plain") == ""


@pytest.mark.parametrize(
    ("published", "layout", "template", "eos"),
    [
        (BASE, "qwen2", "chatml", [IM_END, END]),
        ({"eos_token_id": [END, 260]}, "qwen2", "chatml", [IM_END, END, 260]),
        ({"eos_token_id": IM_END}, "qwen2", "chatml", IM_END),
        ({"eos_token_id": [IM_END, END]}, "qwen2", "chatml", [IM_END, END]),
        ({}, "qwen2", "chatml", [IM_END, END]),
        (BASE, "qwen2", "plain", END),
        ({"eos_token_id": IM_END}, "qwen2", "plain", [END, IM_END]),
        ({"eos_token_id": END, "chat_format": "raw"}, "qwen", "chatml", IM_END),
        ({"eos_token_id": END, "chat_format": "chatml"}, "qwen", "plain", END),
    ],
)
def test_the_stops_follow_the_template(
    tmp_path: Path, published: dict[str, Any], layout: str, template: str, eos: Any
) -> None:
    tokenizer = load_tokenizer(tiny_checkpoint(tmp_path / "m", tiny_config()))
    written = generation_for(published, layout, tokenizer, template)
    assert written["eos_token_id"] == eos
    assert written["pad_token_id"] == END
    expected = {"chat_format": {"chatml": "chatml", "plain": "raw"}[template], "max_window_size": 6144}
    assert {key: written.get(key) for key in expected} == (expected if layout == "qwen" else dict.fromkeys(expected))
    assert written.get("do_sample") == published.get("do_sample"), "all else is the base's"


def test_a_template_without_the_blocks_of_the_base_is_told(tmp_path: Path) -> None:
    small_tokenizer(tmp_path)
    plain = load_tokenizer(tmp_path)
    thinks = Tokenizer(plain.backend, {**plain.control, "<think>": 600, "</think>": 601})
    assert "template=qwen3 or qwen3_thinking" in thinking_note("qwen3", thinks, "chatml")
    assert "written as plain text" in thinking_note("qwen2", plain, "qwen3")
    quiet = [("qwen3", "qwen3"), ("qwen3", "qwen3_thinking"), ("qwen2", "chatml"), ("qwen3", "plain")]
    assert not any(thinking_note(layout, thinks, template) for layout, template in quiet)
    assert [usual_template(layout) for layout in ("qwen", "qwen2", "qwen3")] == ["chatml", "chatml", "qwen3_thinking"]
