"""The tokenizer against tiktoken, both published files, and damaged ones."""

import base64
import hashlib
import importlib.util
import json
import random
import unicodedata
from pathlib import Path

import pytest
import tiktoken
from tokenizers import normalizers

from train.common.errors import UserError
from train.model.tiktoken_file import read_tiktoken, recover_merges
from train.model.tokenizer import (
    PATTERN,
    QWEN_CONTROL,
    Tokenizer,
    load_tokenizer,
    write_qwen1_tokenizer,
)

PUBLISHED = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
MATERIAL = """
The quick brown fox didn't jump; it'll wait, they've said, 'cause I'M TIRED and you'RE not.
Training on 3.14159 tokens/s costs $1,234,567.89 (about 12.5 %) on 2026-11-22T13:37:00Z.
今天天气很好，我们去公园散步吧。你会说中文吗？数据共有８６５８行，第①行有误！
機器學習是人工智慧的一個分支；深度學習又是機器學習的一種。「引號」與——破折號……
日本語のテキスト：カタカナ、ひらがな、漢字。ﾊﾝｶｸも。 한국어 문장도 있습니다. 값은 100원.
Привет, мир! Γειά σου Κόσμε. שָׁלוֹם עוֹלָם. مرحبا بالعالم ١٢٣. नमस्ते दुनिया १२३। สวัสดีชาวโลก
def forward(self, x: Tensor) -> Tensor:\n    return self.c_proj(self.w1(x) * F.silu(self.w2(x)))
for (int i = 0; i < n; ++i) {\r\n\tsum += a[i] << 2;\r\n}\t// done\r\n
SELECT id, name FROM users WHERE age >= 21 AND name LIKE '%o''Brien%';  -- comment
<html><body class="x">&nbsp;</body></html> {"key": [1, 2.5e-3, null, true], "k2": "v\\n"}
😀 👍🏽 👩‍👩‍👧‍👦 🇨🇳 🏳️‍🌈 ✈️ ☺ e\u0301 \u212b \ufb01 ﬁ ½ Ⅷ 㐀 𠀀 \U0001d54f \u200d\u200b\ufeff
café naïve Ångström ﬀ ǆ ẛ̣ 가각 \u1100\u1161\u11a8 a\u0315\u0300\u05ae\u0300\u0062 ‘quotes’ “double” — – …
<|im_start|>user\nhello<|im_end|> <|endoftext|> <|extra_0|> <| im_end |>
   spaces     many\n\n\n\tand\ttabs   \n   trailing   \r\r\n  \u3000全角\u00a0nbsp\u2028line\u0085next
aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa          ======================== --------- ......... !!!???
"""
BYTES = {bytes([n]): n for n in range(256)}
# Characters that this Python's Unicode has: in newer ones the regex tables of the libraries differ (see tokenizer.py).
ASSIGNED = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
MARKS = [c for c in ASSIGNED if unicodedata.combining(c)]


def lines(count: int, seed: int = 7) -> list[str]:
    """`count` lines of pieces of MATERIAL, random code points, combining marks, digits and spaces."""
    rng = random.Random(seed)

    def piece() -> str:
        start = rng.randrange(len(MATERIAL))
        return rng.choice(
            [
                lambda: MATERIAL[start : start + rng.randrange(1, 60)],
                lambda: MATERIAL[start : start + rng.randrange(1, 60)],
                lambda: "".join(rng.choices(ASSIGNED, k=rng.randrange(1, 8))),
                lambda: rng.choice("aeonAEO가あ") + "".join(rng.choices(MARKS, k=rng.randrange(1, 4))),
                lambda: "".join(rng.choices("0123456789.,٣８", k=rng.randrange(1, 12))),
                lambda: "".join(rng.choices(" \t\n\r\u3000\u00a0\u0085\u2028\x0b\x1c", k=rng.randrange(1, 6))),
                lambda: "'" + rng.choice(["s", "S", "ſ", "T", "re", "LL", "Ve", "d", "m"]),
                lambda: chr(rng.randrange(0x4E00, 0x9FA6)) * rng.randrange(1, 4),
            ]
        )()

    return ["".join(piece() for _ in range(rng.randrange(1, 7))) for _ in range(count)]


def tiktoken_file(ranks: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(word) + f" {rank}\n".encode() for word, rank in ranks.items())


@pytest.fixture(scope="module")
def published() -> Path:
    """The folder of qwen.tiktoken, in an installed package that is never imported."""
    spec = importlib.util.find_spec("dashscope")
    assert spec is not None, "the test section of env.lock installs dashscope"
    folder = Path(str(spec.origin)).parent / "resources"
    assert hashlib.sha256((folder / "qwen.tiktoken").read_bytes()).hexdigest() == PUBLISHED
    return folder


@pytest.fixture(scope="module")
def tokenizer(published: Path) -> Tokenizer:
    return load_tokenizer(published)


@pytest.fixture(scope="module")
def oracle(published: Path) -> tiktoken.Encoding:
    ranks = read_tiktoken(published / "qwen.tiktoken")
    return tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


def test_ten_thousand_lines_have_the_ids_of_tiktoken_and_decode_again(
    tokenizer: Tokenizer, oracle: tiktoken.Encoding
) -> None:
    for line in lines(10_000):
        normal = unicodedata.normalize("NFC", line)
        ids = tokenizer.encode(line)
        assert ids == oracle.encode_ordinary(normal), repr(line)
        assert tokenizer.decode(ids) == normal


def test_control_tokens_are_outside_the_vocabulary(tokenizer: Tokenizer) -> None:
    assert (tokenizer.endoftext, tokenizer.im_start, tokenizer.im_end) == (151643, 151644, 151645)
    assert tokenizer.pad == tokenizer.endoftext
    assert tokenizer.control["<|extra_204|>"] == 151850
    assert tokenizer.vocab_size == 151851
    assert tokenizer.stop_ids == (151645, 151643)


def test_a_typed_control_token_stays_text(tokenizer: Tokenizer) -> None:
    for name in QWEN_CONTROL:
        ids = tokenizer.encode(f"a{name}b")
        assert max(ids) < 151643
        assert tokenizer.decode(ids) == f"a{name}b"


def test_decode_shows_control_tokens_only_on_request(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.im_start, *tokenizer.encode("hi"), tokenizer.im_end]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_control=False) == "<|im_start|>hi<|im_end|>"


def test_half_a_character_and_rows_without_a_token(tokenizer: Tokenizer) -> None:
    first, *rest = tokenizer.encode("𓀀")
    assert rest
    assert tokenizer.decode([first]) == "\ufffd"
    assert tokenizer.bytes_of(151_900) == b""
    assert tokenizer.decode([151_900]) == ""
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_saved_and_read_again_the_ids_are_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.control == tokenizer.control
    assert again.vocab_size == tokenizer.vocab_size
    for line in lines(1_000, seed=8):
        assert again.encode(line) == tokenizer.encode(line)
    write_qwen1_tokenizer(again, tmp_path)
    assert hashlib.sha256((tmp_path / "qwen.tiktoken").read_bytes()).hexdigest() == PUBLISHED
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "QWenTokenizer"
    first = (tmp_path / "tokenizer.json").read_bytes()
    again.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == first


def test_stock_transformers_reads_what_is_saved(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer.save(tmp_path)
    stock = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert (stock.eos_token_id, stock.pad_token_id) == (tokenizer.im_end, tokenizer.pad)
    compared = [
        line for line in lines(400, seed=9) if "<|" not in line and _old_marks_only(line)
    ]  # stock parses "<|…|>"
    assert len(compared) > 300
    for line in compared:
        assert stock(line).input_ids == tokenizer.encode(line)
    assert stock("<|im_start|>").input_ids == [tokenizer.im_start]


def _old_marks_only(line: str) -> bool:
    """Whether the library's NFC, which has fewer combining marks, agrees with Python's, which is the published one."""
    return normalizers.NFC().normalize_str(line) == unicodedata.normalize("NFC", line)


def test_merges_as_lists_and_unknown_keys_are_read(tmp_path: Path) -> None:
    """Newer files (Qwen3) write merges as pairs."""
    (tmp_path / "qwen.tiktoken").write_bytes(tiktoken_file(BYTES | {b"ab": 256, b"abc": 257}))
    old = load_tokenizer(tmp_path)
    old.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"] |= {"merges": [m.split(" ") for m in content["model"]["merges"]], "ignore_merges": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "qwen.tiktoken").unlink()
    assert load_tokenizer(tmp_path).encode("abcab") == old.encode("abcab") == [257, 256]


def test_only_the_merge_that_can_happen_is_recovered() -> None:
    """abc could be a+bc or ab+c; ab comes first, so bc never forms inside it."""
    ranks = BYTES | {b"ab": 256, b"bc": 257, b"abc": 258}
    assert recover_merges(ranks) == [("a", "b"), ("b", "c"), ("ab", "c")]
    with pytest.raises(KeyError):
        recover_merges(BYTES | {b"xyz": 256})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"IQ== 0\n!!! 1\n", ":2: not a tiktoken vocabulary: found b'!!! 1'"),
        (b"IQ==\n", ":1: not a tiktoken vocabulary"),
        (b"IQ== 0\nIQ== 1\n", ":2: .*repeated"),
        (b"IQ== 0\nIg== 5\n", ":2: .*rank 5 where 1 is expected"),
        (b"IQ== 0\n", ":2: .*without a token for the byte 0x00"),
        (tiktoken_file(BYTES | {b"xyz": 256}), ":257: .*cannot be merged"),
    ],
)
def test_a_damaged_tiktoken_file_is_reported_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"tokenizer.json:1:2: not JSON: the file is cut off"),
        ("[]", r"tokenizer.json: holds a list"),
        ("{}", "not a tokenizer.json"),
        ("", "tokenizer.json: empty"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a pointer of Git LFS.*git lfs pull"),
        ('{"model": {"type": "Unigram"}, "pre_tokenizer": null}', "not a byte-level BPE"),
    ],
)
def test_a_damaged_tokenizer_json_is_reported(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_or_with_another_chat_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer: expected qwen\.tiktoken or tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "qwen.tiktoken").write_bytes(tiktoken_file(BYTES))
    load_tokenizer(tmp_path).save(tmp_path)
    (tmp_path / "qwen.tiktoken").unlink()
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"] = content["added_tokens"][:1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"no control token <\|im_start\|>"):
        load_tokenizer(tmp_path)
