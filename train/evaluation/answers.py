"""The same questions to the base and to the trained model: the questions, the two models, and the files of answers.

Answers are greedy, so equal inputs give equal answers. answers.jsonl, scores.json, loss.png and report.md go into the
run's folder; compare.json, written last, holds the inputs of the comparison. Knows nothing of options and tables.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from train.common.device import pick_device, pick_dtype
from train.common.errors import UserError
from train.common.files import read_json, read_json_lines, sha256, write_json, write_text
from train.data.checked import conversations
from train.data.checked.conversations import Conversation, ReadOptions, training_data
from train.data.files.questions import read as read_question_file
from train.data.streams.streamed import take
from train.evaluation.parity import BUILTIN_QUESTIONS
from train.evaluation.report import AnsweredQuestion, draw_losses, write_report
from train.evaluation.scores import rows as score_table
from train.inference.generate import CUT, answers
from train.model.adapter_file import WEIGHTS, check_present
from train.model.adapters import load_adapter
from train.model.architecture import STORED
from train.model.folder import MANIFEST, check_whole, find_damage, read_manifest
from train.model.loading import fits, keeps_float, load
from train.model.tokenizer import Tokenizer
from train.runs import losses
from train.runs.folder import HELD_OUT, LOSSES, REMOVED, RESTORE, SCORES, trained_model
from train.runs.record_form import PARITY, find_problem

DIGEST = "scores_sha256"  # in compare.json
DATA_QUESTIONS = 8  # questions taken from the training data when no file of questions is given


@dataclass(frozen=True)
class ModelPair:
    """The two models that answer. `merged` is the verified export, or None for the adapter on its base.

    Where every weight was trained, `merged` is the model of the run itself, and there is no adapter.
    `reason`: why an existing export is not used.
    """

    base: Path
    adapter: Path | None
    merged: Path | None
    reason: str = ""
    load_as: str = STORED  # how training loaded the base

    @property
    def trained_name(self) -> str:
        """The trained model as messages and the report name it."""
        if self.adapter is None:
            return "the trained model"
        return f"the merged model ({self.merged.name})" if self.merged else f"the adapter on its base{self.reason}"

    @property
    def weights(self) -> Path:
        """The file whose hash stands for the trained weights: a manifest has those of all files."""
        if self.merged:
            return self.merged / MANIFEST
        assert self.adapter is not None
        return self.adapter / WEIGHTS


def find_pair(run: Path, base: Path, load_as: str = STORED) -> ModelPair:
    """The merged model is used if it is complete, was made from the run's present adapter, and fits the GPU.

    Raises:
        UserError: the run's adapter or model is missing or damaged.
    """
    if own := trained_model(run):
        check_whole(own, RESTORE)
        return ModelPair(base, None, own)
    merged, adapter = run / "merged", run / "adapter"
    check_present(adapter)
    manifest = read_manifest(merged) or {"inputs": {}, "files": {}}
    current = manifest.get("inputs", {}).get("adapter") == sha256(adapter / "adapter_model.safetensors")
    if not current:
        return ModelPair(base, adapter, None, load_as=load_as)
    parity = find_problem(manifest.get("parity"), PARITY, "parity")
    if damage := [*find_damage(merged, manifest, full=False), *filter(None, [parity])]:
        reason = f" (its merged export is damaged: {'; '.join(damage)})"
        return ModelPair(base, adapter, None, reason, load_as)
    device = pick_device()
    if not fits(merged, pick_dtype(device), device):
        return ModelPair(base, adapter, None, " (the GPU has no room for the merged model)", load_as)
    return ModelPair(base, adapter, merged, load_as=load_as)


def find_questions(
    path: str, record: dict[str, Any], run: Path, held_out: int = DATA_QUESTIONS
) -> tuple[list[str], str]:
    """The questions for a run, and where they are from.

    They are those of the file `path`. Without one, the first `held_out` that were held out; then those of DATA_questions.txt, .jsonl or .json beside the run's data (of
    several files each may have its own); without that, the first that were trained on; and where the data is missing
    or has changed, the built-in ones.
    """
    if path:
        return read_questions(Path(path)), path
    questions, source = _questions_of_data(record, run)
    aside = list(dict.fromkeys(c.turns[0].text for c in held_out_conversations(record, run)))[:held_out]
    if aside:
        source = f"{len(aside)} held out, then {source}"
    return [*aside, *(question for question in questions if question not in aside)], source


def _questions_of_data(record: dict[str, Any], run: Path) -> tuple[list[str], str]:
    """Those beside the data, the first of it, or built-in ones; and where they are from."""
    if files := _questions_beside(record["data"]):
        return [question for file in files for question in read_questions(file)], ", ".join(map(str, files))
    trained, name = trained_on(record, run)
    if trained:
        return [c.turns[0].text for c in trained[:DATA_QUESTIONS]], f"the first of {name}"
    return [question for question, _ in BUILTIN_QUESTIONS], f"built-in: {name} is missing or has changed"


def held_out_conversations(record: dict[str, Any], run: Path) -> Sequence[Conversation]:
    """What a run has set aside; none for a run without held_out=.

    Raises:
        UserError: the file is missing or has changed.
    """
    if "held_out" not in record:
        return []
    pairs = record["recipe"].get("loss", "sft") == "dpo"
    return conversations.load(_unchanged(run / HELD_OUT, record["held_out"]["sha256"]), ReadOptions(pairs=pairs))


def trained_on(record: dict[str, Any], run: Path) -> tuple[Sequence[Conversation], str]:
    """The conversations of a run's data without those that it left out or set aside, and the name of the data.

    None if a file of the data is missing or has changed.
    """
    rows, name = training_data(record)
    left_out = set()
    if "cleaned" in record:
        left_out = {row["row"] - 1 for row in read_json_lines(_unchanged(run / REMOVED, record["cleaned"]["sha256"]))}
    aside = {(one.turns, one.system) for one in held_out_conversations(record, run)}
    kept = [
        row for row, one in enumerate(rows) if row not in left_out and (one.turns, one.system) not in aside
    ]  # numbers only: large data stays on the disk
    return take(rows, kept), name


def _unchanged(path: Path, recorded: str) -> Path:
    if not path.is_file() or sha256(path) != recorded:
        raise UserError(f"{path} is missing, or not what it was when the run ended. Restore it from a copy.")
    return path


def _questions_beside(data: dict[str, Any]) -> list[Path]:
    """The files of questions beside the data of a run: of DATA itself, or of each of its files.

    Args:
        data: of run.json.
    """
    files = []
    for source in dict.fromkeys([data["path"], *data.get("files", ())]):
        path = Path(source)
        if path.name:
            beside = (path.with_name(f"{path.stem}_questions{suffix}") for suffix in (".txt", ".jsonl", ".json"))
            files += [file for file in beside if file.is_file()][:1]
    return files


def read_questions(path: Path) -> list[str]:
    """The questions of a file, one of each row: of a conversation its first.

    Raises:
        UserError: see questions.py.
    """
    return [question.first for question in read_question_file(path).questions]


def answer_questions(
    model: nn.Module,
    tokenizer: Tokenizer,
    questions: Sequence[str],
    recipe: dict[str, Any],
    max_tokens: int,
    batch: int,
    on_answers: Callable[[int], None],
) -> list[str]:
    """Answers of a model, in the order of the questions. An answer that is cut ends with …

    A question that fills the model's context is not asked, and its answer says so.

    Args:
        recipe: the run's, for its system message and template.
        on_answers: called with the number of new answers, after each batch.
    """
    reported = 0

    def report_new(answered: int, total: int) -> None:
        nonlocal reported
        on_answers(answered - reported)
        reported = answered

    return answers(
        model,
        tokenizer,
        questions,
        system=recipe["system"],
        max_new_tokens=max_tokens,
        batch=batch,
        on_progress=report_new,
        template=recipe["template"],
        cut=CUT,
        name_too_long=True,
    )


def load_model(pair: ModelPair, trained: bool) -> nn.Module:
    """The base, or the trained model, on the device that computes."""
    device = pick_device()
    dtype = pick_dtype(device)
    if trained and pair.merged:
        return load(pair.merged, dtype, device)
    keep_float = keeps_float(pair.base, device, pair.load_as)
    base = load(pair.base, dtype, device, keep_float=keep_float, load_as=pair.load_as)
    return load_adapter(base, pair.adapter).eval() if trained and pair.adapter else base


def answered_questions(
    questions: Sequence[str], before: Sequence[str], after: Sequence[str], record: dict[str, Any], run: Path
) -> list[AnsweredQuestion]:
    """Each question with both answers, and whether the run was trained on it or has set it aside."""
    trained, _ = trained_on(record, run)
    asked = {turn.text.strip() for c in trained for turn in c.turns if turn.role == "user"}
    aside = {c.turns[0].text.strip() for c in held_out_conversations(record, run)}
    return [
        AnsweredQuestion(question, one.strip(), other.strip(), question.strip() in asked, question.strip() in aside)
        for question, one, other in zip(questions, before, after, strict=True)
    ]


def comparison_inputs(pair: ModelPair, questions: Sequence[str], max_tokens: int, words: str) -> dict[str, Any]:
    """Everything that the answers depend on, as compare.json keeps it."""
    return {
        "questions": list(questions),
        "max_tokens": max_tokens,
        "words": words,
        "device": pick_device().type,
        "after": pair.trained_name,
        "weights": sha256(pair.weights),
        "base": str(pair.base),
    }


def read_answers(run: Path, inputs: dict[str, Any]) -> tuple[list[AnsweredQuestion], dict[str, Any]] | None:
    """The stored answers and scores of the run, if they were made with the same `inputs` and all files exist; else None."""
    files = ("compare.json", "answers.jsonl", SCORES, "loss.png", "report.md")
    if not all((run / name).is_file() for name in files):
        return None
    try:
        if read_json(run / "compare.json") != {**inputs, DIGEST: sha256(run / SCORES)}:
            return None
        answered = [AnsweredQuestion(**row) for row in read_json_lines(run / "answers.jsonl")]
        scores = read_json(run / SCORES)
        score_table(scores)
    except (ValueError, TypeError, KeyError, RecursionError):  # damaged: the questions are asked again
        return None
    whole = all(isinstance(text, str) for one in answered for text in (one.question, one.before, one.after))
    return (answered, scores) if whole and [one.question for one in answered] == inputs["questions"] else None


def write_answers(
    run: Path,
    record: dict[str, Any],
    answered: Sequence[AnsweredQuestion],
    scores: dict[str, Any],
    pair: ModelPair,
    inputs: dict[str, Any],
) -> None:
    """answers.jsonl, scores.json, loss.png, report.md, and last compare.json."""
    write_text(run / "answers.jsonl", "".join(f"{json.dumps(_row(one), ensure_ascii=False)}\n" for one in answered))
    write_json(run / SCORES, scores)
    rows = read_losses(run, record)
    draw_losses(rows, run.name, run / "loss.png")
    manifest = read_manifest(pair.merged) if pair.merged and pair.adapter else None
    write_report(run / "report.md", record, rows, answered, scores, pair.trained_name, manifest)
    write_json(run / "compare.json", {**inputs, DIGEST: sha256(run / SCORES)})


def _row(one: AnsweredQuestion) -> dict[str, Any]:
    """A line of answers.jsonl; `held_out` only where it is true, as in runs without such questions."""
    return {key: value for key, value in asdict(one).items() if key != "held_out" or value}


def read_losses(run: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of losses.jsonl; a step that the guard skipped has no loss and is left out.

    Args:
        record: run.json, which has the hash of the file.
    Raises:
        UserError: the file is missing or has changed since the run ended, or no step in it has a loss.
    """
    path = run / LOSSES
    if not path.is_file() or record.get("losses_sha256", digest := sha256(path)) != digest:
        raise UserError(f"{path} is missing, or not what it was when the run ended. Restore it from a copy.")
    rows = [row for row in losses.read(run) if isinstance(row.get("loss"), float) and math.isfinite(row["loss"])]
    if not rows:
        raise UserError(f"{path}: no step with a loss in it. Restore it from a copy.")
    return rows
