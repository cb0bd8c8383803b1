"""Tools by the official client: into the prompt, and back out of an answer, whole and streamed."""

import json
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from openai import OpenAI

from tests.serving.test_tools import CONVERSATION, TOOLS, tokenizer
from train.common.listen import open_listener
from train.model.tokenizer import Tokenizer
from train.serving.engine import Counters
from train.serving.guard import Limits
from train.serving.request import Piece, Request
from train.serving.routes import State, application
from train.serving.service import ModelCard, Service

__all__ = ["tokenizer"]  # the fixture
PIECES = ("Let me", " look.\n<tool", '_call>\n{"name": "weather", ', '"arguments": {"town": "Köln"}}\n</tool', "_call>")


class Scripted:
    """An engine whose model always says the same."""

    refusal = ""
    running = waiting = 0

    def __init__(self) -> None:
        self.counters, self.asked = Counters(), list[Request]()
        self.scheduler, self.session = SimpleNamespace(queue=9), SimpleNamespace(slots=9)

    def submit(self, request: Request) -> None:
        self.asked.append(request)
        threading.Thread(target=self._answer, args=(request,)).start()

    def cancel(self, request: Request) -> None:
        raise AssertionError("nobody hangs up")

    def _answer(self, request: Request) -> None:
        for n, text in enumerate(PIECES, 1):
            request.deliver(request, Piece(text, tokens=n, finish="stop" if n == len(PIECES) else ""))
            time.sleep(0.02)


def ask(tokenizer: Tokenizer, stream: bool, **more: Any) -> tuple[Any, Scripted]:
    engine: Any = Scripted()
    state = State(Limits())
    state.ready(Service(engine, tokenizer, {"m": ModelCard("m", "m", "", 0, "", "chatml")}, {}, 4096, has_tools=True))
    listener = open_listener("127.0.0.1", 0)
    config = uvicorn.Config(application(state), lifespan="off", ws="none", log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        with OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            messages: Any = CONVERSATION
            reply = client.chat.completions.create(model="m", messages=messages, stream=stream, **more)
            return (list(reply) if stream else reply), engine
    finally:
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize("choice", [{}, {"tool_choice": "auto"}])
def test_a_call_is_parsed_back(tokenizer: Tokenizer, choice: Any) -> None:
    reply, engine = ask(tokenizer, False, tools=TOOLS, **choice)
    (answer,) = reply.choices
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content == "Let me look."
    (call,) = answer.message.tool_calls
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments) == {"town": "Köln"}
    assert '"name": "now"' in tokenizer.decode(list(engine.asked[0].ids), skip_control=False)


def test_a_streamed_call_is_parsed_back_and_none_of_it_is_text(tokenizer: Tokenizer) -> None:
    chunks, _ = ask(tokenizer, True, tools=TOOLS)
    choices = [chunk.choices[0] for chunk in chunks]
    assert "".join(choice.delta.content or "" for choice in choices) == "Let me look."
    (call,) = [call for choice in choices for call in choice.delta.tool_calls or []]
    assert (call.index, call.function.name) == (0, "weather")
    assert json.loads(call.function.arguments) == {"town": "Köln"}
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["tool_calls"]


def test_without_tools_a_call_is_text(tokenizer: Tokenizer) -> None:
    reply, _ = ask(tokenizer, False, tools=TOOLS, tool_choice="none")
    assert reply.choices[0].message.content == "".join(PIECES)
    assert reply.choices[0].finish_reason == "stop"
