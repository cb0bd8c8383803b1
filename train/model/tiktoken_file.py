"""qwen.tiktoken, the vocabulary that Qwen-1 publishes, and the library's byte-level BPE that merges as tiktoken does.

Knows bytes, ranks and merges; nothing of control tokens and folders.
"""

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from train.common.errors import UserError
from train.model.base_files import DamagedFileError
from train.model.text_pieces import PATTERN

PUBLISHED_FILE = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"  # sha256 of Qwen's qwen.tiktoken


def _byte_chars() -> dict[int, str]:
    """GPT-2's printable character for each byte: Latin-1 where it is printable, else U+0100 and following (68 of them)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + n) for n, byte in enumerate(others)}}


BYTE_TO_CHAR = _byte_chars()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


@dataclass(frozen=True)
class PublishedTokens:
    """The bytes of each id of the qwen.tiktoken that Qwen publishes, from which the library's tokenizer can be made."""

    tokens: list[bytes]

    def backend(self) -> tokenizers.Tokenizer:
        ranks = {token: rank for rank, token in enumerate(self.tokens)}
        return backend_of(ranks, recover_merges(ranks))


def byte_level_bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """Qwen's tokenizer from a vocabulary and merges, both in GPT-2's printable characters, without control tokens."""
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    to_chars = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_chars])
    backend.decoder = decoders.ByteLevel()
    return backend


def backend_of(ranks: dict[bytes, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    return byte_level_bpe({to_chars(token): rank for token, rank in ranks.items()}, merges)


def read_published(path: Path) -> PublishedTokens | None:
    """The tokens of a file with the bytes that Qwen publishes; None for any other, which needs a careful look."""
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != PUBLISHED_FILE:
        return None
    return PublishedTokens([base64.b64decode(line.partition(b" ")[0]) for line in content.splitlines()])


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
            raise damaged(path, expected, f"found {line[:40]!r}, expected base64, a space and a rank") from None
        if len(ranks) != expected + 1 or int(rank) != expected:
            raise damaged(path, expected, f"token repeated, or rank {int(rank)} where {expected} is expected")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise damaged(path, len(ranks), f"the file ends without a token for the byte {missing[0]:#04x}")
    return ranks


def damaged(path: Path, index: int, problem: str) -> UserError:
    return DamagedFileError(path, f"not a tiktoken vocabulary: {problem}", f":{index + 1}")


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
            merges.append((to_chars(parts[0]), to_chars(parts[1])))
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


def to_chars(token: bytes) -> str:
    return "".join(BYTE_TO_CHAR[byte] for byte in token)
