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
    settings = {"n_predict": request["new_tokens"], "n_probs": request["top"], "return_tokens": True}
    greedy = {"temperature": 0, "repeat_penalty": 1.0, "cache_prompt": False}
    reply = server.post("/completion", {"prompt": ids, **settings, **greedy})
    places = reply["completion_probabilities"]
    top = [[[one["id"], one["logprob"]] for one in place["top_logprobs"]] for place in places]
    return {"tokens": [place["id"] for place in places], "top": top}


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
