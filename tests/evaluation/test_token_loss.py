"""The loss of texts: each as if computed alone with plain torch."""

from pathlib import Path

import pytest
import torch

from tests.support.oracles import tiny_checkpoint, tiny_config
from train.config.recipe import Recipe
from train.data.checked.conversations import Conversation, Turn
from train.evaluation import token_loss
from train.evaluation.scores import general_texts
from train.model.loading import load
from train.model.tokenizer import load_tokenizer

RECIPE = {"template": "chatml", "mask": "assistant", "system": "", "length": 80, "overlong": "cut"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base"), tiny_config("qwen2"), int4=False)


def test_each_text_has_the_loss_that_plain_torch_gives_it(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_loss, "ROWS", 2)
    monkeypatch.setattr(token_loss, "CHUNK", 5)
    model, tokenizer = load(base, torch.float32), load_tokenizer(base)
    rows = token_loss.text_rows(["A first text.", "第二段文字，稍微长一点。", "3"], tokenizer, 64)
    rows += token_loss.conversation_rows(_conversations(), tokenizer, RECIPE, 512)
    counted: list[int] = []
    found = token_loss.text_losses(model, rows, counted.append)
    assert sum(counted) == len(rows) == len(found)
    for (ids, mask), one in zip(rows, found, strict=True):
        logits = model(torch.tensor([ids])).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        wanted = losses[torch.tensor(mask[1:]).bool()]
        assert one.tokens == len(wanted)
        assert one.total == pytest.approx(float(wanted.sum()), rel=1e-5)


def _conversations() -> list[Conversation]:
    return [
        Conversation((Turn("user", f"question {n}"), Turn("assistant", "answer " * n)), None, f"row {n}")
        for n in (1, 3, 40)
    ]


def test_rows_are_as_in_training(base: Path) -> None:
    """Cut to length=, or left out with overlong=skip; no text without a label."""
    tokenizer = load_tokenizer(base)
    rows = token_loss.conversation_rows(_conversations(), tokenizer, RECIPE, 512)
    assert [len(ids) for ids, _ in rows][-1] == 80 and len(rows) == 3
    assert len(token_loss.conversation_rows(_conversations(), tokenizer, {**RECIPE, "overlong": "skip"}, 512)) == 2
    assert token_loss.conversation_rows(_conversations(), tokenizer, {**RECIPE, "length": 2}, 512) == []


def test_the_general_text_is_paragraphs_in_both_languages() -> None:
    texts = general_texts()
    assert len(texts) == 24
    assert sum("\u4e00" <= text[0] <= "\u9fff" for text in texts) == 12


def test_defaults_of_a_recipe_are_enough(base: Path) -> None:
    from dataclasses import asdict

    assert token_loss.conversation_rows(_conversations(), load_tokenizer(base), asdict(Recipe()), 512)
