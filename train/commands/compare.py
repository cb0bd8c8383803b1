"""Ask the base and the trained model the same questions, and show the answers side by side.

Greedy answers, so that the same command shows the same table. After an export the merged model answers, before it the
adapter on its base. Writes answers.jsonl, loss.png and report.md into the run's folder.
"""

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from train.common.device import pick_device, pick_dtype
from train.common.errors import UserError
from train.common.files import read_json, sha256, write_json, write_text
from train.common.progress import bar
from train.config.options import option
from train.config.recipe import Recipe
from train.data.conversations import training_data
from train.evaluation.parity import EXAMPLES
from train.evaluation.report import Answer, draw_losses, plot, smoothed, write_report
from train.inference.generate import answers
from train.model.folder import find_damage, read_manifest, resolve
from train.model.loading import fits, keeps_float, load
from train.model.lora import load_adapter
from train.model.tokenizer import Tokenizer, load_tokenizer
from train.runs.folder import read_run

WIDEST = 160  # columns of the table
LONGEST_WORD = 16  # letters that are given up so that a cut does not tear a word
CUT = "…"
FIRST = 8  # questions taken from the data when nothing else says which


@dataclass(frozen=True)
class Options:
    """The same questions before and after."""

    run: str = option("", "name of a finished run below runs/")
    questions: str = option(
        "", "file, one question a line (or .jsonl); empty: DATA_questions.txt beside the data, or the data's first"
    )
    max_tokens: int = option(64, "longest answer; a longer one is cut off and ends in …")
    batch: int = option(8, "questions answered at once")
    models: str = option("models", "folder of the models")
    runs: str = option("runs", "folder of the runs")


@dataclass(frozen=True)
class Who:
    """Which two models answer. `merged`: the verified export, or None for the adapter on its base; `why` if there is one."""

    base: Path
    adapter: Path
    merged: Path | None
    why: str = ""

    @property
    def after(self) -> str:
        return f"the merged model ({self.merged.name})" if self.merged else f"the adapter on its base{self.why}"


def run(options: Options) -> None:
    # what is asked, and who answers
    if not options.run:
        raise UserError("which run? RUN= names a folder below runs/. Example: make compare RUN=demo")
    folder = Path(options.runs) / options.run
    record = read_run(folder)
    questions, source = _questions(options, record)
    who = _who(folder, resolve(Recipe.from_record(record["recipe"]).model, Path(options.models)))
    inputs = _inputs(options, questions, who)

    # before and after, unless these very answers are there
    if _finished(folder, inputs):
        print(f"{folder}: nothing to do, these questions were answered before.")
        found = [Answer(**json.loads(line)) for line in (folder / "answers.jsonl").read_text("utf-8").splitlines()]
    else:
        print(f"Asking {len(questions)} questions ({source}): {who.base.name}, then {who.after}")
        found = _ask(options, record, questions, who)
        _save(folder, record, found, who)
        write_json(folder / "compare.json", inputs)
    _show(folder, found)


def _questions(options: Options, record: dict[str, Any]) -> tuple[list[str], str]:
    """The questions, and where they are from."""
    if options.questions:
        return read_questions(Path(options.questions)), options.questions
    data = Path(record["data"]["path"])
    for beside in (data.with_name(f"{data.stem}_questions{end}") for end in (".txt", ".jsonl")):
        if beside.is_file():
            return read_questions(beside), str(beside)
    conversations, name = training_data(record)
    if conversations:
        return [c.turns[0].text for c in conversations[:FIRST]], f"the first of {name}"
    return [question for question, _ in EXAMPLES], f"built-in: {name} is gone or has changed"


def read_questions(path: Path) -> list[str]:
    """A question a line; in .jsonl a string or an object with `question` or `instruction`.

    Raises:
        UserError: no file, not UTF-8, a line that holds no question, no questions.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        found = [_question(line) if path.suffix == ".jsonl" else line.strip() for line in lines]
    except FileNotFoundError:
        raise UserError(f"questions={path}: no such file. Write one question a line.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: expected UTF-8, and in .jsonl a string or {{'question': …}} a line ({error!r:.120})."
        ) from error
    if not found:
        raise UserError(f"{path}: no questions in it. Write one a line.")
    return found


def _question(line: str) -> str:
    row = json.loads(line)
    text = row.get("question") or row["instruction"] if isinstance(row, dict) else row
    if not isinstance(text, str) or not text.strip():
        raise ValueError(line)
    return text.strip()


def _who(folder: Path, base: Path) -> Who:
    """The merged model answers if it is whole, was made from the adapter that is there now, and the GPU holds it."""
    merged, adapter = folder / "merged", folder / "adapter"
    manifest = read_manifest(merged) or {"inputs": {}, "files": {}}
    current = manifest["inputs"].get("adapter") == sha256(adapter / "adapter_model.safetensors")
    if not current or find_damage(merged, manifest, full=False):
        return Who(base, adapter, None)
    device = pick_device()
    if not fits(merged, pick_dtype(device), device):
        return Who(base, adapter, None, " (the GPU has no room for the merged model)")
    return Who(base, adapter, merged)


def _inputs(options: Options, questions: list[str], who: Who) -> dict[str, Any]:
    weights = who.merged / "manifest.json" if who.merged else who.adapter / "adapter_model.safetensors"
    asked = {"questions": questions, "max_tokens": options.max_tokens, "device": pick_device().type}
    return asked | {"after": who.after, "weights": sha256(weights), "base": str(who.base)}


def _finished(folder: Path, inputs: dict[str, Any]) -> bool:
    done = all((folder / name).is_file() for name in ("compare.json", "answers.jsonl", "loss.png", "report.md"))
    return done and bool(read_json(folder / "compare.json") == inputs)


def _ask(options: Options, record: dict[str, Any], questions: list[str], who: Who) -> list[Answer]:
    """Both models' answers; one model is in memory at a time."""
    tokenizer, (conversations, _) = load_tokenizer(who.base), training_data(record)
    seen = {turn.text.strip() for c in conversations for turn in c.turns if turn.role == "user"}
    before = _answers("before", options, record, who, tokenizer, questions)
    after = _answers("after", options, record, who, tokenizer, questions)
    return [
        Answer(q, b.strip(), a.strip(), q.strip() in seen) for q, b, a in zip(questions, before, after, strict=True)
    ]


def _model(who: Who, trained: bool) -> nn.Module:
    """The base, or the trained model, on the device that is there."""
    device = pick_device()
    dtype = pick_dtype(device)
    if trained and who.merged:
        return load(who.merged, dtype, device)
    base = load(who.base, dtype, device, keep_float=keeps_float(who.base, device))
    return load_adapter(base, who.adapter).eval() if trained else base


def _answers(
    title: str, options: Options, record: dict[str, Any], who: Who, tokenizer: Tokenizer, questions: list[str]
) -> list[str]:
    """Answers "before" or "after"; an answer that max_tokens cut off ends in …"""
    recipe, shown = Recipe.from_record(record["recipe"]), 0
    model = _model(who, trained=title == "after")
    with bar(title, len(questions), "answers") as advance:

        def progress(done: int, total: int) -> None:
            nonlocal shown
            advance(done - shown)
            shown = done

        how: dict[str, Any] = {"system": recipe.system, "template": recipe.template, "batch": options.batch, "cut": CUT}
        return answers(model, tokenizer, questions, max_new_tokens=options.max_tokens, on_progress=progress, **how)


def _losses(folder: Path) -> list[dict[str, Any]]:
    """The steps that counted: one that was left out has no loss."""
    lines = (folder / "losses.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["loss"] is not None]


def _save(folder: Path, record: dict[str, Any], found: list[Answer], who: Who) -> None:
    write_text(folder / "answers.jsonl", "".join(json.dumps(asdict(a), ensure_ascii=False) + "\n" for a in found))
    losses = _losses(folder)
    draw_losses(losses, folder.name, folder / "loss.png")
    write_report(
        folder / "report.md", record, losses, found, who.after, read_manifest(who.merged) if who.merged else None
    )


def _show(folder: Path, found: Sequence[Answer]) -> None:
    """The table, the loss in the terminal, and where the files are."""
    from rich.console import Console

    console = Console(highlight=False)
    console.width = min(console.width, WIDEST)
    console.print()
    console.print(table(found, console.width))
    if not all(a.seen for a in found):
        console.print("* not asked in the training data", style="dim")
    values = smoothed([row["loss"] for row in _losses(folder)])
    console.print(f"\nloss of {len(values)} steps, running mean: {values[0]:.2f} → {values[-1]:.2f}")
    drawn = plot(values, width=min(64, console.width - 10))
    for label, line in zip([f"{max(values):.2f}", *[""] * (len(drawn) - 2), "0"], drawn, strict=True):
        console.print(f"{label:>6} [cyan]{line}[/cyan]")
    console.print(f"\n{folder / 'report.md'}, {folder / 'loss.png'}, {folder / 'answers.jsonl'}", soft_wrap=True)


def table(found: Sequence[Answer], width: int) -> Any:
    """question | before | after, `width` cells wide; an answer of more than some lines is cut with … (files hold the whole)."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shares = (width - 10) * 28 // 100, (width - 10) * 38 // 100, (width - 10) * 34 // 100
    drawn = Table(box=box.ROUNDED, show_lines=True, header_style="bold", border_style="bright_black", width=width)
    for name, share, style in zip(("question", "before", "after"), shares, ("", "yellow", "green"), strict=True):
        drawn.add_column(name, width=share, style=style, overflow="fold")
    for a in found:
        mark = "" if a.seen else " *"
        cells = (
            shorten(a.question, 3 * shares[0]) + mark,
            shorten(a.before, 4 * shares[1]),
            shorten(a.after, 6 * shares[2]),
        )
        drawn.add_row(*map(Text, cells))
    return drawn


def shorten(text: str, cells: int) -> str:
    """`text` on one line, at most `cells` columns wide (a Chinese character takes two), cut with …

    Control characters are left out: an answer must not steer the terminal.
    """
    from rich.cells import cell_len

    line = "".join(c for c in " ".join(text.split()) if unicodedata.category(c) != "Cc")
    if cell_len(line) <= cells:
        return line
    while cell_len(line) > cells - 1:
        line = line[: len(line) - max(1, (cell_len(line) - cells) // 2)]
    words, _, torn = line.rpartition(" ")
    return (words if words and len(torn) < LONGEST_WORD else line).rstrip(" ,.:;，。：；…") + CUT
