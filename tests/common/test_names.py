"""Names that a user gives: a sentence for what is too long or leads out of its folder, in every command, and no file."""

from pathlib import Path

import pytest

from tests.support.oracles import tiny_checkpoint, tiny_config
from tests.support.runs import tiny_run
from train.__main__ import main
from train.common.errors import UserError
from train.common.names import below

LONG = "x" * 300
OUTSIDE = ["..", "/", ".", "a/../..", "../x", "/tmp/x", "a/..", "./"]


@pytest.mark.parametrize("name", [*OUTSIDE, LONG, f"a/{LONG}", "名" * 90])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"^run=.*(expected the name of a folder below runs/|bytes, 255 at most)"):
        below("runs", name, "run")


@pytest.mark.parametrize("name", ["demo", "a b", "名", "..a", "demo/stages/1", "x" * 255])
def test_a_name_below_the_folder_is_taken(name: str) -> None:
    assert below("runs", name, "run") == Path("runs") / name


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    tiny_run(root)
    tiny_checkpoint(root / "models" / "float", tiny_config())
    (root / "data.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    (root / "folder").mkdir()
    (root / "folder" / "precious").write_text("mine")
    return root


def refuses(root: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a command that must end with a sentence and change nothing."""
    monkeypatch.chdir(root)
    before = sorted(root.rglob("*"))
    assert main(words) in (1, 2)
    assert sorted(root.rglob("*")) == before
    assert (root / "folder" / "precious").read_text() == "mine"
    said = capsys.readouterr().err
    assert "error: " in said and "Traceback" not in said
    return said


@pytest.mark.parametrize("name", ["..", "/", "a/../..", LONG])
@pytest.mark.parametrize("verb", ["train", "infer", "compare", "export", "verify"])
def test_run_names_a_folder_below_runs(
    verb: str, name: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["data=data.jsonl", "model=base-Int4"] if verb == "train" else []
    said = refuses(root, [verb, f"run={name}", *more], monkeypatch, capsys)
    assert "run=" in said


@pytest.mark.parametrize(
    "words",
    [
        ["train", "data=data.jsonl", "model=base-Int4", f"from={LONG}", "run=y"],
        ["train", "data=data.jsonl", "model=base-Int4", "from=..", "run=y"],
        ["train", f"data={LONG}", "model=base-Int4"],
        ["train", "data=data.jsonl", f"model={LONG}", "run=y"],
        ["train", "data=data.jsonl", "model=base-Int4", f"recipe={LONG}", "run=y"],
        ["data", f"data={LONG}"],
        ["data", "data=data.jsonl", "model=base-Int4", "out=folder"],
        ["data", "data=data.jsonl", "model=base-Int4", "out=/"],
        ["data", "data=data.jsonl", "model=base-Int4", f"out={LONG}"],
        ["data", "data=data.jsonl", "model=base-Int4", "out=data.jsonl/x"],
        ["export", "run=tiny", "out=folder"],
        ["export", "run=tiny", "out=data.jsonl"],
        ["export", "run=tiny", "out=/"],
        ["export", "run=tiny", "out=models/float"],
        ["export", "run=tiny", f"out={LONG}"],
        ["export", "run=tiny", f"onto={LONG}"],
        ["quantize", "model=float", "out=.."],
        ["quantize", "model=float", "out=/"],
        ["quantize", "model=float", f"out={LONG}"],
        ["quantize", f"model={LONG}"],
        ["infer", f"model={LONG}"],
        ["model", f"model={LONG}"],
        ["compare", "run=tiny", f"questions={LONG}"],
        ["compare", "run=tiny", "questions=folder"],
    ],
    ids=lambda words: " ".join(words).replace(LONG, "LONG"),
)
def test_a_path_that_cannot_be_meant_is_a_sentence(
    words: list[str], root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuses(root, words, monkeypatch, capsys)


@pytest.mark.parametrize("verb", ["train", "infer", "compare", "export", "verify", "quantize", "data", "model"])
def test_what_a_container_needs_is_no_traceback_for_such_names(verb: str, capfd: pytest.CaptureFixture[str]) -> None:
    words = [f"{key}={LONG}" for key in ("run", "data", "model", "recipe", "out", "onto", "questions")]
    status = main(["needs", verb, *words])
    said = capfd.readouterr().err
    assert (status, said) == (0, "") or (status == 1 and "File name too long. Give a shorter name." in said)
