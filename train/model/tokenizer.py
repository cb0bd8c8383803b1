"""Text to ids and back: byte-level BPE, from `qwen.tiktoken` (Qwen-1) or `tokenizer.json` (Qwen1.5, 2, 2.5, 3).

Both files become one fast tokenizer of the `tokenizers` library with the same ids. Text is only ever text: the control tokens
are kept beside the model, not in it, so no user can type one. Refuses to know conversations (chatml) and models.
Trade-off: recovering the merges of qwen.tiktoken costs about two seconds at each load, and in return no second file can disagree
with the published one. Letters and digits newer than Unicode 15 are split differently than by today's tiktoken (older regex tables).
"""

import base64
import json
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from train.common.errors import UserError
from train.common.files import write_json, write_text

# Published with Qwen-1 (tokenization_qwen.py, PAT_STR) and Qwen2: cl100k's pattern, but digits one by one.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


QWEN_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205)))


def _byte_letters() -> dict[int, str]:
    """GPT-2's visible stand-in for each byte: printable Latin-1 for itself, the other 68 from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {**{byte: chr(byte) for byte in visible}, **{byte: chr(256 + n) for n, byte in enumerate(hidden)}}


LETTER = _byte_letters()


BYTE = {letter: byte for byte, letter in LETTER.items()}


class Tokenizer:
    """Ids as the model was published with. `control` maps each control token to its id; the chat's own have names."""

    def __init__(
        self, backend: tokenizers.Tokenizer, control: dict[str, int], entries: Sequence[dict[str, Any]] = ()
    ) -> None:
        """`backend` holds the vocabulary without control tokens; `entries`: their published form (added_tokens), if any."""
        self.backend = backend
        self.control = control
        self._entries = entries or [_entry(name, number) for name, number in control.items()]
        self._names = {number: name for name, number in control.items()}
        self.endoftext, self.im_start, self.im_end = (_need(control, name) for name in QWEN_CONTROL[:3])
        self.pad = self.endoftext  # as published: rows are padded with <|endoftext|>
        self.stop_ids = (self.im_end, self.endoftext)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id (a model's embedding may have more rows)."""
        return max(self.backend.get_vocab_size(), max(self.control.values()) + 1)

    def encode(self, text: str) -> list[int]:
        """Ids of NFC(text). Control tokens in `text` are letters like any others; half surrogates become U+FFFD."""
        text = unicodedata.normalize("NFC", text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_control: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        kept = (number for number in ids if not (skip_control and number in self._names))
        return b"".join(map(self.bytes_of, kept)).decode("utf-8", "replace")

    def bytes_of(self, number: int) -> bytes:
        """The bytes of one id: part of a character, perhaps; none for a row of the embedding that has no token."""
        if number in self._names:
            return self._names[number].encode()
        letters = self.backend.id_to_token(number) or ""
        return bytes(BYTE[letter] for letter in letters)

    def is_control(self, number: int) -> bool:
        return number in self._names

    def save(self, folder: Path, chat_template: str = "") -> None:
        """Write tokenizer.json and tokenizer_config.json as stock tools read them.

        Args:
            chat_template: Jinja, for tokenizer_config.json; empty: the file has none.
        Stock tools will parse text for control tokens, and normalise with the library's older Unicode tables.
        """
        content = json.loads(self.backend.to_str())
        content["added_tokens"] = self._entries
        content["normalizer"] = {"type": "NFC"}
        write_text(folder / "tokenizer.json", json.dumps(content, ensure_ascii=False, indent=2))
        write_json(folder / "tokenizer_config.json", self._config(chat_template))

    def _config(self, chat_template: str) -> dict[str, Any]:
        described = {str(e["id"]): {key: value for key, value in e.items() if key != "id"} for e in self._entries}
        template = {"chat_template": chat_template} if chat_template else {}
        return {
            "added_tokens_decoder": described,
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


def _entry(name: str, number: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": name, **flags}


def _need(control: dict[str, int], name: str) -> int:
    if name not in control:
        raise UserError(f"tokenizer: no control token {name}. Only models with Qwen's ChatML tokens can be used here.")
    return control[name]


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder: its qwen.tiktoken, else its tokenizer.json.

    Raises:
        UserError: neither is there, or the file is broken (with the line), or it is no byte-level BPE.
    """
    if (folder / "qwen.tiktoken").is_file():
        return _from_tiktoken(folder / "qwen.tiktoken")
    if (folder / "tokenizer.json").is_file():
        return _from_json(folder / "tokenizer.json")
    raise UserError(
        f"{folder}: no tokenizer: expected qwen.tiktoken or tokenizer.json. Fetch the whole model: make model MODEL=…"
    )


def read_tiktoken(path: Path) -> dict[bytes, int]:
    """Token bytes -> rank; ranks must be 0, 1, 2 … in order. Raises UserError with the line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines()):
        try:
            word, rank = line.split()
            ranks[base64.b64decode(word, validate=True)] = int(rank)
        except ValueError:
            raise _broken(path, number, f"found {line[:40]!r}, expected base64, a space and a rank") from None
        if len(ranks) != number + 1 or int(rank) != number:
            raise _broken(path, number, f"token repeated, or rank {int(rank)} where {number} is due")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise _broken(path, len(ranks), f"the file ends without a token for the byte {missing[0]:#04x}")
    return ranks


def _broken(path: Path, index: int, found: str) -> UserError:
    return UserError(f"{path}:{index + 1}: not a tiktoken vocabulary: {found}. Fetch it again: make model MODEL=…")


def write_tiktoken(tokenizer: Tokenizer, path: Path) -> None:
    """The vocabulary as qwen.tiktoken: from any Qwen's tokenizer.json the bytes that Qwen-1 publishes."""
    words = (base64.b64encode(tokenizer.bytes_of(n)).decode() for n in range(tokenizer.backend.get_vocab_size()))
    write_text(path, "".join(f"{word} {rank}\n" for rank, word in enumerate(words)))


def _from_tiktoken(path: Path) -> Tokenizer:
    ranks = read_tiktoken(path)
    try:
        merges = recover_merges(ranks)
    except KeyError as error:
        word = error.args[0]
        raise _broken(path, ranks[word], f"token {word!r} cannot be merged from smaller ones") from None
    backend = tokenizers.Tokenizer(models.BPE({_letters(word): rank for word, rank in ranks.items()}, merges))
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, {name: len(ranks) + n for n, name in enumerate(QWEN_CONTROL)})


def recover_merges(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """The one merge that makes each token of two or more bytes, by rank.

    tiktoken merges any two neighbours whose bytes are a token, lowest rank first, leftmost on ties. While a span's ends are
    not crossed its inside merges as it would alone, so every token has a single last pair, wherever it occurs: a list of
    those pairs in order of rank is the same machine. Raises KeyError(token) if a token does not come together alone.
    """
    merges = []
    for word in ranks:  # in order of rank
        if len(word) > 1:
            parts = _merge(ranks, word)
            if len(parts) != 2:
                raise KeyError(word)
            merges.append((_letters(parts[0]), _letters(parts[1])))
    return merges


def _merge(ranks: dict[bytes, int], word: bytes) -> list[bytes]:
    """tiktoken's merging of `word`, but for the last step that would make it whole."""
    rank_of, none = ranks.get, len(ranks)
    parts = [word[i : i + 1] for i in range(len(word))]
    while len(parts) > 2:
        best, place = none, -1
        for i in range(len(parts) - 1):
            rank = rank_of(parts[i] + parts[i + 1], none)
            if rank < best:
                best, place = rank, i
        if place < 0:
            return parts
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def _letters(word: bytes) -> str:
    return "".join(LETTER[byte] for byte in word)


def _from_json(path: Path) -> Tokenizer:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["model"]["type"] != "BPE" or "ByteLevel" not in json.dumps(content["pre_tokenizer"]):
            raise UserError(f"{path}: not a byte-level BPE tokenizer. Only Qwen's tokenizers can be used here.")
        entries = content["added_tokens"]
        control = {entry["content"]: entry["id"] for entry in entries}
        return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(_text_only(content))), control, entries)
    except UserError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path}: not a tokenizer.json: {error!r:.200}. Fetch it again: make model MODEL=…") from error


def _text_only(content: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer without control tokens; normalisation is Python's (encode); merges as tokenizers 0.14 reads them."""
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
