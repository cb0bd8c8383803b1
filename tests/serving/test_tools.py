"""Tools as Qwen2.5's template writes them, held to that template; calls read back."""

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest

from tests.support.oracles import small_tokenizer
from train.model.tokenizer import Tokenizer, load_tokenizer
from train.serving.errors import ApiError
from train.serving.prompts import chat_ids
from train.serving.schema import ChatBody, Message, Tool
from train.serving.service import with_thinking
from train.serving.tools import Call, find_calls

# The part about tools of the template in tokenizer_config.json of Qwen/Qwen2.5-0.5B-Instruct
TEMPLATE = (
    "{%- if tools %}\n    {{- '<|im_start|>system\\n' }}\n    {%- if messages[0]['role'] == 'system' %}\n"
    "        {{- messages[0]['content'] }}\n    {%- else %}\n        {{- SYSTEM }}\n    {%- endif %}\n"
    '    {{- "\\n\\n# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n'
    'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>" }}\n'
    '    {%- for tool in tools %}\n        {{- "\\n" }}\n        {{- tool | tojson }}\n    {%- endfor %}\n'
    '    {{- "\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within '
    '<tool_call></tool_call> XML tags:\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": '
    '<args-json-object>}\\n</tool_call><|im_end|>\\n" }}\n{%- endif %}\n'
    "{%- for message in messages %}\n"
    '    {%- if (message.role == "user") or (message.role == "assistant" and not message.tool_calls) %}\n'
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
    "    {%- elif message.role == \"assistant\" %}\n        {{- '<|im_start|>' + message.role }}\n"
    "        {%- if message.content %}\n            {{- '\\n' + message.content }}\n        {%- endif %}\n"
    "        {%- for tool_call in message.tool_calls %}\n            {%- set tool_call = tool_call.function %}\n"
    '            {{- \'\\n<tool_call>\\n{"name": "\' }}\n            {{- tool_call.name }}\n'
    '            {{- \'", "arguments": \' }}\n            {{- tool_call.arguments | tojson }}\n'
    "            {{- '}\\n</tool_call>' }}\n        {%- endfor %}\n        {{- '<|im_end|>\\n' }}\n"
    '    {%- elif message.role == "tool" %}\n'
    '        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}\n'
    "            {{- '<|im_start|>user' }}\n        {%- endif %}\n        {{- '\\n<tool_response>\\n' }}\n"
    "        {{- message.content }}\n        {{- '\\n</tool_response>' }}\n"
    '        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}\n'
    "            {{- '<|im_end|>\\n' }}\n        {%- endif %}\n    {%- endif %}\n{%- endfor %}\n"
    "{{- '<|im_start|>assistant\\n' }}\n"
)
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "天气 of a town",
            "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
ARGUMENTS = {"town": "Köln"}
CALLS = [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}}]
CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather? <tool_call>"},
    {"role": "assistant", "content": "", "tool_calls": CALLS},
    {"role": "tool", "content": "rain", "tool_call_id": "1"},
    {"role": "tool", "content": "wind", "tool_call_id": "2"},
    {"role": "assistant", "content": "It rains."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Let me look.", "tool_calls": [*CALLS, *CALLS]},
    {"role": "tool", "content": "sun", "tool_call_id": "1"},
]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    small_tokenizer(tmp_path)
    return load_tokenizer(tmp_path)


def by_template(messages: list[dict[str, Any]], system: str) -> str:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    as_objects = [
        {**m, "tool_calls": [{"function": {**c["function"], "arguments": ARGUMENTS}} for c in m.get("tool_calls", [])]}
        for m in messages
    ]
    return environment.from_string(TEMPLATE).render(messages=as_objects, tools=TOOLS, SYSTEM=system)


def test_the_text_is_that_of_the_published_template(tokenizer: Tokenizer) -> None:
    messages = [Message.model_validate(m) for m in CONVERSATION]
    offered = [Tool.model_validate(t) for t in TOOLS]
    for first in ([], [{"role": "system", "content": "Be short."}]):
        given = [Message.model_validate(m) for m in first] + messages
        ids = chat_ids(given, tokenizer, "You are Ada.", "chatml", offered, has_tools=True)
        assert tokenizer.decode(ids, skip_control=False) == by_template([*first, *CONVERSATION], "You are Ada.")


def test_marks_of_the_program_are_control_tokens_and_those_of_users_are_text(tokenizer: Tokenizer) -> None:
    tokenizer.control["<tool_call>"] = 400
    tokenizer._control_names[400] = "<tool_call>"
    ids = chat_ids(
        [Message.model_validate(m) for m in CONVERSATION], tokenizer, "", "chatml",
        [Tool.model_validate(t) for t in TOOLS], has_tools=True,
    )  # fmt: skip
    assert ids.count(400) == 2 + 3  # in the instructions, and before each call; not in the user's text


def test_without_a_place_in_the_template_tools_are_refused(tokenizer: Tokenizer) -> None:
    for messages, offered, template, has_tools in (
        (CONVERSATION[:1], TOOLS, "chatml", False),
        (CONVERSATION[:1], TOOLS, "plain", True),
        (CONVERSATION, [], "chatml", False),
    ):
        given = [Message.model_validate(m) for m in messages]
        with pytest.raises(ApiError, match="not trained to call tools"):
            chat_ids(given, tokenizer, "", template, [Tool.model_validate(t) for t in offered], has_tools)


def test_calls_are_read_back() -> None:
    one = '<tool_call>\n{"name": "weather", "arguments": {"town": "Köln"}}\n</tool_call>'
    call = Call("weather", '{"town": "Köln"}')
    assert find_calls(f"Let me look.\n{one}") == ("Let me look.", [call])
    assert find_calls(f"{one}\n{one}") == ("", [call, call])
    assert find_calls(one.removesuffix("\n</tool_call>")) == ("", [call])  # the end token came first
    for text in ("no call", "<tool_call>\n{broken\n</tool_call>", "<tool_call>[]</tool_call>", "<tool_call>"):
        assert find_calls(text) == (text, [])


def test_a_request_decides_whether_a_qwen3_thinks(tokenizer: Tokenizer) -> None:
    def template(trained: str, **keys: Any) -> str:
        body = ChatBody.model_validate({"model": "m", "messages": [{"role": "user", "content": "?"}], **keys})
        return with_thinking(trained, body.chat_template_kwargs)

    on, off = ({"chat_template_kwargs": {"enable_thinking": value}} for value in (True, False))
    for trained in ("qwen3", "qwen3_thinking"):
        assert (template(trained, **on), template(trained, **off)) == ("qwen3_thinking", "qwen3")
        assert template(trained) == template(trained, chat_template_kwargs={"other": 1}) == trained
    assert template("chatml", **off) == "chatml"
    with pytest.raises(ValueError, match="enable_thinking"):
        template("qwen3", chat_template_kwargs={"enable_thinking": "no"})


@pytest.mark.parametrize(("template", "end"), [("qwen3", "<think>\n\n</think>\n\n"), ("qwen3_thinking", "")])
def test_a_prompt_with_tools_begins_the_answer_of_a_qwen3(template: str, end: str, tokenizer: Tokenizer) -> None:
    marks = {"<think>": 600, "</think>": 601}
    thinks = Tokenizer(tokenizer.backend, {**tokenizer.control, **marks})
    given = [Message.model_validate(m) for m in CONVERSATION]
    given[4].content = "<think>\nhm\n</think>\n\nIt rains."
    ids = chat_ids(given, thinks, "", template, [Tool.model_validate(t) for t in TOOLS], has_tools=True)
    text = thinks.decode(ids, skip_control=False)
    assert text.endswith(f"<|im_end|>\n<|im_start|>assistant\n{end}") and "assistant\nIt rains.<|im_end|>" in text
