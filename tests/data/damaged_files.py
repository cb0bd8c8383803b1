"""Kinds of damage that people report of their data files, and what `make data FIX=1` makes of each.

Collected from what users of fine-tuning programs report: "Expecting property name enclosed in double quotes", "Extra
data", "Invalid control character", "Invalid \\escape", "Column() changed from object to array", "codec can't decode
byte", KeyError: 'from'.
"""

from dataclasses import dataclass, field

GOOD = '{"instruction": "q", "output": "a"}'
NEXT = '{"instruction": "r", "output": "b"}'
QWEN = '{"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]}'
OPENAI = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'


@dataclass(frozen=True)
class Damage:
    """A broken file."""

    raw: str | bytes
    places: list[tuple[int, int]]  # (line, column) of each problem that the reader reports
    rows: list[str]  # of the mended file; of a file with something left, those of PARTIAL=1
    left: list[tuple[int, int]] = field(default_factory=list)  # what only a person can tell

    @property
    def bytes(self) -> bytes:
        return self.raw.encode() if isinstance(self.raw, str) else self.raw


DAMAGE: dict[str, Damage] = {
    # Quotes
    "python repr": Damage("{'instruction': 'q', 'output': 'a'}\n", [(1, 2)], [GOOD]),
    "python repr with an apostrophe": Damage("{'instruction': \"it's\", 'output': 'say \"hi\"'}\n", [(1, 2)], ['{"instruction": "it\'s", "output": "say \\"hi\\""}']),
    "python repr with escapes": Damage(r"""{'instruction': 'it\'s 5\\6', 'output': 'one\ntwo\x41\u4f60'}"""+"\n", [(1, 2)], ['{"instruction": "it\'s 5\\\\6", "output": "one\\ntwoA你"}']),
    "apostrophe in single quotes": Damage("{'instruction': 'it's', 'output': 'the dogs' bowl'}\n", [(1, 2)], ['{"instruction": "it\'s", "output": "the dogs\' bowl"}']),
    "python 2 repr": Damage("{u'instruction': u'\\u4f60', u'output': u'a'}\n", [(1, 2), (1, 3)], ['{"instruction": "你", "output": "a"}']),
    "python constants": Damage('{"instruction": "q", "input": None, "output": "a", "good": True, "bad": False}\n', [(1, 31), (1, 60), (1, 73)], ['{"instruction": "q", "input": null, "output": "a", "good": true, "bad": false}']),
    "python tuples": Damage("{'instruction': 'q', 'output': 'a', 'history': [('b', 'c')]}\n", [(1, 2), (1, 49)], ['{"instruction": "q", "output": "a", "history": [["b", "c"]]}']),
    "typographic quotes": Damage("{“instruction”: “q”, “output”: “a”}\n", [(1, 2)], [GOOD]),
    "typographic single quotes": Damage("{‘instruction’: ‘q’, ‘output’: ‘a’}\n", [(1, 2)], [GOOD]),
    "full-width quotes": Damage("{＂instruction＂: ＂q＂, ＂output＂: ＂a＂}\n", [(1, 2)], [GOOD]),
    "backticks": Damage('{"instruction": `q`, "output": `a`}\n', [(1, 17)], [GOOD]),
    "bare keys": Damage('{instruction: "q", output: "a"}\n', [(1, 2)], [GOOD]),
    "half-quoted key": Damage('{instruction": "q", "output": "a"}\n', [(1, 2)], [GOOD]),
    "quotes inside a text": Damage('{"instruction": "say "hi" now", "output": "a"}\n', [(1, 22)], ['{"instruction": "say \\"hi\\" now", "output": "a"}']),
    "chinese quotes inside a text": Damage('{"instruction": "他说"你好"，然后走了", "output": "a"}\n', [(1, 20)], ['{"instruction": "他说\\"你好\\"，然后走了", "output": "a"}']),
    "quotes at the end of a text": Damage('{"instruction": "say "hi"", "output": "a"}\n', [(1, 22)], ['{"instruction": "say \\"hi\\"", "output": "a"}']),
    "quotes with commas inside a text": Damage('{"instruction": "say "yes", "no" or so", "output": "a"}\n', [(1, 22), (1, 40)], [], left=[(1, 22)]),
    "no closing quote": Damage('{"instruction": "q, "output": "a"}\n'+NEXT+"\n", [(1, 1), (1, 21)], [NEXT], left=[(1, 21)]),
    "no opening quote": Damage('{"instruction": q", "output": "a"}\n'+NEXT+"\n", [(1, 17), (1, 18)], [NEXT], left=[(1, 17), (1, 18)]),
    "text without quotes": Damage('{"instruction": what is it, "output": "a"}\n', [(1, 17), (1, 22)], [], left=[(1, 17), (1, 22)]),
    "word without quotes": Damage('{"instruction": "q", "output": yes}\n', [(1, 32)], [], left=[(1, 32)]),
    # Commas and colons
    "trailing comma in a row": Damage('{"instruction": "q", "output": "a",}\n', [(1, 35)], [GOOD]),
    "trailing comma in an array": Damage(f"[\n{GOOD},\n{NEXT},\n]\n", [(3, 36)], [GOOD, NEXT]),
    "trailing commas of lines": Damage(f"{GOOD},\n{NEXT},\n", [(1, 36), (2, 36)], [GOOD, NEXT]),
    "missing comma in a row": Damage('{"instruction": "q" "output": "a"}\n', [(1, 21)], [GOOD]),
    "missing comma between rows": Damage(f"[{GOOD}\n{NEXT}]", [(2, 1)], [GOOD, NEXT]),
    "two commas": Damage(f"[{GOOD},,{NEXT}]", [(1, 38)], [GOOD, NEXT]),
    "comma first": Damage(f"[,{GOOD},{NEXT}]", [(1, 2)], [GOOD, NEXT]),
    "missing colon": Damage('{"instruction" "q", "output": "a"}\n', [(1, 16)], [GOOD]),
    "equals sign": Damage('{"instruction"="q", "output" => "a"}\n', [(1, 15)], ['{"instruction":"q", "output" : "a"}']),
    "semicolons": Damage('{"instruction": "q"; "output": "a"};\n', [(1, 20), (1, 36)], [GOOD]),
    "full-width comma and colon": Damage('{"instruction"： "q"， "output"："a"}\n', [(1, 15)], ['{"instruction": "q", "output":"a"}']),
    "full-width brackets": Damage('｛"instruction": "q", "output": "a"｝\n', [(1, 1)], [GOOD]),
    "enumeration comma": Damage('{"instruction": "q"、 "output": "a"}\n', [(1, 20)], [GOOD]),
    # Brackets, and files that were cut
    "missing brace": Damage(f'[{{"instruction": "q", "output": "a",\n{NEXT}]', [(2, 1)], [GOOD, NEXT]),
    "missing brace of a line": Damage(f'{{"instruction": "q", "output": "a"\n{NEXT}\n', [(1, 35)], [GOOD, NEXT]),
    "missing bracket of turns": Damage(QWEN[:-2]+"}\n", [(1, 87)], [QWEN]),
    "missing end of turns": Damage(f"[{QWEN[:-2]},\n{QWEN}]", [(2, 1)], [QWEN, QWEN]),
    "missing brace of a turn": Damage('{"messages": [{"role": "user", "content": "q", {"role": "assistant", "content": "a"}]}\n', [(1, 48)], [OPENAI]),
    "missing end of the array": Damage(f"[{GOOD},\n{NEXT}\n", [(3, 1)], [GOOD, NEXT]),
    "missing start of the array": Damage(f"{GOOD},\n{NEXT}\n]\n", [(1, 36), (3, 1)], [GOOD, NEXT]),
    "brace too many": Damage(f"[{GOOD}}},\n{NEXT}]", [(1, 37)], [GOOD, NEXT]),
    "brace too many in a line": Damage(f"{GOOD}}}\n{NEXT}\n", [(1, 36)], [GOOD, NEXT]),
    "bracket too many": Damage(f"[{GOOD},{NEXT}]]", [(1, 74)], [GOOD, NEXT]),
    "cut in a text": Damage(f'[{GOOD},\n{{"instruction": "r", "outp', [(2, 22), (2, 27)], [GOOD], left=[(2, 22)]),
    "cut line": Damage(f'{GOOD}\n{{"instruction": "r", "output": "b"', [(2, 35)], [GOOD], left=[(2, 35)]),
    "cut in turns": Damage(f'{OPENAI}\n{OPENAI[:-2]}', [(2, 86), (2, 86)], [OPENAI], left=[(2, 86), (2, 86)]),
    # Arrays and lines, and what is around them
    "two rows on a line": Damage(f"{GOOD} {NEXT}\n", [(1, 37)], [GOOD, NEXT]),
    "rows without anything between": Damage(f"{GOOD}{NEXT}", [(1, 36)], [GOOD, NEXT]),
    "rows of several lines": Damage('{\n  "instruction": "q",\n  "output": "a"\n}\n{\n  "instruction": "r",\n  "output": "b"\n}\n', [(5, 1)], [GOOD, NEXT]),
    "row of several lines among lines": Damage(f'{GOOD}\n{{\n  "instruction": "r",\n  "output": "b"\n}}\n', [(2, 1)], [GOOD, NEXT]),
    "two arrays": Damage(f"[{GOOD}]\n[{NEXT}]\n", [(2, 1)], [GOOD, NEXT]),
    "an array on each line": Damage(f"[{GOOD}]\n[{NEXT}]\n[{GOOD}]\n", [(2, 1)], [GOOD, NEXT, GOOD]),
    "list of turns on each line": Damage('[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]\n'*2, [(1, 1)], [OPENAI, OPENAI]),
    "list of texts on each line": Damage('["q", "a"]\n["r", "b"]\n', [(1, 1)], [], left=[(1, 1)]),
    "rows in a list in a list": Damage(f"[[{GOOD}, {NEXT}]]", [(1, 2)], [GOOD, NEXT]),
    "rows below a key": Damage(f'{{"version": "1.0", "data": [{GOOD}, {NEXT}]}}', [(1, 1)], [GOOD, NEXT]),
    "rows below two keys": Damage(f'{{"train": [{GOOD}], "test": [{NEXT}]}}', [(1, 1)], [], left=[(1, 1)]),
    "columns of pandas": Damage('{"instruction": {"0": "q", "1": "r"}, "output": {"0": "a", "1": "b"}}', [(1, 17), (1, 49)], [GOOD, NEXT]),
    "columns as lists": Damage('{"instruction": ["q", "r"], "output": ["a", "b"]}', [(1, 39)], [GOOD, NEXT]),
    "row after the array": Damage(f"[{GOOD}]\n{NEXT}\n", [(2, 1)], [GOOD], left=[(2, 1)]),
    "JSON written twice": Damage('"{\\"instruction\\": \\"q\\", \\"output\\": \\"a\\"}"\n', [(1, 1)], [GOOD]),
    "turns as a text": Damage('{"messages": "[{\\"role\\": \\"user\\", \\"content\\": \\"q\\"}, {\\"role\\": \\"assistant\\", \\"content\\": \\"a\\"}]"}\n', [(1, 14)], [OPENAI]),
    "turns as a text of Python": Damage('{"conversations": "[{\'from\': \'human\', \'value\': \'q\'}, {\'from\': \'gpt\', \'value\': \'a\'}]"}\n', [(1, 19)], ['{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}']),
    "a variable of JavaScript": Damage(f"const data = [{GOOD}];\n", [(1, 1), (1, 51)], [GOOD]),
    "code block of a chat": Damage(f"```json\n[{GOOD}]\n```\n", [(1, 1), (3, 1)], [GOOD]),
    "comments": Damage(f"// mine\n{GOOD} // first\n# second\n{NEXT}\n", [(1, 1), (2, 37), (3, 1)], [GOOD, NEXT]),
    "block comment": Damage(f"[/* two\n lines */{GOOD}]", [(1, 2)], [GOOD]),
    "block comment without end": Damage(f"[{GOOD}, /* {NEXT}]", [(1, 39)], [GOOD, NEXT], left=[(1, 39)]),
    "comment that hides a row": Damage(f"[{GOOD}, // {NEXT}]\n", [(1, 39)], [GOOD, NEXT], left=[(1, 39)]),
    "marks of a merge": Damage(f"<<<<<<< HEAD\n{GOOD}\n=======\n{NEXT}\n>>>>>>> mine\n", [(1, 1), (3, 1), (5, 1)], [GOOD, NEXT], left=[(1, 1), (3, 1), (5, 1)]),
    "numbered lines": Damage(f"1. {GOOD}\n2. {NEXT}\n", [(1, 1)], [], left=[(1, 1)]),
    "a word among lines": Damage(f"{GOOD}\nhello\n{NEXT}\n", [(2, 1)], [GOOD, NEXT], left=[(2, 1)]),
    "an ellipsis among rows": Damage(f"[{GOOD}, ..., {NEXT}]", [(1, 39)], [GOOD, NEXT], left=[(1, 39)]),
    "null among rows": Damage(f"[{GOOD}, null]", [(1, 39)], [GOOD], left=[(1, 39)]),
    # Texts
    "line break in a text": Damage('[{"instruction": "one\ntwo", "output": "a"}]', [(1, 22)], ['{"instruction": "one\\ntwo", "output": "a"}']),
    "line break in a text of a line": Damage(f'{{"instruction": "one\ntwo", "output": "a"}}\n{NEXT}\n', [(1, 21)], ['{"instruction": "one\\ntwo", "output": "a"}', NEXT]),
    "windows line break in a text": Damage('{"instruction": "one\r\ntwo", "output": "a"}\r\n', [(1, 21)], ['{"instruction": "one\\ntwo", "output": "a"}']),
    "tab in a text": Damage('{"instruction": "one\ttwo", "output": "a"}\n', [(1, 21)], ['{"instruction": "one\\ttwo", "output": "a"}']),
    "control character in a text": Damage('{"instruction": "one\x0btwo\x00", "output": "a"}\n', [(1, 21)], ['{"instruction": "one\\u000btwo\\u0000", "output": "a"}']),
    "backslashes": Damage('{"instruction": "\\d+ in C:\\data\\new", "output": "a"}\n', [(1, 18)], ['{"instruction": "\\\\d+ in C:\\\\data\\\\new", "output": "a"}']),
    "LaTeX": Damage('{"instruction": "$\\alpha \\frac{1}{2} \\times \\beta$\\nWhy?", "output": "a"}\n', [(1, 19)], ['{"instruction": "$\\\\alpha \\\\frac{1}{2} \\\\times \\\\beta$\\nWhy?", "output": "a"}']),
    "doubtful LaTeX": Damage('{"instruction": "$\\alpha \\nu$", "output": "a"}\n', [(1, 19)], [], left=[(1, 26)]),
    "escaped apostrophe": Damage('{"instruction": "it\\\'s", "output": "a"}\n', [(1, 20)], ['{"instruction": "it\'s", "output": "a"}']),
    "half an escape": Damage('{"instruction": "\\u4f", "output": "a"}\n', [(1, 18)], [], left=[(1, 18)]),
    "half a character": Damage('{"instruction": "\\ud83d", "output": "a"}\n', [(1, 17)], [], left=[(1, 17)]),
    # Values
    "NaN of pandas": Damage('{"instruction": "q", "input": NaN, "output": "a"}\n', [(1, 31)], ['{"instruction": "q", "input": null, "output": "a"}']),
    "NaN as an answer": Damage('{"instruction": "q", "output": NaN}\n', [(1, 32)], [], left=[(1, 32)]),
    "infinity in a key of no use": Damage('{"instruction": "q", "output": "a", "score": Infinity, "rank": -Infinity}\n', [(1, 46), (1, 64)], ['{"instruction": "q", "output": "a", "score": null, "rank": null}']),
    "number as an answer": Damage('{"instruction": "q", "output": 42}\n', [(1, 32)], ['{"instruction": "q", "output": "42"}']),
    "decimal as an answer": Damage('{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": 3.10}]}\n', [(1, 82)], ['{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "3.10"}]}']),
    "number with zeros as an answer": Damage('{"instruction": "q", "output": 007}\n', [(1, 32)], ['{"instruction": "q", "output": "007"}']),
    "date without quotes": Damage('{"instruction": "q", "output": 2024-01-31}\n', [(1, 32)], ['{"instruction": "q", "output": "2024-01-31"}']),
    "true as an answer": Damage('{"instruction": "q", "output": true}\n', [(1, 32)], [], left=[(1, 32)]),
    "null as an answer": Damage('{"instruction": "q", "output": null}\n', [(1, 32)], [], left=[(1, 32)]),
    "empty answer": Damage('{"instruction": "q", "output": ""}\n', [(1, 32)], [], left=[(1, 32)]),
    "missing value": Damage('{"instruction": "q", "output": }\n', [(1, 32)], [], left=[(1, 32)]),
    "list of one answer": Damage('{"instruction": "q", "output": ["a"]}\n', [(1, 32)], [GOOD]),
    "several answers": Damage('{"instruction": "q", "output": ["a", "b"]}\n', [(1, 32)], [], left=[(1, 32)]),
    "empty list as input": Damage('{"instruction": "q", "input": [], "output": "a", "history": ""}\n', [(1, 31), (1, 61)], ['{"instruction": "q", "input": "", "output": "a", "history": []}']),
    "list of one question": Damage('{"messages": [{"role": "user", "content": ["q"]}, {"role": "assistant", "content": "a"}]}\n', [(1, 43)], [OPENAI]),
    "a key twice, the same": Damage('{"instruction": "q", "output": "a", "output": "a"}\n', [(1, 37)], [GOOD]),
    "a key twice, two values": Damage('{"instruction": "q", "output": "a", "output": "b"}\n', [(1, 37)], [], left=[(1, 37)]),
    "number beside question and answer": Damage('{"question": "q", "answer": 42}\n', [(1, 29)], ['{"instruction": "q", "output": "42"}']),
    "Chinese keys in Chinese punctuation": Damage('{“问题”：“q”，“回答”：“a”}\n', [(1, 2), (1, 6)], ['{"问题":"q","回答":"a"}']),
    "keys in capitals": Damage('{"Instruction": "q", " Output ": 42}\n', [(1, 34)], ['{"instruction": "q", "output": "42"}']),
    "two candidates for the question": Damage('{"prompt": "q", "query": "r", "output": "a"}\n', [(1, 26)], [], left=[(1, 26)]),
    "invisible character in a key": Damage('{"instruction\u200b": "q", "output": "a"}\n', [(1, 1)], [GOOD]),
    "input and output": Damage('{"input": "q", "output": "a"}\n', [(1, 1)], [GOOD]),
    "two candidates for the answer": Damage('{"instruction": "q", "answer": "a", "response": "b"}\n', [(1, 49)], [], left=[(1, 49)]),
    "misspelt key": Damage('{"instuction": "q", "output": "a"}\n', [(1, 1)], [], left=[(1, 1)]),
    "unknown keys": Damage('{"title": "q", "body": "a"}\n', [(1, 1)], [], left=[(1, 1)]),
    "conversations with role and content": Damage(OPENAI.replace("messages","conversations")+"\n", [(1, 19)], [OPENAI]),
    "messages with from and value": Damage(QWEN.replace("conversations","messages")+"\n", [(1, 14)], [QWEN]),
    "from and content": Damage('{"messages": [{"from": "user", "content": "q"}, {"role": "assistant", "value": "a"}]}\n', [(1, 15), (1, 49)], [OPENAI]),
    "roles of another tool": Damage('{"conversations": [{"from": "Human", "value": "q"}, {"from": "bot", "value": "a"}]}\n', [(1, 29), (1, 62)], [QWEN]),
    "role model": Damage('{"messages": [{"role": "user", "content": "q"}, {"role": "model", "content": "a"}]}\n', [(1, 58)], [OPENAI]),
    "role with spaces": Damage('{"messages": [{"role": " user", "content": "q"}, {"role": "Assistant ", "content": "a"}]}\n', [(1, 24), (1, 59)], [OPENAI]),
    "role developer": Damage('{"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n', [(1, 24)], ['{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}']),
    "unknown role": Damage('{"messages": [{"role": "narrator", "content": "q"}, {"role": "assistant", "content": "a"}]}\n', [(1, 24)], [], left=[(1, 24)]),
    "two questions in a row": Damage('{"messages": [{"role": "user", "content": "q"}, {"role": "user", "content": "r"}, {"role": "assistant", "content": "a"}]}\n', [(1, 58)], [], left=[(1, 58)]),
    "no answer last": Damage('{"messages": [{"role": "user", "content": "q"}]}\n', [(1, 24)], [], left=[(1, 24)]),
    # Bytes, and characters that nobody sees
    "GBK": Damage('{"instruction": "你好吗", "output": "很好"}\n'.encode("gbk"), [(1, 18)], ['{"instruction": "你好吗", "output": "很好"}']),
    "GB18030 with an emoji": Damage('{"instruction": "你好😀吗", "output": "很好"}\n'.encode("gb18030"), [(1, 18)], ['{"instruction": "你好😀吗", "output": "很好"}']),
    "a line of GBK": Damage(GOOD.encode()+b'\n'+'{"instruction": "你好吗", "output": "很好"}\n'.encode("gbk")+'{"instruction": "再见", "output": "好"}\n'.encode(), [(2, 18)], [GOOD, '{"instruction": "你好吗", "output": "很好"}', '{"instruction": "再见", "output": "好"}']),
    "GBK with another mistake": Damage("{'instruction': '你好吗', 'output': '很好',}\n".encode("gbk"), [(1, 2), (1, 18), (1, 38)], ['{"instruction": "你好吗", "output": "很好"}']),
    "UTF-16": Damage((GOOD+"\n").encode("utf-16"), [(1, 1)], [GOOD]),
    "UTF-16 without BOM": Damage('{"instruction": "你", "output": "好"}\n'.encode("utf-16-le"), [(1, 1)], ['{"instruction": "你", "output": "好"}']),
    "UTF-32": Damage((GOOD+"\n").encode("utf-32"), [(1, 1)], [GOOD]),
    "Windows quotes": Damage(GOOD.encode()+b'\n{"instruction": "it\x92s \x93so\x94", "output": "a"}\n', [(2, 20)], [GOOD, '{"instruction": "it’s “so”", "output": "a"}']),
    "Latin-1": Damage('{"instruction": "café", "output": "a"}\n'.encode("latin-1"), [(1, 21)], [], left=[(1, 21)]),
    "Big5": Damage('{"instruction": "請問感冒了應該怎麼辦", "output": "多喝水"}\n'.encode("big5"), [(1, 18)], [], left=[(1, 18)]),
    "emoji in halves": Damage(b'{"instruction": "\xed\xa0\xbd\xed\xb8\x80", "output": "a"}\n', [(1, 18)], ['{"instruction": "😀", "output": "a"}']),
    "half a character at the end of a text": Damage('{"instruction": "你'.encode()[:-1]+b'", "output": "a"}\n', [(1, 18)], [], left=[(1, 18)]),
    "BOM in the middle": Damage(f"{GOOD}\n\ufeff{NEXT}\n", [(2, 1)], [GOOD, NEXT]),
    "line separator between rows": Damage(f"{GOOD}\u2028{NEXT}\n", [(1, 36), (1, 37)], [GOOD, NEXT]),
    "full-width space": Damage(f"[{GOOD},\u3000{NEXT}]", [(1, 38)], [GOOD, NEXT]),
    "no-break spaces": Damage('{"instruction":\u00a0"q",\u00a0"output": "a"}\n', [(1, 16)], ['{"instruction":"q","output": "a"}']),
    "zeros at the end": Damage(GOOD+"\n"+"\0"*8, [(2, 1)], [GOOD]),
    "end mark of DOS": Damage(GOOD+"\n\x1a", [(2, 1)], [GOOD]),
}  # fmt: skip
