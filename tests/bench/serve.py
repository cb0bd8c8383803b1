"""Streams that the server answers at once: tokens a second and the time to the first token, Qwen-1.8B's shape in Int4.

    python -m tests.bench.serve out.json [--model 1.8b] [--streams 1,8,32,64] [--rounds 3] [--stock 1,8,32,64]

The server runs in a process of its own, as `make serve` runs it, with random Int4 weights and an adapter of rank 64 on
every linear; clients are streams over HTTP from this process: 128 tokens in, 256 out, each stream `rounds` times, one
after another. A row counts all tokens over all the time, prompts included.

serve         greedy                        serve-drawn   temperature 0.7 and top_p 0.8
serve-mixed   half of the streams ask the base, half the adapter
stock         transformers' generate with auto_gptq's linears and peft, as in tests/bench/decode.py, beside it: one batch
              of so many prompts, 64 tokens each, because all of them come at its end
"""

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.spec import heading
from train.common.files import write_json

PROMPT, NEW, STOCK_NEW = 128, 256, 64
START_SECONDS = 300
BASE, ADAPTER = "base", "adapter"


class Words:
    """A tokenizer of as many words as the model has rows: the server's text costs what text costs."""

    def __init__(self, vocabulary: int) -> None:
        self.vocab_size = vocabulary
        self.endoftext, self.im_start, self.im_end = vocabulary - 1, vocabulary - 2, vocabulary - 3
        self.control = {"<|endoftext|>": self.endoftext, "<|im_start|>": self.im_start, "<|im_end|>": self.im_end}
        self.stop_ids = ()  # random weights may draw any token, and every answer has to be as long

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]

    def bytes_of(self, token_id: int) -> bytes:
        return b" w%d" % token_id

    def is_control(self, token_id: int) -> bool:
        return token_id >= self.im_end


def server(port: int, model: str, slots: int) -> None:
    """The server on random weights, in this process."""
    import torch

    from tests.bench import decode, shapes
    from train.inference.decode_layers import DecodeLayers
    from train.inference.shared_base import twin
    from train.inference.slot_session import SlotSession
    from train.serving.engine import Engine
    from train.serving.guard import Limits
    from train.serving.routes import State
    from train.serving.scheduler import Scheduler
    from train.serving.server import serve
    from train.serving.service import ModelCard, Service

    def load() -> Service:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if decode.DEVICE.type == "cuda" else torch.float32
        base = shapes.random_decoder(shapes.config(model), decode.DEVICE, dtype).eval()
        adapted = decode.with_adapter(twin(base))
        layers = {BASE: DecodeLayers(base), ADAPTER: DecodeLayers(adapted.get_base_model())}
        session = SlotSession(layers[BASE], slots, 512)
        with torch.inference_mode():
            for one in layers.values():
                one.refresh()
                session.warm_up(one)
        vocabulary = base.config.vocab_size
        engine = Engine(session, layers, Words(vocabulary), Scheduler(slots, 256))
        cards = {name: ModelCard(name, name, "", 0, "", "chatml") for name in layers}
        return Service(engine, Words(vocabulary), cards, {}, 512, False)

    serve(State(Limits()), load, "127.0.0.1", port, stop_seconds=1)


@dataclass
class Answer:
    """What a client saw of one stream. Seconds from its start."""

    first: float
    whole: float
    tokens: int


async def stream(port: int, body: dict[str, Any]) -> Answer:
    """One request over a connection of its own."""
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + data)
    first, last, done = 0.0, b"", False
    async for line in reader:
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - start
            last = line
        done = done or line.startswith(b"data: [DONE]")
    writer.close()
    if not done:
        raise RuntimeError(f"a stream ended early, after {last!r:.300}")
    tokens = json.loads(last[6:])["usage"]["completion_tokens"]
    return Answer(first, time.perf_counter() - start, tokens)


async def level(port: int, streams: int, rounds: int, vocabulary: int, arm: str) -> dict[str, Any]:
    """The row of so many streams at once."""
    words = random.Random(streams)
    more: dict[str, Any] = {"temperature": 0.7, "top_p": 0.8} if arm == "serve-drawn" else {"temperature": 0}

    def body(number: int) -> dict[str, Any]:
        ids = [words.randrange(vocabulary - 256) for _ in range(PROMPT)]
        model = BASE if arm == "serve-mixed" and number % 2 else ADAPTER
        fields = {"model": model, "prompt": ids, "max_tokens": NEW, "stream": True, "seed": number, **more}
        return {**fields, "stream_options": {"include_usage": True}}

    async def client(number: int, times: int) -> list[Answer]:
        return [await stream(port, body(number)) for _ in range(times)]

    await asyncio.gather(*(client(n, 1) for n in range(streams)))  # warm
    start = time.perf_counter()
    found = await asyncio.gather(*(client(n, rounds) for n in range(streams)))
    seconds = time.perf_counter() - start
    answers = [answer for one in found for answer in one]
    assert all(answer.tokens == NEW for answer in answers), sorted({answer.tokens for answer in answers})
    firsts = sorted(answer.first for answer in answers)
    return {
        "arm": arm,
        "streams": streams,
        "prompt": PROMPT,
        "new": NEW,
        "answers": len(answers),
        "tokens_per_s": round(sum(answer.tokens for answer in answers) / seconds, 1),
        "first_ms_p50": round(1000 * firsts[len(firsts) // 2], 1),
        "first_ms_p99": round(1000 * firsts[min(len(firsts) - 1, int(0.99 * len(firsts)))], 1),
        "whole_s_max": round(max(answer.whole for answer in answers), 2),
    }


def stock_rows(model: str, batches: list[int]) -> list[dict[str, Any]]:
    """transformers' generate with an adapter, in this process."""
    import torch

    from tests.bench import decode, shapes

    network: Any = decode.stock(model, adapter=True)
    vocabulary, rows = shapes.config(model).vocab_size, []
    for batch in batches:
        ids = torch.randint(0, vocabulary - 256, (batch, PROMPT))
        for new in (8, STOCK_NEW):  # warm, then timed
            decode.synchronize()
            start = time.perf_counter()
            for _ in decode._generated(network, ids, new):
                pass
            decode.synchronize()
        rate = round(batch * STOCK_NEW / (time.perf_counter() - start), 1)
        rows.append({"arm": "stock", "streams": batch, "prompt": PROMPT, "new": STOCK_NEW, "tokens_per_s": rate})
        print(rows[-1], flush=True)
    return rows


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_ready(port: int, process: "subprocess.Popen[bytes]") -> float:
    """Seconds until the server answers."""
    import urllib.error
    import urllib.request

    start = time.monotonic()
    while time.monotonic() - start < START_SECONDS:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
            return time.monotonic() - start
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError("the server did not become ready")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="1.8b")
    parser.add_argument("--streams", default="1,8,32,64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stock", default="1,8,32,64", help="batches of transformers' generate; empty: none")
    parser.add_argument("--server", type=int, default=0, help="used by this program itself: a port")
    parser.add_argument("--stock-only", action="store_true", help="used by this program itself")
    args = parser.parse_args()
    streams = [int(word) for word in args.streams.split(",")]
    if args.server:
        server(args.server, args.model, max(streams))
        return
    batches = [int(word) for word in args.stock.split(",") if word]
    if args.stock_only:
        write_json(args.out, {"rows": stock_rows(args.model, batches)})
        return
    from tests.bench import shapes

    port, rows, vocabulary = free_port(), list[dict[str, Any]](), shapes.config(args.model).vocab_size
    report = {**heading(), "model": args.model}
    command = [sys.executable, "-m", "tests.bench.serve", str(args.out), "--model", args.model]
    process = subprocess.Popen([*command, "--streams", args.streams, "--server", str(port)])
    try:
        report["start_s"] = round(wait_ready(port, process), 1)
        print(f"ready after {report['start_s']} s", flush=True)
        most = min(32, max(streams))
        for arm, at_once in [*(("serve", n) for n in streams), ("serve-drawn", most), ("serve-mixed", most)]:
            try:
                rows.append(asyncio.run(level(port, at_once, args.rounds, vocabulary, arm)))
            except Exception as error:
                traceback.print_exc()
                rows.append({"arm": arm, "streams": at_once, "skipped": f"{type(error).__name__}: {error!s:.200}"})
            print(rows[-1], flush=True)
            write_json(args.out, {**report, "rows": rows})
    finally:
        process.terminate()
        process.wait(60)
    if batches:
        part = args.out.with_suffix(".stock.json")
        status = subprocess.run(
            [*command[:3], str(part), *command[4:], "--stock", args.stock, "--stock-only"]
        ).returncode
        rows += (
            json.loads(part.read_text())["rows"]
            if not status
            else [{"arm": "stock", "skipped": f"exit status {status}"}]
        )
        part.unlink(missing_ok=True)
    write_json(args.out, {**report, "rows": rows})


if __name__ == "__main__":
    main()
