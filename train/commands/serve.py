"""Serve a model under OpenAI's API, for any of its clients: chat, completions, log-probabilities, streams, metrics.

RUN= names finished runs of one base, with commas between: each is a model of its own name, and so is the base; clients
choose by `model`. MODEL= names any model. With neither it is the newest finished run.

It listens on 127.0.0.1, where only this machine reaches it. Another address needs a key: API_KEY=… before the command
(an environment variable, so that it stands in no list of processes); clients send it as OpenAI's do.

Ctrl-C and SIGTERM let running answers end for stop_seconds, cut the rest off, and exit with status 0.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.common.asgi import LOOPBACK
from train.common.errors import UserError
from train.common.listen import Server, address, shown
from train.config.options import option
from train.config.recipe import Recipe
from train.data.tokens.chat_template import DEFAULT_SYSTEM
from train.inference.decode_layers import DecodeLayers
from train.inference.generate import notice
from train.inference.shared_base import BaseSource, NamedModel, find_base, load_base
from train.inference.slot_session import SlotSession
from train.model.stops import usual_template
from train.serving.engine import Engine
from train.serving.guard import Limits
from train.serving.routes import State
from train.serving.scheduler import Scheduler
from train.serving.server import serve
from train.serving.service import ModelCard, Service
from train.serving.slot_memory import plan_slots

SERVER = Server("serve", "API_KEY", "use the model")


@dataclass(frozen=True)
class Options:
    """What is served, to whom, and how much of it at once."""

    run: str = option("", "finished runs below runs/, with commas between; empty: the newest, if MODEL= is empty too")
    model: str = option("", "a model instead: a name below models/, or a folder")
    host: str = option("127.0.0.1", "address to listen on; another than 127.0.0.1 needs API_KEY= in the environment")
    port: int = option(8000, "port to listen on", interval="[1, 65535]")
    slots: int = option(0, "answers at once; 0: as the memory allows, at most 64", interval="[0, 64]")
    queue: int = option(256, "requests that may wait for a slot; more are refused with 429", interval="[0, 100000]")
    length: int = option(
        0, "tokens of prompt and answer; 0: the model's context, at most 8192", interval="[0, 1048576]"
    )
    system: str = option(
        "auto",
        "system message of conversations without one; auto: as it was trained, else Qwen's; empty: none",
        may_be_empty=True,
    )
    template: str = option(
        "auto",
        "how turns are written; auto: as it was trained, else chatml, for a Qwen3 qwen3_thinking; qwen3: it answers at once",
        ("auto", "chatml", "qwen3", "qwen3_thinking", "plain"),
    )
    body_mb: int = option(4, "size of a request at most, in MB", interval="[1, 1024]")
    client_seconds: float = option(30.0, "a client that is slower is disconnected", interval="[0.1, 3600]")
    stop_seconds: float = option(20.0, "at the end, wait so long for running answers", interval="[0, 3600]")
    dtype: str = option(
        "auto", "auto: bf16 where the GPU has it, else fp16; fp32 on a CPU", ("auto", "bf16", "fp16", "fp32")
    )
    models: str = option("models", "folder of the models")
    runs: str = option("runs", "folder of the runs")


def run(options: Options) -> None:
    key = os.environ.get("API_KEY", "")
    host, limits = _address(options, key), _limits(options, key)
    source = find_base(Path(options.models), Path(options.runs), options.run, options.model, Recipe().model)
    state = State(limits)
    serve(
        state,
        lambda: _load(options, source),
        host,
        options.port,
        options.stop_seconds,
        lambda service: notice(_describe(service, options, bool(key))),
        lambda: notice("stopped"),
    )


def _address(options: Options, key: str) -> str:
    return address(SERVER, options.host, options.port, bool(key))


def _limits(options: Options, key: str) -> Limits:
    """With a key, any Host is served: a page whose name was rebound does not know it."""
    if key and (len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key):
        raise UserError("API_KEY: expected 8 or more printable ASCII characters without spaces.")
    hosts = frozenset() if key else LOOPBACK | {options.host}
    return Limits(key, hosts, options.body_mb << 20, options.client_seconds)


def _load(options: Options, source: BaseSource) -> Service:
    start = time.monotonic()
    shared = load_base(source, options.dtype, notice)
    shared.tokenizer.encode("")  # makes the library's tokenizer now, not at the first request
    layers = {model.name: DecodeLayers(model.model) for model in shared.models}
    first = next(iter(layers.values()))
    plan = plan_slots(first, shared.context, options.slots, options.length)
    session = SlotSession(first, plan.slots, plan.capacity)
    for one in layers.values():
        one.refresh()
        session.warm_up(one)
    engine = Engine(session, layers, shared.tokenizer, Scheduler(plan.slots, options.queue))
    notice(f"loaded in {time.monotonic() - start:.0f} s; {plan}")
    cards = {model.name: _card(model, options) for model in shared.models}
    return Service(engine, shared.tokenizer, cards, shared.generation, plan.length, shared.tool_template)


def _card(model: NamedModel, options: Options) -> ModelCard:
    recipe: dict[str, Any] = model.recipe
    system = options.system if options.system != "auto" else recipe.get("system", DEFAULT_SYSTEM)
    template = (
        options.template
        if options.template != "auto"
        else recipe.get("template", usual_template(model.model.config.layout))
    )
    created = int(Path(model.root).stat().st_mtime)
    return ModelCard(model.name, model.root, model.parent, created, system, template)


def _describe(service: Service, options: Options, has_key: bool) -> str:
    host = shown(SERVER, options.host)
    key = "$API_KEY" if has_key else "none"
    name = list(service.cards)[-1]
    return (
        f"ready: http://{host}:{options.port}/v1 serves {', '.join(service.cards)}\n"
        f"  curl http://{host}:{options.port}/v1/chat/completions -H 'Content-Type: application/json'"
        + (' -H "Authorization: Bearer $API_KEY"' if has_key else "")
        + f' -d \'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hi"}}]}}\'\n'
        f"  OpenAI's clients: OPENAI_BASE_URL=http://{host}:{options.port}/v1 OPENAI_API_KEY={key}"
    )
