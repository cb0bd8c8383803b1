"""ENGINE=stock: transformers, optimum and auto-gptq, and the checkpoint's own code if the user allows it.

The control that our decoder is compared with, and the only file of the program that may execute a checkpoint's code.
Knows nothing of runs and terminals. It is slow: on a CPU auto-gptq dequantises every weight for every token.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from train.common.errors import UserError
from train.inference.generate import notice
from train.inference.sampling import Sampling
from train.model.base_files import read_object, weight_files
from train.model.published import read_published


class StockTokenizer:
    """A tokenizer of transformers as chat_template.prompt calls it; it alone decides about control tokens in a text."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock
        names = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
        self.im_start, self.im_end, self.endoftext = (stock.convert_tokens_to_ids(name) for name in names)
        if None in (self.im_start, self.im_end, self.endoftext):
            raise UserError(
                "this checkpoint's tokenizer lacks <|im_start|>, <|im_end|> or <|endoftext|>: it is not a ChatML model."
            )

    def encode(self, text: str) -> list[int]:
        return list(self.stock(text, add_special_tokens=False).input_ids)


def load_stock(folder: Path, trust: bool, dtype: torch.dtype, device: torch.device) -> tuple[Any, StockTokenizer]:
    """The model in evaluation mode and its tokenizer; Int4 through auto-gptq on a CPU, through optimum on CUDA.

    Raises:
        UserError: the checkpoint brings code and `trust` is off (the error names it), or transformers cannot load it.
    """
    check_trust(folder, trust)
    _refuse_pickles(folder)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    int4 = "quantization_config" in read_published(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        if int4 and device.type == "cpu":
            model = _gptq_on_cpu(folder, trust)
        else:
            device_map = {"device_map": str(device)} if int4 else {}
            model = AutoModelForCausalLM.from_pretrained(
                folder, torch_dtype=dtype, trust_remote_code=trust, use_safetensors=True, **device_map
            )
    except (KeyError, ValueError, OSError, ImportError, TypeError) as error:
        raise UserError(
            f"{folder}: ENGINE=stock cannot load it: {type(error).__name__}: {error!s:.300}\n"
            "Use ENGINE=ours. A merged export with LAYOUT=qwen2 is for newer tools than this transformers; "
            "without it, for the base's own code."
        ) from error
    return (model if int4 else model.to(device)).eval(), StockTokenizer(tokenizer)


def _refuse_pickles(folder: Path) -> None:
    """Check that the weights are safetensors: transformers reads .bin files with torch.load, here below torch 2.10.

    Raises:
        UserError: they are not; or as `weight_files`.
    """
    pickled = [path.name for path in weight_files(folder) if path.suffix == ".bin"]
    if pickled:
        raise UserError(
            f"{folder}: {pickled[0]} is a pickle, which ENGINE=stock would read with torch.load; that is not safe for a "
            "damaged file before torch 2.10. Use ENGINE=ours, or fetch a revision with *.safetensors."
        )


def _gptq_on_cpu(folder: Path, trust: bool) -> Any:
    """auto-gptq in float32, without the kernels that need a GPU."""
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

    published = read_published(folder)["quantization_config"]
    known = {f.name for f in fields(BaseQuantizeConfig)}  # quantize_config.json has the same keys, but may be missing
    with _initialisers_restored():
        return AutoGPTQForCausalLM.from_quantized(
            str(folder),
            device="cpu",
            torch_dtype=torch.float32,
            use_safetensors=True,
            disable_exllama=True,
            disable_exllamav2=True,
            quantize_config=BaseQuantizeConfig(**{key: value for key, value in published.items() if key in known}),
            trust_remote_code=trust,
        )


@contextmanager
def _initialisers_restored() -> Iterator[None]:
    """auto-gptq switches initialisers off when it loads a model, and leaves them off.

    Later modules would hold noise, and later models of transformers would not tie their weights.
    """
    from transformers import modeling_utils

    names = ("kaiming_uniform_", "uniform_", "normal_")
    functions = {name: getattr(torch.nn.init, name) for name in names}
    transformers_flag = modeling_utils._init_weights
    try:
        yield
    finally:
        modeling_utils._init_weights = transformers_flag
        for name, function in functions.items():
            setattr(torch.nn.init, name, function)


def check_trust(folder: Path, trust: bool) -> None:
    """Pass if `trust` is on or the checkpoint brings no code of its own.

    Raises:
        UserError: it brings code; the error names the classes and files that would be executed.
    """
    classes = {c for name in ("config.json", "tokenizer_config.json") for c in _remote_classes(folder / name)}
    if not classes or trust:
        return
    files = (
        ", ".join(sorted(path.name for path in folder.glob("*.py")))
        or "none here: transformers would look for them on the hub"
    )
    raise UserError(
        f"{folder}: to load this checkpoint with ENGINE=stock, code that came with it would run with your rights:\n"
        f"  classes: {', '.join(sorted(classes))}\n  files:   {files}\n"
        "Read them, then allow it with TRUST_REMOTE_CODE=1; ENGINE=ours never needs it."
    )


def _remote_classes(path: Path) -> Iterator[str]:
    """module.Class of every auto_map entry in a config file; a list holds the slow and the fast tokenizer.

    Raises:
        UserError: a damaged file, or an auto_map of an unknown form.
    """
    entries = read_object(path).get("auto_map") or {} if path.exists() else {}
    if not isinstance(entries, dict):
        raise UserError(f"{path}: auto_map is {entries!r:.80}, expected an object.")
    for entry in entries.values():
        yield from filter(None, entry if isinstance(entry, list) else [entry])


def stock_stream(
    model: Any,
    tokenizer: StockTokenizer,
    ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    notify: Callable[[str], None] = notice,
) -> Iterator[str]:
    """Pieces of the answer from the model's own `generate`, which runs in a thread until the iterator is closed."""
    from transformers import StoppingCriteriaList, TextIteratorStreamer

    streamer = TextIteratorStreamer(tokenizer.stock, skip_prompt=True, skip_special_tokens=True)
    state = _ThreadState()
    settings = _settings(sampling, tokenizer, max_new_tokens)
    settings |= {"streamer": streamer, "stopping_criteria": StoppingCriteriaList([lambda *_: state.stop])}
    torch.manual_seed(sampling.seed)
    thread = Thread(target=_generate, args=(model, ids, state, settings), daemon=True)
    thread.start()
    try:
        yield from filter(None, streamer)
    finally:
        state.stop = True
        thread.join()
    if state.error:
        raise UserError(
            f"the stock model's generate failed: {type(state.error).__name__}: {state.error}"
        ) from state.error
    if state.tokens - len(ids) >= max_new_tokens:
        notify(f"(stopped: {max_new_tokens} tokens, the most that were asked for or that fit the context)")


@dataclass
class _ThreadState:
    """Shared by the thread that generates and the thread that reads."""

    stop: bool = False
    tokens: int = 0  # prompt and answer
    error: Exception | None = None


def _generate(model: Any, ids: Sequence[int], state: _ThreadState, settings: dict[str, Any]) -> None:
    """Run `generate` to its end or until state.stop. The streamer is ended in every case."""
    row = torch.tensor([list(ids)], device=next(model.parameters()).device)
    try:
        with torch.inference_mode():
            out = model.generate(input_ids=row, attention_mask=torch.ones_like(row), **settings)
        state.tokens = out.shape[1]
    except Exception as error:  # raised again by the thread that reads
        state.error = error
    finally:
        settings["streamer"].end()


def _settings(sampling: Sampling, tokenizer: StockTokenizer, max_new_tokens: int) -> dict[str, Any]:
    """Arguments of `generate`."""
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": [tokenizer.im_end, tokenizer.endoftext],
        "pad_token_id": tokenizer.endoftext,
        "repetition_penalty": float(sampling.repetition_penalty),
        "no_repeat_ngram_size": sampling.no_repeat_ngram_size,
        "do_sample": sampling.temperature > 0,
        **(drawn if sampling.temperature > 0 else {}),
    }
