"""A long run of the server on this CPU with a tiny model: random requests, hang-ups and bad input, 16 at once.

    python -m tests.bench.serve_soak [minutes=30] [clients=16] [out=soak.json]

Every greedy answer is compared with that of `infer`, every drawn one with the first of the same seed. At four times,
when all clients pause, the server has to be idle, and its memory and file handles are counted. It prints one JSON
object; the exit status is 1 if an answer is wrong, a slot is lost, or memory or handles grow.
"""

import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.data_rates import machine
from tests.bench.spec import heading
from tests.support.server import BASE, RUN, Served, serving, tiny_folder

QUESTIONS = ("What is your name?", "你叫什么？", "One word for cold?", "x" * 150, "2 + 2?", "?")
PAUSES = 4
GROWTH = 1.05  # of the server's memory between the first pause and the last
BAD: tuple[bytes, ...] = (
    b"{", b"[]", b'{"model": "no"}', b'{"model": "tiny", "prompt": [99999]}', b'{"model": "tiny", "prompt": NaN}',
    b'{"model": "tiny", "prompt": "' + b"x" * 200_000 + b'"}', b"\xff" * 100, b'{"model": "tiny", "messages": []}',
)  # fmt: skip


@dataclass
class Tally:
    """What was seen. first: of drawn answers, by what was asked."""

    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    first: dict[str, str] = field(default_factory=dict)


def infer_answers(folder: Path) -> dict[tuple[str, str, int], str]:
    """(model, question, tokens) -> what `infer` answers."""
    import torch

    from train.data.rows.formats import Turn
    from train.data.tokens.chat_template import prompt
    from train.inference.generate import stream
    from train.inference.trained import load_run
    from train.model.loading import load
    from train.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder / "models" / BASE)
    models: dict[str, Any] = {
        RUN: load_run(folder / "runs" / RUN, folder / "models", torch.float32)[0],
        BASE: load(folder / "models" / BASE, torch.float32).eval(),
    }
    found = {}
    for name, model in models.items():
        for question in QUESTIONS:
            ids = prompt([Turn("user", question)], tokenizer)
            for tokens in (8, 40):
                found[name, question, tokens] = "".join(stream(model, tokenizer, ids, tokens, notify=lambda _: None))
    return found


async def post(port: int, path: str, body: bytes, read_bytes: int = -1) -> tuple[int, bytes]:
    """(status, body) of a request; after read_bytes the client hangs up, and the status is 0."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    try:
        writer.write(head.encode() + body)
        if read_bytes >= 0:
            await reader.read(read_bytes)
            return 0, b""
        data = await reader.read()
    finally:
        writer.close()
    first, _, rest = data.partition(b"\r\n\r\n")
    return int(first.split(b" ", 2)[1]), _unchunked(rest) if b"chunked" in first.lower() else rest


def _unchunked(data: bytes) -> bytes:
    parts = []
    while data:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        parts.append(data[:length])
        data = data[length + 2 :]
    return b"".join(parts)


def streamed_text(data: bytes) -> str:
    lines = data.decode().split("\n\n")
    assert lines[-2] == "data: [DONE]", lines[-2:]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])


async def one_request(
    served: Served, dice: random.Random, wanted: dict[tuple[str, str, int], str], tally: Tally
) -> None:
    kind = dice.choices(("greedy", "drawn", "hang-up", "bad", "json"), (50, 20, 15, 10, 5))[0]
    tally.kinds[kind] += 1
    model, question, tokens = dice.choice(list(wanted))
    body: dict[str, Any] = {
        "model": model, "messages": [{"role": "user", "content": question}], "max_tokens": tokens, "temperature": 0,
        "stream": dice.random() < 0.5,
    }  # fmt: skip
    if kind == "bad":
        status, reply = await post(
            served.port, dice.choice(("/v1/completions", "/v1/chat/completions")), dice.choice(BAD)
        )
        if not 400 <= status < 500 or b'"error"' not in reply:
            tally.wrong.append(f"bad input: {status} {reply[:200]!r}")
        return
    if kind == "hang-up":
        body |= {"max_tokens": 400, "n": dice.randint(1, 3), "temperature": 1.0}
        await post(served.port, "/v1/chat/completions", json.dumps(body).encode(), dice.choice((0, 1, 300, 3000)))
        return
    if kind == "drawn":
        body |= {"temperature": 1.2, "top_p": 0.9, "seed": dice.randrange(4), "presence_penalty": 0.2}
    if kind == "json":
        body |= {"response_format": {"type": "json_object"}}
    start = time.monotonic()
    status, reply = await post(served.port, "/v1/chat/completions", json.dumps(body).encode())
    tally.seconds.append(time.monotonic() - start)
    if status != 200:
        tally.wrong.append(f"{kind}: {status} {reply[:200]!r}")
        return
    text = streamed_text(reply) if body["stream"] else json.loads(reply)["choices"][0]["message"]["content"]
    key = json.dumps({**body, "stream": False}, sort_keys=True)
    expected = wanted[model, question, tokens] if kind == "greedy" else tally.first.setdefault(key, text)
    if text != expected:
        tally.wrong.append(f"{kind} {model} {question[:20]} {tokens}: {text!r} instead of {expected!r}")


async def phase(served: Served, clients: int, seconds: float, wanted: dict[Any, str], tally: Tally, seed: int) -> None:
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        dice = random.Random(f"{seed}:{number}")
        while time.monotonic() < end:
            await one_request(served, dice, wanted, tally)

    await asyncio.gather(*(client(n) for n in range(clients)))


def state(served: Served) -> dict[str, float]:
    """The server's memory in MB, file handles and threads, once it is idle."""
    served.wait_idle(60)
    time.sleep(1)
    process = Path(f"/proc/{served.process.pid}")
    pages = int((process / "statm").read_text().split()[1])
    return {
        "memory_mb": round(pages * 4096 / 1e6, 1),
        "handles": len(list((process / "fd").iterdir())),
        "threads": len(list((process / "task").iterdir())),
        "running": served.metric("serve_running"),
    }


def soak(minutes: float, clients: int) -> dict[str, Any]:
    """The report. `failures` is empty where everything held."""
    tally, states = Tally(), []
    with tempfile.TemporaryDirectory() as name:
        folder = tiny_folder(Path(name))
        wanted = infer_answers(folder)
        with serving(folder, "slots=8", "queue=200") as served:
            asyncio.run(
                phase(served, clients, min(10, 6 * minutes), wanted, tally, 0)
            )  # until everything was used once
            for n in range(PAUSES):
                states.append(state(served))
                if n < PAUSES - 1:
                    asyncio.run(phase(served, clients, 60 * minutes / (PAUSES - 1), wanted, tally, n + 1))
            cancelled = served.metric("serve_cancelled_total")
    failures = tally.wrong[:20]
    first, last = states[0], states[-1]
    failures += [f"{name} grew: {states}" for name in ("handles", "threads") if last[name] > first[name] + 2]
    if last["memory_mb"] > GROWTH * first["memory_mb"]:
        failures.append(f"memory grew: {states}")
    seconds = sorted(tally.seconds)
    return {
        "minutes": minutes, "clients": clients, "requests": dict(tally.kinds), "cancelled": cancelled,
        "wrong": len(tally.wrong), "p50_s": round(seconds[len(seconds) // 2], 3),
        "p99_s": round(seconds[int(0.99 * len(seconds))], 3), "states": states, "failures": failures,
    }  # fmt: skip


def main() -> int:
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    report = soak(float(given.get("minutes", "30")), int(given.get("clients", "16")))
    report = {**heading(), "machine": machine(), "load_of_the_machine": round(os.getloadavg()[2], 1), **report}
    text = json.dumps(report, indent=1, ensure_ascii=False)
    print(text)
    if "out" in given:
        Path(given["out"]).write_text(text + "\n", encoding="utf-8")
    return int(bool(report["failures"]))


if __name__ == "__main__":
    sys.exit(main())
