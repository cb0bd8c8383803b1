"""Texts to pieces that the library encodes to the same ids alone as within the text, many characters at a time.

Two steps, both in numpy on the code points of many texts at once. `Words` says where Qwen's published pattern splits a
text. Chinese has no spaces, and most of its runs of characters are new; but two neighbours can only be merged if some
token of the vocabulary spans them, and `Borders` cuts between all others, so that the pieces are old acquaintances.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import Regex, pre_tokenizers

# Published with Qwen-1 (tokenization_qwen.py, PAT_STR) and with Qwen2: the pattern of cl100k, but digits one by one.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
OTHER, LETTER, NUMBER, SPACE, END = range(5)  # kinds of characters: those of PATTERN, and NUL, which ends each text
EMOJI = (0x1F000, 0x1FB00)  # known beside the first 2¹⁶ characters: range of code points
CHARACTER_BYTES = {0: 1, 1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1, 7: 1, 12: 2, 13: 2, 14: 3, 15: 4}  # by the top four bits


class Words:
    """Where PATTERN splits texts. Which characters are letters, numbers and spaces is asked of the library once."""

    def __init__(self) -> None:
        self._kinds = np.full(0x110000, OTHER, np.uint8)
        for kind, members in ((LETTER, r"\p{L}"), (NUMBER, r"\p{N}"), (SPACE, r"\s")):
            self._kinds[_members(members)] = kind
        self._kinds[0] = END

    def begins(self, codes: np.ndarray) -> np.ndarray:
        """bool [N]: whether a word begins at each character. codes: uint32 [N], texts that each end with a NUL."""
        kinds = self._kinds[codes]
        letter, other, space = kinds == LETTER, kinds == OTHER, kinds == SPACE
        blank = codes == ord(" ")
        newline = space & ((codes == ord("\n")) | (codes == ord("\r")))
        lone = other & ~_after(other) & ~_before(other)
        leads = (lone & ~_after(blank)) | (space & ~newline)  # the letters after it belong to its word
        inside = letter & _after(letter | leads)
        inside |= other & _after(other | blank)
        inside |= space & _after(space)
        inside |= newline & _after(other)
        begins = ~inside
        _split_spaces(begins, kinds, newline)
        _split_contractions(
            begins, codes, np.flatnonzero(lone & ~_after(blank) & (codes == ord("'")) & _before(letter))
        )
        return begins


def _after(marked: np.ndarray) -> np.ndarray:
    """Whether the character before is marked."""
    shifted = np.empty_like(marked)
    shifted[:1], shifted[1:] = False, marked[:-1]
    return shifted


def _before(marked: np.ndarray) -> np.ndarray:
    """Whether the character after is marked."""
    shifted = np.empty_like(marked)
    shifted[-1:], shifted[:-1] = False, marked[1:]
    return shifted


def _split_spaces(begins: np.ndarray, kinds: np.ndarray, newline: np.ndarray) -> None:
    """The words within runs of spaces: up to the last line end; then all but the last space, if anything follows."""
    space = kinds == SPACE
    last = np.flatnonzero(space & _after(space) & ~newline & ~_before(space))
    begins[last[kinds[last + 1] != END]] = True
    ends = np.flatnonzero(newline)
    if not len(ends):
        return
    run = np.cumsum(space & ~_after(space), dtype=np.int32)[ends]
    begins[ends[np.append(run[1:] != run[:-1], True)] + 1] = True
    first, final = ends[~newline[ends - 1]], ends[~newline[ends + 1]]  # of each run; the last character is a NUL
    begins[final[(first > 0) & (kinds[first - 1] == OTHER)] + 1] = True  # they belong to the punctuation before


def _split_contractions(begins: np.ndarray, codes: np.ndarray, quotes: np.ndarray) -> None:
    """Begin a word after 's 't 'm 'd 're 've 'll. quotes: where a single quote begins a word and a letter follows."""
    first, second = codes[quotes + 1], codes[quotes + 2]
    begins[quotes[_is_in(first, "sStTmMdD\u017f")] + 2] = True
    pairs = _is_in(first, "rRvV") & _is_in(second, "eE") | _is_in(first, "lL") & _is_in(second, "lL")
    begins[quotes[pairs] + 3] = True


def _is_in(codes: np.ndarray, characters: str) -> np.ndarray:
    return np.isin(codes, [ord(character) for character in characters])


def _members(pattern: str) -> np.ndarray:
    """Code points of a class of the library's regular expressions, from the library's own Unicode tables."""
    only = pre_tokenizers.Split(Regex(f"[^{pattern}]+"), "removed")
    blocks = ((1, 0xD800), (0xE000, 0x10000), EMOJI)
    found = "".join(run for block in blocks for run, _ in only.pre_tokenize_str("".join(map(chr, range(*block)))))
    return np.frombuffer(found.encode("utf-32-le"), np.uint32)


class Borders:
    """Where a word can be cut with the same ids: between two characters that no token spans, not even in part.

    A merge makes a token of the vocabulary, so without such a token none crosses the border, and both sides merge as
    they would alone. A token may begin or end within a character; the character on its other side then counts as one
    that is never cut from its neighbours. Words in ASCII repeat: they are kept whole.
    """

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        pairs, left_any, right_any = _spanned(token_bytes)
        characters = sorted({ord(character) for pair in pairs for character in pair})
        kinds = np.zeros(0x110000, np.uint16)  # 0 to 3: + 1 never cut from what comes after, + 2 from what is before
        kinds[left_any] += 1
        kinds[right_any] += 2
        kinds[:0x80] = 3
        classes = np.concatenate([np.arange(4, dtype=np.uint16), kinds[characters]])
        kinds[characters] = np.arange(4, 4 + len(characters))  # of a character that is in a pair
        self._class = kinds.astype(np.int32)
        self._count = len(classes)
        self._spanned = (classes & 1 > 0)[:, None] | (classes & 2 > 0)[None]  # [C, C], the class before and after
        ends = np.array([[ord(first), ord(second)] for first, second in pairs], np.int64).reshape(-1, 2)
        self._spanned[self._class[ends[:, 0]], self._class[ends[:, 1]]] = True

    def cuts(self, codes: np.ndarray) -> np.ndarray:
        """bool [N]: whether the text can be cut before each character but the first. codes: uint32 [N]."""
        classes = self._class[codes]
        cuts = np.zeros(len(codes), bool)
        at = classes[:-1] * self._count  # below 2³¹: a vocabulary has some ten thousand characters at most
        at += classes[1:]
        np.logical_not(self._spanned.ravel()[at], out=cuts[1:])
        return cuts


def _spanned(token_bytes: Sequence[bytes]) -> tuple[set[tuple[str, str]], list[int], list[int]]:
    """Pairs of characters that a token spans; and code points that may be spanned with anything after, or before."""
    pairs: set[tuple[str, str]] = set()
    left_any: set[int] = set()
    right_any: set[int] = set()
    for token in token_bytes:
        if len(token) < 2 or token.isascii():
            continue
        if text := _text(token):
            pairs.update(itertools.pairwise(text))
            continue
        for left, right in _sides(token):
            one, other = _text(left), _text(right)
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


def _text(raw: bytes) -> str:
    """The characters of these bytes; empty if they begin or end within one."""
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
