"""Answers from decoding sessions against answers from the growing cache; which session is kept and used again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.inference.test_decode_graph import adapted, tiny_model
from tests.support.oracles import small_tokenizer, tiny_config, tiny_decoder
from train.inference import sessions
from train.inference.decode_graph import CAPACITY_STEP
from train.inference.generate import answers, stream
from train.inference.sampling import Sampling
from train.model.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    small_tokenizer(tmp_path)
    return load_tokenizer(tmp_path)


QUESTIONS = ["a", "what is it?", "好", "twelve bottles of it", "no"]


def every_answer(model: nn.Module, tokenizer: Tokenizer) -> list[Any]:
    """A model's answers in batches, as a stream, and with every kind of sampling."""
    texts: list[Any] = [answers(model, tokenizer, QUESTIONS, max_new_tokens=24, batch=2)]
    for sampling in (
        Sampling(),
        Sampling(temperature=1.5, top_p=0.9, top_k=40, seed=7),
        Sampling(repetition_penalty=1.5),
        Sampling(temperature=0.7, repetition_penalty=1.2, seed=8),
    ):
        texts.append("".join(stream(model, tokenizer, [1, 2, 3, 4], 24, sampling, lambda _: None)))
    return texts


@pytest.fixture
def sessions_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions decode although there is no GPU."""
    monkeypatch.setattr(sessions, "supports", lambda model, batch: True)


@pytest.mark.parametrize("layout", ["qwen", "qwen2", "qwen3"])
def test_sessions_give_the_same_answers(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    model = tiny_decoder(tiny_config(layout), seed=2)
    plain = every_answer(model, tokenizer)
    monkeypatch.setattr(sessions, "supports", lambda model, batch: True)
    assert every_answer(model, tokenizer) == plain
    assert capsys.readouterr().err == ""


def test_without_a_gpu_there_is_no_session() -> None:
    assert not sessions.supports(tiny_decoder(tiny_config()), 1)
    assert not sessions.supports(nn.Linear(1, 1), 1)


def test_a_session_is_used_again_where_it_fits_and_never_by_two(sessions_on_cpu: None) -> None:
    model = tiny_decoder(tiny_config())
    with sessions.borrow(model, 1, 100) as first, sessions.borrow(model, 1, 100) as second:
        assert first is not None
        assert second is not None
        assert first is not second
        assert first.capacity == CAPACITY_STEP
    with sessions.borrow(model, 1, CAPACITY_STEP) as third:
        assert third is first
    with sessions.borrow(model, 1, CAPACITY_STEP + 1) as larger:
        assert larger is not third
        assert larger is not None
        assert larger.capacity == 2 * CAPACITY_STEP
    with sessions.borrow(model, 2, 100) as of_two_rows:
        assert of_two_rows is not larger
    sessions.release(model)
    with sessions.borrow(model, 2, 100) as fresh:
        assert fresh is not of_two_rows


def test_layers_are_read_again_when_an_adapter_is_switched(sessions_on_cpu: None, tmp_path: Path) -> None:
    model: Any = adapted(tiny_model(tmp_path, "qwen", True))
    with sessions.borrow(model, 1, 10) as on:
        pass
    with model.disable_adapter(), sessions.borrow(model, 1, 10) as off:
        assert on is not None
        assert off is not None
        assert off.layers is not on.layers
    with sessions.borrow(model, 1, 10) as again:
        assert again is not None
        assert again.layers is not off.layers


def test_a_session_that_cannot_be_made_costs_one_line_and_speed_only(
    sessions_on_cpu: None, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_decoder(tiny_config(), seed=2)
    plain = every_answer(model, tokenizer)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nand much more")

    capsys.readouterr()
    monkeypatch.setattr(sessions, "DecodeSession", full)
    assert answers(model, tokenizer, QUESTIONS, max_new_tokens=24, batch=8) == plain[0]
    assert capsys.readouterr().err == "Decoding goes the slower way, without a CUDA graph: CUDA out of memory.\n"


@pytest.mark.gpu
@pytest.mark.parametrize("int4", [False, True], ids=["float", "int4"])
@pytest.mark.parametrize("layout", ["qwen", "qwen2", "qwen3"])
def test_sessions_give_the_same_answers_on_the_gpu(
    tmp_path: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    layout: str,
    int4: bool,
) -> None:
    """Greedy answers and streams, and draws with a seed, in float32, with and without an adapter."""
    model = tiny_model(tmp_path, layout, int4, torch.float32, "cuda")
    for one in (model, adapted(model)):
        assert sessions.supports(one, 2)
        graphs = every_answer(one, tokenizer)
        assert capsys.readouterr().err == ""
        with monkeypatch.context() as patch:
            patch.setattr(sessions, "supports", lambda model, batch: False)
            assert every_answer(one, tokenizer) == graphs
