"""Generation against a fake that spells a text, and against the tiny decoder without a cache."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tests.support.oracles import small_tokenizer, tiny_config, tiny_decoder
from train.common.errors import UserError
from train.data.rows.formats import Turn
from train.data.tokens.chat_template import prompt
from train.inference.generate import answers, stream
from train.inference.sampling import Sampling
from train.model.decoder import Decoder
from train.model.tokenizer import Tokenizer, load_tokenizer


class Speller(nn.Module):
    """Answers any prompt with `script` byte by byte, then <|im_end|>; its cache is the number of steps so far."""

    def __init__(self, script: bytes, context: int = 512) -> None:
        super().__init__()
        self.script = [*script, 258]
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(max_position_embeddings=context)
        self.positions: list[list[int]] = []

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: int | None,
        use_cache: bool,
    ) -> SimpleNamespace:
        self.positions.append(position_ids[:, -1].tolist())
        step = past_key_values or 0
        logits = torch.ones(*input_ids.shape, 320)
        logits[:, -1, self.script[min(step, len(self.script) - 1)]] = 9.0
        return SimpleNamespace(logits=logits, past_key_values=step + 1)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    small_tokenizer(tmp_path)
    return load_tokenizer(tmp_path)


@pytest.fixture(scope="module", params=["qwen", "qwen2", "qwen3"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return tiny_decoder(tiny_config(request.param), seed=2)  # with this seed, answers differ by question


QUESTIONS = ["a", "what is it?", "好", "twelve bottles of it", "no"]


def greedy(model: Decoder, ids: list[int], steps: int, stop: tuple[int, ...]) -> list[int]:
    """The oracle: the whole row again for every token, alone and without a cache."""
    row = list(ids)
    for _ in range(steps):
        with torch.no_grad():
            row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
        if row[-1] in stop:
            return row[len(ids) : -1]
    return row[len(ids) :]


def test_batches_equal_each_prompt_alone(decoder: Decoder, tokenizer: Tokenizer) -> None:
    expected = [
        tokenizer.decode(greedy(decoder, prompt([Turn("user", q)], tokenizer), 24, tokenizer.stop_ids))
        for q in QUESTIONS
    ]
    assert len(set(expected)) > 1
    assert answers(decoder, tokenizer, QUESTIONS, max_new_tokens=24, batch=2) == expected
    assert answers(decoder, tokenizer, QUESTIONS, max_new_tokens=24, batch=8) == expected


def test_a_stream_and_turns_give_the_same_answer(decoder: Decoder, tokenizer: Tokenizer) -> None:
    turns = [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")]
    ids = prompt(turns, tokenizer, system="")
    pieces = list(stream(decoder, tokenizer, ids, max_new_tokens=24, notify=lambda _: None))
    assert answers(decoder, tokenizer, [turns], system="", max_new_tokens=24) == ["".join(pieces)]
    assert len(pieces) > 1


def test_progress_counts_to_the_end(tokenizer: Tokenizer) -> None:
    seen: list[tuple[int, int]] = []
    assert (
        answers(Speller(b"ok"), tokenizer, QUESTIONS, batch=2, on_progress=lambda n, of: seen.append((n, of)))
        == ["ok"] * 5
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_an_answer_ends_at_im_end_and_each_row_counts_its_own_positions(tokenizer: Tokenizer) -> None:
    model = Speller("héllo".encode())
    assert answers(model, tokenizer, ["a", "abcd"], system="", max_new_tokens=50) == ["héllo", "héllo"]
    assert len(model.positions) == 7
    assert all([a + 1 for a in now] == then for now, then in pairwise(model.positions))
    assert model.positions[0][1] - model.positions[0][0] == 3


def test_a_stream_never_cuts_a_character(tokenizer: Tokenizer) -> None:
    pieces = list(stream(Speller("好a🙂".encode()), tokenizer, [1]))
    assert pieces == ["好", "a", "🙂"]
    assert list(stream(Speller("好".encode()[:2] + b"!"), tokenizer, [1])) == ["\ufffd!"]
    assert list(stream(Speller("a好".encode()), tokenizer, [1], max_new_tokens=2, notify=lambda _: None)) == [
        "a",
        "\ufffd",
    ]


def test_the_end_of_the_context_is_stated(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    model = Speller(b"a long answer", context=8)
    assert "".join(stream(model, tokenizer, [1, 2, 3])) == "a lon"
    assert "the model's context of 8 tokens is full" in capsys.readouterr().err
    assert "".join(stream(model, tokenizer, [1, 2, 3], max_new_tokens=2)) == "a "
    assert "2 tokens, the most that were asked for" in capsys.readouterr().err
    with pytest.raises(UserError, match="the prompt has 9 tokens, the model's context 8"):
        next(stream(model, tokenizer, [1] * 9))
    model = Speller(b"a long answer", context=len(prompt([Turn("user", "a")], tokenizer, "")) + 3)
    assert answers(model, tokenizer, ["a"], system="") == ["a l"]
    assert "1 answers end where the model's context" in capsys.readouterr().err


def test_an_answer_that_is_cut_off_can_be_marked(tokenizer: Tokenizer) -> None:
    for limit, answer in ((4, "whol…"), (5, "whole…"), (6, "whole")):
        assert answers(Speller(b"whole"), tokenizer, ["a"], max_new_tokens=limit, cut="…") == [answer]


def sample(model: nn.Module, tokenizer: Tokenizer, sampling: Sampling) -> str:
    return "".join(stream(model, tokenizer, prompt([Turn("user", "a")], tokenizer), 24, sampling, lambda _: None))


def test_a_seed_makes_sampling_repeat_itself(decoder: Decoder, tokenizer: Tokenizer) -> None:
    answers_by_seed = [sample(decoder, tokenizer, Sampling(temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
    assert answers_by_seed[0] == answers_by_seed[1] != answers_by_seed[2]


def test_each_setting_of_sampling_has_an_effect(decoder: Decoder, tokenizer: Tokenizer) -> None:
    likeliest = sample(decoder, tokenizer, Sampling())
    assert sample(decoder, tokenizer, Sampling(temperature=1.5, top_k=1)) == likeliest
    assert sample(decoder, tokenizer, Sampling(temperature=1.5, top_p=1e-6)) == likeliest
    assert sample(decoder, tokenizer, Sampling(temperature=1.5)) != likeliest
    assert sample(Speller(b"aaaa"), tokenizer, Sampling()) == "aaaa"
    assert sample(Speller(b"aaaa"), tokenizer, Sampling(repetition_penalty=1e6)) != "aaaa"


def test_a_prompt_that_fills_the_context_is_named_and_the_others_are_answered(tokenizer: Tokenizer) -> None:
    seen: list[int] = []
    model, long = Speller(b"ok", context=64), "x" * 100
    with pytest.raises(UserError, match="no room is left"):
        answers(model, tokenizer, ["a", long], system="")
    keys = {"system": "", "max_new_tokens": 8, "name_too_long": True}
    out = answers(model, tokenizer, ["a", long, "b"], on_progress=lambda n, _: seen.append(n), **keys)
    assert (out[0], out[2], seen[-1]) == ("ok", "ok", 3)
    assert out[1].startswith("(not asked: the prompt has ") and "context 64: no room is left for an answer)" in out[1]
    assert answers(model, tokenizer, [long], **keys) == [out[1]], "also alone"


def test_a_long_prompt_does_not_shorten_the_answers_beside_it(tokenizer: Tokenizer) -> None:
    model = Speller(b"twelve bytes", context=64)
    width = len(prompt([Turn("user", "")], tokenizer, ""))
    long = "x" * (60 - width)  # room for four tokens
    assert answers(model, tokenizer, ["a", long], system="", max_new_tokens=20) == ["twelve bytes", "twel"]
