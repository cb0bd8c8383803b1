"""`doctor` as it is typed: one line a check, status 0 or 2, and nothing on the disk is changed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.oracles import tiny_checkpoint, tiny_config
from tests.support.questions import questions
from train.__main__ import main
from train.commands import doctor
from train.commands.findings import Report
from train.common.errors import UserError
from train.host import machine
from train.host.checks import Finding
from train.host.machine import Card, Machine

GB = 10**9
CARD = Card("NVIDIA RTX 4060", (8, 9), 8 * GB, 7 * GB)
WITHOUT_CARD = Machine(
    torch="2.7.1+cu126", cuda="12.6", nvidia_smi_error="absent", free_memory=8 * GB, shared_memory=8 * GB
)
WITH_CARD = replace(
    WITHOUT_CARD,
    cards=(CARD,),
    driver="535.1",
    nvidia_smi_error="",
    compiler="/usr/bin/gcc",
    python_headers=True,
)
LOCK = "# === section: common ===\ntransformers==4.34.1\n"


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny Int4 base and a data file, on an imaginary machine without a card."""
    monkeypatch.chdir(tmp_path)
    tiny_checkpoint(tmp_path / "models" / "base-Int4", tiny_config("qwen"), int4=True)
    rows = [{"instruction": f"question {n}", "output": f"answer {n}"} for n in range(4)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    (tmp_path / "env.lock").write_text(LOCK)
    monkeypatch.setattr(doctor, "LOCK", tmp_path / "env.lock")
    pretend(monkeypatch, WITHOUT_CARD, {"seen": 0, "errors": []})
    return tmp_path


def pretend(monkeypatch: pytest.MonkeyPatch, here: Machine, probe: dict[str, object]) -> None:
    monkeypatch.setattr(machine, "inspect_machine", lambda: here)
    monkeypatch.setattr(machine, "probe_torch", lambda: probe)


def listed(root: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in root.rglob("*"))


class Output:
    """What `doctor` printed: the name of each check -> its state, and the whole text."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *words: str) -> None:
        self.status = main(["doctor", *words])
        self.text, self.error = capsys.readouterr()
        lines = [line.split(maxsplit=1) for line in self.text.splitlines()]
        rows = [(state, rest) for state, rest in (x for x in lines if len(x) == 2) if state in ("ok", "warn", "fail")]
        self.state = {rest.split("  ")[0]: state for state, rest in rows}


def test_everything_is_ok_and_nothing_is_changed(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = listed(workspace)
    output = Output(capsys, "model=base-Int4", "data=data.json")
    assert output.status == 0, output.text
    assert set(output.state.values()) == {"ok"}
    assert {
        "card",
        "torch",
        "packages",
        "keys",
        "combination",
        "folder",
        "tensors",
        "tokenizer",
        "memory",
        "runs",
    } <= set(output.state)
    assert "4 conversations" in output.text
    assert output.text.splitlines()[-1].endswith(" ok, 0 warn, 0 fail")
    assert output.error == ""
    assert listed(workspace) == before


def test_on_a_card(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, WITH_CARD, {"seen": 1, "errors": []})
    output = Output(capsys, "model=base-Int4", "gpus=1")
    assert output.status == 0, output.text
    assert {output.state[name] for name in ("card", "driver", "generation", "card's memory", "memory")} == {"ok"}


def test_a_card_too_small_for_the_base(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(CARD, total=10_000, free=9_000)
    pretend(monkeypatch, replace(WITH_CARD, cards=(small,)), {"seen": 1, "errors": []})
    output = Output(capsys, "model=base-Int4")
    assert (output.status, output.state["card's memory"]) == (2, "fail")
    assert "Int4 base" in output.text
    assert "make plan MODEL=base-Int4" in output.text


def test_a_card_too_small_for_the_recipe_but_not_for_its_rows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The suggested words fit: given to doctor again, they lead to no failure."""
    words = ("model=base-Int4", "length=8192", "batch=64", "accumulation=1", "checkpointing=off")
    some = replace(CARD, total=4 * GB, free=3 * GB)
    pretend(monkeypatch, replace(WITH_CARD, cards=(some,)), {"seen": 1, "errors": []})
    output = Output(capsys, *words)
    assert (output.status, output.state["card's memory"]) == (2, "fail")
    remedy = output.text.split('in less memory: ARGS="')[1].split('"')[0].split()
    assert Output(capsys, "model=base-Int4", "length=8192", *remedy).state["card's memory"] in ("ok", "warn")


def test_it_checks_what_training_takes_by_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card too small for the recipe's rows at once: `train` takes fewer at once, so doctor fails nothing."""
    some = replace(CARD, total=4 * GB, free=4 * GB)
    pretend(monkeypatch, replace(WITH_CARD, cards=(some,)), {"seen": 1, "errors": []})
    output = Output(capsys, "model=base-Int4", "length=8192", "rows_per_step=64")
    assert output.status == 0, output.text
    assert (output.state["step"], output.state["card's memory"]) == ("ok", "ok")
    assert "the fastest way that fits" in output.text
    numbers = ("batch=64", "accumulation=1", "checkpointing=off", "embedding=device")
    given = Output(capsys, "model=base-Int4", "length=8192", *numbers)
    assert "step" not in given.state  # nothing is left to choose


def test_a_float_base_may_be_quantised_when_it_is_loaded(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_checkpoint(workspace / "models" / "float", tiny_config("qwen2"))
    fine = Output(capsys, "model=float", "data=data.json", "load_as=nf4")
    assert fine.status == 0 and fine.state["load_as"] == "ok", fine.text
    wrong = Output(capsys, "model=base-Int4", "data=data.json", "load_as=nf4")
    assert wrong.status == 2 and wrong.state["load_as"] == "fail"
    assert "is quantised already. Take its float checkpoint" in wrong.text


def test_other_programs_hold_the_card(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen follows from the card's size; where others use it, less memory is free than that needs."""
    shared = replace(CARD, total=24 * GB, free=3 * GB)
    pretend(monkeypatch, replace(WITH_CARD, cards=(shared,)), {"seen": 1, "errors": []})
    output = Output(capsys, "model=base-Int4", "length=8192", "rows_per_step=64")
    assert (output.state["step"], output.state["card's memory"]) == ("ok", "fail")


def test_a_container_with_too_little_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, replace(WITH_CARD, free_memory=GB), {"seen": 1, "errors": []})
    output = Output(capsys, "model=base-Int4")
    assert (output.status, output.state["memory"], output.state["card's memory"]) == (2, "fail", "ok")


def test_blackwell_with_cuda_12_6(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(
        monkeypatch,
        replace(WITH_CARD, cards=(replace(CARD, capability=(12, 0)),)),
        {"seen": 1, "errors": ["card 0: no kernel"]},
    )
    output = Output(capsys, "model=base-Int4")
    assert output.status == 2
    assert (output.state["generation"], output.state["torch"]) == ("fail", "fail")
    assert "CUDA=12.8" in output.text
    assert output.error == f"error: 2 of {len(output.state)} checks fail. Nothing was changed.\n"


@pytest.mark.parametrize(("capability", "state"), [((8, 6), "fail"), ((8, 9), "ok"), ((9, 0), "ok")])
def test_fp8_needs_a_card_that_has_it(
    capability: tuple[int, int], state: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(
        monkeypatch,
        replace(WITH_CARD, cards=(replace(CARD, capability=capability),)),
        {"seen": 1, "errors": []},
    )
    output = Output(capsys, "model=base-Int4", "precision=fp8")
    assert output.state["combination"] == state
    assert ("of compute capability 8.9 or newer (RTX 40, L4, H100), and this one has 8.6" in output.text) == (
        state == "fail"
    )


def test_torch_that_does_not_start_does_not_stop_the_other_checks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, WITHOUT_CARD, {"died": "libcudnn.so.9: cannot open shared object file"})
    output = Output(capsys, "model=base-Int4", "data=data.json")
    assert output.status == 2
    assert "libcudnn.so.9" in output.text
    assert (output.state["keys"], output.state["folder"], output.state["rows"], output.state["runs"]) == ("ok",) * 4
    assert "tensors" not in output.state


def test_a_wrong_key_and_wrong_data_are_reported_together(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / "bad.json").write_text('[{"instruction": "a"}, {"instruction": "b"}, 7, 8, 9]')
    output = Output(capsys, "data=bad.json", "lenght=3")
    assert output.status == 2
    assert (output.state["keys"], output.state["rows"]) == ("fail", "fail")
    assert "Did you mean length=?" in output.text
    assert "bad.json:1:" in output.text
    assert "All of them: make data DATA=bad.json" in output.text


@pytest.mark.parametrize(
    ("words", "check", "text"),
    [
        (("precision=fp16",), "combination", "needs a GPU"),
        (("zero=3", "checkpointing=on"), "combination", "checkpointing=off"),
        (("targets=c_attn,k_proj",), "targets", "k_proj"),
        (("recipe=none-such",), "keys", "none-such"),
        (("length=4", "data=data.json", "overlong=skip"), "tokens", "no token to train on"),
        (("model=nowhere",), "folder", "no hub id"),
    ],
)
def test_what_training_would_refuse(
    words: tuple[str, ...], check: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = () if any(word.startswith("model=") for word in words) else ("model=base-Int4",)
    output = Output(capsys, *model, *words)
    assert (output.status, output.state[check]) == (2, "fail")
    assert text in " ".join(output.text.split())


STAGED = "model: base-Int4\nepochs: 1\nstages:\n  - data: style.json\n    epochs: 20\n  - learning_rate: 1.0e-4\n"


def test_every_stage_of_a_recipe(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / "two.yaml").write_text(STAGED)
    (workspace / "style.json").write_text('[{"instruction": "a"}]')
    output = Output(capsys, "recipe=two.yaml", "data=data.json")
    assert output.status == 2
    assert "20 epochs" in output.text
    assert "; then " in output.text
    first, second = output.text.split("data style.json, stage 1 of 2")[1].split("data data.json, stage 2 of 2")
    assert "fail  rows" in first
    assert "4 conversations" in second
    alone = Output(capsys, "recipe=two.yaml")  # the data of the second stage is not named yet
    assert "stage 1 of 2" in alone.text
    assert "stage 2 of 2" not in alone.text
    (workspace / "two.yaml").write_text(STAGED.replace("epochs: 20", "epochs: many"))
    assert "stage 1" in Output(capsys, "recipe=two.yaml").text


def test_a_base_that_train_would_fetch_is_a_warning(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(capsys)
    assert (output.status, output.state["folder"]) == (0, "warn")
    assert "make model MODEL=Qwen/Qwen-1_8B-Chat-Int4" in output.text
    assert Output(capsys, "model=Qwen2.5-Coder-0.5B-Instruct").state["folder"] == "warn"  # a name of data/models.lock
    assert doctor._download_bytes("Qwen2.5-Coder-0.5B-Instruct") > 1_500_000_000


def test_a_base_with_a_file_missing(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found without a manifest too, because the headers of the files are compared with config.json."""
    from safetensors.torch import load_file, save_file

    path = workspace / "models/base-Int4/model.safetensors"
    state = load_file(path)
    state.pop("transformer.ln_f.weight")
    save_file(state, path)
    (workspace / "models/base-Int4/manifest.json").unlink(missing_ok=True)
    output = Output(capsys, "model=base-Int4")
    assert (output.status, output.state["tensors"]) == (2, "fail")
    assert "transformer.ln_f.weight" in output.text


def test_a_base_that_is_damaged(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = {"files": {"model.safetensors": {"bytes": 1, "sha256": "0"}}}
    (workspace / "models/base-Int4/manifest.json").write_text(json.dumps(manifest))
    output = Output(capsys, "model=base-Int4")
    assert (output.status, output.state["folder"]) == (2, "fail")
    assert "Remove the folder" in output.text


def test_rows_longer_than_the_base_was_made_for(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(capsys, "model=base-Int4", "length=1024")
    assert (output.status, output.state["length"]) == (0, "warn")


def test_a_package_in_another_version_than_the_lock_has(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / "env.lock").write_text(LOCK.replace("4.34.1", "4.40.0"))
    output = Output(capsys, "model=base-Int4")
    assert (output.status, output.state["packages"]) == (2, "fail")
    assert "transformers is 4.34.1, not 4.40.0" in output.text


def test_an_option_of_the_wrong_kind_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert Output(capsys, "gpus=all").error == "error: gpus=all: expected a whole number\n"


def test_the_real_machine_is_inspected(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without stand-ins: whatever this machine is, every check gives a finding and none a traceback."""
    monkeypatch.undo()
    monkeypatch.chdir(workspace)
    output = Output(capsys, "model=base-Int4")
    assert {"card", "torch", "packages", "shared memory"} <= set(output.state)
    assert "torch 2.7.1" in output.text


def test_what_the_data_takes_out_or_has_for_nothing_is_said(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `data` and `train` say it."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "r"}]
    row = {"messages": [*turns, {"role": "user", "content": "q"}, {"role": "assistant", "content": "b", "weight": 0}]}
    (workspace / "marked.json").write_text(json.dumps([row]))
    text = " ".join(Output(capsys, "model=base-Int4", "data=marked.json").text.split())
    assert "(weight 0): 1 answer" in text and 'keys of turns: "reasoning_content" (1 turn)' in text


def test_training_notes_what_doctor_says_of_the_data(workspace: Path) -> None:
    from train.config.recipe import Recipe
    from train.training.prepare import prepare

    (workspace / "typo.json").write_text('[{"instruction": "q", "output": "a", "histroy": []}]')
    recipe = Recipe(
        model="base-Int4", length=64, rank=4, batch=2, accumulation=8, checkpointing="on", embedding="device"
    )
    prepared = prepare(recipe, "typo.json", workspace / "runs" / "new", None, Path("models"), 1, "float32")
    assert any('"histroy" (1 row; did you mean "history"?)' in note for note in prepared.notes)


def test_a_base_that_is_not_a_chat_model_is_told(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = workspace / "models" / "base-Int4"
    (base / "generation_config.json").write_text('{"eos_token_id": 256, "chat_format": "raw"}')
    output = Output(capsys, "model=base-Int4")
    assert (output.status, output.state["chat"]) == (0, "warn")
    assert "template=plain" in output.text
    assert "chat" not in Output(capsys, "model=base-Int4", "template=plain").state


def test_a_damaged_file_of_the_base_is_not_ok(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = workspace / "models" / "base-Int4"
    for name, check in (
        ("generation_config.json", "tensors"),
        ("added_tokens.json", "files"),
        ("qwen.tiktoken", "tokenizer"),
    ):
        before = (base / name).read_bytes() if (base / name).is_file() else None
        (base / name).write_text('{"a": 1,}')
        output = Output(capsys, "model=base-Int4")
        assert (output.status, output.state[check]) == (2, "fail"), output.text
        assert name in output.text
        (base / name).unlink() if before is None else (base / name).write_bytes(before)


# --- findings as they are printed


def test_findings_are_printed_as_they_come_and_summed_up(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    report.section("this machine")
    report.add(Finding("card", "ok", "NVIDIA H100"))
    report.add(Finding("Triton", "warn", "no C compiler", "apt-get install gcc"))
    report.add(None)
    report.end()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["this", "machine"],
        ["ok", "card", "NVIDIA", "H100"],
        ["warn", "Triton", "no", "C", "compiler"],
    ]
    assert "Remedy: apt-get install gcc" in lines[3]
    assert lines[-1] == "2 checks: 1 ok, 1 warn, 0 fail"


def test_a_failure_is_named_and_raised_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> str:
        raise UserError("no such file")

    report = Report()
    assert report.attempt("folder", lambda: "models/x", str.upper) == "models/x"
    assert report.attempt("rows", fail, str.upper) is None
    assert report.failed == {"rows"}
    with pytest.raises(UserError, match=r"1 of 2 checks fail\. Nothing was changed\."):
        report.end()
    out = capsys.readouterr().out
    assert "MODELS/X" in out
    assert "no such file" in out


# --- logs, JSON, strict


def test_a_log_is_explained_with_its_remedy(capsys: pytest.CaptureFixture[str], workspace: Path) -> None:
    (workspace / "train.log").write_bytes(b"\xff 10%\r\ntorch.cuda.OutOfMemoryError: CUDA out of memory.\r\n")
    assert main(["doctor", "log=train.log"]) == 2
    out = capsys.readouterr().out
    assert "fail  GPU memory" in out
    assert "line 2: torch.cuda.OutOfMemoryError" in out
    assert "Remedy: make plan" in out


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_log_of_powershell_is_read(capsys: pytest.CaptureFixture[str], workspace: Path, encoding: str) -> None:
    (workspace / "train.log").write_text("RuntimeError: Driver/library version mismatch\n", encoding=encoding)
    assert main(["doctor", "log=train.log"]) == 2
    assert "driver updated" in capsys.readouterr().out


def test_a_log_of_a_sound_run_is_ok(capsys: pytest.CaptureFixture[str], workspace: Path) -> None:
    (workspace / "train.log").write_text("step 1 of 2 loss 1.5\nstep 2 of 2 loss 1.4\n")
    assert main(["doctor", "log=train.log"]) == 0
    assert "it shows no failure" in capsys.readouterr().out


def test_an_unknown_failure_is_shown_without_a_cause(capsys: pytest.CaptureFixture[str], workspace: Path) -> None:
    (workspace / "train.log").write_text("Traceback (most recent call last):\nNeverSeenError: 7\n")
    assert main(["doctor", "log=train.log"]) == 2
    assert "no known cause; the last error is" in capsys.readouterr().out


def test_a_log_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "log=none.log"]) == 2
    assert "log=none.log: cannot be read: No such file" in capsys.readouterr().err


def test_json_is_one_object_with_every_finding(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "model=base-Int4", "json=1"])
    found = json.loads(capsys.readouterr().out)
    assert status == (2 if found["fail"] else 0)
    assert found["checks"] == len(found["findings"]) == found["ok"] + found["warn"] + found["fail"] > 5
    assert {"section", "name", "state", "text", "remedy"} == found["findings"][0].keys()
    assert found["findings"][0]["section"] == "this machine"


def test_strict_fails_for_a_warning(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, WITHOUT_CARD, {"seen": 0, "errors": []})
    words = ["model=base-Int4", "length=100000"]
    output = Output(capsys, *words)
    assert output.state["length"] == "warn"
    strict = Output(capsys, *words, "strict=on")
    assert strict.status == 2
    assert "strict=on asks for none" in strict.error or "checks fail" in strict.error


def test_cleaning_and_held_out_questions_are_tried(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As training takes the rows; without the base only the limits of tokens are not checked."""
    rows = [{"instruction": text, "output": text[::-1]} for text in questions(20)]
    rows += [rows[0], {"instruction": "q", "output": ""}]
    (workspace / "dirty.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("data=dirty.jsonl", "clean=empty,exact_duplicates", "held_out=4")
    output = Output(capsys, "model=base-Int4", *words)
    assert output.state["selection"] == "ok" and output.state["tokens"] == "ok", output.text
    text = " ".join(output.text.split())
    assert "cleaned: empty 1, exact_duplicates 1; 20 of 22 rows stay." in text
    assert "held out: 4 of 20 conversations" in text and "16 conversations, 32 turns" in text
    output = Output(capsys, "model=base-Int4", "data=dirty.jsonl", "clean=empty", "held_out=21")
    assert output.state["selection"] == "fail" and "leaves none to train on" in output.text
    output = Output(capsys, "model=org/absent", *words[:1], "clean=empty,tokens", "tokens_min=2")
    assert output.state["selection"] == "warn"
    assert Output(capsys, "model=base-Int4", *words, "tokens_min=2").state["keys"] == "fail"
