"""Other programs that read an export: what is asked, measured and refused. No such program runs here."""

import json
import math
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.exports import export
from tests.support.runs import tiny_run
from train.commands.export import Options
from train.common.errors import UserError
from train.common.files import read_json
from train.evaluation.parity import AnswerStates
from train.export import passport, reader_llama_cpp, readers
from train.export.manifest import covers
from train.export.readers import Question

VOCABULARY = 6
PROMPTS = [[1, 2], [3]]
QUESTION = Question([[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]], PROMPTS, 4)


def logs(seed: int, places: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(places, VOCABULARY, generator=generator, dtype=torch.float64).log_softmax(-1)


def told(*rows: torch.Tensor, prompts: list[list[int]] = PROMPTS, top: int = VOCABULARY) -> dict[str, Any]:
    """The reply of a reader with these log-probabilities, one tensor [places, V] for each answer."""
    answers = []
    for row in rows:
        best = [place.topk(top) for place in row]
        pairs = [list(zip(one.indices.tolist(), one.values.tolist(), strict=True)) for one in best]
        answers.append({"tokens": row.argmax(-1).tolist(), "top": pairs})
    return {"version": "a program 1", "prompts": prompts, "answers": answers}


def states(*rows: torch.Tensor) -> AnswerStates:
    return AnswerStates(torch.cat(rows), torch.eye(VOCABULARY, dtype=torch.float64))


def test_equal_answers_and_the_kl_of_whole_distributions() -> None:
    ours = [logs(0, 3), logs(1, 2)]
    theirs = [(row + 0.01 * logs(9, len(row))).log_softmax(-1) for row in ours]
    expected = [row.argmax(-1).tolist() for row in ours]
    found = readers.compare("x", QUESTION, expected, states(*ours), told(*theirs))
    assert (found["equal_answers"], found["equal_prompts"], found["first_differences"]) == (2, 2, [])
    p, q = torch.cat(ours), torch.cat(theirs)
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    assert found["logits"]["divergence"] == pytest.approx(float(kl), rel=1e-6)
    assert found["logits"] | {"divergence": 0} == {
        "tokens": 5,
        "agreement": 1.0,
        "divergence": 0,
        "largest_difference": pytest.approx(float((p - q).abs().max())),
    }


def test_places_after_the_first_difference_are_not_compared_and_gaps_are_told() -> None:
    ours, theirs = logs(0, 4), logs(0, 4).clone()
    first, second = ours[2].topk(2).indices.tolist()
    theirs[2, [first, second]] = theirs[2, [second, first]]
    theirs[3] = logs(5, 1)[0]
    found = readers.compare("x", QUESTION, [ours.argmax(-1).tolist()], states(ours), told(theirs))
    (one,) = found["first_differences"]
    gap = float(ours[2, first] - ours[2, second])
    assert (one["prompt"], one["token"]) == (1, 3)
    assert (one["gap"], one["gap_there"]) == (pytest.approx(gap), pytest.approx(gap))
    assert found["logits"]["tokens"] == 3 and found["logits"]["agreement"] == pytest.approx(2 / 3)


def test_an_answer_that_ends_early_differs_and_other_prompts_are_counted() -> None:
    ours = logs(0, 3)
    reply = told(ours[:2], prompts=[[1, 2, 3]])
    question = Question(QUESTION.messages[:1], PROMPTS[:1], 4)
    found = readers.compare("x", question, [ours.argmax(-1).tolist()], states(ours), reply)
    assert found["first_differences"] == [{"prompt": 1, "token": 3}]
    assert (found["equal_answers"], found["equal_prompts"]) == (0, 0)
    own = {"reader": "own", "equal_answers": 1}
    logits = {"tokens": 2, "agreement": 1.0, "divergence": 0.0, "without": 1.0}
    issued = {"prompts": 1, "data": "d", "compared_with": "c", "logits": logits, "readers": [own, found]}
    assert "it makes other ids of 1 of the 1 prompts" in passport.in_words(issued)
    issued["readers"] = [own, found | {"equal_prompts": 1}]
    assert "other ids" not in passport.in_words(issued)


def test_of_the_likeliest_tokens_alone_the_kl_is_never_larger() -> None:
    ours, theirs = logs(0, 5), logs(3, 5)

    def divergence(count: int) -> float:
        tops = [row.topk(count) for row in theirs]
        told = [dict(zip(one.indices.tolist(), one.values.tolist(), strict=True)) for one in tops]
        return sum(readers._place(p, one)[1] for p, one in zip(ours, told, strict=True))

    few, all_of_them = divergence(2), divergence(VOCABULARY)
    assert 0 < few < all_of_them
    assert math.isclose(all_of_them, float((ours.exp() * (ours - theirs)).sum()), rel_tol=1e-6)


class StandInServer(reader_llama_cpp.Server):
    """A server that knows three tokens, of which 1 ends within a character: then it gives no probabilities, as
    llama.cpp's does. The likeliest tokens are 1 after an even number of tokens, 0 after an odd one; 2 ends an answer.
    """

    def __init__(self) -> None:
        self.requests = 0

    def post(self, path: str, content: dict[str, Any]) -> Any:
        self.requests += 1
        count, banned = len(content["prompt"]), [token for token, _ in content["logit_bias"]]
        order = [2, 0, 1] if count > 4 else [1, 0, 2] if count % 2 == 0 else [0, 1, 2]
        chosen = next(token for token in order if token not in banned)
        reply = {"tokens": [chosen], "stop_type": "eos" if chosen == 2 else "limit"}
        top = [{"id": token, "logprob": -1.0 - n} for n, token in enumerate(order)]
        return reply if chosen == 1 else reply | {"completion_probabilities": [{"id": chosen, "top_logprobs": top}]}


def test_each_token_of_llama_cpp_has_its_own_probabilities() -> None:
    server = StandInServer()
    found = reader_llama_cpp.answer(server, [5, 6], {"new_tokens": 9, "top": 3})
    assert found["tokens"] == [1, 0, 1, 2]
    assert [[token for token, _ in place] for place in found["top"]] == [[1, 0, 2], [0, 1, 2], [1, 0, 2], [2, 0, 1]]
    assert server.requests == 6 and reader_llama_cpp.answer(server, [5], {"new_tokens": 2, "top": 3})["tokens"] == [
        0,
        1,
    ]


def stand_in(path: Path, body: str) -> str:
    """A program that takes the place of another environment's Python: it has xllamacpp, and its script is `body`."""
    found = "[n for n in json.load(sys.stdin) if n == 'xllamacpp']"
    probe = f"if sys.argv[1] == '-c':\n    print(json.dumps({found}))\n    sys.exit()\n"
    path.write_text(f"#!{sys.executable} -S\nimport json, sys\n{probe}request = json.load(sys.stdin)\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


ANSWERS_ALL = """
top = [[[n, -float(n)] for n in range(3)]] * request['new_tokens']
one = {'tokens': [0] * request['new_tokens'], 'top': top}
reply = {'version': '1', 'prompts': request['prompts'], 'answers': [one] * len(request['prompts'])}
open(request['reply'], 'w').write(json.dumps(reply))
open({seen!r}, 'w').write(json.dumps(request))
"""


def test_a_reader_gets_the_files_and_the_prompts_and_the_passport_and_the_card_tell_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = tmp_path / "seen.json"
    python = stand_in(tmp_path / "python", ANSWERS_ALL.replace("{seen!r}", repr(str(seen))))
    folder = tiny_run(tmp_path)
    export(folder, format="gguf", readers=python)
    request = json.loads(seen.read_text())
    assert (Path(request["model"]).name, Path(request["adapter"]).name) == (
        "base-Q4_0.gguf",
        "base-tiny-F32-LoRA.gguf",
    )
    assert request["messages"][0] == [{"role": "user", "content": "What is your name?"}]
    found = read_json(folder / "gguf" / "passport.json")
    assert found["readers"][-1]["reader"] == "llama.cpp" and found["readers"][-1]["equal_prompts"] == 4
    line = passport.in_words(found)
    assert "llama.cpp 0 of 4 (mean KL" in line
    assert line in (folder / "gguf" / "README.md").read_text() and line in capsys.readouterr().out
    export(folder, format="gguf")  # with fewer programs it is complete
    assert "nothing to do" in capsys.readouterr().out


def test_a_program_that_fails_leaves_a_line_and_the_export(tmp_path: Path) -> None:
    python = stand_in(tmp_path / "python", "sys.exit('unknown model architecture')")
    folder = tiny_run(tmp_path)
    export(folder, format="gguf", readers=python)
    found = read_json(folder / "gguf" / "passport.json")
    assert found["readers"][-1] == {"reader": "llama.cpp", "error": "unknown model architecture"}
    assert "llama.cpp does not read it (unknown model architecture)" in passport.in_words(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"readers": "/nowhere/python", "format": "gguf"}, "this is no Python program"),
        ({"readers": "LLAMA", "format": "gptq"}, "only about FORMAT=hf"),
        ({"readers": "LLAMA"}, "nothing there reads FORMAT=hf. Install transformers"),
        ({"readers": "LLAMA", "format": "gguf", "passport": 0}, "leave out passport=0"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    python = stand_in(tmp_path / "python", "")
    folder = tiny_run(tmp_path)
    before = sorted(folder.iterdir())
    given = {key: python if value == "LLAMA" else value for key, value in options.items()}
    with pytest.raises(UserError, match=message):
        export(folder, **given)
    assert sorted(folder.iterdir()) == before


def test_an_export_with_more_readers_is_the_one_that_is_wanted() -> None:
    assert covers({"run": "a"}, {"run": "a"}) and covers(
        {"run": "a", "readers": ["x", "y"]}, {"run": "a", "readers": ["y"]}
    )
    assert covers({"run": "a", "readers": ["x"]}, {"run": "a"})
    assert not covers({"run": "a"}, {"run": "a", "readers": ["x"]}) and not covers({"run": "b"}, {"run": "a"})
    assert not covers(None, {"run": "a"}) and Options().readers == ""
