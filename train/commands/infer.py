"""Chat with a model in the terminal, answer one prompt, or answer a file of questions.

RUN= names a finished run: its merged export answers if there is one and the GPU has room for it, else its adapter on
its base. MODEL= names any model. With neither, the newest finished run answers, else the default base: the first line
says which. Answers go to the standard output, all else to the standard error.

QUESTIONS= is a file: text with one question a line, .jsonl, .json, .csv, .tsv or .xlsx. Its answers are written to
ANSWERS= as they come, and the same command continues after an interruption.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.common import commands
from train.common.device import pick_device, pick_dtype
from train.common.errors import UserError
from train.common.progress import bar
from train.config.options import SEEDS, option
from train.config.recipe import Recipe
from train.data.files.questions import read as read_questions
from train.data.rows.formats import Turn
from train.data.tokens.chat_template import DEFAULT_SYSTEM
from train.inference.answer_file import AnswerFile, default_path
from train.inference.ask_file import ask, inputs_of
from train.inference.chat import Chat, chat_model, print_answer, stock_chat_model, typed_lines
from train.inference.generate import CUT, notice
from train.inference.sampling import Sampling
from train.inference.stock import load_stock
from train.inference.trained import TrainedModel, find_source, identity, load_trained
from train.model.loading import read_folder_config
from train.model.stops import usual_template


@dataclass(frozen=True)
class Options:
    """Chat, answer PROMPT=, or answer the file QUESTIONS=."""

    run: str = option("", "name of a finished run below runs/; empty: the newest, if MODEL= is empty too")
    model: str = option("", "a model instead: a name below models/, or a folder")
    prompt: str = option("", "answer this and end; empty: chat")
    questions: str = option("", "answer the questions of this file: .txt, .jsonl, .json, .csv, .tsv or .xlsx")
    answers: str = option("", "file of their answers, of any of these kinds; empty: NAME_answers beside the questions")
    batch: int = option(8, "questions of a file that are answered at once", interval="[1, 4096]")
    system: str = option(
        "auto",
        "system message; auto: what the run or export was trained with, else Qwen's; empty: none",
        may_be_empty=True,
    )
    template: str = option(
        "auto",
        "how turns are written; auto: as it was trained, else chatml, for a Qwen3 qwen3_thinking; qwen3: it answers at once",
        ("auto", "chatml", "qwen3", "qwen3_thinking", "plain"),
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
    no_repeat_ngram_size: int = option(
        0, "no sequence of this many tokens twice, prompt and answer together; 0: any", interval="[0, 1000]"
    )
    seed: int = option(1234, "seed of sampling, with a temperature", interval=SEEDS)
    dtype: str = option(
        "auto", "auto: bf16 where the GPU has it, else fp16; fp32 on a CPU", ("auto", "bf16", "fp16", "fp32")
    )
    models: str = option("models", "folder of the models")
    runs: str = option("runs", "folder of the runs")


def run(options: Options) -> None:
    # the model, and how it answers
    sampling = Sampling(
        options.temperature,
        options.top_p,
        options.top_k,
        options.repetition_penalty,
        options.seed,
        options.no_repeat_ngram_size,
    )
    if options.questions or options.answers:
        _answer_file(options, sampling)
        return
    start = time.monotonic()
    stock = options.engine == "stock"
    trained = _load_stock(options) if stock else _load(options)
    system, template = _prompt_of(options, trained.recipe, trained.model.config)
    build = stock_chat_model if stock else chat_model
    model = build(trained.model, trained.tokenizer, template, options.max_tokens, sampling)
    seconds = time.monotonic() - start
    notice(f"loaded in {seconds:.0f} s, {template}, {_describe(sampling)}, {model.context:,} tokens of context")

    # one answer, or a chat
    if options.prompt:
        print_answer(model, model.encode([Turn("user", options.prompt)], system))
        return
    Chat(model, system, options.max_tokens).run(typed_lines())


def _prompt_of(options: Options, recipe: dict[str, Any], config: Any) -> tuple[str, str]:
    """(system message, template): as given, else the run's, else the usual one of a base with `config`."""
    usual = usual_template(getattr(config, "layout", ""))
    system = options.system if options.system != "auto" else recipe.get("system", DEFAULT_SYSTEM)
    return system, options.template if options.template != "auto" else recipe.get("template", usual)


def _answer_file(options: Options, sampling: Sampling) -> None:
    """Answer QUESTIONS= into ANSWERS=. Both files are checked before a weight is loaded.

    Raises:
        UserError: options that cannot be together, and what questions.read and AnswerFile raise.
    """
    if not options.questions:
        raise UserError(f"answers={options.answers}: to which questions? QUESTIONS= names their file.")
    if options.prompt or options.engine == "stock":
        other = "prompt=" if options.prompt else "engine=stock"
        raise UserError(f"questions={options.questions} and {other}: give one of them.")
    questions = read_questions(Path(options.questions))
    source = find_source(Path(options.models), Path(options.runs), options.run, options.model, Recipe().model)
    base = None if source.adapter else read_folder_config(source.folder)[0]
    system, template = _prompt_of(options, source.recipe, base)
    inputs = inputs_of(questions, identity(source), sampling, system, template, options.max_tokens)
    answers = AnswerFile(Path(options.answers or default_path(questions)), questions, inputs)
    total, kept = len(questions.questions), answers.answered
    for note in filter(None, questions.notes):
        notice(note)
    if answers.complete:
        print(f"{answers.path}: nothing to do, all {total:,} questions are answered.")
        return
    if kept:
        notice(f"{kept:,} of {total:,} questions are answered already: going on with the next")
    trained = _load(options)
    try:
        with bar("answering", total, "answers") as advance:
            advance(kept)
            ask(trained, answers, sampling, system, template, options.max_tokens, options.batch, advance)
    except KeyboardInterrupt:
        notice(f"\n{answers.answered:,} of {total:,} questions are answered; the same command continues")
        raise
    print(f"{answers.path}: {total:,} answers ({_describe(sampling)}; one that was cut off ends in {CUT})")


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
