"""Run by another Python, one that has a current transformers: what it makes of a merged export.

Imports nothing of this program. Request on the standard input, reply to the file that it names: see readers.py. The
prompts are transformers' own too: it renders the messages by the chat template in the folder and tokenises them.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers


@torch.inference_mode()
def answer(model: Any, ids: list[int], stops: set[int], request: dict[str, Any]) -> dict[str, Any]:
    """The greedy answer to `ids`: each token, and the likeliest tokens at its place with their log-probabilities.

    By forward passes, not by generate(), whose settings in the folder may include a repetition penalty.
    """
    tokens: list[int] = []
    top: list[list[tuple[int, float]]] = []
    past, new = None, ids
    while len(tokens) < request["new_tokens"] and not (tokens and tokens[-1] in stops):
        output = model(torch.tensor([new], device=model.device), past_key_values=past, use_cache=True)
        values, found = output.logits[0, -1].double().log_softmax(-1).topk(request["top"])
        top.append(list(zip(found.tolist(), values.tolist(), strict=True)))
        tokens.append(top[-1][0][0])
        past, new = output.past_key_values, tokens[-1:]
    return {"tokens": tokens, "top": top}


def prompt(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """The ids of a conversation up to where the answer starts."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text)["input_ids"])


def main() -> None:
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(request["model"])
    dtype = getattr(torch, request["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(request["model"], dtype=dtype)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    ends = model.generation_config.eos_token_id
    stops = set(ends) if isinstance(ends, list) else {ends}
    reply = {
        "version": f"transformers {transformers.__version__}",
        "prompts": [prompt(tokenizer, messages) for messages in request["messages"]],
        "answers": [answer(model, ids, stops, request) for ids in request["prompts"]],
    }
    Path(request["reply"]).write_text(json.dumps(reply), encoding="utf-8")


if __name__ == "__main__":
    main()
