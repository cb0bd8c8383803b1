"""The official client drives every parameter; plain HTTP reads a stream; answers are those of `infer`."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI

from tests.support.server import BASE, RUN, Served
from train.data.rows.formats import Turn
from train.data.tokens.chat_template import prompt
from train.inference.generate import stream
from train.inference.trained import load_run
from train.model.loading import load
from train.model.tokenizer import load_tokenizer

QUESTION = [{"role": "user", "content": "What is your name?"}]


def chat(client: OpenAI, model: str = RUN, messages: Any = QUESTION, **more: Any) -> Any:
    return client.chat.completions.create(
        model=model, messages=messages, **{"max_tokens": 24, "temperature": 0, **more}
    )


def text_of(answer: Any) -> str:
    return answer.choices[0].message.content


@pytest.fixture(scope="module")
def wanted(folder: Path) -> dict[tuple[str, str], str]:
    """(model, question) -> what `infer` answers."""
    tokenizer = load_tokenizer(folder / "models" / BASE)
    adapted, _, _ = load_run(folder / "runs" / RUN, folder / "models", torch.float32)
    models = {RUN: adapted, BASE: load(folder / "models" / BASE, torch.float32).eval()}
    found = {}
    for name, model in models.items():
        for question in ("What is your name?", "你叫什么？", "2 + 2?"):
            ids = prompt([Turn("user", question)], tokenizer)
            found[name, question] = "".join(stream(model, tokenizer, ids, 24, notify=lambda _: None))
    return found


def test_base_and_adapter_are_listed_with_parent_and_root(client: OpenAI, folder: Path) -> None:
    models = {model.id: model.model_dump() for model in client.models.list()}
    assert set(models) == {BASE, RUN}
    assert (models[BASE]["parent"], models[RUN]["parent"]) == (None, BASE)
    assert models[RUN]["root"] == "runs/tiny"
    assert client.models.retrieve(RUN).id == RUN
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


@pytest.mark.parametrize("concurrent", [1, 8, 64])
def test_answers_are_those_of_infer_at_any_load(
    client: OpenAI, wanted: dict[tuple[str, str], str], concurrent: int
) -> None:
    cases = [list(wanted)[n % len(wanted)] for n in range(max(6, concurrent))]

    def ask(case: tuple[str, str]) -> str:
        messages = [{"role": "user", "content": case[1]}]
        if concurrent == 1:
            return text_of(chat(client, case[0], messages))
        chunks = chat(client, case[0], messages, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(concurrent) as pool:
        assert list(pool.map(ask, cases)) == [wanted[case] for case in cases]


def test_usage_counts_and_reasons(client: OpenAI) -> None:
    answer = chat(client, max_tokens=5)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == 5 + answer.usage.prompt_tokens
    assert chat(client, max_completion_tokens=3, max_tokens=9).usage.completion_tokens == 3


def test_max_tokens_is_cut_to_the_context(client: OpenAI) -> None:
    answer = chat(client, max_tokens=100_000)
    assert answer.usage.total_tokens <= 512
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, messages=[{"role": "user", "content": "x" * 600}])
    assert caught.value.code == "context_length_exceeded"


def test_parts_developer_and_system_messages(client: OpenAI) -> None:
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "your name?"}]}
    ]
    assert text_of(chat(client, messages=parts)) == text_of(chat(client))
    system, developer = (
        text_of(chat(client, messages=[{"role": r, "content": "Be short."}, *QUESTION]))
        for r in ("system", "developer")
    )
    assert system == developer != text_of(chat(client))
    with pytest.raises(openai.BadRequestError, match="text alone"):
        chat(client, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])


def test_temperature_seed_top_p_and_top_k(client: OpenAI) -> None:
    drawn = [text_of(chat(client, temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = text_of(chat(client))
    assert text_of(chat(client, temperature=1.5, seed=1, extra_body={"top_k": 1})) == greedy
    assert text_of(chat(client, temperature=1.5, seed=1, top_p=1e-6)) == greedy
    assert text_of(chat(client, temperature=1e-9, seed=1)) == greedy


def test_n_draws_each_by_itself(client: OpenAI) -> None:
    answer = chat(client, n=3, temperature=1.5, seed=1)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert [c.message.content for c in chat(client, n=3, temperature=1.5, seed=1).choices] == texts
    assert texts[0] == text_of(chat(client, temperature=1.5, seed=1))


def test_three_penalties_are_three_different_things(client: OpenAI) -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"extra_body": {"repetition_penalty": 1.8}},
    ]
    assert len({text_of(chat(client, max_tokens=80, **one)) for one in settings}) == 4


def test_stop_texts_are_never_sent(client: OpenAI) -> None:
    whole = text_of(chat(client, max_tokens=80))
    stop = re.sub("\ufffd", "", whole)[6:8]
    for value in (stop, ["never", stop]):
        answer = chat(client, max_tokens=80, stop=value)
        assert text_of(answer) == whole[: whole.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
        chunks = list(chat(client, max_tokens=80, stop=value, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole[: whole.index(stop)]


def test_logprobs_of_a_chat(client: OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=3, max_tokens=6)
    content = answer.choices[0].logprobs.content
    assert len(content) == 6
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob, abs=1e-5)
        assert entry.token == entry.top_logprobs[0].token
    assert text_of(answer) == bytes(
        b for entry in content for b in entry.bytes if not entry.token.startswith("<|")
    ).decode("utf-8", "replace")
    streamed = [c.choices[0].logprobs for c in chat(client, logprobs=True, top_logprobs=3, max_tokens=6, stream=True)]
    assert [e.token for one in streamed if one for e in one.content] == [e.token for e in content]
    assert chat(client, max_tokens=2).choices[0].logprobs is None


def test_completions_echo_and_logprobs_as_evaluation_harnesses_ask(client: OpenAI) -> None:
    both = client.completions.create(
        model=RUN, prompt=["What is it?", "好 x"], max_tokens=1, echo=True, logprobs=1, temperature=0
    )
    for choice, prompt_text in zip(both.choices, ("What is it?", "好 x")):
        assert choice.text.startswith(prompt_text)
        p = choice.logprobs
        assert len(p.tokens) == len(prompt_text.encode()) + 1
        assert p.token_logprobs[0] is None and p.top_logprobs[0] is None
        assert all(value <= 0 for value in p.token_logprobs[1:])
        assert all(len(top) == 1 for top in p.top_logprobs[1:])
        assert p.text_offset[0] == 0
    ids = list(b"What is it?")  # the tiny tokenizer's ids are bytes
    for prompts in (ids, [ids, list(b"x")]):
        again = client.completions.create(model=RUN, prompt=prompts, max_tokens=1, echo=True, logprobs=1, temperature=0)
        assert again.choices[0].logprobs.token_logprobs == both.choices[0].logprobs.token_logprobs
    none = client.completions.create(
        model=RUN, prompt="What is it?", max_tokens=0, echo=True, logprobs=1, temperature=0
    )
    assert none.choices[0].text == "What is it?"
    assert none.choices[0].logprobs.token_logprobs == both.choices[0].logprobs.token_logprobs[:-1]
    assert none.usage.completion_tokens == 0


def test_completions_stream_and_defaults(client: OpenAI) -> None:
    whole = client.completions.create(model=RUN, prompt="a", temperature=0)
    assert whole.usage.completion_tokens == 16
    chunks = list(client.completions.create(model=RUN, prompt="a", temperature=0, stream=True, echo=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "a" + whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_text_offset_is_the_place_in_the_text_whole_and_streamed(client: OpenAI) -> None:
    """Of prompt and answer together, and a character of several tokens has one place."""
    asked: dict[str, Any] = {"model": RUN, "prompt": "好 x", "max_tokens": 12, "temperature": 0, "logprobs": 0}
    for echo in (False, True):
        (whole,) = client.completions.create(echo=echo, **asked).choices
        chunks = [chunk.choices[0] for chunk in client.completions.create(echo=echo, stream=True, **asked)]
        offsets = [place for one in chunks if one.logprobs for place in one.logprobs.text_offset]
        assert offsets == whole.logprobs.text_offset
        assert "".join(one.text for one in chunks) == whole.text
        for token, place in zip(whole.logprobs.tokens, offsets):
            assert token.startswith("bytes:") or whole.text[place:].startswith(token)
        if echo:
            assert offsets[:5] == [0, 0, 0, 1, 2]
            assert offsets[5] == 3


def test_json_answers_fit_their_schema(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2, 3]}},
        "required": ["ok", "n"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    for more in ({}, {"temperature": 1.5, "seed": 3}):
        value = json.loads(text_of(chat(client, max_tokens=300, response_format=wanted, **more)))
        assert set(value) == {"ok", "n"} and value["n"] in (1, 2, 3) and isinstance(value["ok"], bool)
    answer = chat(client, max_tokens=60, response_format={"type": "json_object"})
    assert text_of(answer).lstrip().startswith("{")
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, response_format=bad)
    assert caught.value.param == "response_format"


def test_tools_are_refused_where_the_template_has_no_place_for_them(client: OpenAI) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(openai.BadRequestError, match="not trained to call tools"):
        chat(client, tools=[tool])
    assert text_of(chat(client, tools=[tool], tool_choice="none")) == text_of(chat(client))


def test_unknown_fields_are_ignored_and_wrong_ones_named(client: OpenAI) -> None:
    assert text_of(chat(client, extra_body={"no_such_field": 1}, user="me")) == text_of(chat(client))
    for field, value in (("temperature", -1), ("top_p", 0), ("n", 0), ("max_tokens", "many"), ("logit_bias", {"5": 1})):
        with pytest.raises(openai.BadRequestError) as caught:
            chat(client, extra_body={field: value})
        assert field in str(caught.value.param)
    with pytest.raises(openai.NotFoundError) as missing:
        chat(client, model="gpt-9")
    assert missing.value.code == "model_not_found"


def test_a_stream_is_well_formed(served: Served) -> None:
    body = {"model": RUN, "messages": QUESTION, "max_tokens": 12, "temperature": 0, "stream": True}
    status, text, headers = served.raw("/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    lines = text.split("\n\n")
    assert lines[-1] == "" and lines[-2] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    *pieces, end, usage = chunks
    assert end["choices"][0]["delta"] == {} and end["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 12
    assert all(c["usage"] is None for c in pieces)
    assert all(c["choices"][0]["finish_reason"] is None for c in pieces)
    without = served.raw("/v1/chat/completions", body)[1]
    assert '"usage"' not in without


def test_metrics_and_document(served: Served) -> None:
    served.wait_idle()
    text = served.raw("/metrics")[1]
    for name in (
        "serve_running 0.0",
        "serve_slots 8.0",
        "serve_first_token_seconds_count",
        "serve_answer_tokens_total",
    ):
        assert name in text
    assert 'serve_requests_total{path="/v1/chat/completions",status="200"}' in text
    document = served.ask("/openapi.json")[1]
    assert set(document["paths"]) >= {"/v1/models", "/v1/chat/completions", "/v1/completions", "/health", "/metrics"}
