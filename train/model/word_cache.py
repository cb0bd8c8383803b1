"""Many texts to ids at once, faster than the library, with the same ids.

Text has few different words, so each is encoded once and then looked up. Chinese has no spaces, and most of its runs
of characters are new. But two neighbours can only be merged if some token of the vocabulary spans them; between all
others a run is cut, and the pieces are old acquaintances again. The library still encodes every new piece. Whatever
this module does not know (another pattern, another kind of model, rare characters) is encoded by the library alone.
`Tokenizer.encode` is the definition, and a test compares.
"""

import itertools
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, pre_tokenizers

# Published with Qwen-1 (tokenization_qwen.py, PAT_STR) and with Qwen2: the pattern of cl100k, but digits one by one.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The same for Python's re; {L}, {N} and {S}: letters, numbers and spaces of the library's tables
SAME_IN_RE = (
    "'(?:[sStTmMdD\u017f]|[rR][eE]|[vV][eE]|[lL][lL])|[^\r\n{L}{N}]?[{L}]+|[{N}]| ?[^{S}{L}{N}]+[\r\n]*"
    "|[{S}]*[\r\n]+|[{S}]+(?![^{S}])|[{S}]+"
)
EMOJI = (0x1F000, 0x1FB00)  # known beside the first 2¹⁶ characters: range of code points
UNKNOWN = re.compile("[\0\ud800-\udfff\U00010000-\U0001efff\U0001fb00-\U0010ffff]")  # a text with one: library alone
NUL = "\0"  # between the words that are handed to the library; no word has it
MAX_WORDS, MAX_CHARACTERS = 300_000, 8_000_000  # that are kept
CHARACTER_BYTES = {0: 1, 1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1, 7: 1, 12: 2, 13: 2, 14: 3, 15: 4}  # by the top four bits


class WordCache:
    """Encodes batches of texts in NFC or not, as `encode` does one. Not for several threads at once."""

    def __init__(self, backend: tokenizers.Tokenizer, token_bytes: Sequence[bytes]) -> None:
        """
        Args:
            backend: a tokenizer for which `fits` is true. token_bytes: the bytes of each of its ids.
        """
        self._library = _words_only(backend)
        self._separator = self._library.encode(NUL, add_special_tokens=False).ids
        self._find = _pattern().findall
        self._borders = Borders(token_bytes)
        self._words: dict[str, bytes] = {}
        self._characters = 0

    def encode_batch(self, texts: Sequence[str], encode: Callable[[str], list[int]]) -> list[bytes]:
        """Ids (int32) of each text, as bytes.

        Args:
            encode: one text, by the library alone.
        """
        known = [_normalised(text) for text in texts]
        words = [self._find(text) if text is not None else [] for text in known]
        self._learn(list(set().union(*words) - self._words.keys()))
        lookup = self._words.__getitem__
        encoded = [
            b"".join(map(lookup, found)) if text is not None else np.array(encode(original), np.int32).tobytes()
            for original, text, found in zip(texts, known, words, strict=True)
        ]
        if len(self._words) > MAX_WORDS or self._characters > MAX_CHARACTERS:
            self._words.clear()
            self._characters = 0
        return encoded

    def _learn(self, words: list[str]) -> None:
        """Add words that are new: from their pieces, of which only new ones are encoded."""
        if not words:
            return
        pieces = self._borders.cut(words)
        self._encode(list(set(itertools.chain.from_iterable(pieces)) - self._words.keys()))
        for word, parts in zip(words, pieces, strict=True):
            self._words[word] = b"".join([self._words[part] for part in parts])
        self._characters += sum(map(len, words))

    def _encode(self, pieces: list[str]) -> None:
        """Add pieces, in one call of the library."""
        if not pieces:
            return
        ids = np.array(self._library.encode(NUL.join(pieces), add_special_tokens=False).ids, np.int32)
        stops = [*np.flatnonzero(ids == self._separator[0]).tolist(), len(ids)]
        raw, start = ids.tobytes(), 0
        for piece, stop in zip(pieces, stops, strict=True):
            self._words[piece] = raw[4 * start : 4 * stop]
            start = stop + 1
        self._characters += sum(map(len, pieces))


class Borders:
    """Where a word can be cut with the same ids: between two characters that no token spans, not even in part.

    A merge makes a token of the vocabulary, so without such a token none crosses the border, and both sides merge as
    they would alone. A token may begin or end within a character; the character on its other side then counts as one
    that is never cut from its neighbours.
    """

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        pairs, left_any, right_any = _spanned(token_bytes)
        characters = sorted({ord(character) for pair in pairs for character in pair})
        self._class = np.zeros(0x110000, np.uint16)  # of a character that is in a pair, from 1
        self._class[characters] = np.arange(1, len(characters) + 1)
        self._spanned = np.zeros((len(characters) + 1,) * 2, bool)
        ends = np.array([[ord(first), ord(second)] for first, second in pairs], np.int64).reshape(-1, 2)
        self._spanned[self._class[ends[:, 0]], self._class[ends[:, 1]]] = True
        self._left_any, self._right_any = np.zeros(0x110000, bool), np.zeros(0x110000, bool)
        self._left_any[left_any], self._right_any[right_any] = True, True
        self._left_any[:0x80] = self._right_any[:0x80] = True  # words in ASCII repeat: they are kept whole

    def cut(self, words: Sequence[str]) -> list[list[str]]:
        """The pieces of each word."""
        text = "".join(words)
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        before, after = codes[:-1], codes[1:]
        whole = self._left_any[before] | self._right_any[after]
        whole |= self._spanned[self._class[before], self._class[after]]
        cuts = np.flatnonzero(~whole) + 1
        ends = np.cumsum([len(word) for word in words])
        cuts = np.union1d(cuts, ends)
        pieces = [text[start:stop] for start, stop in itertools.pairwise([0, *cuts.tolist()])]
        lasts = [0, *(np.searchsorted(cuts, ends) + 1).tolist()]
        return [pieces[first:last] for first, last in itertools.pairwise(lasts)]


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


def _words_only(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same model behind another first step: what is between two NUL is a word."""
    content = json.loads(backend.to_str())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"String": NUL}
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def _normalised(text: str) -> str | None:
    """NFC(text); None for a text that the library must encode."""
    if text.isascii():
        return None if NUL in text else text
    if UNKNOWN.search(text):
        return None
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def _pattern() -> "re.Pattern[str]":
    """PATTERN for Python's re, on the characters that UNKNOWN does not match."""
    classes = {name: _ranges(members) for name, members in (("L", r"\p{L}"), ("N", r"\p{N}"), ("S", r"\s"))}
    pattern = SAME_IN_RE
    for name, members in classes.items():
        pattern = pattern.replace(f"{{{name}}}", members)
    return re.compile(pattern)


def _ranges(members: str) -> str:
    """A class of the library's regular expressions as ranges for Python's, from the library's own Unicode tables."""
    only = pre_tokenizers.Split(Regex(f"[^{members}]+"), "removed")
    blocks = ("".join(map(chr, range(1, 0xD800))), "".join(map(chr, range(0xE000, 0x10000))))
    emoji = "".join(map(chr, range(*EMOJI)))
    found = [run for block in (*blocks, emoji) for run, _ in only.pre_tokenize_str(block)]
    return "".join(f"{re.escape(run[0])}-{re.escape(run[-1])}" for run in found)


def _spanned(token_bytes: Sequence[bytes]) -> tuple[set[tuple[str, str]], list[int], list[int]]:
    """Pairs of characters that a token spans; and code points that may be spanned with anything after, or before."""
    pairs: set[tuple[str, str]] = set()
    left_any: set[int] = set()
    right_any: set[int] = set()
    for token in token_bytes:
        if len(token) < 2 or token.isascii():
            continue
        for left, right in _sides(token):
            one, other = _character(left), _character(right)
            if one and other:
                pairs.add((one, other))
            elif one:
                left_any.add(ord(one))
            elif other:
                right_any.add(ord(other))
            else:
                right_any.update(_beginning_with(right))
    return pairs, sorted(left_any), sorted(right_any)


def _sides(token: bytes) -> Iterator[tuple[bytes, bytes]]:
    """At each border of characters within a token: the bytes of the character before it, and after it.

    Either may lack bytes: those before the token, or after it.
    """
    borders = [n for n in range(len(token)) if token[n] & 0xC0 != 0x80]
    for n, border in enumerate(borders):
        if border:
            start = borders[n - 1] if n else 0
            yield token[start:border], token[border : borders[n + 1] if n + 1 < len(borders) else len(token)]


def _character(raw: bytes) -> str:
    """The character of these bytes; empty for a part of one."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return ""


def _beginning_with(raw: bytes) -> range:
    """Code points whose UTF-8 begins with these bytes of a character that is cut off."""
    missing = CHARACTER_BYTES[raw[0] >> 4] - len(raw)
    bits: Any = raw[0] & (0x7F >> CHARACTER_BYTES[raw[0] >> 4])
    for byte in raw[1:]:
        bits = bits << 6 | byte & 0x3F
    return range(bits << 6 * missing, (bits + 1) << 6 * missing)
