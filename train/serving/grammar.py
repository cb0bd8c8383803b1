"""Answers that must be JSON, or fit a JSON schema: which tokens may come next, by llguidance."""

from functools import lru_cache
from typing import Any

import llguidance
import numpy as np
import torch
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from torch import Tensor

from train.serving.tokens import Tokens

# Between the parts of a JSON text: a line end and an indent at most. Without a limit, a model that once begins with
# white space may write nothing else until its tokens are used up.
WHITE_SPACE = r"[ ]{1,16}|\n[ ]{0,16}"
MAX_SCHEMA = 100_000  # characters of a schema: llguidance compiles it before the answer begins


class GrammarError(ValueError):
    """A schema that llguidance cannot use; the text says why."""


class _Words:
    """The tokenizer as llguidance asks for it: the bytes of each id; control tokens are marked, so that no text is one."""

    def __init__(self, tokens: Tokens, end: int) -> None:
        self.eos_token_id, self.bos_token_id = end, None
        self.tokens = [
            (b"\xff" if tokens.is_control(n) else b"") + tokens.bytes_of(n) for n in range(tokens.vocab_size)
        ]
        self.special_token_ids = [n for n in range(tokens.vocab_size) if tokens.is_control(n)]
        self._encode = tokens.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


class Grammars:
    """Compiles grammars for one tokenizer. rows: those of the model's embedding, at least its vocabulary."""

    def __init__(self, tokens: Tokens, rows: int, end: int) -> None:
        wrapper = llguidance.TokenizerWrapper(_Words(tokens, end))
        self.tokenizer = llguidance.LLTokenizer(wrapper, n_vocab=rows, eos_token=end)
        self._compiled = lru_cache(maxsize=32)(_compile)

    def json_schema(self, schema: str) -> "Grammar":
        """For answers that fit the schema, a JSON text.

        Raises:
            GrammarError: it is no schema, or has parts that cannot be followed.
        """
        if len(schema) > MAX_SCHEMA:
            raise GrammarError(f"the schema has {len(schema):,} characters, the most are {MAX_SCHEMA:,}")
        try:
            matcher = llguidance.LLMatcher(self.tokenizer, self._compiled(schema))
        except Exception as error:  # the library raises plain classes
            raise GrammarError(str(error).splitlines()[0]) from None
        if matcher.is_error():
            raise GrammarError(matcher.get_error().splitlines()[0])
        return Grammar(matcher, self.tokenizer.vocab_size)


def _compile(schema: str) -> str:
    return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITE_SPACE})


class Grammar:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self.matcher = matcher
        self.bits = allocate_token_bitmask(1, vocabulary)

    def mask(self, logits: Tensor) -> None:
        """Set the logits [V] of tokens that may not come next to -inf."""
        fill_next_token_bitmask(self.matcher, self.bits)
        bits = np.unpackbits(self.bits.view(np.uint8), bitorder="little")[: len(logits)]
        allowed = np.zeros(len(logits), bool)
        allowed[: len(bits)] = bits
        logits.masked_fill_(~torch.from_numpy(allowed).to(logits.device), float("-inf"))

    def take(self, token: int) -> None:
        self.matcher.consume_token(token)


def any_object() -> str:
    """The schema of response_format json_object."""
    return '{"type": "object"}'
