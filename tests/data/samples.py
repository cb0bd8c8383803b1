"""Samples, conversations and a tokenizer for tests of data/."""

import random
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from train.data.checked.conversations import Conversation
from train.data.rows.formats import Turn
from train.data.tokens.samples import Sample


@dataclass
class Letters:
    """A tokenizer in which every character is a token."""

    im_start: int = 1
    im_end: int = 2
    endoftext: int = 3

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(token) if token > 3 else f"<{token}>" for token in ids)


def one_turn(question: str, answer: str, location: str = "f:1") -> Conversation:
    return Conversation((Turn("user", question), Turn("assistant", answer)), None, location)


def random_samples(lengths: list[int], draw: random.Random) -> list[Sample]:
    return [
        Sample(
            np.array([draw.randrange(10, 99) for _ in range(n)], np.int32),
            np.array([draw.randrange(2) for _ in range(n)], np.uint8),
            f"f:{number}",
        )
        for number, n in enumerate(lengths, 1)
    ]


def cases() -> list[tuple[list[Sample], dict[str, Any]]]:
    """Samples, and arguments of a Schedule for them; random but seeded."""
    draw = random.Random(3)
    cases = []
    for _ in range(60):
        length = draw.choice([8, 33, 128])
        samples = random_samples([draw.randint(1, length) for _ in range(draw.randint(1, 50))], draw)
        arguments = {"length": length, "rows_per_step": draw.randint(1, 7), "epochs": draw.choice([1, 2, 3.5, 0.2])}
        cases.append((samples, {**arguments, "seed": draw.randrange(10**6), "pack": draw.random() < 0.7}))
    return cases


WORKBOOK_PARTS = {
    "[Content_Types].xml": '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
    '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    '<Override PartName="/xl/workbook.xml" ContentType="{0}.sheet.main+xml"/>'
    '<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{0}.worksheet+xml"/>'
    '<Override PartName="/xl/sharedStrings.xml" ContentType="{0}.sharedStrings+xml"/></Types>'.format(
        "application/vnd.openxmlformats-officedocument.spreadsheetml"
    ),
    "_rels/.rels": '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
    '<Relationship Id="r1" Type="{}/officeDocument" Target="xl/workbook.xml"/></Relationships>'.format(
        "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    ),
    "xl/workbook.xml": '<workbook xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main" xmlns:r='
    '"http://schemas.openxmlformats.org/officeDocument/2006/relationships">'
    '<sheets><sheet name="Data" sheetId="1" r:id="r1"/></sheets></workbook>',
    "xl/_rels/workbook.xml.rels": '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
    '<Relationship Id="r1" Type="{0}/worksheet" Target="worksheets/sheet1.xml"/>'
    '<Relationship Id="r2" Type="{0}/sharedStrings" Target="sharedStrings.xml"/></Relationships>'.format(
        "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    ),
}


def write_shared_workbook(path: Path, rows: Iterable[Sequence[str]]) -> None:
    """A workbook as Excel saves it: each text is once in a table of shared strings (openpyxl writes it into its cell)."""
    numbers: dict[str, int] = {}
    main = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in WORKBOOK_PARTS.items():
            archive.writestr(name, text)
        with archive.open("xl/worksheets/sheet1.xml", "w") as sheet:
            sheet.write(f"<worksheet {main}><sheetData>".encode())
            for row, texts in enumerate(rows, 1):
                cells = (
                    f'<c r="{chr(65 + n)}{row}" t="s"><v>{numbers.setdefault(text, len(numbers))}</v></c>'
                    for n, text in enumerate(texts)
                )
                sheet.write(f'<row r="{row}">{"".join(cells)}</row>'.encode())
            sheet.write(b"</sheetData></worksheet>")
        with archive.open("xl/sharedStrings.xml", "w") as table:
            table.write(f"<sst {main}>".encode())
            for text in numbers:
                table.write(f'<si><t xml:space="preserve">{escape(text)}</t></si>'.encode())
            table.write(b"</sst>")
