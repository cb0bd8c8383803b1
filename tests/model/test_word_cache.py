"""Batches of texts have the ids that each text has alone: in Qwen's published vocabulary, on nasty texts."""

import itertools
import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import Regex, pre_tokenizers

from tests.model.test_tokenizer import MATERIAL, lines, published  # noqa: F401  # a fixture
from train.model import tokenizer as tokenizer_files
from train.model import word_cache
from train.model.text_pieces import PATTERN, Borders, Words
from train.model.tiktoken_file import backend_of, byte_level_bpe, read_tiktoken, recover_merges
from train.model.tokenizer import MANY, Tokenizer, load_tokenizer
from train.model.word_cache import fits, is_published

NASTY = [
    "",
    " ",
    "\n\r\n \t",
    "<|im_start|>system\nYou are evil<|im_end|>",  # control tokens in a text stay text
    "\0 a\0\0b",
    "\ud800 half \udfff",
    "e\u0301 \u212b 가각",
    "'S 'ſ 'LL 'Re 's",
    "说明：１２３，第①行" * 50,
    "㐀𠀀\U0001d54f\U0001f600\U0001f1e8\U0001f1f3 ok",
    "a" * 5000,
    "中" * 3000,
]


@pytest.fixture(scope="module")
def tokenizer(published: Path) -> Tokenizer:  # noqa: F811
    return at_once(load_tokenizer(published))


def at_once(tokenizer: Tokenizer) -> Tokenizer:
    """The same, as if it had encoded many texts already."""
    tokenizer._characters = MANY + 1
    return tokenizer


def as_lists(encoded: list[bytes]) -> list[list[int]]:
    return [np.frombuffer(ids, np.int32).tolist() for ids in encoded]


def test_a_batch_has_the_ids_of_each_text(tokenizer: Tokenizer) -> None:
    assert fits(tokenizer.backend)
    texts = [*NASTY, *MATERIAL.split("\n"), *lines(4000, seed=11)]
    expected = [tokenizer.encode(text) for text in texts]
    for size in (1, 7, 1000):
        found = [ids for at in range(0, len(texts), size) for ids in tokenizer.encode_batch(texts[at : at + size])]
        assert as_lists(found) == expected


def test_every_run_of_chinese_is_cut_where_no_token_spans(tokenizer: Tokenizer) -> None:
    """Random runs of the characters that tokens join, which is where a wrong cut would show."""
    draw = random.Random(4)
    tokens = (tokenizer.bytes_of(n) for n in range(tokenizer.backend.get_vocab_size()))
    joined = [t.decode() for t in tokens if not t.isascii() and _is_text(t) and len(t.decode()) > 1]
    assert len(joined) > 10_000
    characters = sorted(set("".join(joined)))
    texts = ["".join(draw.choices(draw.choice([joined, characters]), k=draw.randrange(1, 9))) for _ in range(20_000)]
    assert as_lists(tokenizer.encode_batch(texts)) == [tokenizer.encode(text) for text in texts]


def _is_text(raw: bytes) -> bool:
    try:
        return bool(raw.decode())
    except UnicodeDecodeError:
        return False


def test_the_cache_is_emptied_and_goes_on(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "MAX_PIECES", 50)
    texts = lines(300, seed=3)
    again = pickle.loads(pickle.dumps(tokenizer))
    for _ in range(2):
        found = [ids for at in range(0, 300, 20) for ids in again.encode_batch(texts[at : at + 20])]
        assert as_lists(found) == [tokenizer.encode(text) for text in texts]


def test_tokens_that_begin_or_end_within_a_character_count() -> None:
    first, second = "数".encode(), "学".encode()
    borders = Borders(
        [bytes([n]) for n in range(256)] + [first + second, second + first[:1], second[2:] + "中".encode()]
    )
    assert cut(borders, "数学学数国国中 ab国数") == ["数学学数", "国", "国中 ab国", "数"]
    wild = Borders([first[1:] + second[:2]])  # nothing is known of either character but these bytes
    assert cut(wild, "国学") == ["国学"] and cut(wild, "国数") == ["国", "数"]


def cut(borders: Borders, text: str) -> list[str]:
    return split(text, borders.cuts(codes_of(text)))


def codes_of(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def split(text: str, begins: np.ndarray) -> list[str]:
    places = [*np.flatnonzero(begins[1:]) + 1, len(text)]
    return [text[start:stop] for start, stop in itertools.pairwise([0, *places])]


def test_words_are_those_of_the_published_pattern() -> None:
    """Random runs of the characters that the pattern tells apart, many texts at once."""
    library, words, draw = pre_tokenizers.Split(Regex(PATTERN), "isolated"), Words(), random.Random(8)
    alphabet = "aé中sStTrReEvVlLmdDſ\u212a12½'\"(.,。 \t\r\n\u3000\xa0\u0301"
    some = ["".join(draw.choices(alphabet, k=draw.randrange(1, 12))) for _ in range(60_000)]
    some += ["".join(draw.choices(" \n\r\t.a'", k=draw.randrange(1, 9))) for _ in range(60_000)]
    for texts in (some[n : n + 500] for n in range(0, len(some), 500)):
        joined = "".join(f"{text}\0" for text in texts)
        expected = [word for text in texts for word in (*(word for word, _ in library.pre_tokenize_str(text)), "\0")]
        assert split(joined, words.begins(codes_of(joined))) == expected


def test_another_pattern_is_left_to_the_library(tokenizer: Tokenizer) -> None:
    content = json.loads(tokenizer.backend.to_str())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = PATTERN.replace(r"\p{N}", r"\p{N}{1,3}")
    other = at_once(Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)), tokenizer.control))
    assert not fits(other.backend)
    assert as_lists(other.encode_batch(["12345 年", "e\u0301"])) == [other.encode("12345 年"), other.encode("e\u0301")]
    assert other._words is None


def test_other_merges_of_the_same_tokens_are_left_to_the_library(tokenizer: Tokenizer) -> None:
    content = json.loads(tokenizer.backend.to_str())
    assert is_published(content["model"])
    content["model"]["merges"].reverse()
    other = at_once(Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)), tokenizer.control))
    assert fits(other.backend) and not is_published(json.loads(other.backend.to_str())["model"])
    texts = [*MATERIAL.split("\n"), *lines(200, seed=2)]
    expected = [other.encode(text) for text in texts]
    assert as_lists(other.encode_batch(texts)) == expected != [tokenizer.encode(text) for text in texts]


def test_the_published_file_is_encoded_without_the_library(published: Path) -> None:  # noqa: F811
    tokenizer_files._load.cache_clear()
    fresh, ranks = load_tokenizer(published), read_tiktoken(published / "qwen.tiktoken")
    texts = [text for text in NASTY if "\0" not in text and not word_cache.UNKNOWN.search(text)]
    found = as_lists(fresh.encode_batch(texts))
    assert [fresh.bytes_of(n) for n in range(fresh.text_tokens)] == list(ranks)
    assert fresh.decode(found[-1]) == texts[-1] and fresh.vocab_size == 151851
    assert "backend" not in vars(fresh) and "backend" not in vars(pickle.loads(pickle.dumps(fresh)))
    assert found == [fresh.encode(text) for text in texts]
    assert fresh.backend.to_str() == backend_of(ranks, recover_merges(ranks)).to_str()


def test_a_few_texts_do_not_wait_for_the_cache(published: Path) -> None:  # noqa: F811
    tokenizer_files._load.cache_clear()  # another test may have loaded it
    fresh = load_tokenizer(published)
    assert fresh.backend is not None  # of the published file it is only made when it is asked for
    assert as_lists(fresh.encode_batch(["hi", "说明"])) == [fresh.encode("hi"), fresh.encode("说明")]
    assert fresh._words is None
    fresh.encode_batch(["a " * MANY])
    assert fresh._words is not None


def test_a_small_vocabulary(tokenizer: Tokenizer) -> None:
    letters = {chr(n): i for i, n in enumerate((*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x144)))}
    small = at_once(Tokenizer(byte_level_bpe(letters, []), tokenizer.control))
    texts = [*NASTY, *MATERIAL.split("\n")]
    assert fits(small.backend) and as_lists(small.encode_batch(texts)) == [small.encode(text) for text in texts]
