"""Prompts that are padded to a few widths, and read by a graph from the second one of a width on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.inference.test_decode_graph import adapted, prompts, tiny_model
from train.inference import prompt_graph
from train.inference.decode_graph import DecodeSession
from train.inference.decode_layers import DecodeLayers
from train.inference.prompt_graph import MAX_TOKENS, WIDTHS, pad_left, padded_width, prompt_mask
from train.model.decoder import sdpa_mask


def test_a_width_is_the_next_that_has_a_graph() -> None:
    assert [padded_width(n) for n in (1, 32, 33, 300, 512, 513)] == [32, 32, 64, 512, 512, 513]
    assert padded_width(200, batch=MAX_TOKENS // 256) == 256
    assert padded_width(200, batch=MAX_TOKENS // 256 + 1) == 200  # too many rows


def test_padding_stands_on_the_left() -> None:
    ids, mask = pad_left(torch.tensor([[5, 6]]), torch.tensor([[1, 1]]), 4)
    assert ids.tolist() == [[0, 0, 5, 6]] and mask.tolist() == [[0, 0, 1, 1]]


def test_the_mask_is_the_decoders() -> None:
    for batch, width in ((3, 9), (1, 1), (2, 32)):
        mask = prompts(batch, width)[1]
        mask[0, 0] = 0  # so that sdpa_mask does not leave it out
        assert torch.equal(prompt_mask(mask), sdpa_mask(mask, None, width, width, torch.device("cpu")))


@pytest.mark.gpu
@pytest.mark.parametrize("with_adapter", [False, True], ids=["base", "adapter"])
def test_a_graph_reads_prompts_as_the_first_did(tmp_path: Path, with_adapter: bool) -> None:
    """The same bits for the same prompt; another prompt of the width is not confused with it; an adapter's new values count."""
    base = tiny_model(
        tmp_path, "qwen2", True, torch.bfloat16, "cuda", hidden_size=256, head_dim=64, intermediate_size=384
    )
    model: Any = adapted(base) if with_adapter else base
    session = DecodeSession(DecodeLayers(base), 2, 512)
    answers = []
    for width in (20, 31, 20, 20, 31, 100, 100):
        ids, mask = prompts(2, width, "cuda")
        logits = session.start(model, ids, mask, 1).clone()
        answers.append((width, logits, session.step().clone(), session.slot.item(), session.pads.tolist()))
    assert session.prompt_graphs is not None and set(session.prompt_graphs.graphs) == {32, 128}
    first = {}
    for width, *found in answers:
        for a, b in zip(found, first.setdefault(width, found)):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        assert found[2] == padded_width(width) + 1 and found[3][0] == padded_width(width) - width
    if with_adapter:
        before = session.start(model, *prompts(2, 20, "cuda"), 1).clone()
        for name, p in model.named_parameters():
            if ".lora_B." in name:
                p.data.mul_(3.0)
        assert not torch.equal(before, session.start(model, *prompts(2, 20, "cuda"), 1))


def no_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def no_memory_and_a_broken_end(*_: Any) -> None:
    try:
        no_memory()
    finally:
        another_reason()


def another_reason(*_: Any) -> None:
    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize("record", [no_memory, no_memory_and_a_broken_end])
def test_without_memory_for_a_graph_prompts_are_read_without(
    record: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read: list[int] = []
    graphs = prompt_graph.PromptGraphs(lambda ids, mask: read.append(ids.shape[1]), 1)
    monkeypatch.setattr(graphs, "_record", record)
    widths = [32, 32, 64, 32, 64]
    for width in widths:
        graphs(*prompts(1, width))
    assert read == widths
    assert capsys.readouterr().err.count("no memory for a CUDA graph") == 1


def test_another_error_of_a_recording_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = prompt_graph.PromptGraphs(lambda ids, mask: None, 1)
    monkeypatch.setattr(graphs, "_record", another_reason)
    graphs(*prompts(1, 32))
    with pytest.raises(RuntimeError, match="during capture"):
        graphs(*prompts(1, 32))


@pytest.mark.gpu
def test_without_room_for_padding_the_prompt_is_read_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_graph, "WIDTHS", (32, 1024))
    base = tiny_model(tmp_path, "qwen2", True, torch.float32, "cuda")
    session = DecodeSession(DecodeLayers(base), 1, 512)
    for _ in range(3):
        session.start(base, *prompts(1, 40, "cuda"), 100)
        assert session.slot.item() == 40
    assert not session.prompt_graphs.graphs  # type: ignore[union-attr]


def test_every_width_is_longer_than_the_one_before() -> None:
    assert list(WIDTHS) == sorted(set(WIDTHS)) and WIDTHS[-1] <= MAX_TOKENS
