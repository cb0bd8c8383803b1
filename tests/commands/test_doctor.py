"""`doctor` as it is typed: a line a check, status 0 or 2, and nothing changed on the disk."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.oracles import tiny_checkpoint, tiny_config
from train.__main__ import main
from train.commands import doctor
from train.host import machine
from train.host.machine import Card, Host

GB = 10**9
CARD = Card("NVIDIA RTX 4060", (8, 9), 8 * GB, 7 * GB)
HOST = Host(torch="2.7.1+cu126", cuda="12.6", refusal="absent", memory=8 * GB, shared=8 * GB)
WITH_CARD = replace(HOST, cards=(CARD,), driver="535.1", refusal="", compiler="/usr/bin/gcc", headers=True)
LOCK = "# === section: common ===\ntransformers==4.34.1\n"


@pytest.fixture(autouse=True)
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny Int4 base and a data file, on a machine without a card; the machine's own state does not matter."""
    monkeypatch.chdir(tmp_path)
    tiny_checkpoint(tmp_path / "models" / "base-Int4", tiny_config("qwen"), int4=True)
    rows = [{"instruction": f"question {n}", "output": f"answer {n}"} for n in range(4)]
    (tmp_path / "talk.json").write_text(json.dumps(rows))
    (tmp_path / "env.lock").write_text(LOCK)
    monkeypatch.setattr(doctor, "LOCK", tmp_path / "env.lock")
    see(monkeypatch, HOST, {"seen": 0, "errors": []})
    return tmp_path


def see(monkeypatch: pytest.MonkeyPatch, seen: Host, answer: dict[str, object]) -> None:
    monkeypatch.setattr(machine, "look", lambda: seen)
    monkeypatch.setattr(machine, "probe", lambda: answer)


def listed(root: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in root.rglob("*"))


class Told:
    """What `doctor` printed: name of each check -> how it stands, and the whole text."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *words: str) -> None:
        self.status = main(["doctor", *words])
        self.text, self.error = capsys.readouterr()
        lines = [line.split(maxsplit=1) for line in self.text.splitlines()]
        found = [(state, rest) for state, rest in (x for x in lines if len(x) == 2) if state in ("ok", "warn", "fail")]
        self.state = {rest.split("  ")[0]: state for state, rest in found}


def test_all_is_well_and_nothing_is_touched(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = listed(house)
    told = Told(capsys, "model=base-Int4", "data=talk.json")
    assert told.status == 0, told.text
    assert set(told.state.values()) == {"ok"}
    assert {"card", "torch", "packages", "keys", "way", "folder", "tensors", "tokenizer", "memory", "runs"} <= set(
        told.state
    )
    assert "4 conversations" in told.text
    assert told.text.splitlines()[-1].endswith(" ok, 0 warn, 0 fail")
    assert told.error == ""
    assert listed(house) == before


def test_on_a_card(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, WITH_CARD, {"seen": 1, "errors": []})
    told = Told(capsys, "model=base-Int4", "gpus=1")
    assert told.status == 0, told.text
    assert {told.state[name] for name in ("card", "driver", "generation", "card's memory", "memory")} == {"ok"}


def test_a_card_too_small_for_the_base(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(CARD, total=10_000, free=9_000)
    see(monkeypatch, replace(WITH_CARD, cards=(small,)), {"seen": 1, "errors": []})
    told = Told(capsys, "model=base-Int4")
    assert (told.status, told.state["card's memory"]) == (2, "fail")
    assert "Int4 base" in told.text
    assert "make plan MODEL=base-Int4" in told.text


def test_a_card_too_small_for_the_recipe_but_not_for_its_rows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is said fits: the same words given, nothing is left to say."""
    words = ("model=base-Int4", "length=8192", "batch=64", "accumulation=1", "checkpointing=off")
    some = replace(CARD, total=4 * GB, free=3 * GB)
    see(monkeypatch, replace(WITH_CARD, cards=(some,)), {"seen": 1, "errors": []})
    told = Told(capsys, *words)
    assert (told.status, told.state["card's memory"]) == (2, "fail")
    remedy = told.text.split('in less: ARGS="')[1].split('"')[0].split()
    assert Told(capsys, "model=base-Int4", "length=8192", *remedy).state["card's memory"] in ("ok", "warn")


def test_a_container_with_too_little_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch, replace(WITH_CARD, memory=GB), {"seen": 1, "errors": []})
    told = Told(capsys, "model=base-Int4")
    assert (told.status, told.state["memory"], told.state["card's memory"]) == (2, "fail", "ok")


def test_blackwell_with_cuda_12_6(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    see(
        monkeypatch,
        replace(WITH_CARD, cards=(replace(CARD, capability=(12, 0)),)),
        {"seen": 1, "errors": ["card 0: no kernel"]},
    )
    told = Told(capsys, "model=base-Int4")
    assert told.status == 2
    assert (told.state["generation"], told.state["torch"]) == ("fail", "fail")
    assert "CUDA=12.8" in told.text
    assert told.error == f"error: 2 of {len(told.state)} checks fail. Nothing was changed.\n"


def test_torch_that_does_not_start_leaves_the_other_checks_standing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch, HOST, {"died": "libcudnn.so.9: cannot open shared object file"})
    told = Told(capsys, "model=base-Int4", "data=talk.json")
    assert told.status == 2
    assert "libcudnn.so.9" in told.text
    assert (told.state["keys"], told.state["folder"], told.state["rows"], told.state["runs"]) == ("ok",) * 4
    assert "tensors" not in told.state


def test_a_wrong_key_and_wrong_data_are_told_together(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (house / "bad.json").write_text('[{"instruction": "a"}, {"instruction": "b"}, 7, 8, 9]')
    told = Told(capsys, "data=bad.json", "lenght=3")
    assert told.status == 2
    assert (told.state["keys"], told.state["rows"]) == ("fail", "fail")
    assert "Did you mean length=?" in told.text
    assert "bad.json:1:" in told.text
    assert "All of them: make data DATA=bad.json" in told.text


@pytest.mark.parametrize(
    ("words", "check", "text"),
    [
        (("precision=fp16",), "way", "needs a GPU"),
        (("zero=3", "checkpointing=on"), "way", "checkpointing=off"),
        (("targets=c_attn,k_proj",), "targets", "k_proj"),
        (("recipe=none-such",), "keys", "none-such"),
        (("length=4", "data=talk.json", "overlong=skip"), "tokens", "no token to train on"),
        (("model=nowhere",), "folder", "no hub id"),
    ],
)
def test_what_training_would_refuse(
    words: tuple[str, ...], check: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = Told(capsys, "model=base-Int4", *words)
    assert (told.status, told.state[check]) == (2, "fail")
    assert text in " ".join(told.text.split())


STAGED = "model: base-Int4\nepochs: 1\nstages:\n  - data: voice.json\n    epochs: 20\n  - learning_rate: 1.0e-4\n"


def test_every_stage_of_a_recipe(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (house / "two.yaml").write_text(STAGED)
    (house / "voice.json").write_text('[{"instruction": "a"}]')
    told = Told(capsys, "recipe=two.yaml", "data=talk.json")
    assert told.status == 2
    assert "20 epochs" in told.text
    assert "; then " in told.text
    first, second = told.text.split("data voice.json, stage 1 of 2")[1].split("data talk.json, stage 2 of 2")
    assert "fail  rows" in first
    assert "4 conversations" in second
    alone = Told(capsys, "recipe=two.yaml")  # what the second stage learns is not said yet
    assert "stage 1 of 2" in alone.text
    assert "stage 2 of 2" not in alone.text
    (house / "two.yaml").write_text(STAGED.replace("epochs: 20", "epochs: many"))
    assert "stage 1" in Told(capsys, "recipe=two.yaml").text


def test_a_base_that_is_not_here_yet_is_fetched_by_train(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = Told(capsys)
    assert (told.status, told.state["folder"]) == (0, "warn")
    assert "make model MODEL=Qwen/Qwen-1_8B-Chat-Int4" in told.text
    assert Told(capsys, "model=Qwen2.5-Coder-0.5B-Instruct").state["folder"] == "warn"  # a name of data/models.lock
    assert doctor._download("Qwen2.5-Coder-0.5B-Instruct") > 1_500_000_000


def test_a_base_with_a_file_missing(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a manifest too: the files' headers are held against config.json."""
    from safetensors.torch import load_file, save_file

    path = house / "models/base-Int4/model.safetensors"
    state = load_file(path)
    state.pop("transformer.ln_f.weight")
    save_file(state, path)
    (house / "models/base-Int4/manifest.json").unlink(missing_ok=True)
    told = Told(capsys, "model=base-Int4")
    assert (told.status, told.state["tensors"]) == (2, "fail")
    assert "transformer.ln_f.weight" in told.text


def test_a_base_that_is_damaged(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = {"files": {"model.safetensors": {"bytes": 1, "sha256": "0"}}}
    (house / "models/base-Int4/manifest.json").write_text(json.dumps(manifest))
    told = Told(capsys, "model=base-Int4")
    assert (told.status, told.state["folder"]) == (2, "fail")
    assert "Remove the folder" in told.text


def test_longer_than_the_base_was_made_for(capsys: pytest.CaptureFixture[str]) -> None:
    told = Told(capsys, "model=base-Int4", "length=1000000")
    assert (told.status, told.state["length"]) == (0, "warn")


def test_a_package_that_the_lock_has_otherwise(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (house / "env.lock").write_text(LOCK.replace("4.34.1", "4.40.0"))
    told = Told(capsys, "model=base-Int4")
    assert (told.status, told.state["packages"]) == (2, "fail")
    assert "transformers is 4.34.1, not 4.40.0" in told.text


def test_an_option_of_the_wrong_kind_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert Told(capsys, "gpus=all").error == "error: gpus=all: expected a whole number\n"


def test_the_real_machine_is_looked_at(
    house: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No stand-ins: whatever this machine is, every check says something and no traceback."""
    monkeypatch.undo()
    monkeypatch.chdir(house)
    told = Told(capsys, "model=base-Int4")
    assert {"card", "torch", "packages", "shared memory"} <= set(told.state)
    assert "torch 2.7.1" in told.text
