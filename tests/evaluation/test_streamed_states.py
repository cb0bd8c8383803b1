"""A model block by block has the states of the whole one, with any adapter and any format of its weights."""

from pathlib import Path

import pytest
import torch

from tests.support.oracles import tiny_checkpoint, tiny_config
from train.config.recipe import Recipe
from train.evaluation.parity import AnswerStates, MaskedRow, answer_states
from train.evaluation.streamed_states import streamed_states
from train.model import adapters
from train.model.block_stream import BlockStream
from train.model.loading import load

CPU = torch.device("cpu")
START = [7, 8, 9]


def rows(shared: bool) -> list[MaskedRow]:
    """Of several lengths, more than a pass holds; with the same first tokens or with others."""
    ids = [[*(START if shared else [n]), *(torch.arange(5 + 31 * n) % 97).tolist()] for n in range(12)]
    return [(row, [0] * 4 + [1] * (len(row) - 4)) for row in ids]


def adapted(base: Path, folder: Path, **recipe: object) -> Path:
    """An adapter that changes the answers."""
    torch.manual_seed(3)
    model = adapters.attach(load(base, torch.float32), Recipe(model=base.name, rank=4, **recipe))  # type: ignore[arg-type]
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p), alpha=0.2)
    adapters.save_adapter(model, folder)
    return folder


def whole(base: Path, adapter: Path | None, load_as: str, data: list[MaskedRow]) -> tuple[AnswerStates, AnswerStates]:
    model = load(base, torch.float32, load_as=load_as)
    if adapter is None:
        return answer_states(model, data), answer_states(model, data[:5])
    both = adapters.load_adapter(model, adapter).eval()
    of_all = answer_states(both, data)
    with both.disable_adapter():
        return of_all, answer_states(both, data[:5])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("layout", "int4", "load_as", "recipe"),
    [
        ("qwen2", True, "stored", None),
        ("qwen", True, "stored", {}),
        ("qwen3", False, "stored", {"dora": True}),
        ("qwen2", False, "nf4", {}),
        ("qwen2", True, "stored", {"method": "vera"}),
        ("qwen", False, "stored", {"method": "ia3"}),
    ],
)
def test_states_are_those_of_the_whole_model(
    tmp_path: Path, layout: str, int4: bool, load_as: str, recipe: dict[str, object] | None, shared: bool
) -> None:
    base = tiny_checkpoint(tmp_path / "base", tiny_config(layout, tie_word_embeddings=layout == "qwen2"), int4=int4)
    adapter = None if recipe is None else adapted(base, tmp_path / "adapter", **recipe)
    done: list[int] = []
    model = BlockStream(base, torch.float32, CPU, adapter, load_as)
    found = streamed_states(model, rows(shared), 5, None, done.append)
    assert sum(done) == 12 + 5
    for one, other in zip(found, whole(base, adapter, load_as, rows(shared)), strict=True):
        torch.testing.assert_close(one.hidden, other.hidden)
        assert torch.equal(one.head, other.head)
    assert recipe is None or not torch.equal(found[0].hidden[: len(found[1].hidden)], found[1].hidden)


def test_an_equal_head_is_not_in_memory_twice(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", tiny_config("qwen"))
    first, other = (BlockStream(base, torch.float32, CPU).head() for _ in range(2))
    assert BlockStream(base, torch.float32, CPU).head(first) is first
    changed = other.clone()
    changed[-1, -1] += 1
    assert torch.equal(BlockStream(base, torch.float32, CPU).head(changed), other)


def test_dynamic_ntk_acts_as_in_the_whole_model(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", tiny_config("qwen", seq_length=64))
    data = rows(shared=True)
    found, _ = streamed_states(BlockStream(base, torch.float32, CPU), data)
    torch.testing.assert_close(found.hidden, answer_states(load(base, torch.float32), data).hidden)
