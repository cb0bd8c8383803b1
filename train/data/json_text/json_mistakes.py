"""Every mistake in JSON text that the reader reports: what was found, what was expected, the remedy, the correction.

One function per mistake. `at` is its offset in the text, in characters. A mistake with one possible correction carries
it as `change` and `edits` (see repair.py); what only a person can tell has none.
"""

from collections.abc import Sequence

from train.data.rows.problems import Edit, TextProblem, visible

INPUT_METHOD = "type it with the Chinese input method off"
LOOK_BEFORE = "look at the quotes and brackets just before"
FOREIGN_WORDS = {  # words of Python or JavaScript
    "True": "write true",
    "False": "write false",
    "None": "write null",
    "NaN": 'an empty cell? Write "", or delete the row',
}
TRUE, FALSE = ("True", "TRUE"), ("False", "FALSE")
NULL = ("None", "NULL", "Null", "nil", "undefined", "NaN", "nan", "NaT", "<NA>", "Infinity", "-Infinity", "inf", "-inf")
JSON_WORDS = {**dict.fromkeys(TRUE, "true"), **dict.fromkeys(FALSE, "false"), **dict.fromkeys(NULL, "null")}
NEWLINE_ROWS = "each row on a line of its own"

# The file


def not_utf8(at: int, byte: int, byte_offset: int, encoding: str) -> TextProblem:
    """A byte that is not UTF-8. `encoding`: of its line, where that can be told."""
    name = {"gb18030": "GB18030", "cp1252": "WINDOWS-1252"}.get(encoding, "")
    remedy = "save the file as UTF-8" + (f": iconv -f {name} -t UTF-8 OLD > NEW" if name else "")
    found = f"byte 0x{byte:02X} (byte {byte_offset} of the file), which is not UTF-8"
    change = f"{name or encoding.upper()} to UTF-8" if encoding else ""
    return TextProblem(at, found, "UTF-8", remedy, change=change)


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
    return TextProblem(
        at,
        "a second array of rows",
        "one array, or one row a line (JSONL)",
        remedy,
        file_kind="second array",
        change="several arrays to lines",
    )


def list_on_line(at: int, turns: bool) -> TextProblem:
    shape = '{"messages": [ … ]}' if turns else '{"instruction": "the question", "output": "the answer"}'
    found = f"a list on each line ({'of turns' if turns else 'of texts'})"
    remedy, change = f"write each line as {shape}", "a list of turns to a row" if turns else ""
    return TextProblem(at, found, "an object in { } on each line", remedy, file_kind="list on a line", change=change)


def rows_of_several_lines(at: int) -> TextProblem:
    remedy = "put [ before the first row, ] after the last and a comma between each two"
    return TextProblem(
        at,
        "more after a row of several lines",
        "one row a line (JSONL), or an array of rows",
        remedy,
        file_kind="rows of several lines",
        change=NEWLINE_ROWS,
    )


def row_of_several_lines(at: int) -> TextProblem:
    remedy = "write it on one line; a line break in a text is written \\n"
    expected = "one row a line (JSONL), or an array of rows"
    return TextProblem(
        at, "a row of several lines", expected, remedy, file_kind="rows of several lines", change=NEWLINE_ROWS
    )


def assignment(at: int, text: str) -> TextProblem:
    found, remedy = f"{text[:24]!r} before the rows", "delete it"
    return TextProblem(at, found, "rows alone", remedy, change="program text around the rows deleted")


def not_a_row(at: int, character: str) -> TextProblem:
    change = "stray bracket or comma deleted" if character in tuple(",，;；}]｝］)") else ""
    return TextProblem(at, f"{character!r}", "a row", "delete it", change=change)


def after_the_array(at: int, found: str, empty: bool) -> TextProblem:
    """More after the array. `empty`: brackets and commas alone."""
    change = "stray bracket or comma deleted" if empty else ""
    remedy = "delete it, or move it before the ]"
    return TextProblem(at, found, "nothing after the ] of the array", remedy, change=change)


def comma_after_line(at: int, expected: str) -> TextProblem:
    remedy = "delete the comma: in JSONL each line is a row of its own"
    return TextProblem(at, "',' after the row", expected, remedy, change="comma between lines deleted")


def second_row_on_line(at: int, expected: str) -> TextProblem:
    remedy = "start a new line here: in JSONL each line is one row"
    return TextProblem(at, "a second row", expected, remedy, change=NEWLINE_ROWS)


def after_the_row(at: int, found: str, expected: str, empty: bool) -> TextProblem:
    """More after the row of a line. `empty`: brackets, commas and semicolons alone."""
    change = "stray bracket or comma deleted" if empty else ""
    return TextProblem(at, found, expected, "delete it", change=change)


def code_fence(at: int, text: str) -> TextProblem:
    found = f"{text[:24]!r}, the mark of a code block"
    return TextProblem(
        at, found, "rows alone", "delete it", "fence", "", "mark of a code block deleted", _cut(at, text)
    )


# Between values


def comment(at: int, text: str, clear: bool) -> TextProblem:
    """`clear`: it ends where it seems to, and swallows no row."""
    change = "comment deleted" if clear else ""
    found, expected = f"a comment {text[:24]!r}", "JSON, which has no comments"
    return TextProblem(at, found, expected, "delete the comment", "comment", "", change, _cut(at, text))


def odd_space(at: int, text: str) -> TextProblem:
    found = f"a space character {visible(text[0])}"
    change = "odd space or invisible character deleted"
    return TextProblem(at, found, "an ordinary space or none", "delete it", "space", "", change, _cut(at, text))


def other_separator(at: int, character: str, meant: str) -> TextProblem:
    """A full-width comma or colon, a semicolon, or => in place of a comma or a colon."""
    name = {"，": "a full-width comma '，'", "：": "a full-width colon '：'"}.get(character, repr(character))
    full_width = character in "，：；、"
    remedy = INPUT_METHOD if full_width else f"write {meant}"
    kind = "full-width" if full_width else "separator"
    edits = (Edit(at, at + len(character), meant),)
    return TextProblem(at, name, repr(meant), remedy, kind, "", f"{character} to {meant}", edits)


def full_width_bracket(at: int, character: str, meant: str) -> TextProblem:
    found = f"a full-width bracket {character!r}"
    edits = (Edit(at, at + 1, meant),)
    return TextProblem(at, found, repr(meant), INPUT_METHOD, "full-width", "", "full-width bracket to ASCII", edits)


def tuple_of_python(start: int, stop: int, closed: bool) -> TextProblem:
    """A Python tuple: its brackets are at `start` and before `stop`. `closed`: the second one is a round one too."""
    edits = (Edit(start, start + 1, "["), Edit(stop - 1, stop, "]"))
    return TextProblem(
        start, "'(', a tuple of Python", "a list in [ ]", "write [ ]", "tuple", "", "( ) to [ ]" * closed, edits
    )


def extra_comma(at: int, expected: str) -> TextProblem:
    return TextProblem(
        at, "','", expected, "delete this comma", change="extra comma deleted", edits=(Edit(at, at + 1),)
    )


def trailing_comma(at: int, bracket: str) -> TextProblem:
    found, expected = f"a trailing comma before {bracket}", "no comma after the last one"
    edits = (Edit(at, at + 1),)
    return TextProblem(at, found, expected, "delete the comma", change="trailing comma deleted", edits=edits)


def missing_comma(at: int, found: str, stop: int) -> TextProblem:
    """`stop`: the end of the value before."""
    remedy, edits = "put a comma after the value before", (Edit(stop, stop, "," if stop < at else ", "),)
    return TextProblem(at, found, "',' before it", remedy, change="comma added", edits=edits)


def no_separator(at: int, found: str, bracket: str) -> TextProblem:
    return TextProblem(at, found, f"',' or {bracket}", LOOK_BEFORE)


def missing_colon(at: int, found: str, key: str, stop: int) -> TextProblem:
    """`stop`: the end of the key."""
    remedy, edits = "put a colon between key and value", (Edit(stop, stop, ":" if stop < at else ": "),)
    return TextProblem(at, found, f"':' after the key {key!r}", remedy, change="colon added", edits=edits)


# Brackets


def missing_bracket(at: int, found: str, bracket: str, name: str, comma: int | None, cut: bool) -> TextProblem:
    """`comma`: the offset of a comma just before, if there is one. `cut`: the file ends within a row."""
    remedy, change = f"put a {bracket} where {name} ends", "" if cut else f"{bracket} added"
    before = () if comma is None else (Edit(comma, comma + 1),)
    edits = (*before, Edit(at, at, bracket))
    return TextProblem(at, found, f"the {bracket} that closes {name}", remedy, change=change, edits=edits)


def missing_brace_before_object(at: int, comma: int | None, in_list: bool) -> TextProblem:
    """`in_list`: the object is an element of a list, and the next `{` begins the one after it."""
    closing = "}," if in_list else "}"
    edits = (Edit(at, at, closing),) if comma is None else (Edit(comma, comma + 1, closing),)
    remedy = "put a } where that object ends"
    return TextProblem(at, "'{'", "a key, or the } of the object before", remedy, change="} added", edits=edits)


def unfinished_row(at: int, comma: int | None, closing: str) -> TextProblem:
    """`closing`: the brackets that the row lacks."""
    edits = (Edit(at, at, closing),) if comma is None else (Edit(comma, comma + 1, closing),)
    expected, remedy = "the ] and } that close this one", "put them before it"
    return TextProblem(at, "the next row", expected, remedy, change=f"{closing} added", edits=edits)


def unclear_row(at: int) -> TextProblem:
    return TextProblem(at, "a row that is not JSON", "a row of one of the four formats", "write it anew")


def too_deep(at: int, depth: int) -> TextProblem:
    remedy = "delete this row or write it anew"
    return TextProblem(at, f"brackets {depth} deep", "a row of one of the four formats", remedy)


# Keys and values


def no_key(at: int, found: str) -> TextProblem:
    return TextProblem(at, found, "a key in double quotes", LOOK_BEFORE)


def bare_key(at: int, key: str, stop: int) -> TextProblem:
    found, edits = f"{key!r} without quotes", (Edit(at, stop, f'"{key}"'),)
    change = "double quotes around a key"
    return TextProblem(at, found, "a key in double quotes", f'write "{key}"', "bare key", "", change, edits)


def python_prefix(at: int, letter: str) -> TextProblem:
    found, expected = f"{letter!r} before a string, as Python prints it", "the string alone"
    return TextProblem(
        at, found, expected, "delete it", "prefix", "", "Python's u before a string deleted", _cut(at, "u")
    )


def repeated_key(at: int, key: str, again: Edit | None) -> TextProblem:
    """`again`: deletes the second one, if both have the same value."""
    found, remedy = f'the key "{key}" a second time', "delete or rename one of the two"
    change = "second key with the same value deleted" if again else ""
    return TextProblem(at, found, "each key once", remedy, change=change, edits=(again,) if again else ())


def no_value(at: int, found: str) -> TextProblem:
    return TextProblem(at, found, "a value", "write the value, or delete what leads up to it")


def bare_word(at: int, word: str, number: bool) -> TextProblem:
    """A word that JSON does not have. `number`: it is written like a number or a date: 007, 2024-01-31."""
    remedy = FOREIGN_WORDS.get(word, 'put text in double quotes: "…"')
    meant = JSON_WORDS.get(word) or (f'"{word}"' if number else "")
    change = f"{word if word in JSON_WORDS else 'number or date'} to {meant if word in JSON_WORDS else 'text'}"
    edits = (Edit(at, at + len(word), meant),) if meant else ()
    return TextProblem(
        at, f"{word[:24]!r} without quotes", "a JSON value", remedy, change=change if meant else "", edits=edits
    )


def word_for_a_row(at: int, word: str) -> TextProblem:
    return TextProblem(at, f"{word[:24]!r} without quotes", "a row, an object in { }", "delete it, or make it a row")


# Strings


def unclosed_string(at: int, end: str) -> TextProblem:
    return TextProblem(at, "a string that is not closed", f'its closing " before {end}', "close the string")


def unclosed_string_at_line_end(at: int) -> TextProblem:
    remedy = "close the string; a line break in a text is written \\n"
    return TextProblem(at, "the end of the line inside a string", 'the closing "', remedy)


def quotes_in_string(inner: Sequence[int], clear: bool) -> TextProblem:
    """Double quotes inside a string, at these offsets. `clear`: none of them can be the end of the string."""
    remedy = 'write \\" for a quote inside a string, or close the string before it'
    found, expected = "a double quote inside a string", 'it written \\"'
    change, edits = 'quote inside a text written \\"', tuple(Edit(at, at, "\\") for at in inner)
    return TextProblem(inner[0], found, expected, remedy, "inner quote", "", change if clear else "", edits)


def bad_escape(at: int, found: str, clear: bool) -> TextProblem:
    """`clear`: the backslash itself was meant, or \\' for an apostrophe."""
    expected, remedy = r"an escape of JSON: \n \t \" \\ \uXXXX", r"write \\ for a backslash"
    edits = (Edit(at, at + 1),) if found == "\\'" else (Edit(at, at, "\\"),)
    change = "backslash before ' deleted" if found == "\\'" else "backslash doubled"
    return TextProblem(at, f"{found} in a string", expected, remedy, "escape", "", change if clear else "", edits)


def latex_escape(at: int, word: str, clear: bool) -> TextProblem:
    """A LaTeX command that JSON reads as an escape and letters, beside others that it refuses."""
    found, expected = f"{word} in a string, which JSON reads as an escape and {word[2:]!r}", "a command of LaTeX"
    change = "backslash doubled" if clear else ""
    return TextProblem(at, found, expected, r"write \\ for a backslash", "escape", "", change, (Edit(at, at, "\\"),))


def control_character(at: int, character: str, clear: bool) -> TextProblem:
    """`character`: a control character, or the two of a Windows line end. `clear`: it is in a text, not in a key."""
    name = {"\n": "a line break", "\r": "a line break", "\t": "a tab"}.get(character[0], "a control character")
    written = {"\n": r"\n", "\r": r"\n", "\t": r"\t"}.get(character[0], f"\\u{ord(character[0]):04x}")
    remedy = f"write {written}, or close the string before it"
    found, expected = f"{name} inside a string", f"it written {written}"
    change = f"{name} inside a text written as its escape" if clear else ""
    return TextProblem(at, found, expected, remedy, name, "", change, (Edit(at, at + len(character), written),))


def other_quotes(at: int, text: str, quote: str, stop: int, written: str) -> TextProblem:
    """A string in quotes that JSON does not have, up to `stop`. `written`: as JSON; empty if its end is unclear."""
    if quote == "'":
        name, remedy = "single quotes", "write the file with json.dump, not with str() or print()"
    else:
        name, remedy = f"typographic quotes {quote}", "type them with the input method off"
    change, edits = f"{name} to double quotes" if written else "", (Edit(at, stop, written),)
    return TextProblem(at, f"{text[:20]!r} in {name}", 'double quotes "…"', remedy, name, "", change, edits)


def _cut(at: int, text: str) -> tuple[Edit, ...]:
    return (Edit(at, at + len(text)),)
