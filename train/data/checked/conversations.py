"""The conversations of data files, checked.

This module knows files, and nothing of tokens, templates or models; what a row means is in formats.py. A file is
accepted as a whole or not at all: one report lists every problem in it. Only broken rows are read a second time, by a
slower parser. Texts are kept exactly: nothing is stripped, replaced or left out. Those of large data are not kept in
memory: whoever walks through them reads the files again.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from train.common.errors import UserError
from train.common.processes import cores, in_processes
from train.data.checked.checked_data import (
    CheckedData,
    Conversation,
    Parse,
    PartCount,
    ProblemsError,
    report,
)
from train.data.checked.counts import Counts
from train.data.files import readers
from train.data.json_text import json_mistakes
from train.data.json_text.json_stream import Block, NotPlainError
from train.data.origins import drawing
from train.data.origins.sources import Part, hash_data, parts, short_name
from train.data.rows import pair_rows
from train.data.rows.data_row import GUESS, DataRow, ReadOptions
from train.data.rows.dataset_rows import LayoutReader
from train.data.rows.formats import ParsedRow, Turn
from train.data.rows.problems import Problem, merge_kinds
from train.data.streams.streamed import Streamed, in_batches, join, take

__all__ = ["CheckedData", "Conversation", "PartCount", "ProblemsError", "ReadOptions", "Turn", "report"]

MAX_PROBLEMS = 100_000  # of a file, after which it is not read on: they take memory, and nobody reads them
ROWS_PER_CALL = 1000  # of on_progress
KEPT = 32_000_000  # bytes of files up to which the conversations stay in memory; of larger ones they are read again

OnProgress = Callable[[str, float], None]  # (file, fraction of it that is read, 0 to 1)


# Reading


def training_data(record: dict[str, Any]) -> tuple[Sequence[Conversation], str]:
    """The conversations that a run was trained on, and the name of the data; none if a file is missing or has changed.

    Args:
        record: run.json.
    """
    data = record["data"]["path"]
    name = short_name(data)
    try:
        recipe = record["recipe"]
        keep_empty = "empty" in recipe.get("clean", "").split(",")
        pairs = recipe.get("loss", "sft") == "dpo"
        options = ReadOptions(recipe.get("columns", ""), seed=recipe.get("seed", 0), pairs=pairs, keep_empty=keep_empty)
        return (load(data, options), name) if hash_data(data)["sha256"] == record["data"]["sha256"] else ([], name)
    except UserError:  # a file is missing; or it was accepted when the run began, and this program is stricter now
        return [], name


def load(data: str | Path, options: ReadOptions = GUESS) -> Sequence[Conversation]:
    """Every conversation of DATA (see sources.py), in order.

    Raises:
        UserError: no such file, or the report of all problems of all files.
    """
    return read(data, options).conversations


def read(data: str | Path, options: ReadOptions = GUESS, on_progress: OnProgress | None = None) -> CheckedData:
    """DATA without problems (see sources.py): its conversations, and what a person should know of them.

    Args:
        options: of the recipe: names of columns, and the seed for parts that are drawn from.
    Raises:
        UserError: no such file.
        ProblemsError: the report of all problems of all files.
    """
    checked = check(data, on_progress, options)
    if checked.problems:
        raise ProblemsError(checked)
    return checked


def check(data: str | Path, on_progress: OnProgress | None = None, options: ReadOptions = GUESS) -> CheckedData:
    """Read all files of DATA (see sources.py) and collect their conversations and their problems.

    Args:
        options: of the recipe: names of columns, and the seed for parts that are drawn from.
    Raises:
        UserError: no such file.
    """
    checked, found = CheckedData(), parts(data)
    options = _of_all_files(options, found)
    keep = sum(path.stat().st_size for path in options.files) <= KEPT
    used = []
    for part in found:
        one = _PartReader(part, options).check(on_progress, keep)
        used.append(_draw(part, one, options.seed))
        checked.merge(one)
    checked.conversations = join(used)
    return checked


def restore(data: str | Path, options: ReadOptions, stored: dict[str, Any]) -> CheckedData:
    """What reading DATA gave, from CheckedData.to_json; the files are known to be the same, and are not read yet."""
    checked, found = CheckedData.from_json(stored), parts(data)
    all_options, used = _of_all_files(options, found), []
    for part, count in zip(found, checked.parts, strict=True):
        stream = _PartReader(part, all_options).stream(count.read)
        used.append(_drawn_when_needed(stream, part, count.used, options.seed) if part.draws else stream)
    checked.conversations = join(used)
    return checked


def _drawn_when_needed(stream: Streamed[Conversation], part: Part, count: int, seed: int) -> Streamed[Conversation]:
    """The rows that are drawn from a part. Which they are is only known when all of them have been read."""

    @cache
    def drawn() -> Sequence[Conversation]:
        return take(stream, drawing.draw_rows(stream, part.draws, seed))

    def number(row: int) -> Hashable:
        found = drawn()
        assert isinstance(found, Streamed)
        return found.number(row)

    return Streamed(lambda: iter(drawn()), count, number=number)


def _of_all_files(options: ReadOptions, found: Sequence[Part]) -> ReadOptions:
    return replace(options, files=tuple(path for part in found for path in part.files))


def _draw(part: Part, one: CheckedData, seed: int) -> Sequence[Conversation]:
    """The conversations of a part that are used; its counts become theirs."""
    rows = one.conversations
    if part.draws and not one.problems:
        drawn = drawing.draw_rows(rows, part.draws, seed)
        if len(rows) and not len(drawn):
            raise UserError(f"data {part.text}: this takes none of its {len(rows):,} rows. Take more, or leave it out.")
        used = take(rows, drawn)
        one.counts = count(used)
        one.parts.append(PartCount(part.text, len(rows), len(used)))
        return used
    one.parts.append(PartCount(part.text, len(rows), len(rows)))
    return rows


def count(conversations: Sequence[Conversation]) -> Counts:
    """Counts of conversations. A row that is taken several times is no copy of another."""
    found, seen = Counts(), set[Hashable]()
    for row, conversation in enumerate(conversations):
        number = conversations.number(row) if isinstance(conversations, Streamed) else id(conversation)
        found.add(conversation, is_new=number not in seen)
        seen.add(number)
    return found


def duplicates(conversations: Sequence[Conversation]) -> int:
    """How many conversations are exact copies of an earlier one; a row that is drawn several times is one."""
    return count(conversations).duplicates()


# One part of DATA


@dataclass(frozen=True)
class _PartReader:
    """Reads the files of a part."""

    part: Part
    options: ReadOptions

    def _layout(self) -> tuple[ReadOptions, LayoutReader | None]:
        if self.part.layout is None:
            return self.options, None
        self._check_kind(self.part.layout.ranking)
        reader = LayoutReader(self.part.layout, self.part.name, self.part.origin)
        return replace(self.options, columns="", named=reader.roles_of_columns()), reader

    def _check_kind(self, ranking: bool) -> None:
        """Raises UserError for a set that dataset_info.json calls preference data where none are wanted, or the reverse."""
        where = f'{self.part.origin}: "{self.part.name}"'
        if ranking and not self.options.pairs:
            raise UserError(
                f'{where} is preference data ("ranking": true), a chosen and a rejected answer a row. Train on both with '
                "RECIPE=dpo (loss=dpo), or choose another set."
            )
        if self.options.pairs and not ranking:
            raise UserError(
                f'{where} has one answer a row, and loss=dpo compares two. If it has two, add "ranking": true and the '
                'columns "chosen" and "rejected"; else train with loss=sft (RECIPE=qlora).'
            )

    def _parse(self, reader: LayoutReader | None) -> Parse:
        """What a row means, as its layout or the recipe says."""
        return reader.parse if reader else pair_rows.parse if self.options.pairs else ParsedRow

    def check(self, on_progress: OnProgress | None, keep: bool) -> CheckedData:
        """All of it, once.

        Args:
            keep: the conversations stay in memory.
        """
        kept: list[Conversation] | None = [] if keep else None
        checked, (options, reader) = CheckedData(), self._layout()
        for path in self.part.files:
            one = _check_blocks(path, options, on_progress) if kept is None and reader is None else None
            one = one or _check_rows(path, options, on_progress, kept, self._parse(reader))
            _finish(path, one)
            checked.merge(one)
            if on_progress:
                on_progress(str(path), 1.0)
        checked.notes += [*self.part.notes, *(reader.notes() if reader else ())]
        checked.conversations = self.stream(checked.counts.conversations) if kept is None else kept
        return checked

    def stream(self, count: int) -> Streamed[Conversation]:
        """Its conversations, read again each time. count: of them."""
        return Streamed(partial(self._walk, count), count, self._batches)

    def _walk(self, count: int) -> Iterator[Conversation]:
        number = 0
        for path in self.part.files:
            for conversation in self._walk_file(path):
                number += 1
                yield conversation
        if number != count:
            raise changed(*self.part.files)

    def _walk_file(self, path: Path) -> Iterator[Conversation]:
        options, reader = self._layout()
        checked = CheckedData(keep_empty=options.keep_empty)
        for row in readers.rows(path, options):
            conversation = checked.add(row, str(path), self._parse(reader))
            if checked.problems:
                raise changed(path)
            if conversation:
                yield conversation

    def _batches(self, size: int) -> "Iterator[Block | list[Conversation]]":
        for path in self.part.files:
            blocks = readers.blocks(path, self.options) if self.part.layout is None else None
            yield from in_batches(self._walk_file(path), size) if blocks is None else blocks


def of_block(block: Block) -> list[Conversation]:
    """The conversations of a part of a file without problems.

    Raises:
        UserError: it has some now.
    """
    try:
        checked, found = check_block(block)
    except NotPlainError:
        raise changed(block.path) from None
    if checked.problems:
        raise changed(block.path)
    return found


def check_block(block: Block) -> tuple[CheckedData, list[Conversation]]:
    """What was found in a part of a file, and its sound conversations.

    Raises:
        NotPlainError: a line that needs a careful look.
    """
    checked = CheckedData()
    found = [conversation for row in block.rows() if (conversation := checked.add(row, str(block.path)))]
    return checked, found


def changed(*files: Path) -> UserError:
    """The error for files that are not what they were when they were checked."""
    return UserError(f"{', '.join(map(str, files))}: changed while this command ran. Start the same command again.")


# One file


def _check_rows(
    path: Path, options: ReadOptions, on_progress: OnProgress | None, kept: list[Conversation] | None, parse: Parse
) -> CheckedData:
    """Read a file row by row.

    Args:
        kept: takes the conversations; or None.
    """
    checked = CheckedData(keep_empty=options.keep_empty)
    for number, row in enumerate(readers.rows(path, options)):
        conversation = checked.add(row, str(path), parse)
        if kept is not None and conversation:
            kept.append(conversation)
        if on_progress and number % ROWS_PER_CALL == 0:
            on_progress(str(path), row.share)
        if len(checked.problems) > MAX_PROBLEMS:
            checked.problems.append(_not_read_on(str(path), row))
            break
    return checked


def _check_blocks(path: Path, options: ReadOptions, on_progress: OnProgress | None) -> CheckedData | None:
    """Read a large JSONL file in several processes; None for any other file, and where a careful look is needed."""
    blocks = readers.blocks(path, options)
    if blocks is None:
        return None
    checked = CheckedData()
    for share, part in in_processes(_check_block, blocks, cores()):
        if part is None or len(checked.problems) > MAX_PROBLEMS:
            return None
        checked.merge(part)
        if on_progress:
            on_progress(str(path), share)
    return checked


def _check_block(block: Block) -> tuple[float, CheckedData | None]:
    """(share of the file that is read after the block, what was found in it)"""
    try:
        return block.share, check_block(block)[0]
    except NotPlainError:
        return block.share, None


def _finish(path: Path, checked: CheckedData) -> None:
    """Put the problems of a file in order; a file without a row is one too."""
    if not (checked.problems or checked.read_elsewhere or checked.counts.conversations):
        nothing = json_mistakes.no_rows()
        checked.problems.append(Problem(str(path), 1, 1, nothing.found, nothing.expected, nothing.remedy))
    files = {file: number for number, file in enumerate(dict.fromkeys(p.file for p in checked.problems))}
    checked.problems.sort(key=lambda p: (files[p.file], p.line, p.column))  # an archive has several files
    checked.problems = merge_kinds(checked.problems, "kind", "of this kind in the file")


def _not_read_on(file: str, row: DataRow) -> Problem:
    place, remedy = row.place_of(()), "correct what is listed, and check again"
    found = f"the row after which reading stopped: more than {MAX_PROBLEMS:,} problems"
    return Problem(row.file or file, place.line, place.column, found, "none", remedy, place.cell)
