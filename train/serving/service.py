"""From the body of a request to requests of the engine: whose answer, which settings, how many tokens. No HTTP."""

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from train.data.tokens import thinking
from train.serving.engine import Engine
from train.serving.errors import ApiError, bad
from train.serving.grammar import Grammar, GrammarError, Grammars, any_object
from train.serving.prompts import chat_ids
from train.serving.request import Choosing, Piece, Request
from train.serving.schema import ChatBody, Common, CompletionBody, TemplateKeys
from train.serving.tokens import Tokens
from train.serving.tools import CLOSE, OPEN

DEFAULT_COMPLETION = 16  # tokens of /v1/completions, as OpenAI's
SMALLEST_TEMPERATURE = 1e-4  # below it a draw is the likeliest token, and the division would overflow
Deliver = Callable[[Request, Piece], None]


@dataclass(frozen=True)
class ModelCard:
    """A model as /v1/models lists it. system, template: of a conversation without a system message."""

    name: str
    root: str
    parent: str
    created: int
    system: str
    template: str

    def as_json(self) -> dict[str, Any]:
        fields = {"id": self.name, "object": "model", "created": self.created, "owned_by": "qwen-finetune"}
        return {**fields, "root": self.root, "parent": self.parent or None}


@dataclass
class Service:
    """All that answers: the engine, what it can be asked for, and the defaults.

    generation: the content of generation_config.json. context: tokens of prompt and answer together.
    """

    engine: Engine
    tokens: Tokens
    cards: Mapping[str, ModelCard]
    generation: Mapping[str, Any]
    context: int
    has_tools: bool
    _grammars: list[Grammars] = field(default_factory=list)

    def card(self, name: str) -> ModelCard:
        """Raises ApiError (404) for a model that is not served."""
        if name not in self.cards:
            raise ApiError(
                404, f"model {name[:80]!r} is not served here. There are: {', '.join(self.cards)}.", "model",
                "model_not_found",
            )  # fmt: skip
        return self.cards[name]

    def chat(self, body: ChatBody, deliver: Deliver) -> list[Request]:
        """The requests of a chat, one for each of n.

        Raises:
            ApiError: what this model or this server does not do.
        """
        card = self.card(body.model)
        _refuse_bias(body)
        offered = body.tools or [] if body.tool_choice != "none" else []
        if body.top_logprobs and not body.logprobs:
            raise bad("top_logprobs needs logprobs=true.", "top_logprobs")
        template = with_thinking(card.template, body.chat_template_kwargs)
        ids = chat_ids(body.messages, self.tokens, card.system, template, offered, self.has_tools)
        asked = body.max_completion_tokens or body.max_tokens
        if body.max_tokens == 0 and not body.max_completion_tokens:
            raise bad("max_tokens: expected 1 or more.", "max_tokens")
        marks = (*((OPEN, CLOSE) if offered else ()), thinking.OPEN, thinking.CLOSE)
        kept = frozenset(self.tokens.control[mark] for mark in marks if mark in self.tokens.control)
        top = (body.top_logprobs or 0) if body.logprobs else None
        return self._requests(body, [ids], asked, self.context, deliver, top, kept, schema=_schema_of(body))

    def completion(self, body: CompletionBody, deliver: Deliver) -> list[Request]:
        """The requests of a completion: n for each prompt, in OpenAI's order.

        Raises:
            ApiError: what this server does not do.
        """
        self.card(body.model)
        _refuse_bias(body)
        if body.suffix:
            raise bad("suffix: this server does not fill in the middle of a text.", "suffix", "unsupported")
        if body.best_of not in (None, 1, body.n):
            raise bad("best_of: expected the same as n.", "best_of", "unsupported")
        prompts = [self._ids(one) for one in _prompts(body.prompt)]
        chances = bool(body.echo) and body.logprobs is not None
        return self._requests(
            body, prompts, body.max_tokens, DEFAULT_COMPLETION, deliver, body.logprobs, chances=chances
        )

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            return self.tokens.encode(prompt) or [self.tokens.endoftext]
        if max(prompt) >= self.tokens.vocab_size:
            raise bad(f"prompt: {max(prompt)} is no token; there are {self.tokens.vocab_size:,}.", "prompt")
        return list(prompt)

    def _requests(
        self,
        body: Common,
        prompts: Sequence[list[int]],
        asked: int | None,
        default: int,
        deliver: Deliver,
        top: int | None = None,
        kept: frozenset[int] = frozenset(),
        chances: bool = False,
        schema: str | None = None,
    ) -> list[Request]:
        """Args: asked, default: tokens of an answer; both are cut to what the context has left."""
        count = len(prompts) * (body.n or 1)
        if count > self.engine.scheduler.queue + self.engine.session.slots:
            raise bad(f"{count} answers at once are more than this server queues.", "n")
        stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        seed = body.seed if body.seed is not None else secrets.randbits(62)
        requests = []
        for number, ids in enumerate(ids for ids in prompts for _ in range(body.n or 1)):
            room = self.context - len(ids)
            if room < (0 if asked == 0 else 1):
                raise bad(
                    f"the prompt has {len(ids):,} tokens, and prompt and answer together {self.context:,}. Shorten it.",
                    "messages" if isinstance(body, ChatBody) else "prompt", "context_length_exceeded",
                )  # fmt: skip
            wanted = min(default if asked is None else asked, room)
            choosing = self._choosing(body, seed, number)
            grammar = self._grammar(schema)
            requests.append(
                Request(ids, body.model, wanted, deliver, choosing, stops, top, chances, kept, grammar)
            )  # fmt: skip
        return requests

    def _choosing(self, body: Common, seed: int, number: int) -> Choosing:
        """The settings of the request, else the model's own."""
        own = self.generation if self.generation.get("do_sample") else {"temperature": 0.0}
        temperature = _either(body.temperature, own.get("temperature"), 1.0)
        return Choosing(
            0.0 if temperature < SMALLEST_TEMPERATURE else temperature,
            _either(body.top_p, own.get("top_p"), 1.0),
            max(int(_either(body.top_k, own.get("top_k"), 0)), 0),
            _either(body.repetition_penalty, self.generation.get("repetition_penalty"), 1.0),
            body.presence_penalty or 0.0,
            body.frequency_penalty or 0.0,
            seed,
            number,
        )

    def _grammar(self, schema: str | None) -> Grammar | None:
        if schema is None:
            return None
        if not self._grammars:  # at the first use: it reads the whole vocabulary
            rows = self.engine.session.layers.config.vocab_size
            self._grammars.append(Grammars(self.tokens, rows, self.tokens.stop_ids[0]))
        try:
            return self._grammars[0].json_schema(schema)
        except GrammarError as error:
            raise bad(f"response_format: {error}", "response_format", "unsupported_schema") from None


def with_thinking(template: str, keys: TemplateKeys | None) -> str:
    """The template of one request: for a Qwen3, enable_thinking chooses between its two."""
    if template not in thinking.TEMPLATES or keys is None or keys.enable_thinking is None:
        return template
    return "qwen3_thinking" if keys.enable_thinking else "qwen3"


def _either(*values: float | None) -> float:
    return float(next(value for value in values if value is not None))


def _refuse_bias(body: Common) -> None:
    if body.logit_bias:
        raise bad("logit_bias is not supported.", "logit_bias", "unsupported")


def _prompts(prompt: Any) -> list[str | Sequence[int]]:
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def _schema_of(body: ChatBody) -> str | None:
    """The JSON schema that the answer has to fit; None: any text."""
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return any_object()
    if wanted.json_schema is None or wanted.json_schema.json_schema is None:
        raise bad("response_format: json_schema needs a schema.", "response_format.json_schema")
    return json.dumps(wanted.json_schema.json_schema)
