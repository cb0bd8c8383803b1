"""dataset_info.json of LLaMA-Factory: the data sets that it names, where each is, and how its rows are written.

It is read as LLaMA-Factory reads it (hiyouga/LLaMA-Factory, src/llamafactory/data/parser.py), with one difference: what
that loader passes over in silence is a mistake with line and column, or a sentence. This module opens no data file.
"""

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.common.errors import UserError
from train.data.json_text import json_rows
from train.data.json_text.json_lexer import LostError
from train.data.json_text.json_rows import Lines
from train.data.json_text.lenient_json import LenientParser
from train.data.origins.hub_data import HubSet
from train.data.rows.dataset_rows import ALPACA_KEYS, ROLE_TAGS, SHARED_KEYS, SHAREGPT_TAGS, Layout
from train.data.rows.problems import KeyPath, Problem, TextProblem

FILE = "dataset_info.json"
FORMATTINGS = ("alpaca", "sharegpt", "openai")
PREFERENCE = ("chosen", "rejected")
COLUMNS = (*ALPACA_KEYS, *SHARED_KEYS, "messages", *PREFERENCE)
TEXT, BOOL, COUNT, OBJECT = "a text", "true or false", "a whole number from 1", "an object in { }"
KEYS = {  # key of a data set -> what its value is
    **dict.fromkeys(("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"), TEXT),
    **dict.fromkeys(("formatting", "subset", "split", "folder", "revision", "file_sha1"), TEXT),
    **{"ranking": BOOL, "num_samples": COUNT, "columns": OBJECT, "tags": OBJECT},
}
PLACES = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "file_name")  # the first counts
REFUSED = {  # place -> why it is not read, and the remedy
    "script_url": (
        "a script that makes the rows: code of a data set is never run here",
        'run it yourself, write its rows to a .jsonl file, and name that: "file_name"',
    ),
    "om_hub_url": ("a data set of the Openmind hub, which is not read here", 'download it, and name its "file_name"'),
    "cloud_file_name": ("a file in S3 or GCS, which is not read here", 'download it, and name its "file_name"'),
}
IS: dict[str, Callable[[Any], bool]] = {
    TEXT: lambda value: isinstance(value, str) and bool(value.strip()),
    BOOL: lambda value: isinstance(value, bool),
    COUNT: lambda value: isinstance(value, int) and not isinstance(value, bool) and value > 0,
    OBJECT: lambda value: isinstance(value, dict),
}


@dataclass(frozen=True)
class Entry:
    """A data set of the file: one of `path` and `hubs` says where it is."""

    name: str
    layout: Layout
    path: Path | None = None  # a file or a folder
    hubs: tuple[HubSet, ...] = ()  # the same set on one or two hubs
    num_samples: int | None = None
    notes: tuple[str, ...] = ()  # what LLaMA-Factory would not have said


@dataclass
class Registry:
    """The text of a dataset_info.json, what it says, and where."""

    path: Path
    text: str
    value: dict[str, Any]
    offsets: dict[KeyPath, int]
    problems: list[Problem] = field(default_factory=list)

    def entries(self, names: Sequence[str]) -> list[Entry]:
        """The data sets with these names.

        Raises:
            UserError: one report of every mistake in them.
        """
        entries = [_EntryReader(self, name).read() for name in names]
        if self.problems:
            raise UserError(_report(self.path, self.problems))
        return [entry for entry in entries if entry]

    def choose(self) -> str:
        """How to choose among the data sets of the file."""
        listed = "\n".join(f"    {name}{_about(self.value[name])}" for name in self.value)
        first, second = [*self.value, "name", "other"][:2]
        where = self.path.parent if self.path.name == FILE and self.path.parent != Path() else self.path
        return (
            f"{self.path} describes data sets of LLaMA-Factory. Which? DATA={where}:{first}, or several with commas "
            f"between: DATA={where}:{first},{second}. It has:\n{listed}"
        )

    def add(self, path: KeyPath, found: str, expected: str, remedy: str) -> None:
        """A mistake at a value, or at the object that it should be in."""
        offset = json_rows.nearest_offset(self.offsets, path)
        if path in self.offsets and path and isinstance(path[-1], str):  # show the key, not its value
            offset = max(self.text.rfind(json.dumps(path[-1], ensure_ascii=False), 0, offset), 0) or offset
        self.problems.append(Problem(str(self.path), *Lines(self.text).position(offset), found, expected, remedy))


def registry_of(path: Path) -> Path | None:
    """The dataset_info.json that a path means: the file itself, or the one in the folder; else None."""
    if path.is_dir():
        return path / FILE if (path / FILE).is_file() else None
    return path if path.name == FILE or (path.suffix == ".json" and path.is_file()) else None


def read(path: Path) -> Registry:
    """The data sets that a dataset_info.json names.

    Raises:
        UserError: it cannot be read, is not JSON (every mistake by line and column), or is something else.
    """
    try:
        text, problems = json_rows.decode(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from error
    parser = LenientParser(text, len(text), "the end of the file")
    at = parser.skip(0)
    value, sound = _strict(text, at, parser)
    if not problems and not sound:
        problems = _all_mistakes(parser, at) or [TextProblem(at, "something else", "JSON", "write it anew")]
    if problems:
        lines = Lines(text)
        placed = [Problem(str(path), *lines.position(p.offset), p.found, p.expected, p.remedy) for p in problems]
        raise UserError(_report(path, placed))
    if not isinstance(value, dict) or not all(isinstance(one, dict) for one in value.values()) or not value:
        example = '{"mine": {"file_name": "mine.json"}}'
        raise UserError(f"{path}: not a {FILE} of LLaMA-Factory, which names data sets: {example}")
    parser = LenientParser(text, len(text), "the end of the file", sound=True)
    parser.value(at)
    return Registry(path, text, value, parser.offsets)


def _strict(text: str, at: int, parser: LenientParser) -> tuple[Any, bool]:
    """(the value, whether the text is JSON and nothing else)."""
    try:
        value, end = json_rows.strict(text, at)
    except ValueError:
        return None, False
    return value, parser.skip(end) == len(text)


def _all_mistakes(parser: LenientParser, at: int) -> list[TextProblem]:
    try:
        _, end = parser.value(at)
        end = parser.skip(end)
        if end < len(parser.text):
            parser.add(
                TextProblem(end, parser.seen(end), "the end of the file", "delete it, or move it before the last }")
            )
    except LostError:
        pass
    return parser.take_problems()


def _report(path: Path, problems: Sequence[Problem]) -> str:
    noun = "problem" if len(problems) == 1 else "problems"
    return "\n".join([f"{len(problems)} {noun} in {path}; nothing was changed.", *map(str, problems)])


def _about(value: Mapping[str, Any]) -> str:
    """What a line of the list says of a data set: where it is, and that it is of a kind that is not trained on."""
    place = next((key for key in PLACES if key in value), "")
    kind = ", preference data" if value.get("ranking") else ""
    return f": {value[place]}{kind}" if place else ""


class _EntryReader:
    """Checks one data set of a registry; mistakes go to the registry, sentences to `notes`."""

    def __init__(self, registry: Registry, name: str) -> None:
        self.registry, self.name, self.notes = registry, name, list[str]()
        self.value: dict[str, Any] = registry.value.get(name, {})

    def read(self) -> Entry | None:
        """The data set; None if it has a mistake."""
        before = len(self.registry.problems)
        if self.name not in self.registry.value:
            self._unknown_name()
            return None
        self._check_keys((), self.value, KEYS, "a data set")
        place = next((key for key in PLACES if key in self.value), "")
        self._check_place(place)
        layout = self._layout()
        self._check_preference()
        if len(self.registry.problems) > before:
            return None
        self._note_what_is_passed_over(place)
        hubs = self._hubs() if place.endswith("hub_url") else ()
        path = None if hubs else self.registry.path.parent / self.value["file_name"]
        return Entry(self.name, layout, path, hubs, self.value.get("num_samples"), tuple(self.notes))

    def _add(self, path: KeyPath, found: str, expected: str, remedy: str) -> None:
        self.registry.add((self.name, *path), found, expected, remedy)

    def _unknown_name(self) -> None:
        names = list(self.registry.value)
        near = difflib.get_close_matches(self.name, names, n=1, cutoff=0.5)
        remedy = f'write "{near[0]}"' if near else f"choose one of: {', '.join(names[:20])}"
        self.registry.add((), f'no data set "{self.name}"', "a name in this file", remedy)

    # Checks

    def _check_keys(self, path: KeyPath, value: Mapping[str, Any], known: Mapping[str, str], where: str) -> None:
        """Every value is of its kind; a key that is not known is a mistake where it is nearly one that is."""
        for key, one in value.items():
            if key not in known:
                near = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.7)
                if near:
                    remedy = f'write "{near[0]}"; LLaMA-Factory passes over a key that it does not know'
                    self._add((*path, key), f'the key "{key}"', f"a key of {where}", remedy)
                else:
                    place = ".".join(map(str, (*path, key)))
                    self.notes.append(f"{self.name}: {FILE} has a key that is not used: {place}")
            elif one is not None and not IS[known[key]](one):
                self._add(
                    (*path, key),
                    f'"{key}" that is {json.dumps(one, ensure_ascii=False)[:40]}',
                    known[key],
                    "correct it",
                )

    def _check_place(self, place: str) -> None:
        if not place:
            remedy = f'write the file beside {FILE}: "file_name": "mine.json"'
            self._add((), f'no "file_name" in "{self.name}"', "where the data set is", remedy)
        elif place in REFUSED:
            found, remedy = REFUSED[place]
            self._add((place,), f'"{place}": {found}', "a file, or a data set of a hub", remedy)
        split = self.value.get("split")
        if isinstance(split, str) and (set("[]+%") & set(split) or (place == "file_name" and split != "train")):
            remedy = 'write "train", or delete it; "num_samples": 1000 takes some of the rows'
            self._add(("split",), f'the split "{split}"', 'the name of a split; a file is all of it "train"', remedy)

    def _layout(self) -> Layout:
        formatting = self.value.get("formatting") or "alpaca"
        if isinstance(formatting, str) and formatting not in FORMATTINGS:
            near = difflib.get_close_matches(formatting.lower(), FORMATTINGS, n=1, cutoff=0.5)
            remedy = f'write "{near[0]}"' if near else "write one of these"
            self._add(("formatting",), f'the formatting "{formatting}"', ", ".join(FORMATTINGS), remedy)
        before = len(self.registry.problems)
        columns, tags = self._texts("columns", COLUMNS), self._texts("tags", tuple(SHAREGPT_TAGS))
        if columns is not None and formatting in FORMATTINGS and len(self.registry.problems) == before:
            self._check_columns(columns, formatting)
        self._check_tags(tags or {})
        return Layout(formatting, columns, tags, self.value.get("ranking") is True)

    def _texts(self, key: str, known: Sequence[str]) -> dict[str, str] | None:
        """The object `key` of the data set, without keys that are null; None if it is not there."""
        value = self.value.get(key)
        if not isinstance(value, dict):
            return None
        self._check_keys((key,), value, dict.fromkeys(known, TEXT), f'"{key}"')
        return {name: one for name, one in value.items() if name in known and isinstance(one, str)}

    def _check_columns(self, columns: dict[str, str], formatting: str) -> None:
        ranking = bool(self.value.get("ranking"))
        if formatting != "alpaca" and "messages" not in columns:
            usual = "conversations" if formatting == "sharegpt" else "messages"
            remedy = f'add "messages": "{usual}": where there are columns, LLaMA-Factory has no default for the others'
            self._add(("columns",), 'columns without "messages"', f'"messages", for {formatting}', remedy)
        if formatting == "alpaca" and not ranking and "response" not in columns:
            remedy = 'name the answers: "response": "output"; text without answers (for pretraining) is not learnt here'
            self._add(("columns",), 'columns without "response"', '"prompt" and "response"', remedy)
        if formatting == "alpaca" and "prompt" not in columns and "query" not in columns:
            remedy = 'name the questions: "prompt": "instruction"'
            self._add(("columns",), 'columns without "prompt"', '"prompt" and "response"', remedy)
        others = ("messages",) if formatting == "alpaca" else (*ALPACA_KEYS, "history")
        for column in [column for column in others if column in columns]:
            remedy = 'write "formatting": "sharegpt"' if column == "messages" else "delete it, or the formatting"
            self._add(
                ("columns", column), f'the column "{column}" in {formatting}', f"a column of {formatting}", remedy
            )
        twice = [key for key in columns.values() if list(columns.values()).count(key) > 1]
        if twice:
            self._add(("columns",), f'"{twice[0]}" for two columns', "a key of its own for each", "correct one of them")

    def _check_tags(self, tags: dict[str, str]) -> None:
        roles = [tags[tag] for tag in ROLE_TAGS if tag in tags]
        if twice := [role for role in roles if roles.count(role) > 1]:
            self._add(
                ("tags",), f'the role "{twice[0]}" for two tags', "a role of its own for each", "correct one of them"
            )

    def _check_preference(self) -> None:
        """Preference data have columns for both answers, which LLaMA-Factory gives no default."""
        columns = self.value.get("columns")
        named = columns if isinstance(columns, dict) else {}
        if self.value.get("ranking") is True and (lacking := [one for one in PREFERENCE if one not in named]):
            names = ", ".join(f'"{one}": "{one}"' for one in PREFERENCE)
            remedy = f'name the keys of the two answers: "columns": {{…, {names}}}'
            found = f'"ranking": true without the column {" and ".join(lacking)}'
            self._add(("ranking",), found, "both columns, chosen and rejected", remedy)

    # Sentences

    def _note_what_is_passed_over(self, place: str) -> None:
        value, name = self.value, self.name
        if later := [key for key in PLACES[PLACES.index(place) + 1 :] if key in value and not key.endswith("hub_url")]:
            self.notes.append(f'{name}: "{place}" counts, as in LLaMA-Factory; not used: {", ".join(later)}')
        if value.get("formatting") == "openai":
            self.notes.append(
                f'{name}: LLaMA-Factory adds "detailed thinking off" to the system message of openai rows without '
                "tools; here it stays as it is"
            )
        if "file_sha1" in value:
            self.notes.append(
                f"{name}: file_sha1 is not checked (LLaMA-Factory does not either); its sha256 is recorded"
            )
        if (value.get("formatting") or "alpaca") == "alpaca" and "tags" in value:
            self.notes.append(f'{name}: tags count with "formatting": "sharegpt" or "openai" only; not used')
        preference = [column for column in PREFERENCE if column in (value.get("columns") or {})]
        if preference and value.get("ranking") is not True:
            self.notes.append(f'{name}: not used without "ranking": the columns {", ".join(preference)}')
        useless = [key for key in ("subset", "folder", "revision") if value.get(key)]
        if place == "file_name" and useless:
            self.notes.append(f"{name}: not used, because it is a file: {', '.join(useless)}")

    def _hubs(self) -> tuple[HubSet, ...]:
        keys = {key: self.value.get(key) or "" for key in ("subset", "revision", "split", "folder")}
        places = (("hub", "hf_hub_url"), ("ms", "ms_hub_url"))
        return tuple(HubSet(hub, self.value[place], **keys) for hub, place in places if self.value.get(place))
