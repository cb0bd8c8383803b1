"""What DATA names: files, folders, sets of a dataset_info.json, sets of a hub, each whole or drawn from; their hashes.

    DATA=a.jsonl                          a file
    DATA=folder                           its files
    DATA=data:alpaca_zh,identity          two sets of data/dataset_info.json (also data/dataset_info.json:alpaca_zh)
    DATA=hub:owner/name:subset@v1#train   a split of a set on the hub, fetched before; ms: for ModelScope
    DATA=a.jsonl:0.3x,b.jsonl:2x          three tenths of the rows of one file, each row of the other twice
    DATA=a.jsonl:500rows                  500 of its rows

A path that exists is that path, whatever is in its name. Knows names and bytes, and nothing of what is in the files.
"""

import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from train.common import commands
from train.common.errors import UserError
from train.common.files import sha256
from train.data.files.file_kinds import ARCHIVE_SUFFIXES, FOLDER_SUFFIXES
from train.data.origins import dataset_info, hub_data, mixture
from train.data.origins.dataset_info import Entry, Registry
from train.data.origins.hub_data import HubSet
from train.data.origins.mixture import Draw
from train.data.rows.dataset_rows import Layout
from train.data.rows.formats import LONE_SURROGATE

SEPARATOR = ","


@dataclass(frozen=True)
class Part:
    """Files of DATA that are read in one way: what one piece of it, or one set of a dataset_info.json, means."""

    text: str  # as a person writes it
    name: str  # short, for reports: a.jsonl, alpaca_zh
    files: tuple[Path, ...]
    layout: Layout | None = None  # the keys and roles of its rows; None: recognised by its content
    origin: str = ""  # the file that describes the layout
    draws: tuple[Draw, ...] = ()  # how much of it is taken, one after another
    notes: tuple[str, ...] = ()  # what a person should know of it
    pinned: str = ""  # `text` with the commit of a set of a hub; empty: `text` itself

    @property
    def is_plain(self) -> bool:
        """Whether the files alone say what is read."""
        return self.layout is None and not self.draws


@dataclass(frozen=True)
class Piece:
    """A part of DATA before its files are looked for: exactly one of path, entry and hub is there."""

    text: str
    path: Path | None = None
    entry: tuple[Path, str] | None = None  # a dataset_info.json, and a name in it
    hub: HubSet | None = None
    draw: Draw | None = None


# Reading DATA


def sources(data: str | Path) -> list[Path]:
    """The files of DATA, in order.

    Raises:
        UserError: one of them does not exist, a folder has no file that is read, or a set has to be chosen or fetched.
    """
    return [path for part in parts(data) for path in part.files]


def parts(data: str | Path) -> list[Part]:
    """The parts of DATA, in order, with their files.

    Raises:
        UserError: as `sources`.
    """
    found: list[Part] = []
    registries: dict[Path, list[Piece]] = {}
    pieces = split(data)
    for piece in pieces:
        if piece.entry:
            registries.setdefault(piece.entry[0], []).append(piece)
    entries = {path: _entries(path, of_it) for path, of_it in registries.items()}
    for piece in pieces:
        if piece.entry:
            found.append(_of_entry(piece, entries[piece.entry[0]][piece.entry[1]]))
        elif piece.hub:
            found.append(_of_hub(piece, piece.hub))
        else:
            assert piece.path is not None
            files = tuple(_files_in(piece.path)) if piece.path.is_dir() else (piece.path,)
            found.append(Part(piece.text, piece.path.name, files, draws=_draws(piece)))
    _check_names(path for part in found for path in part.files)
    return found


def split(data: str | Path) -> list[Piece]:
    """The pieces of DATA between commas; a name after a set of a dataset_info.json is a set of the same file.

    Raises:
        UserError: a piece that is no path, no set of a dataset_info.json that is here, and no set of a hub.
    """
    text = str(data)
    if _exists(text):
        return [_path_piece(text, None)]
    pieces: list[Piece] = []
    for word in text.split(SEPARATOR):
        if not word.strip():
            example = "Example: DATA=one.json,two.jsonl"
            raise UserError(f"data {text!r}: a comma with no file name beside it. {example}")
        before = pieces[-1].entry[0] if pieces and pieces[-1].entry else None
        pieces.append(_piece(word.strip(), before))
    return pieces


def _piece(word: str, registry: Path | None) -> Piece:
    """A piece of DATA. `registry`: the dataset_info.json of the piece before."""
    if _exists(word):
        return _path_piece(word, registry)
    if registry and word in dataset_info.read(registry).value:
        return Piece(word, entry=(registry, word))
    rest, draw = mixture.split_suffix(word)
    if draw:
        piece = _piece(rest, registry)
        if piece.draw:
            raise UserError(f"data {word!r}: says twice how much of it is used. Say it once: {piece.draw} or {draw}.")
        return replace(piece, text=word, draw=draw)
    if hub := hub_data.parse(word):
        return Piece(word, hub=hub)
    path, colon, name = word.rpartition(":")
    while colon and not _exists(path):
        path, colon, more = path.rpartition(":")
        name = f"{more}:{name}"
    found = dataset_info.registry_of(Path(path)) if colon else None
    number = bool(mixture.number_without_unit(word))  # a.json:0.5, where 0.5x is meant
    if found and not (number and (found.name != dataset_info.FILE or name not in dataset_info.read(found).value)):
        return Piece(word, entry=(found, name))
    raise UserError(_missing(word, Path(path) if colon else None, registry))


def _path_piece(word: str, registry: Path | None) -> Piece:
    """A path that exists. One that holds names has to be one of them, and one that is also a name is neither."""
    path = Path(word)
    if registry and word in dataset_info.read(registry).value:
        raise UserError(
            f"data {word!r}: a file or folder here, and a name in {registry}. Write ./{word} for the one, "
            f"{registry.parent}:{word} for the other."
        )
    found = dataset_info.registry_of(path)
    if found and found.name == dataset_info.FILE:
        files = f"\nFor files of the folder, name them: DATA={path}/FILE.json" if path.is_dir() else ""
        raise UserError(dataset_info.read(found).choose() + files)
    return Piece(word, path=path)


def hub_sets(data: str) -> list[HubSet]:
    """The sets of DATA that are on a hub, whether they have been fetched or not; of a set on two hubs the first.

    Raises:
        UserError: as `split`, or mistakes in a dataset_info.json.
    """
    found = []
    for piece in split(data):
        if piece.hub:
            found.append(piece.hub)
        if piece.entry:
            found += _entries(piece.entry[0], [piece])[piece.entry[1]].hubs[:1]
    return found


# Pieces to parts


def _entries(path: Path, pieces: Sequence[Piece]) -> dict[str, Entry]:
    """Name -> set, of all pieces that name one of the same dataset_info.json: its mistakes are reported together."""
    registry: Registry = dataset_info.read(path)
    names = list(dict.fromkeys(piece.entry[1] for piece in pieces if piece.entry))
    return {entry.name: entry for entry in registry.entries(names)}


def _of_entry(piece: Piece, entry: Entry) -> Part:
    assert piece.entry is not None
    registry, notes = piece.entry[0], list(entry.notes)
    draws = ((Draw(rows=entry.num_samples),) if entry.num_samples else ()) + _draws(piece)
    files: tuple[Path, ...] = ()
    if entry.path is not None:
        if not entry.path.exists():
            raise UserError(f"{registry}: {entry.name}: file_name {_missing_path(entry.path)}")
        files = tuple(_files_in(entry.path)) if entry.path.is_dir() else (entry.path,)
    else:
        fetched = _fetched(entry, notes)
        files = fetched.files
    text = f"{registry.parent if registry.name == dataset_info.FILE else registry}:{entry.name}"
    if entry.num_samples:
        notes.append(
            f"{entry.name}: num_samples takes {entry.num_samples:,} rows by a hash of seed= and row, "
            "the same in every run (LLaMA-Factory draws others each time)"
        )
    return Part(
        text + (f":{piece.draw}" if piece.draw else ""),
        entry.name,
        files,
        entry.layout,
        str(registry),
        draws,
        tuple(notes),
    )


def _fetched(entry: Entry, notes: list[str]) -> hub_data.FetchedSplit:
    """The set where it has been fetched from: the model hub, as LLaMA-Factory prefers it, else ModelScope."""
    for hub in entry.hubs[1:]:
        if hub_data.find_folder(entry.hubs[0])[1] is None and hub_data.find_folder(hub)[1] is not None:
            notes.append(f"{entry.name}: read as it was fetched from {hub_data.HUBS[hub.hub]}, {hub}")
            return hub_data.find(hub)
    return hub_data.find(entry.hubs[0])


def _of_hub(piece: Piece, hub: HubSet) -> Part:
    fetched = hub_data.find(hub)
    end = f":{piece.draw}" if piece.draw else ""
    name = Path(hub.id).name + (f"#{hub.split}" if hub.split else "")
    note = f"{hub}: commit {fetched.commit[:12]}, fetched before"
    return Part(piece.text, name, fetched.files, draws=_draws(piece), notes=(note,), pinned=f"{fetched.pinned}{end}")


def _draws(piece: Piece) -> tuple[Draw, ...]:
    return (piece.draw,) if piece.draw else ()


def _files_in(folder: Path) -> list[Path]:
    """The data files of a folder; its archives if it has no other data, so that nothing is read twice."""
    for suffixes in (FOLDER_SUFFIXES, ARCHIVE_SUFFIXES):
        if files := sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes and p.is_file()):
            return files
    kinds = ", ".join(f"*{suffix}" for suffix in FOLDER_SUFFIXES)
    raise UserError(f"{folder}: none of {kinds} in this folder. Give the file itself: DATA=path/to/file")


# What is wrong


def _check_names(files: Iterable[Path]) -> None:
    """Refuse names that are not UTF-8: records and messages are UTF-8, and could not name such a file.

    Raises:
        UserError: all of these names.
    """
    bad = [os.fsencode(path) for path in files if LONE_SURROGATE.search(str(path))]
    if bad:
        listed = ", ".join(repr(name)[1:] for name in bad)
        raise UserError(f"{listed}: the name of this file is not UTF-8. Rename it, for example to data.jsonl.")


def _missing(word: str, path: Path | None, registry: Path | None) -> str:
    """What is wrong with a piece that is nothing. `path`: what is there of it, before a colon."""
    if path is not None and (sentence := mixture.number_without_unit(word)):
        return sentence
    if path is not None and path.is_dir():
        return f"data {word!r}: {path} has no {dataset_info.FILE}, which would say what {word.rpartition(':')[2]!r} is."
    if registry is not None:
        names = list(dataset_info.read(registry).value)
        near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}?" if near else f"The names there: {', '.join(names[:20])}."
        return f"data {word!r}: no such file, and no name in {registry}. {hint}"
    return f"data {_missing_path(Path(word))}"


def _missing_path(path: Path) -> str:
    if path.is_symlink():
        return f"{str(path)!r}: a link to {path.readlink()}, which is not there."
    if path.is_absolute() and not path.parent.is_dir() and (sees := commands.container_sees()):
        return f"{str(path)!r}: no such file in the container. {sees}"
    neighbours: list[str] = []
    with suppress(OSError):
        neighbours = [p.name for p in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, neighbours, n=1)
    example = "Give the path of a data file: DATA=data/demo.jsonl"
    return f"{str(path)!r}: no such file. " + (f"Did you mean {path.parent / near[0]}?" if near else example)


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except OSError:  # a list of files may be longer than a name may be
        return False


# Names and hashes


def hash_data(data: str) -> dict[str, Any]:
    """The sha256 of a single file; of several files, or of files that are read in a way of their own, that of all of it.

    Files that are read as they are have the hash that they always had. A layout, a draw and the rest count too: another
    one is other data.
    """
    found = parts(data)
    files = {str(path): sha256(path) for part in found for path in part.files}
    if not all(part.is_plain for part in found):
        record = [_record(part, files) for part in found]
        text = json.dumps(record, sort_keys=True, ensure_ascii=False)
        return {"sha256": hashlib.sha256(text.encode()).hexdigest(), "files": files, "parts": record}
    hashes = [files[str(path)] for part in found for path in part.files]  # a file that is given twice counts twice
    if len(hashes) == 1 and not found[0].pinned:
        return {"sha256": hashes[0]}
    return {"sha256": hashlib.sha256("\n".join(hashes).encode()).hexdigest(), "files": files}


def _record(part: Part, files: dict[str, str]) -> dict[str, Any]:
    """What decides the rows of a part: the content of its files, its layout, and how much of it is taken."""
    layout = {key: value for key, value in asdict(part.layout).items() if value is not None} if part.layout else None
    return {"files": [files[str(path)] for path in part.files], "layout": layout, "draws": [str(d) for d in part.draws]}


def pinned(data: str) -> str:
    """DATA with the commit of each set of a hub, so that the same words mean the same rows next year.

    Raises:
        UserError: as `sources`.
    """
    found = parts(data)
    return SEPARATOR.join(part.pinned or part.text for part in found) if any(part.pinned for part in found) else data


def short_name(data: str) -> str:
    """DATA for a report, without folders and commits: "a.jsonl", "alpaca_zh, b.jsonl:2x", "name#train"."""
    if _exists(data):
        return Path(data).name
    return ", ".join(_short(word.strip()) for word in data.split(SEPARATOR))


def _short(word: str) -> str:
    if _exists(word):
        return Path(word).name
    rest, draw = word, None
    with suppress(UserError):
        rest, draw = mixture.split_suffix(word)
    end = f":{draw}" if draw else ""
    with suppress(UserError):
        if hub := hub_data.parse(rest):
            return f"{Path(hub.id).name}{f':{hub.subset}' if hub.subset else ''}{f'#{hub.split}' if hub.split else ''}{end}"
    path, colon, name = rest.rpartition(":")
    return (name if colon and _exists(path) else Path(rest).name) + end


def stem(data: str) -> str:
    """A name for a run's folder, from the first piece of DATA: "a", "alpaca_zh", "name"."""
    name = short_name(data if _exists(data) else data.split(SEPARATOR)[0])
    if not _exists(data):
        name = name.partition("#")[0]
        with suppress(UserError):
            name = mixture.split_suffix(name)[0]
    return Path(name).stem.replace(":", "-")


def named_paths(data: str) -> Iterator[str]:
    """The paths that DATA names, there or not, for whoever has to show them to a container.

    Raises nothing: what is wrong, the command itself reports.
    """
    yield data
    if _exists(data):
        return
    for word in (part.strip() for part in data.split(SEPARATOR)):
        yield word
        path = word
        while ":" in path:
            path = path.rpartition(":")[0]
            yield path
    with suppress(UserError, OSError):
        yield from (str(path) for path in sources(data))
