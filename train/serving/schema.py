"""The bodies of requests as OpenAI's API has them. Fields that are not listed are ignored; wrong types are refused.

A list is refused at its first wrong item: a body of megabytes could hold a million, each with an error of its own.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_PROMPTS = 2048


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 6.0 is the integer 6."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


T = TypeVar("T")
Items = Annotated[list[T], Field(fail_fast=True)]
WHOLE = BeforeValidator(_whole)
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=1000)]
TokenId = Annotated[int, Field(ge=0, lt=2**31), WHOLE]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class TextPart(Body):
    """A part of a message. Models here read text alone."""

    type: str
    text: str | None = None


class FunctionCall(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Items[TextPart] | None = None
    tool_calls: Items[ToolCall] | None = None


class Function(Body):
    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class JsonSchema(Body):
    name: str = ""
    json_schema: dict[str, Any] | bool | None = Field(default=None, alias="schema")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(Body):
    include_usage: bool | None = None


class Common(Body):
    """What both kinds of answers take. None: the model's own value, of its generation_config.json."""

    model: str = Field(max_length=1000)
    max_tokens: Annotated[int, Field(ge=0), WHOLE] | None = None
    temperature: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: Annotated[int, Field(ge=-1, le=10_000_000), WHOLE] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = None
    seed: Annotated[int, WHOLE] | None = None  # of any size: it is hashed
    stop: Text | Annotated[list[Text], Field(fail_fast=True, max_length=MAX_STOPS)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: float | None = Field(default=None, gt=0, le=100, allow_inf_nan=False)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, Any] | None = None  # refused, whatever it holds


class TemplateKeys(Body):
    """What a client hands to the chat template, as vLLM takes it."""

    enable_thinking: bool | None = None  # of Qwen3


class ChatBody(Common):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(fail_fast=True, min_length=1)
    max_completion_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    response_format: ResponseFormat | None = None
    tools: Items[Tool] | None = None
    chat_template_kwargs: TemplateKeys | None = None
    tool_choice: Literal["none", "auto"] | None = None  # a call cannot be forced


class CompletionBody(Common):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
    )
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    suffix: str | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = None
