"""Bytes that are not all UTF-8: which encoding a line has, and where its first byte is that is not UTF-8."""

import pytest

from train.data.json_text.encodings import decode, decode_wide

HEAD = '{"instruction": "'
CHINESE = "请问感冒了怎么办"


def encodings_of(*lines: bytes) -> list[str]:
    return [bad.encoding for bad in decode(b"\n".join(lines))[1]]


@pytest.mark.parametrize("text", [CHINESE, "痤疮", "你好😀", "Python 是什么？", "聯合國和联合国的区别"])
def test_gb18030_is_read(text: str) -> None:
    assert decode(text.encode("gb18030"))[0] == text
    assert encodings_of(text.encode("gb18030")) == ["gb18030"]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("請問感冒了應該怎麼辦", "big5"),
        ("고양이는 생선을 먹는다. 하나 둘 셋 넷 다섯 여섯 일곱 여덟 아홉", "euc-kr"),
        ("猫は魚を食べて寝ます", "shift_jis"),
        ("猫は魚を食べて寝ます", "euc_jp"),
        ("кошка ест рыбу и спит", "cp1251"),
        ("für café naïve déjà vu", "latin-1"),
    ],
)
def test_other_encodings_are_not_guessed(text: str, encoding: str) -> None:
    read, bad = decode(text.encode(encoding))
    assert [one.encoding for one in bad] == [""] and "\ufffd" in read


def test_a_line_has_an_encoding_of_its_own() -> None:
    lines = [CHINESE.encode(), CHINESE.encode("gbk"), b"it\x92s", b"\xed\xa0\xbd\xed\xb8\x80", b"\xff\xfe", b"plain"]
    text, bad = decode(b"\r\n".join(lines))
    assert text.split("\r\n") == [CHINESE, CHINESE, "it’s", "😀", "\ufffd\ufffd", "plain"]
    assert [one.encoding for one in bad] == ["gb18030", "cp1252", "cesu-8", ""]
    assert [text[one.offset] for one in bad] == ["请", "’", "😀", "\ufffd"]
    raw = b"\r\n".join(lines)
    assert [raw[one.byte_offset] for one in bad] == [one.byte for one in bad]


def test_a_line_of_gbk_that_is_utf8_by_chance_goes_with_its_file() -> None:
    """The bytes of these two characters in GBK are two others in UTF-8."""
    chance = "目录".encode("gbk")
    assert chance.decode("utf-8") != "目录"
    assert decode(CHINESE.encode("gbk") + b"\n" + chance)[0] == f"{CHINESE}\n目录"
    assert decode(CHINESE.encode() + b"\n" + chance)[0] != f"{CHINESE}\n目录"  # beside UTF-8, it is that


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_wide_encodings(encoding: str) -> None:
    text, found = decode_wide(f'{HEAD}你", "output": "a"}}'.encode(encoding)) or ("", "")
    assert text == f'{HEAD}你", "output": "a"}}' and found.lower() == encoding


def test_what_is_not_wide() -> None:
    assert decode_wide(b'{"a": "\0"}') is None
    assert decode_wide("ab".encode("utf-16")) is None  # no JSON
    assert decode_wide('{"a": 1}'.encode("utf-16")[:-1]) is None  # cut
