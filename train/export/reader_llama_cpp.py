"""Run by another Python, one that has llama.cpp's bindings `xllamacpp`: what llama.cpp makes of a GGUF file.

Imports nothing of this program. Request on the standard input, reply to the file that it names: see readers.py. The
prompts are llama.cpp's own too: it renders the messages by the chat template in the file and tokenises them.
"""

import importlib
import json
import sys
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any


class Server:
    """llama.cpp's own server in this process, on a free port of this machine."""

    def __init__(self, request: dict[str, Any]) -> None:
        llama: Any = importlib.import_module("xllamacpp")
        options = llama.CommonParams()
        options.model.path = request["model"]
        if request["adapter"]:
            options.lora_adapters = [llama.CommonAdapterLoraInfo(request["adapter"], 1.0)]
        longest = max(map(len, request["prompts"]))
        options.n_ctx = -(-(longest + request["new_tokens"] + 8) // 256) * 256
        options.n_parallel, options.warmup, options.fit_params, options.verbosity = 1, False, False, 1
        options.cpuparams.n_threads = request["threads"]
        self._server = llama.Server(options)
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def post(self, path: str, content: dict[str, Any]) -> Any:
        """The reply of its HTTP interface."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._server.listening_address + path, json.dumps(content).encode(), headers)
        return json.load(self._opener.open(request))


def prompt(server: Server, messages: list[dict[str, str]]) -> list[int]:
    """The ids of a conversation up to where the answer starts."""
    text = server.post("/apply-template", {"messages": messages})["prompt"]
    return list(server.post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"])


def answer(server: Server, ids: list[int], request: dict[str, Any]) -> dict[str, Any]:
    """The greedy answer to `ids`: each token, and the likeliest tokens at its place with their log-probabilities."""
    tokens: list[int] = []
    top: list[list[tuple[int, float]]] = []
    ended = False
    while not ended and len(tokens) < request["new_tokens"]:
        likeliest, ended = place(server, ids + tokens, request["top"])
        tokens.append(likeliest[0][0])
        top.append(likeliest)
    return {"tokens": tokens, "top": top}


def place(server: Server, ids: list[int], count: int) -> tuple[list[tuple[int, float]], bool]:
    """The `count` likeliest tokens after `ids`, with their log-probabilities; does the likeliest one end the answer?

    The server gives no probabilities where the token that it chose ends within a character, as many a Chinese character
    of several tokens does. It is then asked to choose another one: its probabilities are those before the choice.
    """
    settings = {"n_predict": 1, "n_probs": count, "return_tokens": True, "cache_prompt": True}
    greedy = {"temperature": 0, "repeat_penalty": 1.0}
    chosen: list[int] = []
    while True:
        banned = {"logit_bias": [[token, False] for token in chosen]}
        reply = server.post("/completion", {"prompt": ids, **settings, **greedy, **banned})
        if places := reply.get("completion_probabilities"):
            found = [(one["id"], one["logprob"]) for one in places[0]["top_logprobs"]]
            return found, not chosen and reply["stop_type"] == "eos"
        chosen += reply["tokens"]


def main() -> None:
    request = json.load(sys.stdin)
    server = Server(request)
    reply = {
        "version": f"xllamacpp {version('xllamacpp')}",
        "prompts": [prompt(server, messages) for messages in request["messages"]],
        "answers": [answer(server, ids, request) for ids in request["prompts"]],
    }
    Path(request["reply"]).write_text(json.dumps(reply), encoding="utf-8")


if __name__ == "__main__":
    main()
