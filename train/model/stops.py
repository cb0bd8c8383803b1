"""Where an answer ends: the stop tokens that a base publishes, and those of the template that a run was trained in.

It knows the names of templates (chatml, plain, qwen3_thinking) and no more of them. Every other program reads the stops from one of four
files, so an export says the same in all of them: see export/prompt_files.py.
"""

from pathlib import Path
from typing import Any

from train.model.base_files import DamagedFileError, read_object
from train.model.published import read_published
from train.model.tokenizer import Tokenizer

GENERATION = "generation_config.json"
TOKEN_IDS = ("eos_token_id", "pad_token_id", "bos_token_id")


def read_generation(folder: Path) -> dict[str, Any]:
    """The content of generation_config.json; empty without the file.

    Raises:
        UserError: damaged, or token ids that are not ids.
    """
    path = folder / GENERATION
    if not path.exists():
        return {}
    content = read_object(path)
    for key in TOKEN_IDS:
        if any(type(number) is not int or not 0 <= number < 2**31 for number in token_ids(content.get(key))):
            raise DamagedFileError(path, f"{key} is {content[key]!r:.80}, expected a token id or a list of them")
    return content


def token_ids(value: Any) -> list[Any]:
    """The entries of a value that may be one id, a list of ids, or missing."""
    return [] if value is None else value if isinstance(value, list) else [value]


def answer_end(tokenizer: Tokenizer, template: str) -> int:
    """The token that ends each answer in the template."""
    return tokenizer.endoftext if template == "plain" else tokenizer.im_end


def thinking_note(layout: str, tokenizer: Tokenizer, template: str) -> str:
    """A sentence where the template and the base disagree about <think> blocks; empty where they do not."""
    if layout == "qwen3" and template == "chatml":
        return (
            "this base is a Qwen3, and template=chatml writes no <think> blocks: it learns to answer without them. "
            "template=qwen3 or qwen3_thinking writes them as Qwen3's own template does."
        )
    if template.startswith("qwen3") and "<think>" not in tokenizer.control:
        return f"template={template}: this base has no token <think>, so the marks are written as plain text."
    return ""


def usual_template(layout: str) -> str:
    """The template of a chat model that was not trained here, by its layout: as its publisher writes a prompt."""
    return "qwen3_thinking" if layout == "qwen3" else "chatml"


def generation_for(published: dict[str, Any], layout: str, tokenizer: Tokenizer, template: str) -> dict[str, Any]:
    """The content of generation_config.json for a model in `layout` that was trained in `template`.

    Qwen-1's published code takes one stop token, not a list (StopWordsLogitsProcessor in qwen_generation_utils.py), and
    model.chat needs the format.
    """
    end, stops = answer_end(tokenizer, template), token_ids(published.get("eos_token_id"))
    written = {
        **published,
        "pad_token_id": tokenizer.pad if published.get("pad_token_id") is None else published["pad_token_id"],
    }
    if layout == "qwen":
        chat = {"chat_format": "raw" if template == "plain" else "chatml"}
        return {"max_window_size": 6144, **written, **chat, "eos_token_id": end}
    written = {key: value for key, value in written.items() if key not in ("chat_format", "max_window_size")}
    if end in stops:
        return written
    return {**written, "eos_token_id": list(dict.fromkeys((end, tokenizer.endoftext, *stops)))}


def no_chat_model(folder: Path, tokenizer: Tokenizer, template: str) -> str:
    """A sentence for a base that was never trained in ChatML, if `template` is a form of that; empty for all others.

    Qwen-1 says so by chat_format; later models by their stop tokens: a chat model ends its answers with <|im_end|>.
    """
    generation, config = read_generation(folder), read_published(folder)
    chat_format = generation.get("chat_format")
    stops = token_ids(generation.get("eos_token_id")) or token_ids(config.get("eos_token_id"))
    learnt = tokenizer.im_end in stops or chat_format == "chatml" or (not stops and chat_format is None)
    if template == "plain" or learnt:
        return ""
    return (
        f"{folder.name} is not a chat model: its texts end with <|endoftext|>, and it has not learnt <|im_start|> and "
        "<|im_end|>, whose embeddings an adapter does not train. Take its Instruct or Chat model as the base; or give "
        "template=plain, whose answers end with <|endoftext|>."
    )
