"""Chat with a model in the terminal, or answer one prompt.

RUN= names a finished run: its merged export answers if there is one and the GPU has room for it, else its adapter on
its base. MODEL= names any model. With neither, the newest finished run answers, else the default base: the first line
says which. Answers go to the standard output, all else to the standard error.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from train.common import commands
from train.common.device import pick_device, pick_dtype
from train.common.errors import UserError
from train.config.options import SEEDS, option
from train.config.recipe import Recipe
from train.data.chat_template import DEFAULT_SYSTEM
from train.data.formats import Turn
from train.inference.chat import Chat, chat_model, print_answer, stock_chat_model, typed_lines
from train.inference.generate import notice
from train.inference.sampling import Sampling
from train.inference.stock import load_stock
from train.inference.trained import TrainedModel, find_source, load_trained


@dataclass(frozen=True)
class Options:
    """Chat, or answer PROMPT=."""

    run: str = option("", "name of a finished run below runs/; empty: the newest, if MODEL= is empty too")
    model: str = option("", "a model instead: a name below models/, or a folder")
    prompt: str = option("", "answer this and end; empty: chat")
    system: str = option(
        "auto",
        "system message; auto: what the run or export was trained with, else Qwen's; empty: none",
        may_be_empty=True,
    )
    template: str = option(
        "auto", "how turns are written; auto: as it was trained, else chatml", ("auto", "chatml", "plain")
    )
    engine: str = option("ours", "stock: transformers, optimum, auto-gptq, to compare with", ("ours", "stock"))
    trust_remote_code: bool = option(False, "with engine=stock: allow the checkpoint's own code to run")
    max_tokens: int = option(512, "tokens in an answer, at most", interval="[1, 1048576]")
    temperature: float = option(0.0, "0: the same answer each time; 0.7 is a usual value", interval="[0, 100]")
    top_p: float = option(
        0.8, "with a temperature: draw from the likeliest tokens that share this probability", interval="(0, 1]"
    )
    top_k: int = option(0, "with a temperature: draw from this many tokens; 0: all", interval="[0, 1000000]")
    repetition_penalty: float = option(1.0, "more than 1: avoid tokens that occurred before", interval="(0, 100]")
    seed: int = option(1234, "seed of sampling, with a temperature", interval=SEEDS)
    dtype: str = option(
        "auto", "auto: bf16 where the GPU has it, else fp16; fp32 on a CPU", ("auto", "bf16", "fp16", "fp32")
    )
    models: str = option("models", "folder of the models")
    runs: str = option("runs", "folder of the runs")


def run(options: Options) -> None:
    # the model, and how it answers
    sampling = Sampling(options.temperature, options.top_p, options.top_k, options.repetition_penalty, options.seed)
    if options.max_tokens < 1:
        raise UserError(f"max_tokens={options.max_tokens}: expected 1 or more.")
    start = time.monotonic()
    stock = options.engine == "stock"
    trained = _load_stock(options) if stock else _load(options)
    system = options.system if options.system != "auto" else trained.recipe.get("system", DEFAULT_SYSTEM)
    template = options.template if options.template != "auto" else trained.recipe.get("template", "chatml")
    build = stock_chat_model if stock else chat_model
    model = build(trained.model, trained.tokenizer, template, options.max_tokens, sampling)
    seconds = time.monotonic() - start
    notice(f"loaded in {seconds:.0f} s, {template}, {_describe(sampling)}, {model.context:,} tokens of context")

    # one answer, or a chat
    if options.prompt:
        print_answer(model, model.encode([Turn("user", options.prompt)], system))
        return
    Chat(model, system, options.max_tokens).run(typed_lines())


def _load(options: Options) -> TrainedModel:
    models, runs = Path(options.models), Path(options.runs)
    return load_trained(models, runs, options.run, options.model, Recipe().model, options.dtype, on_source=notice)


def _load_stock(options: Options) -> TrainedModel:
    """The model by transformers.

    Raises:
        UserError: a run without a merged export.
    """
    models, runs = Path(options.models), Path(options.runs)
    source = find_source(models, runs, options.run, options.model, Recipe().model, any_size=True)
    if source.adapter:
        raise UserError(
            f"run {source.folder.name} has no merged export, and engine=stock loads whole models only. "
            f"First: {commands.make('export', run=source.folder.name, models=models, runs=runs)}"
        )
    notice(source.description)
    device = pick_device()
    model, tokenizer = load_stock(source.folder, options.trust_remote_code, pick_dtype(device, options.dtype), device)
    return TrainedModel(model, tokenizer, source.recipe, source.description)


def _describe(sampling: Sampling) -> str:
    if sampling.temperature == 0:
        return "the same answer each time"
    return f"temperature {sampling.temperature:g}, seed {sampling.seed}"
