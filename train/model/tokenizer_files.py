"""The files of a tokenizer with the prompt of a training, for tools that load it from a folder: peft's users, vLLM.

The base's own files are copied as bytes; only tokenizer_config.json is rewritten, because it holds the prompt. Nothing
in them is run. Chat templates are plain text here; this module does not interpret them.
"""

import shutil
from pathlib import Path

from train.common.files import write_json
from train.model.base_files import read_object
from train.model.tokenizer import Tokenizer, write_qwen1_tokenizer

SETTINGS = "tokenizer_config.json"
FILES = {  # of each layout; chat_template.jinja is left out, because tools prefer it to the template of SETTINGS
    "qwen": ("qwen.tiktoken", "tokenization_qwen.py", SETTINGS),
    "qwen2": ("tokenizer.json", "vocab.json", "merges.txt", SETTINGS),
}
FILES["qwen3"] = FILES["qwen2"]


def write_tokenizer(base: Path, tokenizer: Tokenizer, folder: Path, layout: str, chat_template: str, end: int) -> None:
    """Write the tokenizer of `base` into `folder`, with `chat_template` as its template.

    Args:
        tokenizer: that of `base`, for the files that it lacks. layout: of the base.
        end: the token that ends an answer. Qwen-1's own code reads it from the generation config.
    """
    is_whole = all((base / name).is_file() for name in (FILES[layout][0], SETTINGS))
    if layout == "qwen":
        stops = {}
        if not is_whole:
            write_qwen1_tokenizer(tokenizer, folder)  # of which the files of the base then replace what it has
    else:
        if not is_whole:
            tokenizer.save(folder)
        names = (tokenizer.decode([token], skip_control=False) for token in (end, tokenizer.pad))
        stops = dict(zip(("eos_token", "pad_token"), names, strict=True))
    for name in FILES[layout]:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    write_json(folder / SETTINGS, {**read_object(folder / SETTINGS), **stops, "chat_template": chat_template})
