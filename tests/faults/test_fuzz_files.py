"""Each file of a base and of a run, missing, cut off, of another kind, and each key of its JSON with each wrong value.

For every command: nothing but a UserError leaves the program, and status 0 means the result of the whole files. A short
form of it runs by default; `pytest -m slow tests/faults/test_fuzz_files.py` runs all cases, and prints how far it is and
how many there were.
"""

import contextlib
import io
import json
import random
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.commands import test_doctor
from tests.faults.file_cases import Change, Tree, keys, whole_file
from tests.support.runs import tiny_run
from train.__main__ import main
from train.commands import doctor
from train.common.files import read_json, sha256
from train.export.manifest import weight_hashes
from train.model.folder import ShardWriter, write_manifest
from train.model.tokenizer import load_tokenizer
from train.runs.checkpoint import read as read_checkpoint
from train.training import prepare, train_one

OLD = Path(__file__).parents[1] / "assets" / "old_runs"  # finished runs, one cut off, with everything that they leave
IDS = torch.arange(2, 40)[None]
EVERY = 10.0  # seconds between two lines about the progress


@dataclass
class Outcome:
    """How a command ended: its status, what it printed or wrote that must not change, and the error that escaped."""

    status: int
    result: Any = None
    error: str = ""
    escaped: str = ""


@dataclass
class Tally:
    """Cases, how they ended, and what was wrong. `say` is given a line about the progress every EVERY seconds."""

    say: Callable[[str], None]
    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    said: float = field(default_factory=time.monotonic)

    def advance(self, changes: list[Change]) -> Iterator[Change]:
        """Each change, with a line about those that are done now and then."""
        for done, change in enumerate(changes):
            if time.monotonic() - self.said > EVERY:
                self.say(f"{done:,} of {len(changes):,} changes; {self}; {len(self.wrong)} wrong")
                self.said = time.monotonic()
            yield change

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} {end}" for end, count in sorted(self.ends.items()))
        return f"{self.ends.total():,} cases: {counts}"


def call(words: list[str], result: Callable[[str], Any]) -> Outcome:
    """Run a command in this process; `result` is asked for what must not change, if it ends with status 0."""
    out, err = io.StringIO(), io.StringIO()
    escaped, status = "", 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(words)
        except SystemExit as error:
            status = int(error.code or 0)
        except BaseException:
            status, escaped = -1, traceback.format_exc()
    return Outcome(status, result(out.getvalue()) if status == 0 else None, err.getvalue(), escaped)


# The workspaces


def int4_base(root: Path) -> None:
    """A run on a packed Qwen2 with every small file that such a folder can have."""
    tiny_run(root, "qwen2")
    base = root / "models" / "base-Int4"
    (base / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "model_max_length": 512}))
    (base / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    write_manifest(base, {"name": "base-Int4", "source": {"hub": "Qwen/base-Int4"}, "revision": "abc", "asked": "main"})


def float_base(root: Path) -> None:
    """A run on a float Qwen-1 in shards with an index, and a tokenizer.json."""
    tiny_run(root, "qwen", int4=False)
    base = root / "models" / "base-Int4"
    load_tokenizer(base).save(base)
    (base / "qwen.tiktoken").unlink()
    state = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    writer = ShardWriter(base, 200_000)
    for name, tensor in state.items():
        writer.add(name, tensor)
    writer.close()


def bin_base(root: Path) -> None:
    """A run on a packed Qwen-1 in pytorch_model.bin, with AutoGPTQ's quantize_config.json."""
    tiny_run(root, "qwen")
    base = root / "models" / "base-Int4"
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    config = read_json(base / "config.json")
    (base / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (base / "config.json").write_text(json.dumps(config))


BASES = {"int4": int4_base, "float": float_base, "bin": bin_base}


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """doctor on an imaginary machine; train as far as the loaded model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "env.lock").write_text(test_doctor.LOCK)
    monkeypatch.setattr(doctor, "LOCK", tmp_path / "env.lock")
    test_doctor.pretend(monkeypatch, test_doctor.WITHOUT_CARD, {"seen": 0, "errors": []})

    def checks_only(prepared: Any, devices: Any, checkpoint: Any) -> bool:
        if checkpoint is not None:
            read_checkpoint(checkpoint)
        model = prepare.load_model(prepared, torch.device("cpu"), torch.float32, False)
        with torch.no_grad():
            print("logits", model.eval()(IDS).logits.double().sum().item())
        return True

    monkeypatch.setattr(train_one, "train_one", checks_only)


# Commands on a base


def exported(_: str) -> Any:
    folder = Path("runs/tiny/merged")
    config, generation = read_json(folder / "config.json"), read_json(folder / "generation_config.json")
    weights = [sha256(path) for path in sorted(folder.glob("*.safetensors"))]
    return weights, config["torch_dtype"], config.get("eos_token_id"), generation["eos_token_id"]


def quantised(_: str) -> Any:
    folder = Path("models/out")
    return sha256(folder / "model.safetensors"), [token.encode("你好") for token in [load_tokenizer(folder)]]


def nothing(_: str) -> None:
    return None


def logits(text: str) -> str:
    return next(line for line in text.splitlines() if line.startswith("logits"))


TRAIN = ["data=conversations.jsonl", "recipe=smoke", "length=64", "run=new", "steps=1", "model=base-Int4"]
ON_BASE: dict[str, tuple[list[str], Callable[[str], Any]]] = {
    "plan": (["plan", "model=base-Int4", "gpu=8G"], str),
    "doctor": (["doctor", "model=base-Int4", "data=conversations.jsonl"], nothing),
    "model": (["model", "model=base-Int4"], nothing),
    "train": (["train", *TRAIN], logits),
    "infer": (["infer", "model=base-Int4", "prompt=2 + 2?", "max_tokens=8"], str),
    "export": (["export", "run=tiny", "verify=1"], exported),
    "quantize": (["quantize", "model=base-Int4", "out=out", "group_size=32"], quantised),
}
# Keys whose other values are another model, prompt or data set: what is computed is what the file says
SAID_BY_THE_FILE = ("rope_theta", "rotary_emb_base", "rms_norm_eps", "layer_norm_epsilon", "max_position_embeddings",
                    "seq_length", "use_dynamic_ntk", "use_logn_attn", "tie_word_embeddings", "eos_token_id",
                    "num_attention_heads", "lora_alpha", "recipe.system", "data.path")  # fmt: skip


def record_as_trained_on(base: Path) -> None:
    """Make the run's record say that it was trained on these files, so that export comes to read them."""
    path = Path("runs/tiny/run.json")
    record = read_json(path)
    with contextlib.suppress(OSError):
        record["base"]["files"] = weight_hashes(base)
    path.write_text(json.dumps(record))


def changes_of_base(base: Path) -> Iterator[Change]:
    for path in sorted(base.iterdir()):
        yield from whole_file(path)
        if path.suffix == ".json" and path.name != "tokenizer.json":
            yield from keys(path)


def some(changes: list[Change], share: int) -> list[Change]:
    """One change in `share`, drawn anew for every other list of changes, but the same on every machine."""
    draw = random.Random(len(changes))
    return [change for change in changes if share == 1 or draw.randrange(share) == 0]


def fuzz_base(kind: str, share: int, tally: Tally) -> None:
    BASES[kind](Path())
    base = Path("models/base-Int4")
    record_as_trained_on(base)
    tree = Tree(Path())
    commands = {name: entry for name, entry in ON_BASE.items() if name != "quantize" or kind == "float"}
    sound = {}
    for name, (words, result) in commands.items():
        sound[name] = call(words, result)
        assert sound[name].status == 0, (name, sound[name])
        tree.restore()
    for change in tally.advance(some(list(changes_of_base(base)), share)):
        ends = {}
        change.apply()
        for name, (words, result) in commands.items():
            if name == "export":
                record_as_trained_on(base)
            ends[name] = call(words, result)
            judge(tally, f"{kind} {change.path.name}: {change.name}: {name}", change, ends[name], sound[name])
        agree(tally, f"{kind} {change.path.name}: {change.name}", ends)
        tree.restore()


def judge(tally: Tally, case: str, change: Change, end: Outcome, sound: Outcome) -> None:
    """Count the case, and note what is wrong with its end."""
    tally.ends["refused" if end.status else "as sound"] += 1
    if end.escaped:
        tally.wrong.append(f"{case}: {end.escaped.splitlines()[-1]}\n{end.escaped}")
    elif end.status and not end.error.startswith("error: ") and "\nerror: " not in end.error:
        tally.wrong.append(f"{case}: status {end.status} without a sentence: {end.error[:200]}")
    elif len(end.error) > 3000 or "Traceback" in end.error:
        tally.wrong.append(f"{case}: {end.error[:300]}")
    elif not end.status and end.result not in (None, sound.result) and not change.name.startswith(SAID_BY_THE_FILE):
        tally.wrong.append(f"{case}: status 0 and another result: {end.result!r:.200} for {sound.result!r:.200}")


def agree(tally: Tally, case: str, ends: dict[str, Outcome]) -> None:
    """What doctor and model find sound, every command takes."""
    for first in ("doctor", "model"):
        failed = [name for name, end in ends.items() if end.status]
        if not ends[first].status and failed:
            tally.wrong.append(f"{case}: {first} says ok, {failed[0]} says {ends[failed[0]].error[:200]}")


# Commands on a run

WHOLE: list[str] = json.loads((OLD / "commands.json").read_text())["whole"]
CUT: list[str] = json.loads((OLD / "commands.json").read_text())["cut"]
NEXT = [word for word in WHOLE if not word.startswith("run=")]


def table(text: str) -> str | None:
    """What compare prints of answers and losses, without where they are from; None if another model answered, as it says."""
    if "its merged export is damaged" in text or "then the adapter on its base\n" in text:
        return None
    return text[text.index("╭") :] if "╭" in text else text


ON_RUN: dict[str, tuple[list[str], Callable[[str], Any]]] = {
    "verify": (["verify", "run=whole"], nothing),
    "infer": (["infer", "run=whole", "prompt=Question 0?", "max_tokens=8"], str),
    "infer adapter": (["infer", "run=qwen", "prompt=Question 0?", "max_tokens=8"], str),
    "compare": (["compare", "run=whole", "max_tokens=4"], table),
    "export": (["export", "run=whole"], lambda _: whole_export()),
    "train finished": (["train", *WHOLE], nothing),
    "train cut": (["train", *CUT], logits),
    "train from": (["train", *NEXT, "run=next", "from=whole"], logits),
}
# Files of a run that hold no part of its result, or only what is written again
NO_RESULT = ("answers.jsonl", "scores.json", "compare.json", "report.md", "loss.png", "lineage.txt", "manifest.json", "adapter_config.json",
             "tokenizer_config.json")  # fmt: skip


def whole_export() -> str:
    return sha256(Path("runs/whole/merged/model.safetensors"))


def changes_of_run() -> Iterator[Change]:
    for run in ("whole", "cut", "qwen"):
        for path in sorted(Path("runs", run).rglob("*")):
            if not path.is_file() or "tensorboard" in path.parts:
                continue
            yield from whole_file(path)
            if path.suffix == ".json" and run != "qwen":  # its JSON files are like those of whole
                yield from keys(path)


def commands_on(change: Change) -> dict[str, tuple[list[str], Callable[[str], Any]]]:
    run = change.path.parts[1]
    return {name: entry for name, entry in ON_RUN.items() if f"run={run}" in entry[0] or f"from={run}" in entry[0]}


def fuzz_run(share: int, tally: Tally) -> None:
    shutil.copytree(OLD, Path(), dirs_exist_ok=True)
    # the answers of then were those of another machine
    first = call(*ON_RUN["compare"])
    assert first.status == 0, first
    tree, sound = Tree(Path()), {}
    for name, (words, result) in ON_RUN.items():
        sound[name] = call(words, result)
        assert sound[name].status == 0, (name, sound[name])
        tree.restore()
    for change in tally.advance(some(list(changes_of_run()), share)):
        for name, (words, result) in commands_on(change).items():
            change.apply()
            end = call(words, result)
            case = f"{Path(*change.path.parts[1:])}: {change.name}: {name}"
            judge(tally, case, change, end, sound[name])
            if name == "verify" and not end.status and not unhashed(change):
                tally.wrong.append(f"{case}: status 0 though the file has changed")
            tree.restore()


def unhashed(change: Change) -> bool:
    """Whether nothing holds the hash of this file; of run.json it is printed."""
    return change.path.name in (*NO_RESULT[:6], "run.json")


@pytest.fixture
def tally(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Tally:
    """The tally of a test. The lines of a slow one are shown at once, though the test's output is captured."""
    shown = capsys.disabled if request.node.get_closest_marker("slow") else contextlib.nullcontext

    def say(line: str) -> None:
        with shown():
            print(f"\n{request.node.name}: {line}", end="", flush=True)

    return Tally(say)


def report(tally: Tally) -> None:
    """Say how many cases there were; fail with those that were wrong."""
    tally.say(str(tally))
    assert tally.ends.total(), "no case"
    assert not tally.wrong, f"{tally}; {len(tally.wrong)} wrong:\n" + "\n".join(tally.wrong[:20])


@pytest.mark.parametrize("kind", BASES)
def test_a_base_with_any_file_damaged(kind: str, tally: Tally) -> None:
    fuzz_base(kind, 100, tally)
    report(tally)


def test_a_run_with_any_file_damaged(tally: Tally) -> None:
    fuzz_run(400, tally)
    report(tally)


@pytest.mark.slow
def test_a_run_with_every_file_damaged_in_every_way(tally: Tally) -> None:
    fuzz_run(1, tally)
    report(tally)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BASES)
def test_a_base_with_every_file_damaged_in_every_way(kind: str, tally: Tally) -> None:
    fuzz_base(kind, 1, tally)
    report(tally)
