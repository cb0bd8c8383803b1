"""Other programs that read an export: do they give its greedy answers, and by how much do their logits differ?

Each runs in an environment of its own, by a script that imports nothing of this program (reader_*.py). A request has
the model, the prompts as messages and as ids, and how many tokens to answer; the reply has the ids that the program
makes of the messages, its greedy answers, and its likeliest tokens at each place of an answer. Places are compared up to
the first different token, because what follows answers another text.
"""

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from train.common.errors import UserError
from train.common.files import read_json
from train.common.threads import workers
from train.evaluation.parity import AnswerStates
from train.export.manifest import READERS

HERE = Path(__file__).parent
TOP = 100  # likeliest tokens of a place in a reply; KL takes all others as one
PROBE = (  # the packages' names come on its standard input
    "import importlib.util as u, json, sys; "
    "print(json.dumps([name for name in json.load(sys.stdin) if u.find_spec(name) is not None]))"
)
Rows = list[list[int]]


@dataclass(frozen=True)
class Program:
    """A program that reads exports. module: its Python package; form: what it reads, as FORMAT= names it."""

    name: str
    module: str
    form: str
    script: str


PROGRAMS = (
    Program("transformers", "transformers", "hf", "reader_transformers.py"),
    Program("llama.cpp", "xllamacpp", "gguf", "reader_llama_cpp.py"),
)


@dataclass(frozen=True)
class Reader:
    """A program, and the Python of the environment that has it."""

    program: Program
    python: str


@dataclass(frozen=True)
class Question:
    """What every reader is asked: prompts as messages and as ids, and the most tokens of an answer."""

    messages: list[list[dict[str, str]]]
    prompts: Rows
    new_tokens: int


def check(pythons: str, form: str, prompts: int) -> None:
    """Raises UserError if these environments cannot be asked, or no prompts are wanted."""
    if find(pythons, form) and not prompts:
        raise UserError(f"readers={pythons} needs prompts: leave out passport=0.")


def find(pythons: str, form: str) -> list[Reader]:
    """The readers of `form` in environments.

    Args:
        pythons: their Python programs, with commas between them; empty: none.
    Raises:
        UserError: a path that is no Python, or environments without a program that reads `form`.
    """
    paths = [path.strip() for path in pythons.split(",") if path.strip()]
    known = [program for program in PROGRAMS if program.form == form]
    if paths and not known:
        formats = ", ".join(f"FORMAT={program.form} ({program.name})" for program in PROGRAMS)
        raise UserError(f"readers={pythons}: no other program is asked about FORMAT={form}, only about {formats}.")
    found = [Reader(program, path) for path in paths for program in known if program.module in _modules(path)]
    if paths and not found:
        names = " or ".join(f"{program.name}: `{paths[0]} -m pip install {program.module}`" for program in known)
        raise UserError(f"readers={pythons}: nothing there reads FORMAT={form}. Install {names}.")
    return found


def as_input(pythons: str, form: str) -> dict[str, list[str]]:
    """A key of an export's inputs, if there are readers: one that they have not read yet is written again."""
    names = [reader.program.name for reader in find(pythons, form)]
    return {READERS: names} if names else {}


def _environment() -> dict[str, str]:
    """This process's environment without the variables by which a Python would import this one's packages."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return {**kept, "HF_HUB_OFFLINE": "1"}


@cache
def _modules(python: str) -> tuple[str, ...]:
    """Which of the programs' packages a Python has. Raises UserError if it is none."""
    command, names = [python, "-c", PROBE], json.dumps([program.module for program in PROGRAMS])
    try:
        done = subprocess.run(command, input=names, env=_environment(), capture_output=True, text=True, timeout=120)
        return tuple(json.loads(done.stdout))
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise UserError(
            f"readers={python}: this is no Python program. Example: readers=/path/to/environment/bin/python"
        ) from error


def ask(reader: Reader, model: Path, adapter: Path | None, question: Question, dtype: str) -> dict[str, Any]:
    """The reply of a reader; {"error": …} in one line where it does not read the export."""
    with tempfile.TemporaryDirectory() as made:
        reply = Path(made) / "reply.json"
        request = {
            "model": str(model.absolute()),
            "adapter": str(adapter.absolute()) if adapter else "",
            "messages": question.messages,
            "prompts": question.prompts,
            "new_tokens": question.new_tokens,
            "top": TOP,
            "threads": workers(),
            "dtype": dtype,
            "reply": str(reply),
        }
        command = [reader.python, str(HERE / reader.program.script)]
        done = subprocess.run(
            command, input=json.dumps(request), env=_environment(), cwd=made, capture_output=True, text=True
        )
        if done.returncode or not reply.is_file():
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            return {"error": lines[-1][:300] if lines else f"it ended with status {done.returncode}"}
        answered: dict[str, Any] = read_json(reply)
        return answered


@torch.inference_mode()
def compare(
    name: str, question: Question, expected: Rows, of_export: AnswerStates, reply: dict[str, Any]
) -> dict[str, Any]:
    """What a passport has of a reader: equal prompts and answers, where the others differ first, and the logits.

    Args:
        expected: the export's own answers. of_export: the states that predict each of their tokens, in order.
    """
    if "error" in reply:
        return {"reader": name, "error": reply["error"]}
    differences, places = [], []
    starts = [0, *accumulate(map(len, expected))]
    for number, (ours, found, start) in enumerate(zip(expected, reply["answers"], starts, strict=False), 1):
        same = next((n for n, (a, b) in enumerate(zip(ours, found["tokens"], strict=False)) if a != b), None)
        compared = min(len(ours), len(found["tokens"])) if same is None else same + 1
        hidden = of_export.hidden[start : start + compared]
        logs = nn.functional.linear(hidden, of_export.head).double().log_softmax(-1).cpu()  # [compared, V]
        tops = [dict(map(tuple, top)) for top in found["top"][:compared]]
        places += [_place(row, top) for row, top in zip(logs, tops, strict=True)]
        if same is not None:
            one, other = ours[same], found["tokens"][same]
            gap, their_gap = (
                float(logs[same, one] - logs[same, other]),
                tops[same][other] - tops[same].get(one, -torch.inf),
            )
            differences.append({"prompt": number, "token": same + 1, "gap": gap, "gap_there": their_gap})
        elif len(ours) != len(found["tokens"]):  # one of them ended, without a token for it
            differences.append({"prompt": number, "token": compared + 1})
    prompts = sum(one == other for one, other in zip(question.prompts, reply["prompts"], strict=True))
    count = max(1, len(places))
    return {
        "reader": name,
        "version": reply["version"],
        "equal_prompts": prompts,
        "equal_answers": len(expected) - len(differences),
        "first_differences": differences,
        "logits": {
            "tokens": len(places),
            "agreement": sum(same for same, _, _ in places) / count,
            "divergence": sum(kl for _, kl, _ in places) / count,
            "largest_difference": max((largest for _, _, largest in places), default=0.0),
        },
    }


def _place(ours: Tensor, theirs: dict[int, float]) -> tuple[bool, float, float]:
    """Of one place: is the likeliest token the same, KL(ours ‖ theirs) in nats, and the largest difference of the ten
    likeliest tokens' log-probabilities.

    Args:
        ours: log-probabilities [V], float64. theirs: token -> log-probability of the likeliest ones. KL is over these,
            with all others as one more token, which makes it smaller, never larger.
    """
    ids = torch.tensor(list(theirs))
    q = torch.tensor(list(theirs.values()), dtype=torch.float64)
    p = ours[ids]
    rest = torch.stack([1 - p.exp().sum(), 1 - q.exp().sum()]).clamp_min(1e-12).log()
    kl = (p.exp() * (p - q)).sum() + rest[0].exp() * (rest[0] - rest[1])
    return (
        int(ours.argmax()) == int(ids[q.argmax()]),
        float(kl),
        float((p - q)[q.topk(min(10, len(q))).indices].abs().max()),
    )
