"""Large data give the samples of small data, through a cache that is made once and found damaged where it is."""

import fcntl
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.mistakes import GOOD
from tests.data.samples import Letters
from train.common.errors import UserError
from train.config.recipe import Recipe
from train.data.checked import conversations
from train.data.choice.selection import select
from train.data.json_text import json_stream
from train.data.rows.data_row import ReadOptions
from train.data.tokens import one_pass, sample_cache, training_set
from train.data.tokens.batches import Schedule, collate
from train.data.tokens.encoding import DTYPES
from train.data.tokens.one_pass import OnePass
from train.data.tokens.samples import Samples, Summary, encode, samples_of
from train.data.tokens.training_set import load_tokens

RECIPE = Recipe(system="", length=60, batch=2, pack=True)


class Counted(Letters):
    """A tokenizer in which every character is a token, and another offset makes another tokenizer."""

    offset = 0

    def encode(self, text: str) -> list[int]:
        return [token + self.offset for token in super().encode(text)]

    def encode_batch(self, texts: Any) -> list[bytes]:
        return [np.array(self.encode(text), np.int32).tobytes() for text in texts]

    def fingerprint(self) -> str:
        return str(self.offset)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"instruction": f"q{n}" * (n % 9 + 1), "output": "答" * (n % 13 + 1), "x": 1} for n in range(300)]
    path = tmp_path / "data.jsonl"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"messages": turns}, rows[0]]))
    return path


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_set, "SMALL", 0)
    monkeypatch.setattr(conversations, "KEPT", 0)
    monkeypatch.setattr(conversations, "cores", lambda: 1)
    monkeypatch.setattr(one_pass, "cores", lambda: 1)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def loaded(
    data: Path, cache: Path, tokenizer: Counted | None = None, **keys: Any
) -> tuple[list[Any], Samples, Summary]:
    """(what is said of the data, samples, summary)"""
    recipe = replace(RECIPE, **keys)
    options = ReadOptions(seed=recipe.seed)
    checked, tokens = load_tokens(str(data), tokenizer or Counted(), recipe, cache, options)
    samples, summary = samples_of(tokens, recipe)
    counts = checked.counts
    said = [checked.notices(), checked.formats, counts.duplicates(), counts.turns, len(checked.conversations)]
    return [*said, list(checked.conversations[:2])], samples, summary


def contents(samples: Samples) -> list[Any]:
    return [(sample.ids.tolist(), sample.mask.tolist(), sample.location) for sample in samples]


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it, and reading data is an error from then on."""

    def forbid() -> None:
        def fail(*_: Any) -> None:
            raise AssertionError("the data are read")

        monkeypatch.setattr(training_set, "read", fail)
        monkeypatch.setattr(OnePass, "arrays", fail)

    return forbid


@pytest.mark.parametrize("keys", [{}, {"pack": False}, {"overlong": "skip"}, {"mask": "published"}], ids=str)
def test_large_data_give_the_batches_of_small_data(
    data: Path, cache: Path, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    said, samples, summary = loaded(data, cache, **keys)
    assert not cache.exists() and summary.overlong and (summary.unlearnable or keys)
    monkeypatch.setattr(training_set, "SMALL", 0)
    monkeypatch.setattr(conversations, "KEPT", 0)
    for _ in range(2):  # made, and then found
        again = loaded(data, cache, **keys)
        assert (again[0], again[2]) == (said, summary) and contents(again[1]) == contents(samples)
    one, other = (Schedule(some, 60, 4, 2, seed=7, pack=RECIPE.pack) for some in (samples, again[1]))
    assert len(one) == len(other)
    for step in range(len(one)):
        batches = [collate(one.rows(step), some, 0) for some in (samples, again[1])]
        assert all(bool((batches[0][name] == batches[1][name]).all()) for name in batches[0])


@pytest.mark.usefixtures("large")
def test_the_second_start_reads_no_row_and_takes_another_length(data: Path, cache: Path, no_reading: Any) -> None:
    first = loaded(data, cache)
    no_reading()
    assert loaded(data, cache)[2] == first[2]
    shorter = loaded(data, cache, length=40, overlong="skip", seed=3)[2]
    assert shorter.length == 40 and shorter.overlong > first[2].overlong


@pytest.mark.usefixtures("large")
def test_whatever_decides_the_tokens_makes_another_cache(data: Path, cache: Path, tmp_path: Path) -> None:
    other, moved = Counted(), tmp_path / "moved.jsonl"
    other.offset = 1
    shutil.copy(data, moved)
    loaded(data, cache)
    for number, change in enumerate(
        [
            lambda: loaded(data, cache, other),
            lambda: loaded(data, cache, mask="published"),
            lambda: loaded(data, cache, system="s"),
        ],
        2,
    ):
        change()
        assert len(caches(cache)) == number
    ids = loaded(data, cache)[1][0].ids.tolist()
    assert loaded(data, cache, other)[1][0].ids.tolist() != ids
    assert loaded(moved, cache)[1][0].location == f"{moved}:1"  # the locations are a part of it
    data.write_text(data.read_text().replace("q1", "Q1", 1))
    assert "Q1" in str(loaded(data, cache)[0]) and len(caches(cache)) == sample_cache.KEPT


@pytest.mark.usefixtures("large")
def test_the_format_is_a_part_of_the_name(data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded(data, cache)
    monkeypatch.setattr(sample_cache, "FORMAT", sample_cache.FORMAT + 1)
    loaded(data, cache)
    assert len(caches(cache)) == 2


def caches(cache: Path) -> list[Path]:
    return sorted(path.parent for path in cache.glob("*/manifest.json"))


@pytest.mark.usefixtures("large")
def test_those_used_last_are_kept(data: Path, cache: Path) -> None:
    """The oldest by use goes, not the oldest by making."""
    for number in range(sample_cache.KEPT):
        loaded(data, cache, system=str(number))
        for path in caches(cache):
            os.utime(path / "manifest.json", (time.time() - 100 + number,) * 2)
    first = caches(cache)
    os.utime(first[0] / "manifest.json")
    loaded(data, cache, system="new")
    assert len(caches(cache)) == sample_cache.KEPT and first[0] in caches(cache)
    assert len(list(cache.glob(".*.lock"))) == sample_cache.KEPT


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("name", [*DTYPES, "manifest.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone", "longer", "empty"])
def test_damage_is_found_and_made_good(
    data: Path, cache: Path, name: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said, samples, summary = loaded(data, cache)
    expected = contents(samples)
    (folder,) = caches(cache)
    raw = bytearray((folder / name).read_bytes())
    (folder / name).unlink()
    if how == "flipped":
        raw[len(raw) // 2] ^= 1
    changed = {"cut": raw[:-4], "longer": raw + b"\0\0\0\0", "empty": b""}.get(how, raw)
    if how != "gone":
        (folder / name).write_bytes(changed)
    capsys.readouterr()
    again = loaded(data, cache)
    printed = capsys.readouterr().out
    assert (again[0], again[2]) == (said, summary) and contents(again[1]) == expected
    assert (
        printed == f"the tokens in {folder} are damaged ({printed.split('(')[1].split(')')[0]}): they are made again.\n"
    )


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    "text", ["{}", "[]", "null", "[" * 100_000, '{"files": 1, "places": [], "beside": {}, "content": 0}']
)
def test_a_manifest_of_any_kind_is_damage(data: Path, cache: Path, text: str) -> None:
    expected = contents(loaded(data, cache)[1])
    (caches(cache)[0] / "manifest.json").write_text(text)
    assert contents(loaded(data, cache)[1]) == expected


@pytest.mark.usefixtures("large")
def test_a_half_written_cache_is_not_used(data: Path, cache: Path) -> None:
    expected = contents(loaded(data, cache)[1])
    (folder,) = caches(cache)
    aside = folder.with_name(f".{folder.name}.999999.tmp")  # of a process that was killed
    folder.rename(aside)
    (aside / "manifest.json").unlink()
    assert contents(loaded(data, cache)[1]) == expected and not aside.exists()


def _load(data: Path, cache: Path, built: Any) -> None:
    training_set.SMALL = 0
    one_pass.cores = lambda: 1  # type: ignore[attr-defined]
    arrays = OnePass.arrays

    def counting(*arguments: Any) -> Any:
        with built.get_lock():
            built.value += 1
        time.sleep(0.5)
        return arrays(*arguments)

    OnePass.arrays = counting  # type: ignore[method-assign]
    loaded(data, cache)


def test_several_processes_build_it_once(data: Path, cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    built = context.Value("i", 0)
    workers = [context.Process(target=_load, args=(data, cache, built)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0] and built.value == 1 and len(caches(cache)) == 1


@pytest.mark.usefixtures("large")
def test_without_locks_it_is_built_all_the_same(data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert len(loaded(data, cache)[1]) and caches(cache)


@pytest.mark.usefixtures("large")
def test_a_full_disk_gets_a_sentence(data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_cache, "free_bytes", lambda path: 100)
    with pytest.raises(UserError, match=r"GB free, about .* needed for the tokens of this data"):
        loaded(data, cache)


@pytest.mark.usefixtures("large")
def test_problems_are_reported_and_leave_no_cache(data: Path, cache: Path) -> None:
    with data.open("a") as file:
        file.write("{'instruction': 'q', 'output': 'a'}\n")
    with pytest.raises(UserError, match="1 problem in"):
        loaded(data, cache)
    assert not caches(cache)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(("owner", "name"), [(OnePass, "arrays"), (training_set, "read")], ids=["one pass", "two"])
def test_data_that_change_while_they_are_read_are_not_kept(
    data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    read = getattr(owner, name)

    def then_changed(*arguments: Any) -> Any:
        def grow() -> None:
            with data.open("a") as file:
                file.write(GOOD + "\n")

        if owner is OnePass:
            return grow_after_the_first(read(*arguments), grow)
        checked = read(*arguments)
        grow()
        return checked

    monkeypatch.setattr(owner, name, then_changed)
    if owner is not OnePass:
        monkeypatch.setattr(OnePass, "of", lambda *_: None)
    with pytest.raises(UserError, match="changed while this command ran"):
        loaded(data, cache)
    assert not caches(cache)


def grow_after_the_first(parts: Iterator[Any], grow: Callable[[], None]) -> Iterator[Any]:
    for number, part in enumerate(parts):
        if number == 0:
            grow()
        yield part


@pytest.mark.usefixtures("large")
def test_counting_alone_says_the_same(data: Path, cache: Path) -> None:
    _, _, summary = loaded(data, cache)
    assert training_set.count_tokens(conversations.load(data), Counted(), RECIPE, 0) == summary


@pytest.mark.usefixtures("large")
def test_what_is_said_of_odd_texts_is_kept_too(data: Path, cache: Path) -> None:
    row = {"instruction": "{{名字}} \u2028", "output": "null", "键": 1}
    data.write_text(json.dumps(row, ensure_ascii=False) + "\n")
    said = loaded(data, cache)[0]
    assert loaded(data, cache)[0] == said and len(said[0]) == 3


@pytest.mark.usefixtures("large")
def test_drawn_parts_are_the_same_large_and_small(
    data: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of one file, and each row of another twice: which rows, in which order, and what is counted of them."""
    other = tmp_path / "other.json"
    other.write_text(f"[{GOOD},\n{GOOD}]")
    drawn = f"{data}:0.5x,{other}:2.5x"
    large = [loaded(Path(drawn), cache, seed=5) for _ in range(2)]
    checked = conversations.check(drawn, options=ReadOptions(seed=5))
    monkeypatch.setattr(training_set, "SMALL", 1 << 20)
    monkeypatch.setattr(conversations, "KEPT", 1 << 20)
    small = loaded(Path(drawn), cache, seed=5)
    kept = conversations.check(drawn, options=ReadOptions(seed=5))
    assert list(checked.conversations) == kept.conversations and checked.counts == kept.counts
    assert checked.parts == kept.parts and [part.used for part in kept.parts] == [151, 5]
    for said, samples, summary in large:
        assert (said, summary) == (small[0], small[2]) and contents(samples) == contents(small[1])
    assert kept.counts.duplicates() == conversations.duplicates(kept.conversations) == small[0][2]


@pytest.mark.usefixtures("large")
def test_a_selection_takes_the_same_rows_of_large_and_of_small_data(
    data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cleaned, and with questions set aside: the samples are those of the conversations that are chosen."""
    recipe = replace(RECIPE, clean="exact_duplicates,repeated_question", held_out=0.1, near=1.0)
    drawn = f"{data}:1.5x"
    found = []
    for small in (0, 0, 1 << 20):
        monkeypatch.setattr(training_set, "SMALL", small)
        monkeypatch.setattr(conversations, "KEPT", small)
        checked, tokens = load_tokens(drawn, Counted(), recipe, cache)
        selection = select(checked.conversations, recipe, None)
        samples, summary = samples_of(tokens, recipe, selection.trained_rows)
        held_out, _ = samples_of(tokens, recipe, selection.held_out_rows)
        listed = list(selection.trained), list(selection.held_out), selection.digest()
        assert (contents(samples), summary) == (contents(encode(listed[0], Counted(), recipe)[0]), summary)
        assert contents(held_out) == contents(encode(listed[1], Counted(), recipe)[0])
        found.append((*listed, summary, conversations.count(selection.trained)))
    assert found[0] == found[1] == found[2] and len(found[0][0]) + len(found[0][1]) < len(checked.conversations)


@pytest.mark.parametrize("processes", [1, 2])
def test_several_files_in_one_pass_are_what_they_are_in_two(
    data: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """Also beside an array, which is read in two."""
    other, array = tmp_path / "other.jsonl", tmp_path / "array.json"
    other.write_text("\ufeff" + "\r\n".join([GOOD, "", GOOD]))
    array.write_text(f"[{GOOD}]")
    small = [loaded(Path(some), cache) for some in (f"{data},{other}", f"{data},{array}")]
    for module, name, value in ((training_set, "SMALL", 0), (conversations, "KEPT", 0), (json_stream, "BLOCK", 900)):
        monkeypatch.setattr(module, name, value)
    for module in (conversations, one_pass):
        monkeypatch.setattr(module, "cores", lambda: processes)
    assert OnePass.of(f"{data},{other}", ReadOptions()) and not OnePass.of(f"{data},{array}", ReadOptions())
    for some, expected in zip((f"{data},{other}", f"{data},{array}"), small, strict=True):
        said, samples, summary = loaded(Path(some), cache)
        assert (said, summary) == (expected[0], expected[2]) and contents(samples) == contents(expected[1])


@pytest.mark.usefixtures("large")
def test_a_mistake_after_many_sound_rows_has_the_report_of_small_data(
    data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with data.open("a") as file:
        file.write('{"instruction": "q", "output": 1}\n' + GOOD + "\n" + GOOD[:-1] + "\n")
    monkeypatch.setattr(json_stream, "BLOCK", 900)
    with pytest.raises(UserError) as in_one_pass:
        loaded(data, cache)
    monkeypatch.setattr(training_set, "SMALL", 1 << 20)
    with pytest.raises(UserError) as small:
        loaded(data, cache)
    assert str(in_one_pass.value) == str(small.value) and "2 problems" in str(small.value)
    assert not caches(cache)
