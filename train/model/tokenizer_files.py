"""The files of a tokenizer with the prompt of a training, for tools that load it from a folder: peft's users, vLLM.

The base's own files are copied as bytes; only tokenizer_config.json is written anew, because it holds the prompt. Nothing
in them is run. Chat templates come as text: which prompt it is, and what it means, is not known here.
"""

import shutil
from pathlib import Path
from typing import Any

from train.common.errors import UserError
from train.common.files import read_json, write_json
from train.model.tokenizer import Tokenizer, write_qwen1_tokenizer

SETTINGS = "tokenizer_config.json"
FILES = {  # of each layout; chat_template.jinja is left out, because tools prefer it to the template of SETTINGS
    "qwen": ("qwen.tiktoken", "tokenization_qwen.py", SETTINGS),
    "qwen2": ("tokenizer.json", "vocab.json", "merges.txt", SETTINGS),
}


def read_settings(base: Path) -> dict[str, Any]:
    """tokenizer_config.json of a model folder; empty if it has none.

    Raises:
        UserError: the file is damaged.
    """
    path = base / SETTINGS
    try:
        settings = read_json(path) if path.is_file() else {}
    except ValueError as error:  # JSON or UTF-8
        raise UserError(f"{path}: not JSON ({error}). Fetch the model again: make model MODEL=…") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path}: not a JSON object. Fetch the model again: make model MODEL=…")
    return settings


def write_tokenizer(
    base: Path, tokenizer: Tokenizer, folder: Path, layout: str, chat_template: str, stop: str
) -> None:  # fmt: skip
    """Write the tokenizer of `base` into `folder`, with `chat_template` as its template.

    Args:
        tokenizer: that of `base`, for the files that it lacks. layout: of the base, qwen or qwen2.
        stop: the control token that ends an answer. Qwen-1's own code keeps that in its generation config.
    """
    if layout == "qwen":
        write_qwen1_tokenizer(tokenizer, folder)
        ends = {}
    else:
        tokenizer.save(folder)
        ends = {"eos_token": stop, "pad_token": "<|endoftext|>"}
    for name in FILES[layout]:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    write_json(folder / SETTINGS, {**read_settings(folder), **ends, "chat_template": chat_template})
