"""A file of questions asked in batches, and the file of their answers.

Questions are taken a window at a time, so that prompts of similar length share a batch, and answers still reach the file
in the order of the questions while the rest is computed.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from train.common.files import sha256
from train.data.files.questions import QuestionFile
from train.data.tokens.chat_template import prompt
from train.inference import sessions
from train.inference.answer_file import AnswerFile
from train.inference.generate import CUT, answer_rows
from train.inference.sampling import Sampling
from train.inference.trained import TrainedModel

WINDOW = 4  # batches


def inputs_of(
    questions: QuestionFile, model: dict[str, Any], sampling: Sampling, system: str, template: str, max_tokens: int
) -> dict[str, Any]:
    """Everything that the answers depend on but rounding.

    Args:
        model: see trained.identity.
    """
    settings = asdict(sampling) if sampling.temperature else _greedy(sampling)
    asked = {"questions": sha256(questions.path), "system": system, "template": template, "max_tokens": max_tokens}
    return {**asked, **settings, **model}


def _greedy(sampling: Sampling) -> dict[str, Any]:
    """Without the settings that count only where tokens are drawn."""
    keys = ("temperature", "repetition_penalty", "no_repeat_ngram_size")
    return {key: value for key, value in asdict(sampling).items() if key in keys}


def ask(
    trained: TrainedModel,
    answers: AnswerFile,
    sampling: Sampling,
    system: str,
    template: str,
    max_tokens: int,
    batch: int,
    on_answers: Callable[[int], None],
) -> None:
    """Answer the questions that have no answer yet.

    A question that fills the model's context gets a sentence that says so for an answer; an answer that is cut off ends
    with CUT.

    Args:
        system, template: of questions without a system message of their own; how turns are written.
        on_answers: called with the number of new answers, after each batch.
    """
    questions, window = answers.questions.questions, WINDOW * batch
    with answers.opened():
        for start in range(answers.answered, len(questions), window):
            part = questions[start : start + window]
            systems = [system if one.system is None else one.system for one in part]
            rows = [prompt(one.turns, trained.tokenizer, own, template) for one, own in zip(part, systems)]
            found = answer_rows(
                trained.model,
                trained.tokenizer,  # type: ignore[arg-type]
                rows,
                sampling,
                max_tokens,
                batch,
                _newly(on_answers),
                CUT,
                name_too_long=True,
                first=start,
            )
            answers.append([text.strip() for text in found])
    sessions.release(trained.model)


def _newly(on_answers: Callable[[int], None]) -> Callable[[int, int], None]:
    """A function that is called with (answered, all), and tells `on_answers` how many are new."""
    told = 0

    def tell(answered: int, _: int) -> None:
        nonlocal told
        on_answers(answered - told)
        told = answered

    return tell
