"""dataset_info.json of LLaMA-Factory: sets in every form it allows, against texts that are written out here; what it gets wrong."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.samples import Letters
from train.common.errors import UserError
from train.config.recipe import Recipe
from train.data.checked import conversations
from train.data.origins.sources import hash_data, short_name, sources, stem
from train.data.rows.data_row import ReadOptions
from train.data.tokens.samples import encode

Expected = list[tuple[str | None, list[str]]]  # of each conversation: its system message, its texts in turn
QA = [{"instruction": "Q1", "input": "more", "output": "A1"}, {"instruction": "Q2", "input": "", "output": "A2"}]
SHAREGPT = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
OPENAI_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]

SETS: dict[str, tuple[dict[str, Any], list[Any], Expected]] = {
    # name -> (its entry without file_name, its rows, what has to be read)
    "alpaca": ({}, QA, [(None, ["Q1\nmore", "A1"]), (None, ["Q2", "A2"])]),
    "a question in input alone": ({}, [{"input": "Q", "output": "A"}], [(None, ["Q", "A"])]),
    "only the named columns are used": (
        {"columns": {"prompt": "instruction", "response": "output"}},
        QA,
        [(None, ["Q1", "A1"]), (None, ["Q2", "A2"])],
    ),
    "other names": (
        {"formatting": "alpaca", "columns": {"prompt": "问题", "query": "补充", "response": "回答"}},
        [
            {"问题": "咳嗽怎么办？", "补充": "三天了", "回答": "多喝水。"},
            {"问题": "好？", "补充": None, "回答": "好。"},
        ],
        [(None, ["咳嗽怎么办？\n三天了", "多喝水。"]), (None, ["好？", "好。"])],
    ),
    "history and system": (
        {"columns": {"prompt": "p", "response": "r", "history": "h", "system": "s"}},
        [
            {"p": "third", "r": "3", "h": [["first", "1"], ["second", "2"]], "s": "Be short."},
            {"p": "alone", "r": "0", "h": [], "s": ""},
            {"p": "null", "r": "n", "h": None, "s": None},
        ],
        [
            ("Be short.", ["first", "1", "second", "2", "third", "3"]),
            (None, ["alone", "0"]),
            (None, ["null", "n"]),
        ],
    ),
    "history that is not named": (
        {},
        [{"instruction": "q", "output": "a", "history": [["x", "y"]], "system": "s"}],
        [(None, ["q", "a"])],
    ),
    "null columns": (
        {"columns": {"prompt": "q", "response": "a", "history": None}},
        [{"q": "1", "a": "2"}],
        [(None, ["1", "2"])],
    ),
    "good answers of KTO": (
        {"columns": {"prompt": "instruction", "query": "input", "response": "output", "kto_tag": "label"}},
        [{**QA[0], "label": True}],
        [(None, ["Q1\nmore", "A1"])],
    ),
    "sharegpt": ({"formatting": "sharegpt"}, [SHAREGPT], [(None, ["q", "a"])]),
    "sharegpt with a system column": (
        {"formatting": "sharegpt", "columns": {"messages": "conversations", "system": "s"}},
        [{**SHAREGPT, "s": "Be kind."}, {**SHAREGPT, "s": ""}],
        [("Be kind.", ["q", "a"]), (None, ["q", "a"])],
    ),
    "a system turn counts before the column": (
        {"formatting": "sharegpt", "columns": {"messages": "conversations", "system": "s"}},
        [{"conversations": [{"from": "system", "value": "turn"}, *SHAREGPT["conversations"]], "s": "column"}],
        [("turn", ["q", "a"])],
    ),
    "sharegpt with the tags of OpenAI": (
        {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": OPENAI_TAGS},
        [{"messages": [{"role": "system", "content": "s"}, *MESSAGES, *MESSAGES]}],
        [("s", ["q", "a", "q", "a"])],
    ),
    "tags of one's own": (
        {
            "formatting": "sharegpt",
            "columns": {"messages": "对话"},
            "tags": {"role_tag": "speaker", "content_tag": "text", "user_tag": "患者", "assistant_tag": "医生"},
        },
        [{"对话": [{"speaker": "患者", "text": "头痛"}, {"speaker": "医生", "text": "多久了？"}]}],
        [(None, ["头痛", "多久了？"])],
    ),
    "roles that are others elsewhere": (
        {"formatting": "sharegpt", "tags": {"user_tag": "gpt", "assistant_tag": "human"}},
        [{"conversations": [{"from": "gpt", "value": "1"}, {"from": "human", "value": "2"}]}],
        [(None, ["1", "2"])],
    ),
    "openai": ({"formatting": "openai"}, [{"messages": MESSAGES}], [(None, ["q", "a"])]),
    "openai with columns": (
        {"formatting": "openai", "columns": {"messages": "dialog", "system": "s"}, "ranking": False},
        [{"dialog": MESSAGES, "s": "x"}],
        [("x", ["q", "a"])],
    ),
    "fewer": ({"num_samples": 1}, QA[:1], [(None, ["Q1\nmore", "A1"])]),
    "more": ({"num_samples": 5}, QA[1:], [(None, ["Q2", "A2"])] * 5),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """data/, with every set of SETS and its dataset_info.json."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    info = {}
    for number, (name, (entry, rows, _)) in enumerate(SETS.items()):
        info[name] = {"file_name": f"{number}.{'jsonl' if number % 2 else 'json'}", **entry}
        text = "\n".join(map(json.dumps, rows)) if number % 2 else json.dumps(rows, ensure_ascii=False, indent=1)
        (tmp_path / "data" / info[name]["file_name"]).write_text(text, encoding="utf-8")
    write(info)
    return tmp_path / "data"


def write(info: Any) -> None:
    text = info if isinstance(info, str) else json.dumps(info, ensure_ascii=False, indent=2)
    Path("data/dataset_info.json").write_text(text, encoding="utf-8")


def one(entry: dict[str, Any], rows: list[Any] | None = None) -> str:
    """A dataset_info.json with the set `x`; returns DATA."""
    Path("data/x.json").write_text(json.dumps(rows if rows is not None else QA, ensure_ascii=False), encoding="utf-8")
    write({"x": {"file_name": "x.json", **entry}})
    return "data:x"


def refusal(data: str) -> str:
    with pytest.raises(UserError) as error:
        conversations.read(data)
    return str(error.value)


def texts(data: str) -> Expected:
    return [(c.system, [turn.text for turn in c.turns]) for c in conversations.load(data)]


def notices(data: str) -> str:
    return "\n".join(conversations.read(data).notices())


# What is read


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_read_as_llama_factory_means_it(name: str) -> None:
    expected = SETS[name][2]
    for data in (f"data:{name}", f"data/:{name}", f"data/dataset_info.json:{name}"):
        assert texts(data) == expected
    _, summary = encode(conversations.load(f"data:{name}"), Letters(), Recipe(system="", length=512))
    in_turn = len("1user\n2\n1assistant\n2\n")  # <|im_start|>, role, line end, text, <|im_end|>, line end
    count = sum(
        sum(map(len, turns)) + len(turns) // 2 * in_turn + (len("1system\n2\n") + len(system) if system else 0)
        for system, turns in expected
    )
    assert summary.tokens == count


def test_several_sets_of_a_folder() -> None:
    data = "data:alpaca,sharegpt, openai"
    assert texts(data) == [row for name in ("alpaca", "sharegpt", "openai") for row in SETS[name][2]]
    assert short_name(data) == "alpaca, sharegpt, openai" and stem(data) == "alpaca"
    assert texts("data:openai:2x,sharegpt:1rows") == [(None, ["q", "a"])] * 3


def test_a_folder_of_files_and_a_table_of_the_same_rows() -> None:
    Path("data/parts").mkdir()
    for name in ("b", "a"):
        Path(f"data/parts/{name}.json").write_text(json.dumps([{"q": name, "a": name.upper()}]))
    write({"x": {"file_name": "parts", "columns": {"prompt": "q", "response": "a"}}})
    assert texts("data:x") == [(None, ["a", "A"]), (None, ["b", "B"])]
    assert sources("data:x") == [Path("data/parts/a.json"), Path("data/parts/b.json")]


def test_num_samples_takes_the_same_rows_in_every_run_and_order() -> None:
    rows = [{"instruction": f"q{n}", "output": "a"} for n in range(50)]
    data = one({"num_samples": 10}, rows)
    taken = texts(data)
    assert len(taken) == 10 and taken == texts(data)
    one({"num_samples": 10}, rows[::-1])
    assert sorted(map(str, texts(data))) == sorted(map(str, taken))
    other = [(c.system, [turn.text for turn in c.turns]) for c in conversations.load(data, ReadOptions(seed=1))]
    assert len(other) == 10 and other != taken[::-1]
    assert "num_samples takes 10 rows by a hash of seed=" in notices(data)
    [part] = conversations.read(data).parts
    assert (part.read, part.used) == (50, 10)


def test_what_llama_factory_passes_over_is_said() -> None:
    rows = [{**QA[0], "system": "s", "history": [["x", "y"]], "source": "web", "id": 7, "empty": ""}]
    entry = {"file_sha1": "0" * 40, "license": "mine", "subset": "en", "tags": {"user_tag": "user"}}
    said = notices(one(entry, rows))
    assert 'does not name the columns: "system" (1 rows), "history" (1 rows)' in said
    assert '"columns": {"prompt": "instruction", "query": "input", "response": "output", "system": "system"' in said
    assert 'does not name: "source" (1 rows)' in said and '"id"' not in said and '"empty"' not in said
    assert "file_sha1 is not checked" in said
    assert "a key that is not used: license" in said
    assert "because it is a file: subset" in said
    assert 'tags count with "formatting": "sharegpt" or "openai" only' in said
    said = notices(one({"columns": {"prompt": "instruction", "response": "output", "chosen": "c"}}))
    assert 'not used without "ranking": the columns chosen' in said and '"input" (1 rows)' in said


def test_what_llama_factory_adds_is_said() -> None:
    assert 'adds "detailed thinking off"' in notices("data:openai")


def test_a_system_column_that_gives_way_is_said(folder: Path) -> None:
    assert '"s" is not used in 1 rows, which begin with a system turn' in notices(
        "data:a system turn counts before the column"
    )


def test_another_entry_may_be_anything_and_the_hash_follows_the_one_that_is_read() -> None:
    data = one({})
    before = hash_data(data)
    info = json.loads(Path("data/dataset_info.json").read_text())
    write({**info, "other": {"file_nam": 3}})
    assert hash_data(data) == before and texts(data) == SETS["alpaca"][2]
    for change in ({"num_samples": 1}, {"columns": {"prompt": "instruction", "response": "output"}}):
        one(change)
        assert hash_data(data)["sha256"] != before["sha256"]


# What is wrong: in the rows


def test_rows_that_llama_factory_leaves_out_are_reported() -> None:
    human, gpt = SHAREGPT["conversations"]
    rows = [
        SHAREGPT,
        {"conversations": [human]},
        {"conversations": [human, human]},
        {"conversations": [human, {"from": "user", "value": "x"}]},
        {"conversations": [gpt, human]},
    ]
    said = refusal(one({"formatting": "sharegpt"}, rows))
    assert said.count("LLaMA-Factory leaves such a row out") == 4, said
    assert 'the role "user"' in said and '"tags": {"user_tag": "user", …}' in said


def test_problems_have_the_names_and_places_of_the_file() -> None:
    entry = {
        "formatting": "sharegpt",
        "columns": {"messages": "dialog"},
        "tags": {"role_tag": "who", "content_tag": "says"},
    }
    Path("data/x.jsonl").write_text('{"dialog": [{"who": "human", "says": "q"}, {"who": "gpt", "says": 3}]}\n')
    write({"x": {"file_name": "x.jsonl", **entry}})
    said = refusal("data:x")
    assert "data/x.jsonl:1:67: found a number" in said
    Path("data/x.jsonl").write_text('{"dialog": [{"who": "human", "says": "q"}, {"who": "gpt", "text": "a"}]}\n')
    assert 'no "says" among the keys of a turn "who", "text"' in refusal("data:x")
    assert '"tags": {"content_tag": "text", …}' in refusal("data:x")
    said = refusal(one({"columns": {"prompt": "question", "response": "answer"}}, [{"question": "q", "Answer": "a"}]))
    assert 'no "answer" among the keys "question", "Answer"' in said and '"response": "Answer"' in said
    said = refusal(one({"columns": {"prompt": "q", "response": "a"}}, [{"q": " ", "a": "x"}, {"q": "x", "a": None}]))
    assert "data/x.json:1:8: found an empty text" in said and "data/x.json:1:40: found null" in said


@pytest.mark.parametrize(
    ("entry", "row", "words"),
    [
        ({"columns": {"prompt": "instruction", "response": "output", "kto_tag": "label"}}, {"label": False}, "KTO"),
        (
            {"columns": {"prompt": "instruction", "response": "output", "images": "pics"}},
            {"pics": ["x"]},
            '"pics" in a row',
        ),
    ],
)
def test_rows_of_other_kinds_are_refused_by_name(entry: dict[str, Any], row: dict[str, Any], words: str) -> None:
    assert words in refusal(one(entry, [{**QA[0], **row}]))


# What is wrong: in dataset_info.json


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"file_name": None, "script_url": "mine"}, ["code of a data set is never run here"]),
        ({"script_url": "mine"}, ['"script_url"', "never run"]),  # counts before file_name
        ({"ranking": True, "columns": {"prompt": "p", "response": "r"}}, ["without the column chosen and rejected"]),
        ({"colums": {}}, ['the key "colums"', 'write "columns"']),
        ({"columns": {"promt": "q"}}, ['the key "promt"', 'write "prompt"']),
        ({"formatting": "sharegtp"}, ['the formatting "sharegtp"', 'write "sharegpt"']),
        ({"formatting": 3}, ['"formatting" that is 3']),
        ({"num_samples": "100"}, ['"num_samples" that is "100"', "a whole number"]),
        ({"num_samples": 0}, ['"num_samples" that is 0']),
        ({"num_samples": True}, ['"num_samples" that is true']),
        ({"ranking": "yes"}, ['"ranking" that is "yes"']),
        ({"columns": ["prompt"]}, ['"columns" that is']),
        ({"columns": {"prompt": 3}}, ['"prompt" that is 3']),
        ({"columns": {"prompt": "q"}}, ["for pretraining"]),
        ({"columns": {"response": "a"}}, ['columns without "prompt"']),
        ({"columns": {"prompt": "q", "response": "q"}}, ['"q" for two columns']),
        ({"columns": {"messages": "m", "prompt": "p", "response": "r"}}, ['write "formatting": "sharegpt"']),
        ({"formatting": "sharegpt", "columns": {"system": "s"}}, ['columns without "messages"']),
        ({"formatting": "sharegpt", "columns": {"messages": "m", "history": "h"}}, ['the column "history"']),
        ({"formatting": "sharegpt", "tags": {"user_tag": "x", "assistant_tag": "x"}}, ['the role "x" for two tags']),
        ({"formatting": "sharegpt", "tags": {"user_tga": "x"}}, ['the key "user_tga"', 'write "user_tag"']),
        ({"split": "validation"}, ['the split "validation"', "num_samples"]),
        ({"split": "train[:100]"}, ['the split "train[:100]"']),
        ({"cloud_file_name": "s3://x"}, ["S3"]),
        ({"om_hub_url": "x/y"}, ["Openmind"]),
    ],
)
def test_a_mistake_has_its_place_and_remedy(entry: dict[str, Any], words: list[str]) -> None:
    data = one(entry)
    said = refusal(data)
    assert said.startswith("1 problem in data/dataset_info.json; nothing was changed.\ndata/dataset_info.json:"), said
    assert all(word in said for word in words), said
    line = int(said.split("data/dataset_info.json:")[1].split(":")[0])
    key = (
        words[0].split('"')[1] if words[0].startswith(("the key", '"n', '"r', '"c')) and '" for' not in words[0] else ""
    )
    assert f'"{key}"' in Path("data/dataset_info.json").read_text().split("\n")[line - 1] if key else line > 1


def test_all_mistakes_of_all_names_are_one_report() -> None:
    write({"a": {"file_nam": "x"}, "b": {"file_name": "0.json", "rankng": 1, "split": 2}, "c": {"formatting": "x"}})
    said = refusal("data:a,b")
    assert said.startswith("4 problems in data/dataset_info.json"), said
    assert "data/dataset_info.json:3:" in said and "data/dataset_info.json:7:" in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"x": {"file_name": "0.json",}}', ["dataset_info.json:1:29: found a trailing comma"]),
        ("{'x': {'file_name': '0.json'}}", ["in single quotes"]),
        ('{"x": {"file_name": "0.json"} "y": {}}', ["',' before it"]),
        ('{"x": {"file_name": "0.json"}, // mine\n "y": {}}', ["a comment"]),
        ('{"x": {"file_name": "0.json"}', ["the } that closes the object"]),
        ('{"x": {"file_name": "0.json"}}\n}', ["dataset_info.json:2:1"]),
        ('{"x": {}, "x": {}}', ['the key "x" a second time']),
        ("[]", ["names data sets"]),
        ('{"x": 3}', ["names data sets"]),
        ("{}", ["names data sets"]),
        ("", ["dataset_info.json"]),
        ("hello", ["dataset_info.json:1:1"]),
    ],
)
def test_damaged_json_is_reported_with_line_and_column(text: str, words: list[str]) -> None:
    write(text)
    said = refusal("data:x")
    assert all(word in said for word in words), said


def test_bytes_that_are_not_utf8() -> None:
    Path("data/dataset_info.json").write_bytes('{"中": {}}'.encode("gb18030"))
    assert "iconv -f GB18030" in refusal("data:中")


@pytest.mark.parametrize("data", ["data", "data/", "data/dataset_info.json"])
def test_without_a_name_the_names_are_listed(data: str) -> None:
    write({"one": {"file_name": "0.json"}, "two": {"hf_hub_url": "a/b", "ranking": True}})
    said = refusal(data)
    assert "DATA=data:one,two" in said and "one: 0.json" in said and "two: a/b, preference data" in said


def test_names_that_are_not_there() -> None:
    write({"alpaca_zh": {"file_name": "0.json"}, "identity": {"file_name": "1.jsonl"}})
    assert 'write "alpaca_zh"' in refusal("data:alpaca_hz")
    assert "no name in data/dataset_info.json. Did you mean identity?" in refusal("data:alpaca_zh,identitty")
    Path("identity").touch()
    said = refusal("data:alpaca_zh,identity")
    assert "./identity" in said and "data:identity" in said
    assert "has no dataset_info.json" in refusal(".:x")
    write({"x": {"file_name": "gone.json"}})
    assert "data/dataset_info.json: x: file_name 'data/gone.json': no such file" in refusal("data:x")


# Sets on a hub


def test_a_set_of_a_hub_has_to_be_fetched_first() -> None:
    write({"z": {"hf_hub_url": "o/n", "ms_hub_url": "m/n", "subset": "en", "file_name": "0.json", "split": "test"}})
    said = refusal("data:z")
    assert "make fetch DATA='hub:o/n:en#test'" in said


# Tables


def write_table(path: Path, columns: dict[str, list[Any]]) -> None:
    import openpyxl
    import pyarrow
    import pyarrow.parquet

    rows = [list(columns), *map(list, zip(*columns.values()))]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    elif path.suffix == ".xlsx":
        book = openpyxl.Workbook()
        for row in rows:
            book.active.append(row)  # type: ignore[union-attr]
        book.save(path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)


@pytest.mark.parametrize("name", ["t.csv", "t.xlsx", "t.parquet"])
def test_columns_of_a_table_are_those_of_dataset_info(name: str) -> None:
    """`answer` would be guessed to be the answer, and `question` the question: the names of the file count."""
    table = {"question": ["no"], "病情": ["头痛"], "建议": ["休息"], "answer": ["no"], "设定": [""]}
    write_table(Path("data") / name, table)
    columns = {"prompt": "病情", "query": "补充", "response": "建议", "system": "设定"}
    write({"t": {"file_name": name, "columns": columns}})
    assert texts("data:t") == [(None, ["头痛", "休息"])]
    assert '"question"' in notices("data:t")
    write({"t": {"file_name": name, "columns": {"prompt": "病情", "response": "建义"}}})
    assert 'no column "建义"' in refusal("data:t")
    write_table(Path("data") / name, {**table, "建议": [" "]})
    write({"t": {"file_name": name, "columns": columns}})
    assert "the answer" in refusal("data:t")


def test_turns_in_a_table() -> None:
    turns = [{"who": "患者", "says": "q"}, {"who": "医生", "says": "a"}]
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "患者", "assistant_tag": "医生"}
    for name, cell in (("t.parquet", turns), ("t.csv", json.dumps(turns, ensure_ascii=False))):
        write_table(Path("data") / name, {"dialog": [cell], "other": ["x"]})
        write({"t": {"file_name": name, "formatting": "sharegpt", "columns": {"messages": "dialog"}, "tags": tags}})
        assert texts("data:t") == [(None, ["q", "a"])]
