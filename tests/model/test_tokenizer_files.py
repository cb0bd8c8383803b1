"""A tokenizer's files beside an adapter: the base's own bytes, with the prompt of the training."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.oracles import small_tokenizer, tiny_checkpoint, tiny_config
from train.common.files import read_json, write_json
from train.data.rows.formats import Turn
from train.data.tokens.chat_template import chat_template, prompt
from train.model.stops import answer_end
from train.model.tokenizer import load_tokenizer
from train.model.tokenizer_files import SETTINGS, write_tokenizer

SYSTEM = 'You are "Xiao Ming".\n你好。'


def published(folder: Path) -> Path:
    """The tokenizer files of a base that is no chat model, as Qwen2.5 publishes them, with more beside."""
    small_tokenizer(folder)
    load_tokenizer(folder).save(folder, "{{ 'the prompt of the base' }}")
    (folder / "qwen.tiktoken").unlink()
    settings = read_json(folder / SETTINGS)
    write_json(folder / SETTINGS, {**settings, "eos_token": "<|endoftext|>", "model_max_length": 32768})
    for name in ("vocab.json", "merges.txt", "chat_template.jinja", "special_tokens_map.json", "model.safetensors"):
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    return published(tmp_path / "base")


def write(base: Path, folder: Path, layout: str = "qwen2", template: str = "chatml") -> dict[str, Any]:
    folder.mkdir()
    tokenizer = load_tokenizer(base)
    end = answer_end(tokenizer, template)
    write_tokenizer(base, tokenizer, folder, layout, chat_template(SYSTEM, template), end)
    settings: dict[str, Any] = read_json(folder / SETTINGS)
    return settings


@pytest.mark.parametrize(("template", "end"), [("chatml", "<|im_end|>"), ("plain", "<|endoftext|>")])
def test_stock_tools_get_the_prompt_of_the_training(template: str, end: str, base: Path, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    settings = write(base, tmp_path / "adapter", template=template)
    stock = PreTrainedTokenizerFast.from_pretrained(tmp_path / "adapter")
    messages = [{"role": "user", "content": "你好"}]
    ids = stock.apply_chat_template(messages, add_generation_prompt=True)
    assert ids == prompt([Turn("user", "你好")], load_tokenizer(base), SYSTEM, template)
    assert stock.eos_token == end and stock.pad_token == "<|endoftext|>"
    assert settings["model_max_length"] == 32768, "the base's other settings stay"


def test_the_bases_files_are_copied_as_bytes_and_no_others(base: Path, tmp_path: Path) -> None:
    """chat_template.jinja holds the base's prompt, and tools prefer it; special_tokens_map.json holds its end token."""
    write(base, tmp_path / "adapter")
    names = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert names == ["merges.txt", "tokenizer.json", SETTINGS, "vocab.json"]
    for name in ("merges.txt", "tokenizer.json", "vocab.json"):
        assert (tmp_path / "adapter" / name).read_bytes() == (base / name).read_bytes()


def test_a_base_with_only_a_vocabulary_gives_whole_files(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", tiny_config())
    settings = write(base, tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["tokenizer.json", SETTINGS]
    assert settings["tokenizer_class"] == "Qwen2Tokenizer"
    ours, theirs = (load_tokenizer(folder) for folder in (base, tmp_path / "adapter"))
    assert ours.encode("Hello 你好") == theirs.encode("Hello 你好") and ours.control == theirs.control


def test_qwen1_gets_the_files_that_its_own_code_reads(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", tiny_config("qwen"))
    (base / "tokenization_qwen.py").write_text("raise SystemExit('run!')\n")
    settings = write(base, tmp_path / "adapter", layout="qwen")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "qwen.tiktoken",
        "tokenization_qwen.py",
        SETTINGS,
    ]
    assert settings["tokenizer_class"] == "QWenTokenizer" and settings["chat_template"] == chat_template(SYSTEM)
    assert "eos_token" not in settings, "Qwen-1's tokenizer takes no tokens from its settings"
