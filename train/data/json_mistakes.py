"""Every mistake in JSON text that the reader reports: what was found, what was expected, and the remedy.

One function per mistake. `at` is its offset in the text, in characters.
"""

from train.data.problems import TextProblem, visible

INPUT_METHOD = "type it with the Chinese input method off"
LOOK_BEFORE = "look at the quotes and brackets just before"
FOREIGN_WORDS = {  # words of Python or JavaScript
    "True": "write true",
    "False": "write false",
    "None": "write null",
    "NaN": 'an empty cell? Write "", or delete the row',
}

# The file


def not_utf8(at: int, byte: int, byte_offset: int, gb18030: bool) -> TextProblem:
    remedy = "save the file as UTF-8" + (": iconv -f GB18030 -t UTF-8 OLD > NEW" if gb18030 else "")
    return TextProblem(at, f"byte 0x{byte:02X} (byte {byte_offset} of the file), which is not UTF-8", "UTF-8", remedy)


def no_rows() -> TextProblem:
    return TextProblem(0, "no row", "at least one row in one of the four formats", "write questions and answers to it")


def not_json(at: int, found: str) -> TextProblem:
    remedy = "write rows like these, in UTF-8, to a .jsonl file"
    return TextProblem(at, found, "{ or [, and one of the four formats", remedy)


def rest_not_read(at: int, size: int) -> TextProblem:
    remedy = "correct what is listed, and check again. One row a line (JSONL) is always read to the end"
    return TextProblem(at, f"the end of what was read: a file of {size / 1e9:.1f} GB with a mistake", "none", remedy)


# Rows


def second_array(at: int) -> TextProblem:
    remedy = "make one array of all: replace this [ and the ] before it by a comma"
    return TextProblem(at, "a second array of rows", "one array, or one row a line (JSONL)", remedy)


def list_on_line(at: int, turns: bool) -> TextProblem:
    shape = '{"messages": [ … ]}' if turns else '{"instruction": "the question", "output": "the answer"}'
    found = f"a list on each line ({'of turns' if turns else 'of texts'})"
    return TextProblem(at, found, "an object in { } on each line", f"write each line as {shape}")


def rows_of_several_lines(at: int) -> TextProblem:
    remedy = "put [ before the first row, ] after the last and a comma between each two"
    return TextProblem(at, "more after a row of several lines", "one row a line (JSONL), or an array of rows", remedy)


def not_a_row(at: int, character: str) -> TextProblem:
    return TextProblem(at, f"{character!r}", "a row", "delete it")


def after_the_array(at: int, found: str) -> TextProblem:
    return TextProblem(at, found, "nothing after the ] of the array", "delete it, or move it before the ]")


def comma_after_line(at: int, expected: str) -> TextProblem:
    remedy = "delete the comma: in JSONL each line is a row of its own"
    return TextProblem(at, "',' after the row", expected, remedy)


def second_row_on_line(at: int, expected: str) -> TextProblem:
    return TextProblem(at, "a second row", expected, "start a new line here: in JSONL each line is one row")


def after_the_row(at: int, found: str, expected: str) -> TextProblem:
    return TextProblem(at, found, expected, "delete it")


# Between values


def comment(at: int, text: str) -> TextProblem:
    return TextProblem(
        at, f"a comment {text[:24]!r}", "JSON, which has no comments", "delete the comment", kind="comment"
    )


def odd_space(at: int, character: str) -> TextProblem:
    found = f"a space character {visible(character)}"
    return TextProblem(at, found, "an ordinary space or none", "delete it", kind="space")


def full_width_comma(at: int) -> TextProblem:
    return TextProblem(at, "a full-width comma '，'", "','", INPUT_METHOD, kind="full-width")


def full_width_colon(at: int) -> TextProblem:
    return TextProblem(at, "a full-width colon '：'", "':'", INPUT_METHOD, kind="full-width")


def extra_comma(at: int, expected: str) -> TextProblem:
    return TextProblem(at, "','", expected, "delete this comma")


def trailing_comma(at: int, bracket: str) -> TextProblem:
    found = f"a trailing comma before {bracket}"
    return TextProblem(at, found, "no comma after the last one", "delete the comma")


def missing_comma(at: int, found: str) -> TextProblem:
    return TextProblem(at, found, "',' before it", "put a comma after the value before")


def no_separator(at: int, found: str, bracket: str) -> TextProblem:
    return TextProblem(at, found, f"',' or {bracket}", LOOK_BEFORE)


def missing_colon(at: int, found: str, key: str) -> TextProblem:
    return TextProblem(at, found, f"':' after the key {key!r}", "put a colon between key and value")


# Brackets


def missing_bracket(at: int, found: str, bracket: str, name: str) -> TextProblem:
    return TextProblem(at, found, f"the {bracket} that closes {name}", f"put a {bracket} where {name} ends")


def missing_brace_before_object(at: int) -> TextProblem:
    remedy = "put a } where that object ends"
    return TextProblem(at, "'{'", "a key, or the } of the object before", remedy)


def unfinished_row(at: int) -> TextProblem:
    return TextProblem(at, "the next row", "the ] and } that close this one", "put them before it")


def too_deep(at: int, depth: int) -> TextProblem:
    remedy = "delete this row or write it anew"
    return TextProblem(at, f"brackets {depth} deep", "a row of one of the four formats", remedy)


# Keys and values


def no_key(at: int, found: str) -> TextProblem:
    return TextProblem(at, found, "a key in double quotes", LOOK_BEFORE)


def bare_key(at: int, key: str) -> TextProblem:
    return TextProblem(at, f"{key!r} without quotes", "a key in double quotes", f'write "{key}"', kind="bare key")


def repeated_key(at: int, key: str) -> TextProblem:
    return TextProblem(at, f'the key "{key}" a second time', "each key once", "delete or rename one of the two")


def no_value(at: int, found: str) -> TextProblem:
    return TextProblem(at, found, "a value", "write the value, or delete what leads up to it")


def bare_word(at: int, word: str) -> TextProblem:
    remedy = FOREIGN_WORDS.get(word, 'put text in double quotes: "…"')
    return TextProblem(at, f"{word[:24]!r} without quotes", "a JSON value", remedy)


def word_for_a_row(at: int, word: str) -> TextProblem:
    return TextProblem(at, f"{word[:24]!r} without quotes", "a row, an object in { }", "delete it, or make it a row")


# Strings


def unclosed_string(at: int, end: str) -> TextProblem:
    return TextProblem(at, "a string that is not closed", f'its closing " before {end}', "close the string")


def unclosed_string_at_line_end(at: int) -> TextProblem:
    remedy = "close the string; a line break in a text is written \\n"
    return TextProblem(at, "the end of the line inside a string", 'the closing "', remedy)


def quote_in_string(at: int) -> TextProblem:
    remedy = 'write \\" for a quote inside a string, or close the string before it'
    return TextProblem(at, "a double quote inside a string", 'it written \\"', remedy, kind="inner quote")


def bad_escape(at: int, found: str) -> TextProblem:
    expected, remedy = r"an escape of JSON: \n \t \" \\ \uXXXX", r"write \\ for a backslash"
    return TextProblem(at, f"{found} in a string", expected, remedy, kind="escape")


def control_character(at: int, character: str) -> TextProblem:
    name = {"\n": "a line break", "\r": "a line break", "\t": "a tab"}.get(character, "a control character")
    written = {"\n": r"\n", "\r": r"\n", "\t": r"\t"}.get(character, f"\\u{ord(character):04x}")
    remedy = f"write {written}, or close the string before it"
    return TextProblem(at, f"{name} inside a string", f"it written {written}", remedy, kind=name)


def other_quotes(at: int, text: str, quote: str) -> TextProblem:
    if quote == "'":
        name, remedy = "single quotes", "write the file with json.dump, not with str() or print()"
    else:
        name, remedy = f"typographic quotes {quote}", "type them with the input method off"
    return TextProblem(at, f"{text[:20]!r} in {name}", 'double quotes "…"', remedy, kind=name)
