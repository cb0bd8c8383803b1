"""`make fetch` against a small hub on this machine: subsets, splits, revisions, damage, logins, and no network at all."""

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.data_hub import Hub, commit_of, data_hub
from train.commands import fetch
from train.common.errors import UserError
from train.common.files import read_json
from train.data.checked import conversations
from train.data.origins import hub_data
from train.data.origins.sources import hash_data, pinned, short_name, sources, stem


def jsonl(*names: str) -> bytes:
    return "".join(
        json.dumps({"instruction": f"{name}?", "output": f"{name}. " * 20}) + "\n" for name in names
    ).encode()


def parquet(*names: str) -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    rows = [{"instruction": f"{name}?", "output": f"{name}."} for name in names]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


YAML = b"""---
configs:
- config_name: en
  data_files:
  - split: train
    path: english/a.jsonl
- config_name: zh
  default: true
  data_files:
  - split: train
    path: chinese/*.jsonl
  - split: held
    path: more/held.jsonl
---
# A set
"""
SETS = {
    "one/plain": {
        "main": {"README.md": b"# A set\n", "train.jsonl": jsonl("a", "b", "c"), "test.jsonl": jsonl("t")},
        "v1": {"train.jsonl": jsonl("old")},
        "refs/convert/parquet": {"default/train/0000.parquet": parquet("p")},
    },
    "one/shards": {
        "main": {
            f"data/{split}-{n:05}-of-00002.parquet": parquet(f"{split}{n}", f"more{n}")
            for split in ("train", "validation")
            for n in range(2)
        }
    },
    "one/configs": {
        "main": {
            "README.md": YAML,
            "english/a.jsonl": jsonl("en"),
            "chinese/1.jsonl": jsonl("一"),
            "chinese/2.jsonl": jsonl("二"),
            "more/held.jsonl": jsonl("three"),
        }
    },
    "one/script": {"main": {"script.py": b"print('never')", "data.jsonl": jsonl("s")}},
    "one/splits": {
        "main": {"data/train_sft-00000-of-00001.jsonl": jsonl("x"), "data/gen-00000-of-00001.jsonl": jsonl("g")}
    },
    "one/empty": {"main": {"README.md": b"# nothing\n", "picture.xyz": b"?"}},
    "one/climbs": {"main": {"../../train.jsonl": jsonl("up")}},
    "one/many": {"main": {f"part{n:03}.jsonl": jsonl(f"n{n}") for n in range(230)}},
    "legacy": {"main": {"train.jsonl": jsonl("l")}},
}
NOWHERE = "http://127.0.0.1:9"  # the discard port, where no server listens


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that is asked, and an empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    with data_hub({name: dict(revisions) for name, revisions in SETS.items()}) as (address, state):
        for key in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
            monkeypatch.setenv(key, address)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield state


def get(data: str, **options: bool) -> None:
    fetch.run(fetch.Options(data=data, **options))


def questions(data: str) -> list[str]:
    return [c.turns[0].text for c in conversations.load(data)]


def refusal(data: str) -> str:
    with pytest.raises(UserError) as error:
        get(data)
    return str(error.value)


# What is fetched


def test_a_split_is_fetched_checked_and_read_without_a_network(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    get("hub:one/plain")
    commit = commit_of(SETS["one/plain"]["main"])
    said = capsys.readouterr().out
    assert f"main is commit {commit}" in said and "make data DATA=hub:one/plain" in said
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    assert questions("hub:one/plain") == ["a?", "b?", "c?"]
    assert sources("hub:one/plain") == [Path(f"data/hub/one--plain/{commit}/train.jsonl")]
    assert not list(Path("data").rglob("test.jsonl"))  # another split
    Path("x").touch()
    assert pinned("hub:one/plain:2x,x") == f"hub:one/plain@{commit}#train:2x,x"
    assert pinned("hub:one/plain") == f"hub:one/plain@{commit}#train"
    assert short_name(pinned("hub:one/plain")) == "plain#train" and stem("hub:one/plain#test:2x") == "plain"


def test_the_same_again_asks_nobody_and_another_split_joins_it(hub: Hub) -> None:
    get("hub:one/plain")
    asked = len(hub.requests)
    get("hub:one/plain")
    assert len(hub.requests) == asked
    get("hub:one/plain#test")
    assert questions("hub:one/plain#test,hub:one/plain") == ["t?", "a?", "b?", "c?"]
    manifest = read_json(next(Path("data/hub/one--plain").glob("*/manifest.json")))
    assert set(manifest["files"]) == {"train.jsonl", "test.jsonl"}


def test_shards_of_parquet_are_found_in_order(hub: Hub) -> None:
    get("hub:one/shards")
    files = sources("hub:one/shards")
    assert [path.name for path in files] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert files[0].read_bytes() == SETS["one/shards"]["main"]["data/train-00000-of-00002.parquet"]
    assert questions("hub:one/shards") == ["train0?", "more0?", "train1?", "more1?"]


def test_subsets_are_those_of_the_readme(hub: Hub) -> None:
    get("hub:one/configs")  # the default one
    assert questions("hub:one/configs") == ["一?", "二?"]
    get("hub:one/configs:en,hub:one/configs:zh#held")
    assert questions("hub:one/configs:en") == ["en?"] and questions("hub:one/configs#held") == ["three?"]
    assert (
        "no subset 'fr'" in refusal("hub:one/configs:fr")
        and "hub:one/configs:fr" not in refusal("hub:one/configs:fr").partition("There are:")[2]
    )
    assert "hub:one/configs:en" in refusal("hub:one/configs:fr")


def test_a_split_that_is_not_there_is_named_with_those_that_are(hub: Hub) -> None:
    said = refusal("hub:one/plain#dev")
    assert "no split 'dev'" in said and "hub:one/plain#train" in said and "hub:one/plain#test" in said
    said = refusal("hub:one/splits")
    assert "choose one" in said and "#train_sft" in said and "#gen" in said
    get("hub:one/splits#train_sft")
    assert questions("hub:one/splits#train_sft") == ["x?"]


def test_a_revision_stays_what_it_was_until_it_is_asked_again(hub: Hub) -> None:
    get("hub:one/plain,hub:one/plain@v1")
    old = pinned("hub:one/plain")
    assert questions("hub:one/plain@v1") == ["old?"]
    hub.sets["one/plain"]["main"] = {"train.jsonl": jsonl("new")}
    get("hub:one/plain")
    assert questions("hub:one/plain") == ["a?", "b?", "c?"]
    get("hub:one/plain", update=True)
    assert questions("hub:one/plain") == ["new?"]
    assert questions(old) == ["a?", "b?", "c?"]  # a run's record names the commit
    assert questions(old.replace(old.split("@")[1].split("#")[0][7:], "")) == ["a?", "b?", "c?"]  # seven characters
    assert hash_data(old) != hash_data("hub:one/plain")


def test_a_folder_of_the_repository_counts_alone(hub: Hub) -> None:
    hub.sets["one/folders"] = {"main": {"a/train.jsonl": jsonl("a"), "b/train.jsonl": jsonl("b")}}
    get("hub:one/folders/b")
    assert questions("hub:one/folders/b") == ["b?"]
    assert "no folder 'c'" in refusal("hub:one/folders/c")


# What goes wrong


def test_damage_on_the_way_is_noticed_and_resumed(hub: Hub) -> None:
    hub.cut = 300
    get("hub:one/plain")
    assert questions("hub:one/plain") == ["a?", "b?", "c?"]
    hub.cut = None
    hub.instead["test.jsonl"] = jsonl("u")  # as long, and another
    assert "git's hash differs" in refusal("hub:one/plain#test")
    assert not list(Path("data").rglob("test.jsonl"))
    hub.instead["train.jsonl"] = jsonl("a", "b", "d")
    shutil.rmtree("data")
    assert "its sha256 is" in refusal("hub:one/plain")


def test_a_gated_set_needs_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated.add("one/plain")
    assert "HF_TOKEN=… make fetch DATA=hub:one/plain" in refusal("hub:one/plain")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token_to_send", lambda token: "secret", raising=False)
    get("hub:one/plain")
    assert questions("hub:one/plain") == ["a?", "b?", "c?"]


def test_a_set_made_by_a_script_is_refused_with_the_reason(hub: Hub) -> None:
    said = refusal("hub:one/script")
    assert "script.py" in said and "trust_remote_code" in said and "@refs/convert/parquet" in said
    assert not Path("data").exists()
    get("hub:one/plain@refs/convert/parquet")
    assert questions("hub:one/plain@refs/convert/parquet") == ["p?"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("hub:one/nothing", ["misspelt"]),
        ("hub:one/plain@v9", ["no revision 'v9'", "RevisionNotFound"]),
        ("hub:one/empty", ["no data files"]),
        ("hub:one/climbs", ["leads out of the folder"]),
        ("hub:one", ["misspelt"]),
        ("hub:a/b/../c", ["not the name of a data set", hub_data.FORM]),
        ("hub:", ["not the name of a data set"]),
        ("hub:a/b#", ["not the name of a data set"]),
        ("https://huggingface.co/datasets/one/plain/tree/main", ["write hub:one/plain"]),
        ("https://modelscope.cn/datasets/one/plain", ["write ms:one/plain"]),
        ("ms:one/nothing", ["no such set"]),
    ],
)
def test_what_cannot_be_fetched_is_one_sentence_and_changes_nothing(hub: Hub, data: str, words: list[str]) -> None:
    said = refusal(data)
    assert all(word in said for word in words), said
    assert not [path for path in Path().rglob("*") if path.is_file() and path.name != "README.md"]


def test_a_hub_out_of_reach_has_remedies(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    said = refusal("hub:one/plain")
    assert "does not answer" in said and "HF_ENDPOINT" in said and "ms:OWNER/NAME" in said


def test_what_is_not_fetched_says_how(hub: Hub) -> None:
    with pytest.raises(UserError, match="make fetch DATA=hub:one/plain"):
        conversations.load("hub:one/plain")
    get("hub:one/plain")
    with pytest.raises(UserError, match=r"files are missing.*make fetch"):
        conversations.load("hub:one/plain#test")
    sources("hub:one/plain")[0].write_bytes(b"{}")
    with pytest.raises(UserError, match="changed since it was fetched"):
        conversations.load("hub:one/plain")
    get("hub:one/plain")
    assert questions("hub:one/plain") == ["a?", "b?", "c?"]
    next(Path("data/hub").rglob("manifest.json")).write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        conversations.load("hub:one/plain")


def test_nothing_to_fetch_is_said(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl("a"))
    assert "nothing of it is on a hub" in refusal("a.jsonl")
    assert "which data set" in refusal("")


# The hub's own cache, and ModelScope


def test_offline_takes_what_the_hubs_cache_has(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "its cache has nothing of it" in refusal("hub:one/plain")
    files = SETS["one/plain"]["main"]
    cache = Path("cache/hub/datasets--one--plain")
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("abc1234")
    for name, content in files.items():
        path = cache / "snapshots/abc1234" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    get("hub:one/plain")
    assert "whether the set has more is not known" in capsys.readouterr().out
    assert questions("hub:one/plain") == ["a?", "b?", "c?"] and hub.requests == []


def test_online_a_file_of_the_cache_is_not_fetched_again(hub: Hub) -> None:
    commit = commit_of(SETS["one/plain"]["main"])
    path = Path(f"cache/hub/datasets--one--plain/snapshots/{commit}/train.jsonl")
    path.parent.mkdir(parents=True)
    path.write_bytes(SETS["one/plain"]["main"]["train.jsonl"])
    get("hub:one/plain")
    assert not any("train.jsonl" in request for request in hub.requests)
    shutil.rmtree("data")
    path.write_bytes(b"damaged")
    get("hub:one/plain")
    assert questions("hub:one/plain") == ["a?", "b?", "c?"]


def test_modelscope_is_walked_folder_by_folder_and_page_by_page(hub: Hub) -> None:
    for revisions in hub.sets.values():
        revisions["master"] = revisions.get("main", {})
    get("ms:one/shards,ms:one/many")
    assert len(sources("ms:one/shards")) == 2
    assert len(conversations.load("ms:one/many")) == 230
    assert pinned("ms:one/many").startswith("ms:one/many@") and sources(pinned("ms:one/many"))
    hub.instead["test.jsonl"] = jsonl("u")
    assert "sha256" in refusal("ms:one/plain#test")
