"""Text to ids and back: byte-level BPE from `qwen.tiktoken` (Qwen-1) or `tokenizer.json` (Qwen1.5, 2, 2.5, 3).

Either file becomes one fast tokenizer of the `tokenizers` library, with the ids of the published one. The control tokens
are kept outside its vocabulary, so text that a user types never becomes one. Knows nothing of conversations.

Recovering the merges of qwen.tiktoken takes about two seconds at each load; in return no second file can disagree with
the published one. Letters and digits newer than Unicode 15 are split differently from tiktoken, because the library's
regex tables are older.
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
from tokenizers import Regex, decoders, models, pre_tokenizers

from train.common.errors import UserError
from train.common.files import write_json, write_text
from train.model.base_files import DamagedFileError, check_present, read_object
from train.model.text_pieces import PATTERN
from train.model.word_cache import WordCache, fits

MANY = 3_000_000  # characters from which it pays to make a WordCache, which takes a second
TOKENIZERS = ("qwen.tiktoken", "tokenizer.json")  # the first that a folder has is read
CHECKED_WITH = ("config.json", "generation_config.json")  # files of the model that the tokenizer has to fit
SHOWN = ("<think>", "</think>")  # of Qwen3; control tokens that readers of an answer look for
QWEN_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205)))


def _byte_chars() -> dict[int, str]:
    """GPT-2's printable character for each byte: Latin-1 where it is printable, else U+0100 and following (68 of them)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + n) for n, byte in enumerate(others)}}


BYTE_TO_CHAR = _byte_chars()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


class Tokenizer:
    """The ids that the model was published with.

    `control` maps each control token to its id; those of ChatML are attributes: endoftext, im_start, im_end.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, control: dict[str, int], entries: Sequence[dict[str, Any]] = ()
    ) -> None:
        """`backend` has the vocabulary without control tokens; `entries` are these as published (added_tokens), if they are."""
        self.backend = backend
        self.control = control
        self._entries = entries or [added_token(name, token_id) for name, token_id in control.items()]
        self._control_names = {token_id: name for name, token_id in control.items()}
        self.endoftext, self.im_start, self.im_end = (_control_id(control, name) for name in QWEN_CONTROL[:3])
        self.pad = self.endoftext  # as published: rows are padded with <|endoftext|>
        self.stop_ids = (self.im_end, self.endoftext)
        self._characters = 0  # that were encoded in batches
        self._words: WordCache | None = None  # made when there are many

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_words": None}

    def fingerprint(self) -> str:
        """A hash of all that decides the ids of a text."""
        content = {"text": json.loads(self.backend.to_str()), "control": self.control}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """One more than the largest id. The embedding of a model may have more rows."""
        return max(self.backend.get_vocab_size(), max(self.control.values()) + 1)

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
        if self._words is None and self._characters > MANY and self._fits:
            size = self.backend.get_vocab_size()
            self._words = WordCache(self.backend, [self.bytes_of(token_id) for token_id in range(size)])
        if self._words is not None:
            return self._words.encode_batch(texts, self.encode)
        return [np.array(self.encode(text), np.int32).tobytes() for text in texts]

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


def byte_level_bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """Qwen's tokenizer from a vocabulary and merges, both in GPT-2's printable characters, without control tokens."""
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    to_chars = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_chars])
    backend.decoder = decoders.ByteLevel()
    return backend


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
    needed = max(tokenizer.backend.get_vocab_size(), *(number + 1 for number in control))
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


def read_tiktoken(path: Path) -> dict[bytes, int]:
    """Bytes of a token -> its rank, from a tiktoken file, whose ranks are 0, 1, 2 … in order.

    Raises:
        UserError: a damaged file, with the line.
    """
    ranks: dict[bytes, int] = {}
    for expected, line in enumerate(path.read_bytes().splitlines()):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise _damaged(path, expected, f"found {line[:40]!r}, expected base64, a space and a rank") from None
        if len(ranks) != expected + 1 or int(rank) != expected:
            raise _damaged(path, expected, f"token repeated, or rank {int(rank)} where {expected} is expected")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise _damaged(path, len(ranks), f"the file ends without a token for the byte {missing[0]:#04x}")
    return ranks


def _damaged(path: Path, index: int, problem: str) -> UserError:
    return DamagedFileError(path, f"not a tiktoken vocabulary: {problem}", f":{index + 1}")


def write_qwen1_tokenizer(tokenizer: Tokenizer, folder: Path, **settings: Any) -> None:
    """Write the files that Qwen-1's published code reads: qwen.tiktoken and tokenizer_config.json with `settings`.

    From the tokenizer.json of any Qwen, qwen.tiktoken gets the bytes that Qwen-1 publishes.
    """
    tokens = (base64.b64encode(tokenizer.bytes_of(n)).decode() for n in range(tokenizer.backend.get_vocab_size()))
    write_text(folder / "qwen.tiktoken", "".join(f"{token} {rank}\n" for rank, token in enumerate(tokens)))
    auto_map = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "QWenTokenizer", "auto_map": auto_map, **settings})


def _from_tiktoken(path: Path) -> Tokenizer:
    ranks = read_tiktoken(path)
    try:
        merges = recover_merges(ranks)
    except KeyError as error:
        token = error.args[0]
        raise _damaged(path, ranks[token], f"token {token!r} cannot be merged from smaller ones") from None
    backend = byte_level_bpe({_to_chars(token): rank for token, rank in ranks.items()}, merges)
    return Tokenizer(backend, {name: len(ranks) + n for n, name in enumerate(QWEN_CONTROL)})


def recover_merges(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """For each token of two or more bytes the pair of tokens that it is merged from, in order of rank.

    tiktoken merges two neighbours if their bytes together are a token: the lowest rank first, the leftmost of equals.
    As long as no merge crosses the ends of a span, its inside merges as it would alone. So every token has one last
    pair, wherever it occurs, and the list of these pairs in order of rank merges the same way.

    Raises:
        KeyError(token): a token whose bytes alone do not merge to it.
    """
    merges = []
    for token in ranks:  # in order of rank
        if len(token) > 1:
            parts = _merge_to_pair(ranks, token)
            if len(parts) != 2:
                raise KeyError(token)
            merges.append((_to_chars(parts[0]), _to_chars(parts[1])))
    return merges


def _merge_to_pair(ranks: dict[bytes, int], token: bytes) -> list[bytes]:
    """The parts of `token` after all of tiktoken's merges but the last, which would make it whole."""
    rank_of, no_rank = ranks.get, len(ranks)
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        lowest, index = no_rank, -1
        for i in range(len(parts) - 1):
            rank = rank_of(parts[i] + parts[i + 1], no_rank)
            if rank < lowest:
                lowest, index = rank, i
        if index < 0:
            return parts
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return parts


def _to_chars(token: bytes) -> str:
    return "".join(BYTE_TO_CHAR[byte] for byte in token)


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
