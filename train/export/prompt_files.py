"""The prompt and the stop tokens of a training, written to every file of an export that some program reads them from.

vLLM and transformers read generation_config.json and tokenizer_config.json (older ones special_tokens_map.json too),
llama.cpp's converter tokenizer_config.json and config.json, Qwen-1's own code generation_config.json. A base that is not
a chat model has <|endoftext|> in all of them, and a model trained on it in ChatML would not stop.
"""

from pathlib import Path
from typing import Any

from train.common.files import write_json, write_text
from train.data.tokens.chat_template import chat_template
from train.model.base_files import read_object
from train.model.stops import GENERATION, answer_end, generation_for, read_generation
from train.model.tokenizer import Tokenizer

TEMPLATE = "chat_template.jinja"  # newer tools read the template here first, and the same in tokenizer_config.json


def write_prompt_files(
    source: Path, folder: Path, layout: str, tokenizer: Tokenizer, system: str, template: str
) -> None:
    """Write template and stops to the files of `folder`, whose config and tokenizer are there already.

    Args:
        source: the base's folder, for its generation_config.json. layout: of `folder`.
        system, template: of the training. The base's own chat template has another system message.
    """
    write_stops(source, folder, layout, tokenizer, template)
    settings = read_object(folder / "tokenizer_config.json")
    text = chat_template(system, template)
    write_json(folder / "tokenizer_config.json", {**settings, "chat_template": text})
    write_text(folder / TEMPLATE, text)


def write_stops(source: Path, folder: Path, layout: str, tokenizer: Tokenizer, template: str) -> None:
    """Write the stop tokens of `template` alone, to all of these files. Arguments as for `write_prompt_files`."""
    end = answer_end(tokenizer, template)
    write_json(folder / GENERATION, generation_for(read_generation(source), layout, tokenizer, template))
    config = read_object(folder / "config.json")
    if layout != "qwen" or "eos_token_id" in config:  # one id: llama.cpp's converter reads no list
        write_json(folder / "config.json", {**config, "eos_token_id": end})
    text = tokenizer.decode([end], skip_control=False)
    settings = _with_end(folder / "tokenizer_config.json", text, add=layout != "qwen")
    write_json(folder / "tokenizer_config.json", settings)
    if (folder / "special_tokens_map.json").is_file():
        write_json(folder / "special_tokens_map.json", _with_end(folder / "special_tokens_map.json", text, add=False))


def _with_end(path: Path, text: str, add: bool) -> dict[str, Any]:
    """The settings in a file with `text` as eos_token; without one there only if `add` (Qwen-1's tokenizer takes none)."""
    settings = read_object(path) if path.is_file() else {}
    present = settings.get("eos_token")
    if present is None and not add:
        return settings
    return {**settings, "eos_token": {**present, "content": text} if isinstance(present, dict) else text}
