"""Chat with a model in the terminal, or answer one prompt.

RUN= a finished run (its merged export if there is one and the GPU holds it, else its adapter on its base), MODEL= any model; with neither, the newest
finished run, else the default base: the first line says which. Answers go to the standard output, all else to the standard error.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from train.common.device import pick_device, pick_dtype
from train.common.errors import UserError
from train.config.options import option
from train.config.recipe import Recipe
from train.data.chat_template import DEFAULT_SYSTEM, prompt
from train.data.formats import Turn
from train.inference.generate import context_of, notice, room, stream
from train.inference.sampling import Sampling
from train.inference.stock import load_stock, stock_stream
from train.inference.trained import load_run
from train.model.folder import read_manifest, resolve
from train.model.loading import fits, keeps_float, load
from train.model.tokenizer import load_tokenizer
from train.runs.folder import read_run

HELP = """/clear        forget the conversation
/system TEXT  another system message (/system alone shows it, /system none removes it)
/quit         end (so does Ctrl-D); Ctrl-C stops an answer"""


@dataclass(frozen=True)
class Options:
    """Chat, or answer PROMPT=."""

    run: str = option("", "name of a finished run below runs/; empty: the newest, if MODEL= is empty too")
    model: str = option("", "a model instead: a name below models/, or a folder")
    prompt: str = option("", "answer this and end; empty: chat")
    system: str = option(
        "auto", "system message; auto: what the run or export was trained with, else Qwen's; empty: none"
    )
    template: str = option(
        "auto", "how turns are written; auto: as it was trained, else chatml", ("auto", "chatml", "plain")
    )
    engine: str = option("ours", "stock: transformers, optimum, auto-gptq, to compare with", ("ours", "stock"))
    trust_remote_code: bool = option(False, "with engine=stock: allow the checkpoint's own code to run")
    max_tokens: int = option(512, "tokens in an answer, at most")
    temperature: float = option(0.0, "0: the same answer each time; 0.7 is lively")
    top_p: float = option(0.8, "with a temperature: draw from the likeliest tokens that share this probability")
    top_k: int = option(0, "with a temperature: draw from this many tokens; 0: all")
    repetition_penalty: float = option(1.0, "more than 1: avoid tokens that were there before")
    seed: int = option(1234, "seed of the drawing")
    dtype: str = option("auto", "auto: bf16 or fp16 as the GPU can, fp32 on a CPU", ("auto", "bf16", "fp16", "fp32"))
    models: str = option("models", "folder of the models")
    runs: str = option("runs", "folder of the runs")


@dataclass(frozen=True)
class Source:
    """What is loaded: a model folder, or (adapter) a run folder with its adapter. `why` is told to the user."""

    folder: Path
    why: str
    adapter: bool = False
    recipe: dict[str, Any] = field(default_factory=dict)  # of an export: the part that its manifest kept


@dataclass(frozen=True)
class Speaker:
    """A loaded model as the chat needs it: ids of turns under a system message, the answer to them, and how many fit."""

    ids: Callable[[list[Turn], str], list[int]]
    say: Callable[[list[int], Callable[[str], None]], Iterator[str]]  # the second is told why an answer was cut off
    context: int


def run(options: Options) -> None:
    # which model, and how it answers
    sampling = Sampling(options.temperature, options.top_p, options.top_k, options.repetition_penalty, options.seed)
    if options.max_tokens < 1:
        raise UserError(f"max_tokens={options.max_tokens}: expected 1 or more.")
    source = choose(options)
    notice(source.why)
    system = options.system if options.system != "auto" else source.recipe.get("system", DEFAULT_SYSTEM)
    template = options.template if options.template != "auto" else source.recipe.get("template", "chatml")
    start = time.monotonic()
    speaker = (_ours if options.engine == "ours" else _stock)(source, options, sampling, template)
    notice(
        f"loaded in {time.monotonic() - start:.0f} s, {template}, {_how(sampling)}, {speaker.context:,} tokens of context"
    )

    # one answer, or a chat
    if options.prompt:
        speak(speaker, speaker.ids([Turn("user", options.prompt)], system), [])
        return
    Chat(speaker, system, options.max_tokens).run(_lines())


def _how(sampling: Sampling) -> str:
    return (
        "the same answer each time"
        if sampling.temperature == 0
        else f"temperature {sampling.temperature:g}, seed {sampling.seed}"
    )


# which model


def choose(options: Options) -> Source:
    """The source that RUN= or MODEL= names, else the newest finished run, else the default base.

    Raises:
        UserError: both are given, or what is named is not there or not finished.
    """
    if options.run and options.model:
        raise UserError(f"run={options.run} and model={options.model}: give one of them.")
    models, runs = Path(options.models), Path(options.runs)
    if options.model:
        folder = resolve(options.model, models)
        return Source(folder, f"model {options.model}", recipe=(read_manifest(folder) or {}).get("inputs", {}))
    if options.run:
        return _of_run(runs / options.run, options, f"run {options.run}")
    finished = sorted(runs.glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    if finished:
        newest = finished[-1].parent
        why = f"run {newest.name}, the newest that is finished (RUN= or MODEL= for another)"
        return _of_run(newest, options, why)
    base = Recipe().model
    return Source(resolve(base, models), f"model {base}, the default base: there is no finished run below {runs}/ yet")


def _of_run(folder: Path, options: Options, why: str) -> Source:
    recipe, merged = asdict(Recipe.from_record(read_run(folder)["recipe"])), folder / "merged"
    exported = (merged / "manifest.json").is_file()
    if exported and (options.engine == "stock" or _fits(merged, options)):
        return Source(merged, f"{why}: its merged export {merged}", recipe=recipe)
    if options.engine == "stock":
        raise UserError(
            f"run {folder.name} has no merged export, and engine=stock loads whole models only. First: make export RUN={folder.name}"
        )
    reason = "the GPU has no room for the merged export" if exported else "no merged export yet"
    return Source(folder, f"{why}: its adapter on {recipe['model']} ({reason})", adapter=True, recipe=recipe)


def _fits(merged: Path, options: Options) -> bool:
    device = pick_device()
    return fits(merged, pick_dtype(device, options.dtype), device)


def _ours(source: Source, options: Options, sampling: Sampling, template: str) -> Speaker:
    device = pick_device()
    dtype = pick_dtype(device, options.dtype)
    base = resolve(source.recipe["model"], Path(options.models)) if source.adapter else source.folder
    float_too = keeps_float(base, device)
    model: Any
    if source.adapter:
        model, tokenizer, _ = load_run(source.folder, Path(options.models), dtype, device, keep_float=float_too)
    else:
        model, tokenizer = load(base, dtype, device, keep_float=float_too), load_tokenizer(base)
    return Speaker(
        ids=lambda turns, system: prompt(turns, tokenizer, system, template),
        say=lambda ids, notify: stream(model, tokenizer, ids, options.max_tokens, sampling, notify),
        context=context_of(model),
    )


def _stock(source: Source, options: Options, sampling: Sampling, template: str) -> Speaker:
    device = pick_device()
    model, tokenizer = load_stock(source.folder, options.trust_remote_code, pick_dtype(device, options.dtype), device)

    def say(ids: list[int], notify: Callable[[str], None]) -> Iterator[str]:
        return stock_stream(model, tokenizer, ids, room(len(ids), options.max_tokens, model), sampling, notify)

    return Speaker(lambda turns, system: prompt(turns, tokenizer, system, template), say, context_of(model))


def speak(speaker: Speaker, ids: list[int], said: list[str]) -> None:
    """Print the answer to `ids` as it comes, a line end, and why it was cut off, if it was; its pieces go into `said` too."""
    notes: list[str] = []
    pieces = speaker.say(ids, notes.append)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            said.append(piece)
    except BaseException:
        print(end="\n" if said else "", flush=True)
        raise
    finally:
        pieces.close()  # type: ignore[attr-defined]
    print(flush=True)
    for note in notes:
        notice(note)


# the chat


def _lines() -> Iterator[str]:
    """What the user types, line by line, with line editing; without a terminal, the lines of the standard input."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    try:
        import readline  # noqa: F401  gives input() arrow keys and history
    except ImportError:
        notice("(no line editing: this Python has no readline)")
    notice("Type a question, or /help. Ctrl-D ends.")
    while True:
        try:
            yield input("\nyou> ")
        except KeyboardInterrupt:
            notice("\n(Ctrl-D or /quit ends)")
        except EOFError:
            notice("")
            return


class Chat:
    """A conversation in progress: its turns and its system message."""

    def __init__(self, speaker: Speaker, system: str, max_tokens: int) -> None:
        self.speaker, self.system, self.turns = speaker, system, list[Turn]()
        self.reserve = min(max_tokens, speaker.context // 2)  # what trimming leaves free for the answer

    def run(self, lines: Iterator[str]) -> None:
        for line in lines:
            if line.strip() == "/quit":
                return
            if line.startswith("/"):
                self.command(*line[1:].strip().partition(" ")[::2])
            elif line.strip():
                self.answer(line)

    def command(self, name: str, text: str = "") -> None:
        if name == "clear":
            self.turns.clear()
            notice("(the conversation is forgotten)")
        elif name == "system":
            if text:
                self.system = "" if text == "none" else text
            notice(f"(system message: {self.system or 'none'})")
        else:
            notice(HELP if name == "help" else f"(unknown command /{name})\n{HELP}")

    def answer(self, question: str) -> None:
        """Print the answer as it comes. Interrupted, what was said so far stays in the conversation; nothing said, the question goes too."""
        ids = self.fit(question)
        if ids is None:
            return
        said: list[str] = []
        try:
            speak(self.speaker, ids, said)
        except KeyboardInterrupt:
            notice("(stopped)")
        self.turns += [Turn("user", question), Turn("assistant", "".join(said))] if said else []

    def fit(self, question: str) -> list[int] | None:
        """Ids of the conversation with `question`, after forgetting its oldest turns as far as the context demands; says so."""
        forgotten = 0
        while True:
            ids = self.speaker.ids([*self.turns, Turn("user", question)], self.system)
            if len(ids) + self.reserve <= self.speaker.context or not self.turns:
                break
            del self.turns[:2]
            forgotten += 1
        if forgotten:
            notice(
                f"(the oldest {forgotten} of the questions are forgotten: the context holds {self.speaker.context:,} tokens)"
            )
        if len(ids) < self.speaker.context:
            return ids
        notice(
            f"(this question has {len(ids):,} tokens with its system message, the context holds {self.speaker.context:,}: shorten it)"
        )
        return None
