"""Put into a Qwen-1 base as its tokenization_qwen.py, and run by llama.cpp's converter in an environment with tiktoken.

Imports nothing of this program. It has what the converter uses of the code that Qwen-1 checkpoints come with: the
ranks, the control tokens and ids of a text. `encode` knows no control tokens.
"""

import base64
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import tiktoken
from transformers import PreTrainedTokenizer, convert_slow_tokenizer

# The converter makes this table of 256 characters once for each token: six minutes in all
convert_slow_tokenizer.bytes_to_unicode = cache(convert_slow_tokenizer.bytes_to_unicode)

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205)))


class QWenTokenizer(PreTrainedTokenizer):
    """Qwen-1's tokenizer, under the names of its published class."""

    vocab_files_names: ClassVar = {"vocab_file": "qwen.tiktoken"}

    def __init__(self, vocab_file: str, **settings: Any) -> None:
        pairs = (line.split() for line in Path(vocab_file).read_bytes().splitlines())
        self.mergeable_ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        self.special_tokens = {name: n for n, name in enumerate(CONTROL, len(self.mergeable_ranks))}
        self.encoding = tiktoken.Encoding(
            "Qwen", pat_str=WORDS, mergeable_ranks=self.mergeable_ranks, special_tokens=self.special_tokens
        )
        super().__init__(**settings)

    @property
    def vocab_size(self) -> int:
        return int(self.encoding.n_vocab)

    def get_vocab(self) -> dict[bytes, int]:
        return self.mergeable_ranks

    def encode(self, text: str, **settings: Any) -> list[int]:
        return list(self.encoding.encode_ordinary(text))
