"""The engine without HTTP: its answers are those of `infer`, whoever else is in the batch."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.inference.test_decode_graph import LONG_CONTEXT, adapted
from tests.support.oracles import small_tokenizer, tiny_config, tiny_decoder
from train.inference.decode_layers import DecodeLayers
from train.inference.generate import answer_rows, stream
from train.inference.sampling import Sampling
from train.inference.slot_session import SlotSession
from train.model.decoder import Decoder
from train.model.tokenizer import Tokenizer, load_tokenizer
from train.serving import chances
from train.serving.engine import Engine, QueueFullError, StoppingError
from train.serving.request import Choosing, Piece, Request, TokenChance
from train.serving.scheduler import Scheduler

PROMPTS = ["a", "what is it?", "好", "twelve bottles of it", "no", "x" * 40]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    small_tokenizer(tmp_path)
    return load_tokenizer(tmp_path)


@contextmanager
def engine_of(models: dict[str, Any], tokenizer: Tokenizer, slots: int = 4, queue: int = 100) -> Iterator[Engine]:
    layers = {name: DecodeLayers(getattr(m, "get_base_model", lambda m=m: m)()) for name, m in models.items()}
    session = SlotSession(next(iter(layers.values())), slots, 512)
    engine = Engine(session, layers, tokenizer, Scheduler(slots, queue))
    engine.start()
    try:
        yield engine
    finally:
        engine.stop(0)
    assert not engine.failure
    assert engine.running == engine.waiting == 0
    assert len(engine.scheduler.free) == slots


class Asked:
    """One request, its pieces, and a wait for its end."""

    def __init__(self, engine: Engine, ids: list[int], max_tokens: int = 24, model: str = "base", **more: Any) -> None:
        self.pieces: list[Piece] = []
        self.ended = threading.Event()
        self.request = Request(ids, model, max_tokens, self._take, **more)
        engine.submit(self.request)

    def _take(self, request: Request, piece: Piece) -> None:
        self.pieces.append(piece)
        if piece.finish:
            self.ended.set()

    def text(self) -> str:
        assert self.ended.wait(60)
        return "".join(piece.text for piece in self.pieces)

    def chances(self) -> list[TokenChance]:
        self.text()
        return [chance for piece in self.pieces for chance in piece.chances]


def expected(model: Any, tokenizer: Tokenizer, prompt: str, max_tokens: int = 24) -> str:
    """What `infer` answers."""
    return "".join(stream(model, tokenizer, tokenizer.encode(prompt), max_tokens, notify=lambda _: None))


@pytest.mark.parametrize("concurrent", [1, 8, 64])
def test_answers_are_those_of_infer_whoever_else_is_in_the_batch(tokenizer: Tokenizer, concurrent: int) -> None:
    model = tiny_decoder(tiny_config("qwen2"), seed=2)
    wanted = {prompt: expected(model, tokenizer, prompt) for prompt in PROMPTS}
    with engine_of({"base": model}, tokenizer, slots=concurrent, queue=100) as engine:
        asked = [
            (PROMPTS[n % len(PROMPTS)], Asked(engine, tokenizer.encode(PROMPTS[n % len(PROMPTS)]))) for n in range(64)
        ]
        for prompt, one in asked:
            assert one.text() == wanted[prompt]


def test_dynamic_ntk_and_logn_act_on_each_prompt_by_itself(tokenizer: Tokenizer) -> None:
    model = tiny_decoder(tiny_config("qwen", **LONG_CONTEXT), seed=2)
    wanted = [expected(model, tokenizer, prompt) for prompt in PROMPTS]
    with engine_of({"base": model}, tokenizer) as engine:
        asked = [Asked(engine, tokenizer.encode(prompt)) for prompt in PROMPTS]
        assert [one.text() for one in asked] == wanted


def test_a_prompt_in_several_pieces(tokenizer: Tokenizer) -> None:
    model = tiny_decoder(tiny_config("qwen2", max_position_embeddings=2048, seq_length=2048), seed=2)
    prompt = "many words " * 110
    wanted = expected(model, tokenizer, prompt)
    layers = {"base": DecodeLayers(model)}
    engine = Engine(SlotSession(layers["base"], 2, 2048), layers, tokenizer, Scheduler(2, 4))
    engine.start()
    beside = Asked(engine, tokenizer.encode("a"), 200)
    assert Asked(engine, tokenizer.encode(prompt)).text() == wanted
    assert beside.text() == expected(model, tokenizer, "a", 200)
    engine.stop(0)


def test_two_adapters_and_their_base_at_once(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def fresh() -> Decoder:
        return tiny_decoder(tiny_config("qwen2"), seed=2)

    models = {"base": fresh(), "small": adapted(fresh(), 4), "large": adapted(fresh(), 8)}
    wanted = {(name, p): expected(model, tokenizer, p) for name, model in models.items() for p in PROMPTS}
    assert len({wanted[name, PROMPTS[1]] for name in models}) == 3
    with engine_of(models, tokenizer, slots=6) as engine:
        asked = {(name, p): Asked(engine, tokenizer.encode(p), model=name) for p in PROMPTS for name in models}
        assert {key: one.text() for key, one in asked.items()} == wanted


def test_draws_are_those_of_a_file_of_questions(tokenizer: Tokenizer) -> None:
    """An answer with a seed is that of the first question of a file with the same seed."""
    model = tiny_decoder(tiny_config("qwen2"), seed=2)
    kinds = [
        Sampling(1.5, 0.9, 40, seed=7),
        Sampling(0.7, 1.0, 0, 1.3, seed=8),
        Sampling(0.0, 1.0, 0, 1.5),
        Sampling(1.0, 0.5, 0, seed=9),
        Sampling(2.0, 1.0, 5, seed=10),
    ]
    ids = tokenizer.encode("what is it?")
    wanted = [answer_rows(model, tokenizer, [ids], kind, 24)[0] for kind in kinds]
    with engine_of({"base": model}, tokenizer) as engine:
        asked = [
            Asked(engine, ids, choosing=Choosing(k.temperature, k.top_p, k.top_k, k.repetition_penalty, seed=k.seed))
            for k in kinds
        ]
        assert [one.text() for one in asked] == wanted
        both = [Asked(engine, ids, choosing=Choosing(1.5, seed=3, number=n)).text() for n in (0, 1, 0)]
        assert both[0] == both[2] != both[1]


def test_presence_and_frequency_count_the_answer_alone(tokenizer: Tokenizer) -> None:
    model = tiny_decoder(tiny_config("qwen2"), seed=2)
    ids = tokenizer.encode("what is it?")
    with engine_of({"base": model}, tokenizer) as engine:
        plain, presence, frequency, all_new = (
            Asked(engine, ids, 60, choosing=Choosing(**c), top=0)
            for c in ({}, {"presence": 0.5}, {"frequency": 0.5}, {"presence": 1e6})
        )
        tokens = [[c.token for c in one.chances()] for one in (plain, presence, frequency, all_new)]
    assert len(set(map(tuple, tokens))) == 4
    assert len(set(tokens[3])) == len(tokens[3])
    # by hand: the frequency penalty
    row, counts = list(ids), torch.zeros(512)
    for token in tokens[2]:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([row])).logits[0, -1] - 0.5 * counts
        assert int(logits.argmax()) == token
        row.append(token)
        counts[token] += 1


def test_chances_of_prompt_and_answer(tokenizer: Tokenizer) -> None:
    model = tiny_decoder(tiny_config("qwen2"), seed=2)
    ids = tokenizer.encode("what is it?")
    with engine_of({"base": model}, tokenizer) as engine:
        chances = Asked(engine, ids, 5, top=3, prompt_chances=True).chances()
        only_prompt = Asked(engine, ids, 0, top=3, prompt_chances=True).chances()
    assert [c.token for c in chances[: len(ids)]] == ids
    assert only_prompt == chances[: len(ids)]
    assert chances[0].logprob is None
    row = [c.token for c in chances]
    with torch.inference_mode():
        logprobs = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
    for n, chance in enumerate(chances[1:]):
        assert chance.logprob == pytest.approx(float(logprobs[n, chance.token]), abs=1e-4)
        assert chance.top[0][0] == int(logprobs[n].argmax())
        assert len(chance.top) == 3


def test_prompt_chances_take_memory_for_a_few_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    request = Request([n % 7 for n in range(200)], "base", 0, lambda *_: None, top=2, prompt_chances=True)
    logits = torch.randn(150, 7)
    rows: list[int] = []

    def spy(part: torch.Tensor, *more: Any) -> chances.Chances:
        rows.append(len(part))
        return whole(part, *more)

    whole = chances.chances_of
    monkeypatch.setattr(chances, "chances_of", spy)
    found = chances.prompt_chances(logits, request, 0, 150)
    assert rows == [64, 64, 22]
    wanted = logits.log_softmax(-1)
    assert [c.token for c in found] == list(request.ids[:151])
    assert found[0].logprob is None
    for n, chance in enumerate(found[1:]):
        assert chance.logprob == pytest.approx(float(wanted[n, chance.token]), abs=1e-6)
        assert [token for token, _ in chance.top] == wanted[n].topk(2).indices.tolist()


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(tokenizer: Tokenizer) -> None:
    model = tiny_decoder(tiny_config("qwen2"), seed=2)
    whole = expected(model, tokenizer, "a", 60)
    stop = whole[10:13]
    with engine_of({"base": model}, tokenizer) as engine:
        one = Asked(engine, tokenizer.encode("a"), 60, stop=("never there", stop))
        assert one.text() == whole[: whole.index(stop)]
        assert one.pieces[-1].finish == "stop"


def test_cancelled_requests_free_their_slots_and_the_queue_has_an_end(tokenizer: Tokenizer) -> None:
    model = tiny_decoder(tiny_config("qwen2"), seed=2)
    with engine_of({"base": model}, tokenizer, slots=1, queue=1) as engine:
        running = Asked(engine, [1, 2, 3], 400)
        until(lambda: engine.running == 1)
        waiting = Asked(engine, [1, 2, 3], 400)
        with pytest.raises(QueueFullError):
            Asked(engine, [1, 2, 3], 400)
        engine.cancel(waiting.request)
        engine.cancel(running.request)
        until(lambda: engine.running == engine.waiting == 0)
        assert Asked(engine, tokenizer.encode("a")).text() == expected(model, tokenizer, "a")
        assert engine.counters.cancelled == 2


def test_stopping_cuts_what_takes_too_long(tokenizer: Tokenizer) -> None:
    model = tiny_decoder(tiny_config("qwen2"), seed=2)
    with engine_of({"base": model}, tokenizer, slots=1) as engine:
        running, waiting = Asked(engine, [1, 2, 3], 480), Asked(engine, [1, 2, 3], 480)
        until(lambda: len(running.pieces) > 2)
        engine.stop(0)
        assert running.pieces[-1].finish == waiting.pieces[-1].finish == "length"
        with pytest.raises(StoppingError):
            Asked(engine, [1], 1)


def test_an_error_of_a_step_reaches_everybody(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_decoder(tiny_config("qwen2"), seed=2)
    layers = {"base": DecodeLayers(model)}
    engine = Engine(SlotSession(layers["base"], 1, 512), layers, tokenizer, Scheduler(1, 4))
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    monkeypatch.setattr(engine.session, "step_slots", lambda *_: 1 / 0)
    engine.start()
    both = [Asked(engine, [1, 2], 9), Asked(engine, [1, 2], 9)]
    for one in both:
        one.text()
        assert one.pieces[-1].finish == "error"
    with pytest.raises(StoppingError, match="the engine failed; the log"):
        Asked(engine, [1], 1)


def until(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
