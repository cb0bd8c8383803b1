"""Large files of JSON lines: read once, in several processes, where each block is checked and encoded.

Any other data, and any with a mistake, are read by conversations.py first and encoded after that; the result is the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from train.common.processes import cores, in_processes
from train.data.checked.checked_data import CheckedData, PartCount
from train.data.checked.conversations import OnProgress, changed, check_block
from train.data.files import readers
from train.data.json_text.json_stream import Block, NotPlainError
from train.data.origins.sources import Part, parts
from train.data.rows.data_row import ReadOptions
from train.data.tokens import encoding
from train.data.tokens.chat_template import BatchEncoder
from train.data.tokens.encoding import TokenArrays
from train.data.tokens.settings import Template


@dataclass
class OnePass:
    """Reads DATA. `checked` is what is known of it, without conversations, when `arrays` has given all."""

    parts: Sequence[Part]
    options: ReadOptions
    checked: CheckedData = field(default_factory=CheckedData)

    @classmethod
    def of(cls, data: str, options: ReadOptions) -> "OnePass | None":
        """None for DATA that cannot be read so.

        Raises:
            UserError: no such file, or it cannot be opened.
        """
        found = parts(data)
        files = tuple(path for part in found for path in part.files)
        options = replace(options, files=files)
        plain = all(part.is_plain for part in found)
        plain = plain and all(readers.blocks(path, options) is not None for path in files)
        return cls(found, options) if plain else None

    def arrays(self, tokenizer: BatchEncoder, template: Template, on_progress: OnProgress) -> Iterator[TokenArrays]:
        """The tokens of all conversations in order, a block at a time.

        Raises:
            NotPlainError: a mistake in the data; what was given before is of no use.
            UserError: a file changed while it was read.
        """
        versions = self._versions()
        checked = [CheckedData() for _ in self.parts]
        items = in_processes(_check_and_encode, self._blocks(), cores(), encoding.set_up, (tokenizer, template))
        for number, block, found, arrays in items:
            if arrays is None:
                raise NotPlainError
            checked[number].merge(found)
            on_progress(str(block.path), block.share)
            yield arrays
        if self._versions() != versions:
            raise changed(*self.options.files)
        for part, one in zip(self.parts, checked, strict=True):
            rows = one.counts.conversations
            one.parts.append(PartCount(part.text, rows, rows))
            one.notes += part.notes
            self.checked.merge(one)

    def _versions(self) -> list[tuple[int, int]]:
        return [(stat.st_size, stat.st_mtime_ns) for stat in (path.stat() for path in self.options.files)]

    def _blocks(self) -> Iterator[tuple[int, Block]]:
        for number, part in enumerate(self.parts):
            for path in part.files:
                for block in readers.blocks(path, self.options) or ():
                    yield number, block


def _check_and_encode(item: tuple[int, Block]) -> tuple[int, Block, CheckedData, TokenArrays | None]:
    """(number of the part, block, what was found in it, its tokens; None where there is a mistake)"""
    number, block = item
    try:
        checked, found = check_block(block)
    except NotPlainError:
        return number, block, CheckedData(), None
    return number, block, checked, None if checked.problems else encoding.encode_in_process(found)
