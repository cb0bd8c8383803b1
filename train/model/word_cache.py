"""Many texts to ids at once, faster than the library, with the same ids.

Text has few different pieces (see text_pieces.py), so each is encoded once and then looked up: most of them in a hash
table of numpy, all pieces of a batch in a few calls, so that no Python object is made for them. New pieces of Qwen's
published vocabulary are merged by tiktoken, in a sixth of the library's time. Whatever this module does not know
(another pattern, another kind of model, rare characters) is encoded by the library alone. `Tokenizer.encode` is the
definition, and a test compares.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tokenizers

from train.model.text_pieces import PATTERN, Borders, Words

UNKNOWN = re.compile("[\0\ud800-\udfff\U00010000-\U0001efff\U0001fb00-\U0010ffff]")  # a text with one: library alone
NUL = "\0"  # between texts, and between the pieces that are merged together; no piece has it
# Of Qwen's published tokens and merges, in order: those of qwen.tiktoken, and of every tokenizer.json since Qwen1.5.
# tiktoken merges by tokens alone, as these merges do (see recover_merges); other merges may not.
PUBLISHED = "512d7ef60874ff64e4bb0cd86dc62ce7115d09b4603736b2cd0b2cefd2426bf6"
MAX_PIECES, MAX_BYTES = 500_000, 16_000_000  # that are kept
WORD = 8  # bytes of an unsigned integer
SLOT_BITS = 18  # of the number of slots of the hash table
MASKS = np.array([(1 << 8 * count) - 1 for count in range(WORD + 1)], np.uint64)  # of the first `count` bytes
LONG = np.uint64(2**64 - 1)  # no UTF-8 has such bytes: a piece of more than two words is in no slot
MIXERS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F))  # odd; golden ratio, xxHash's second prime


class WordCache:
    """Encodes batches of texts in NFC or not, as `encode` does one. Not for several threads at once."""

    def __init__(self, token_bytes: Sequence[bytes], backend: tokenizers.Tokenizer | None = None) -> None:
        """
        Args:
            token_bytes: the bytes of each id. backend: their tokenizer, for which `fits` is true; None: they are Qwen's
                published tokens.
        """
        content = json.loads(backend.to_str()) if backend else None
        by_rank = content is None or is_published(content["model"])
        self._merge = _by_rank(token_bytes) if content is None or by_rank else _by_library(content)
        self._separator = int(self._merge(NUL)[0])
        self._words, self._borders = Words(), Borders(token_bytes)
        self._pieces = _Pieces()

    def encode_batch(self, texts: Sequence[str], encode: Callable[[str], list[int]]) -> list[bytes]:
        """Ids (int32) of each text, as bytes.

        Args:
            encode: one text, by the library alone.
        """
        known = [_normalised(text) for text in texts]
        joined = "".join([f"{text or ''}{NUL}" for text in known])
        codes = np.frombuffer(joined.encode("utf-32-le"), np.uint32)
        begins = self._words.begins(codes)
        if not joined.isascii():
            begins |= self._borders.cuts(codes)
        firsts = np.flatnonzero(begins)  # NULs are pieces too, without ids
        ids, counts = self._encode(joined.encode(), _byte_offsets(codes, joined)[firsts])
        stops = 4 * np.cumsum(counts)[codes[firsts] == 0]
        raw, stop = ids.tobytes(), 0
        encoded = []
        for text, original, end in zip(known, texts, stops.tolist(), strict=True):
            start, stop = stop, end
            encoded.append(raw[start:stop] if text is not None else np.array(encode(original), np.int32).tobytes())
        return encoded

    def _encode(self, raw: bytes, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 of all pieces, how many each has, int64 [P]) of the pieces of `raw` that begin at `starts`."""
        keys = _keys(raw, starts)
        offsets, counts, missing = self._pieces.find(keys)
        if len(missing):
            stops = np.append(starts[1:], len(raw))[missing].tolist()
            names = [raw[start:stop] for start, stop in zip(starts[missing].tolist(), stops, strict=True)]
            firsts: dict[bytes, int] = {}
            for name, place in zip(names, missing.tolist(), strict=True):
                if name not in self._pieces.numbers:
                    firsts.setdefault(name, place)
            if firsts:
                new = NUL.encode().join(firsts).decode()
                self._pieces.add(list(firsts), keys[:, list(firsts.values())], self._merge(new), self._separator)
            offsets[missing], counts[missing] = self._pieces.named(names)
        ids = self._pieces.ids_at(offsets, counts)
        self._pieces.empty_if_full()
        return ids, counts


class _Pieces:
    """The ids of the pieces that are known: all of them by their bytes, those of at most two words in a hash table too.

    A slot holds one piece, the first that came; the others of that slot are found by their bytes. Slot 0, of the key
    (0, 0), is that of NUL, which has no ids: an empty slot looks like it.
    """

    def __init__(self) -> None:
        self.numbers: dict[bytes, int] = {}
        self._ids, self._used = np.empty(1 << 16, np.int32), 0  # of all pieces, one after another
        self._offsets, self._counts = np.zeros(1 << 16, np.int64), np.zeros(1 << 16, np.int64)  # by number
        self._keys = np.zeros((2, 1 << SLOT_BITS), np.uint64)
        self._slots = np.zeros((2, 1 << SLOT_BITS), np.int64)  # offset and count
        self._bytes = 0

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(offsets, counts, the places of those that are in no slot), each int64."""
        slots = _slots(keys)
        found = (self._keys[0][slots] == keys[0]) & (self._keys[1][slots] == keys[1])
        return self._slots[0][slots], self._slots[1][slots], np.flatnonzero(~found)

    def named(self, names: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """(offsets, counts) of pieces that are known."""
        numbers = np.array([self.numbers[name] for name in names], np.int64)
        return self._offsets[numbers], self._counts[numbers]

    def add(self, names: Sequence[bytes], keys: np.ndarray, ids: np.ndarray, separator: int) -> None:
        """Add new pieces. ids: of all of them, with the separator's between."""
        stops = np.append(np.flatnonzero(ids == separator), len(ids))
        counts = np.diff(stops, prepend=-1) - 1
        ids = ids[ids != separator]
        first, self._used = self._used, self._used + len(ids)
        self._ids = _with_room(self._ids, self._used)
        self._ids[first : self._used] = ids
        here = slice(len(self.numbers), len(self.numbers) + len(names))
        self._offsets, self._counts = _with_room(self._offsets, here.stop), _with_room(self._counts, here.stop)
        self._offsets[here], self._counts[here] = first + np.cumsum(counts) - counts, counts
        self.numbers |= zip(names, range(here.start, here.stop), strict=True)
        self._bytes += sum(map(len, names))
        slots, firsts = np.unique(_slots(keys), return_index=True)
        free = (self._keys[0][slots] == 0) & (keys[0][firsts] != LONG) & (slots > 0)
        slots, firsts = slots[free], firsts[free]
        self._keys[:, slots] = keys[:, firsts]
        self._slots[0][slots], self._slots[1][slots] = self._offsets[here][firsts], counts[firsts]

    def ids_at(self, offsets: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The ids of pieces, one after another."""
        stops = np.cumsum(counts)
        places = np.repeat(offsets - stops + counts, counts)
        places += np.arange(len(places))
        return self._ids[places]

    def empty_if_full(self) -> None:
        if len(self.numbers) > MAX_PIECES or self._bytes > MAX_BYTES:
            self.numbers.clear()
            self._keys[:], self._slots[:], self._used, self._bytes = 0, 0, 0, 0


def _keys(raw: bytes, starts: np.ndarray) -> np.ndarray:
    """uint64 [2, P]: the bytes of each piece, of which different pieces have different ones; LONG for a longer piece."""
    lengths = np.diff(starts, append=len(raw))
    padded = raw + bytes(2 * WORD)
    at: np.ndarray = np.ndarray((len(raw) + WORD,), "<u8", padded, strides=(1,))  # eight bytes from each byte on
    keys = np.empty((2, len(starts)), np.uint64)
    keys[0] = at[starts] & MASKS[np.minimum(lengths, WORD)]
    keys[1] = at[starts + WORD] & MASKS[np.clip(lengths - WORD, 0, WORD)]
    keys[0, lengths > 2 * WORD] = LONG
    return keys


def _slots(keys: np.ndarray) -> np.ndarray:
    mixed = (keys[0] ^ (keys[0] >> np.uint64(29))) * MIXERS[0] ^ (keys[1] ^ (keys[1] >> np.uint64(32))) * MIXERS[1]
    return (mixed >> np.uint64(64 - SLOT_BITS)).view(np.int64)


def _byte_offsets(codes: np.ndarray, text: str) -> np.ndarray:
    """Where each character begins in UTF-8."""
    if text.isascii():
        return np.arange(len(codes))
    sizes = (codes >= 0x80).astype(np.uint8)
    sizes += codes >= 0x800
    sizes += codes >= 0x10000
    return np.cumsum(sizes, dtype=np.int64) - sizes + np.arange(len(codes))


def _with_room(array: np.ndarray, size: int) -> np.ndarray:
    """The same, with at least `size` entries."""
    return array if size <= len(array) else np.concatenate([array, np.empty(max(size, len(array)), array.dtype)])


def fits(backend: tokenizers.Tokenizer) -> bool:
    """Whether this is a byte-level BPE with Qwen's published pattern and no other step."""
    content = json.loads(backend.to_str())
    model, steps = content["model"], (content["pre_tokenizer"] or {}).get("pretokenizers", [])
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    to_chars = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return (
        model["type"] == "BPE"
        and not any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and not any(model.get(key) for key in ("unk_token", "byte_fallback", "ignore_merges"))
        and len(steps) == 2
        and steps[0] == split
        and steps[1].items() >= to_chars.items()
        and not any(content.get(key) for key in ("added_tokens", "normalizer", "post_processor", "truncation"))
    )


def is_published(model: dict[str, Any]) -> bool:
    """Whether a BPE model of tokenizer.json, with merges as texts, has Qwen's published tokens and merges."""
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    dense = sorted(model["vocab"].values()) == list(range(len(tokens)))
    return dense and hashlib.sha256(json.dumps([tokens, model["merges"]]).encode()).hexdigest() == PUBLISHED


Merge = Callable[
    [str], np.ndarray
]  # the ids (int32) of a text in which each NUL, and what is between two, is one piece


def _by_rank(token_bytes: Sequence[bytes]) -> Merge:
    import tiktoken

    ranks = {token: rank for rank, token in enumerate(token_bytes)}
    encoding = tiktoken.Encoding("pieces", pat_str=f"[^{NUL}]+|{NUL}", mergeable_ranks=ranks, special_tokens={})
    return lambda text: encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int32)


def _by_library(content: dict[str, Any]) -> Merge:
    """content: of tokenizer.json; the first step is replaced."""
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"String": NUL}
    library = tokenizers.Tokenizer.from_str(json.dumps(content))
    return lambda text: np.array(library.encode(text, add_special_tokens=False).ids, np.int32)


def _normalised(text: str) -> str | None:
    """NFC(text); None for a text that the library must encode."""
    if text.isascii():
        return None if NUL in text else text
    if UNKNOWN.search(text):
        return None
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)
