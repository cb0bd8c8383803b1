"""Text to ids and back: byte-level BPE from `qwen.tiktoken` (Qwen-1) or `tokenizer.json` (Qwen1.5, 2, 2.5, 3).

Either file becomes one fast tokenizer of the `tokenizers` library, with the ids of the published one. The control tokens
are kept outside its vocabulary, so text that a user types never becomes one. Knows nothing of conversations.

Recovering the merges of qwen.tiktoken takes about two seconds; in return no second file can disagree with the published
one. Of the file that Qwen publishes, known by its hash, they are recovered when a text first needs the library: training
encodes its data without. Letters and digits newer than Unicode 15 are split differently from tiktoken, because the
library's regex tables are older.
"""

import base64
import hashlib
import json
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from train.common.errors import UserError
from train.common.files import write_json, write_text
from train.model.base_files import DamagedFileError, check_present, read_object
from train.model.text_pieces import PATTERN
from train.model.tiktoken_file import (
    CHAR_TO_BYTE,
    PUBLISHED_FILE,
    PublishedTokens,
    backend_of,
    damaged,
    read_published,
    read_tiktoken,
    recover_merges,
)
from train.model.word_cache import WordCache, fits

MANY = 3_000_000  # characters from which it pays to make a WordCache, which takes a second
TOKENIZERS = ("qwen.tiktoken", "tokenizer.json")  # the first that a folder has is read
CHECKED_WITH = ("config.json", "generation_config.json")  # files of the model that the tokenizer has to fit
SHOWN = ("<think>", "</think>")  # of Qwen3; control tokens that readers of an answer look for
QWEN_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205)))


class Tokenizer:
    """The ids that the model was published with.

    `control` maps each control token to its id; those of ChatML are attributes: endoftext, im_start, im_end.
    """

    def __init__(
        self,
        source: tokenizers.Tokenizer | PublishedTokens,
        control: dict[str, int],
        entries: Sequence[dict[str, Any]] = (),
    ) -> None:
        """`source` has the vocabulary without control tokens; `entries` are these as published (added_tokens), if they are."""
        self._source = source
        self._tokens = source.tokens if isinstance(source, PublishedTokens) else None
        self.control = control
        self._entries = entries or [added_token(name, token_id) for name, token_id in control.items()]
        self._control_names = {token_id: name for name, token_id in control.items()}
        self.endoftext, self.im_start, self.im_end = (_control_id(control, name) for name in QWEN_CONTROL[:3])
        self.pad = self.endoftext  # as published: rows are padded with <|endoftext|>
        self.stop_ids = (self.im_end, self.endoftext)
        self._characters = 0  # that were encoded in batches
        self._words: WordCache | None = None  # made when there are many

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "backend"} | {"_words": None}

    @cached_property
    def backend(self) -> tokenizers.Tokenizer:
        """The library's tokenizer, without control tokens."""
        return self._source.backend() if isinstance(self._source, PublishedTokens) else self._source

    def fingerprint(self) -> str:
        """A hash of all that decides the ids of a text."""
        text = json.loads(self.backend.to_str()) if self._tokens is None else [PUBLISHED_FILE, PATTERN]
        content = {"text": text, "control": self.control}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """One more than the largest id. The embedding of a model may have more rows."""
        return max(self.text_tokens, max(self.control.values()) + 1)

    @property
    def text_tokens(self) -> int:
        """How many ids text can have: all below this number. Control tokens follow."""
        return self.backend.get_vocab_size() if self._tokens is None else len(self._tokens)

    @property
    def added_tokens(self) -> Sequence[dict[str, Any]]:
        """The entries of added_tokens in tokenizer.json, as published: id, content, special and flags."""
        return self._entries

    def encode(self, text: str) -> list[int]:
        """Ids of NFC(text). Control tokens in `text` are plain text; lone surrogates become U+FFFD."""
        return self.backend.encode(_normalised(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text that `encode` gives, as the bytes of int32. Not for several threads at once."""
        self._characters += sum(map(len, texts))
        if self._words is None:
            self._words = self._word_cache()
        if self._words is not None:
            return self._words.encode_batch(texts, self.encode)
        return [np.array(self.encode(text), np.int32).tobytes() for text in texts]

    def _word_cache(self) -> WordCache | None:
        """None where the library is quicker. Of the published tokens it is slower to make than a WordCache."""
        if self._tokens is not None and ("backend" not in self.__dict__ or self._characters > MANY):
            return WordCache(self._tokens)
        if self._characters > MANY and self._fits:
            return WordCache([self.bytes_of(token_id) for token_id in range(self.text_tokens)], self.backend)
        return None

    @cached_property
    def _fits(self) -> bool:
        return fits(self.backend)

    def decode(self, ids: Iterable[int], skip_control: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        shown = (token_id for token_id in ids if not (skip_control and self.is_hidden(token_id)))
        return b"".join(map(self.bytes_of, shown)).decode("utf-8", "replace")

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of one id, which may be a part of a character; empty for a row of the embedding without a token."""
        if token_id in self._control_names:
            return self._control_names[token_id].encode()
        if self._tokens is not None:
            return self._tokens[token_id] if token_id < len(self._tokens) else b""
        chars = self.backend.id_to_token(token_id) or ""
        return bytes(map(CHAR_TO_BYTE.__getitem__, chars))

    def is_hidden(self, token_id: int) -> bool:
        """Whether an answer is shown without this token: control tokens, but not the marks around a reasoning."""
        return token_id in self._control_names and self._control_names[token_id] not in SHOWN

    def is_control(self, token_id: int) -> bool:
        """Whether the id is a control token's."""
        return token_id in self._control_names

    def save(self, folder: Path, chat_template: str = "") -> None:
        """Write tokenizer.json and tokenizer_config.json for stock tools (transformers, vLLM, llama.cpp).

        Args:
            chat_template: Jinja, for tokenizer_config.json; empty: the file gets none.
        Stock tools parse text for control tokens, and normalise with the library's older Unicode tables.
        """
        content = json.loads(self.backend.to_str())
        content["added_tokens"] = self._entries
        content["normalizer"] = {"type": "NFC"}
        write_text(folder / "tokenizer.json", json.dumps(content, ensure_ascii=False, indent=2))
        write_json(folder / "tokenizer_config.json", self._config(chat_template))

    def _config(self, chat_template: str) -> dict[str, Any]:
        decoder = {str(e["id"]): {key: value for key, value in e.items() if key != "id"} for e in self._entries}
        template = {"chat_template": chat_template} if chat_template else {}
        return {
            "added_tokens_decoder": decoder,
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "bos_token": None,
            **template,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        }


def _normalised(text: str) -> str:
    return unicodedata.normalize("NFC", text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


def added_token(name: str, token_id: int, special: bool = True) -> dict[str, Any]:
    """An entry of added_tokens in tokenizer.json."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": name, **flags, "special": special}


def _control_id(control: dict[str, int], name: str) -> int:
    if name not in control:
        raise UserError(f"tokenizer: no control token {name}. Only models with Qwen's ChatML tokens can be used here.")
    return control[name]


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder: from its qwen.tiktoken, or else from its tokenizer.json.

    A command that asks again gets the same object, unless one of the files has changed since.

    Raises:
        UserError: the folder has neither, or the file is damaged (with the line), or it is no byte-level BPE, or it has
            ids that the model has no row for.
    """
    return _load(folder, tuple(_version(folder / name) for name in (*TOKENIZERS, *CHECKED_WITH)))


def _version(path: Path) -> tuple[int, ...]:
    """What changes when a file is written; empty if it cannot be read."""
    try:
        stat = path.stat()
    except OSError:
        return ()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@lru_cache(maxsize=2)
def _load(folder: Path, versions: tuple[tuple[int, ...], ...]) -> Tokenizer:
    """versions: of the files that are read, so that a changed file is read again."""
    for name, read in zip(TOKENIZERS, (_from_tiktoken, _from_json), strict=True):
        path = folder / name
        if path.exists() or path.is_symlink():
            check_present(path)
            tokenizer = read(path)
            _check_rows(path, tokenizer)
            _check_stops(path, tokenizer)
            return tokenizer
    raise UserError(
        f"{folder}: no tokenizer: expected qwen.tiktoken or tokenizer.json. Fetch the model again: make model MODEL=…"
    )


def _check_rows(path: Path, tokenizer: Tokenizer) -> None:
    """Raise a UserError if the embedding has no row for a token that text or ChatML uses: vocab_size is too small.

    The rest of Qwen-1's 208 control tokens (<|extra_0|> …) are never written, so a small model may lack their rows.
    """
    config = path.with_name("config.json")
    rows = read_object(config).get("vocab_size") if config.is_file() else None
    control = (tokenizer.endoftext, tokenizer.im_start, tokenizer.im_end)
    needed = max(tokenizer.text_tokens, *(number + 1 for number in control))
    if isinstance(rows, int) and needed > rows:
        raise DamagedFileError(path, f"has {needed:,} tokens, vocab_size in config.json is {rows:,}")


def _check_stops(path: Path, tokenizer: Tokenizer) -> None:
    """Raise a UserError if none of the published stop tokens is <|endoftext|> or <|im_end|>.

    A qwen.tiktoken that is cut off at the end of a line is a smaller vocabulary like any other, in which every control
    token has another id.
    """
    beside = path.with_name("generation_config.json")
    stops = read_object(beside).get("eos_token_id") if beside.is_file() else None
    listed = stops if isinstance(stops, list) else [stops]
    if all(type(stop) is int and stop not in tokenizer.stop_ids for stop in listed):
        here = f"<|endoftext|> is {tokenizer.endoftext} in it, the stop token in {beside.name} is {stops}"
        raise DamagedFileError(path, f"{here}: one of the files is cut off, or of another model")


def write_qwen1_tokenizer(tokenizer: Tokenizer, folder: Path, **settings: Any) -> None:
    """Write the files that Qwen-1's published code reads: qwen.tiktoken and tokenizer_config.json with `settings`.

    From the tokenizer.json of any Qwen, qwen.tiktoken gets the bytes that Qwen-1 publishes.
    """
    tokens = (base64.b64encode(tokenizer.bytes_of(n)).decode() for n in range(tokenizer.text_tokens))
    write_text(folder / "qwen.tiktoken", "".join(f"{token} {rank}\n" for rank, token in enumerate(tokens)))
    auto_map = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "QWenTokenizer", "auto_map": auto_map, **settings})


def _from_tiktoken(path: Path) -> Tokenizer:
    if published := read_published(path):
        return Tokenizer(published, _control_after(len(published.tokens)))
    ranks = read_tiktoken(path)
    try:
        merges = recover_merges(ranks)
    except KeyError as error:
        token = error.args[0]
        raise damaged(path, ranks[token], f"token {token!r} cannot be merged from smaller ones") from None
    return Tokenizer(backend_of(ranks, merges), _control_after(len(ranks)))


def _control_after(count: int) -> dict[str, int]:
    """Qwen-1's control tokens, whose ids follow those of `count` tokens of text."""
    return {name: count + n for n, name in enumerate(QWEN_CONTROL)}


def _from_json(path: Path) -> Tokenizer:
    content = read_object(path)
    try:
        if content["model"]["type"] != "BPE" or "ByteLevel" not in json.dumps(content["pre_tokenizer"]):
            raise UserError(f"{path}: not a byte-level BPE tokenizer. Only Qwen's tokenizers can be used here.")
        entries = content["added_tokens"]
        control = {entry["content"]: _checked_id(entry["id"]) for entry in entries}
        return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(_text_only(content))), control, entries)
    except UserError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise DamagedFileError(path, f"not a tokenizer.json: {error!r:.200}") from error


def _checked_id(token_id: Any) -> int:
    if type(token_id) is not int or not 0 <= token_id < 2**31:
        raise ValueError(f"added_tokens: the id {token_id!r:.80}")
    return token_id


def _text_only(content: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer without control tokens and normalisation (see encode), with merges as tokenizers 0.14 reads them."""
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    model = {**content["model"], "merges": merges}
    plain: dict[str, Any] = {
        "added_tokens": [],
        "normalizer": None,
        "truncation": None,
        "padding": None,
        "post_processor": None,
    }
    return {**content, **plain, "model": model}
