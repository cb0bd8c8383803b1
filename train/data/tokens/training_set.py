"""DATA as samples to train on: read, checked and encoded; or taken from the cache, where it is large and was seen before.

Small data are encoded at each start: that takes a second, and leaves nothing behind. Large data show their progress.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from train.common.progress import bar
from train.data.checked import conversations
from train.data.checked.conversations import CheckedData, Conversation, OnProgress
from train.data.json_text.json_stream import NotPlainError
from train.data.origins.sources import hash_data, sources
from train.data.rows.data_row import GUESS, ReadOptions
from train.data.tokens.chat_template import BatchEncoder
from train.data.tokens.encoding import TokenArrays, encode_all, join
from train.data.tokens.one_pass import OnePass
from train.data.tokens.pairs import examples_of
from train.data.tokens.sample_cache import key_of, load_or_build
from train.data.tokens.samples import Summary, with_progress
from train.data.tokens.settings import SampleSettings, Template

SMALL = 32_000_000  # bytes of files up to which nothing is written
SHOWN = 2_000_000  # bytes of files from which progress is shown
Built = tuple[Iterable[TokenArrays], Callable[[], dict[str, Any]]]  # what `load_or_build` wants
Loaded = tuple[CheckedData, TokenArrays]
BYTES_PER_BYTE = 1.5  # of tokens for a byte of data: 4 for each of 0.3 tokens, and some to spare


class CachedEncoder(BatchEncoder, Protocol):
    """A tokenizer that can say which one it is."""

    def fingerprint(self) -> str:
        """A hash of all that decides its ids."""


def load_tokens(
    data: str,
    tokenizer: CachedEncoder,
    settings: SampleSettings,
    cache: Path,
    options: ReadOptions = GUESS,
    hashes: dict[str, Any] | None = None,
    early: Callable[[], Loaded | None] | None = None,
) -> Loaded:
    """The conversations of DATA without problems, and their tokens; see `examples_of`.

    Args:
        cache: the folder of caches, which is made if the data are large.
        hashes: hash_data(data), if it is known.
        early: waits for what `load_small` gives in another process, if that was begun; it gives None if it has failed.
    Raises:
        UserError: no such file, the report of all problems, or no space on the disk.
    """
    size = sum(path.stat().st_size for path in sources(data))
    if size <= SMALL:
        return (early and early()) or load_small(data, tokenizer, settings, options)

    def build() -> Built:
        checked = read(data, options)
        return _encoded(data, checked, tokenizer, settings, size), checked.to_json

    def build_in_one_pass() -> Built:
        one_pass = OnePass.of(data, options)
        if one_pass is None:
            return build()
        return _in_one_pass(one_pass, tokenizer, settings, size), one_pass.checked.to_json

    hashes = hashes or hash_data(data)
    key = key_of(
        data=hashes,
        files=[str(path) for path in sources(data)],
        options=str(options if "parts" in hashes else replace(options, seed=0)),  # without a draw no seed matters
        template=asdict(Template.of(settings)),
        tokenizer=tokenizer.fingerprint(),
    )
    try:
        arrays, stored = load_or_build(cache, key, build_in_one_pass, int(BYTES_PER_BYTE * size))
    except NotPlainError:
        arrays, stored = load_or_build(cache, key, build, int(BYTES_PER_BYTE * size))
    return conversations.restore(data, options, stored), arrays


def load_small(data: str, tokenizer: CachedEncoder, settings: SampleSettings, options: ReadOptions = GUESS) -> Loaded:
    """As `load_tokens`, without a cache."""
    checked, size = read(data, options), sum(path.stat().st_size for path in sources(data))
    return checked, join(list(_encoded(data, checked, tokenizer, settings, size)))


def count_tokens(
    checked: Sequence[Conversation], tokenizer: BatchEncoder, settings: SampleSettings, characters: int
) -> Summary:
    """What `examples_of` says of these conversations, of so many characters; no id is kept.

    Raises:
        UserError: whatever `examples_of` finds.
    """
    parts = encode_all(checked, tokenizer, settings, characters)
    return examples_of(join([replace(part, ids=part.ids[:0]) for part in parts]), settings)[1]


def read(data: str, options: ReadOptions = GUESS) -> CheckedData:
    """DATA without problems; large data show their progress.

    Raises:
        UserError: no such file, or the report of all problems.
    """
    files = sources(data)
    with share_bar("reading", len(files), sum(path.stat().st_size for path in files)) as on_progress:
        return conversations.read(data, options, on_progress)


def _in_one_pass(
    one_pass: OnePass, tokenizer: CachedEncoder, settings: SampleSettings, size: int
) -> Iterator[TokenArrays]:
    with share_bar("reading and counting tokens", len(one_pass.options.files), size) as on_progress:
        yield from one_pass.arrays(tokenizer, Template.of(settings), on_progress)


def _encoded(
    data: str, checked: CheckedData, tokenizer: CachedEncoder, settings: SampleSettings, size: int
) -> Iterator[TokenArrays]:
    count, sequences = 0, len(checked.conversations) * (2 if settings.loss == "dpo" else 1)
    with _bar("counting tokens", sequences, size) as done:
        parts = encode_all(checked.conversations, tokenizer, settings, checked.counts.characters)
        for part in with_progress(parts, done):
            count += len(part.lengths)
            yield part
    if count != sequences:
        raise conversations.changed(*sources(data))


@contextmanager
def _bar(title: str, total: int, size: int) -> Iterator[Callable[[int], None] | None]:
    """Yield a function that is told how many of `total` conversations are done; None for little data."""
    if size < SHOWN:
        yield None
        return
    before = 0

    def done(count: int) -> None:
        nonlocal before
        advance(count - before)
        before = count

    with bar(title, total, "conversations") as advance:
        yield done


@contextmanager
def share_bar(title: str, files: int, size: int) -> Iterator[OnProgress]:
    """Yield what is told the share of each file that is done; little data show nothing.

    Args:
        size: bytes of all files.
    """
    if size < SHOWN:
        yield lambda file, share: None
        return
    shares: dict[str, float] = {}

    def progress(file: str, share: float) -> None:
        advance(100 * (share - shares.get(file, 0.0)))
        shares[file] = share

    with bar(title, 100 * files, "%" if files == 1 else "% of a file") as advance:
        yield progress
