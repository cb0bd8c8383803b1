"""Slots against the decoder's growing cache: plain, through Triton's interpreter, and as CUDA graphs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.inference.test_decode_graph import LONG_CONTEXT, WIDE, adapted, tiny_model
from tests.support.interpreter import run_interpreted
from train.inference import sessions
from train.inference.decode_layers import DecodeLayers
from train.inference.slot_session import CHUNK, PromptPiece, SlotSession

LENGTHS = (9, 1, 5, 3)


def prompt(length: int) -> list[int]:
    return torch.randint(0, 500, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def by_slots(
    model: nn.Module, lengths: tuple[int, ...] = LENGTHS, steps: int = 4, slots: int = 4
) -> list[list[Tensor]]:
    """Logits after each prompt and each greedy step, of requests that come one step apart."""
    layers = DecodeLayers(sessions.decoder_of(model))  # type: ignore[arg-type]
    layers.refresh()
    session = SlotSession(layers, slots, CHUNK)
    found: list[list[Tensor]] = [[] for _ in lengths]
    for n in range(len(lengths) + steps):
        running = [m for m in range(min(n, len(lengths))) if len(found[m]) <= steps]
        if n < len(lengths):
            ids = prompt(lengths[n])
            logits = session.read_prompt(layers, PromptPiece(n, ids, 0, len(ids)))
            found[n].append(logits[0].clone())
        if running:
            logits = session.step_slots(layers, running)
            for row, m in enumerate(running):
                found[m].append(logits[row].clone())
    return found


def by_growing_cache(model: Any, length: int, tokens: list[Tensor]) -> list[Tensor]:
    """The logits after the prompt and after each of `tokens` but the last."""
    device = next(iter(model.parameters())).device
    with torch.inference_mode():
        out = model(input_ids=torch.tensor([prompt(length)], device=device), use_cache=True)
        found = [out.logits[0, -1]]
        for n, token in enumerate(tokens[:-1]):
            chosen = token.reshape(1, 1)
            at = torch.tensor([[length + n]], device=device)
            out = model(input_ids=chosen, position_ids=at, past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits[0, -1])
    return found


def difference(model: nn.Module, lengths: tuple[int, ...] = LENGTHS, steps: int = 4) -> float:
    """The largest relative difference of logits. Both read the slots' choices: in 16 bits the likeliest two may be equal."""
    worst = 0.0
    for length, found in zip(lengths, by_slots(model, lengths, steps, len(lengths))):
        expected = by_growing_cache(model, length, [logits.argmax() for logits in found])
        assert len(found) == len(expected)
        for a, b in zip(found, expected):
            worst = max(worst, float((a.float() - b.float()).abs().max() / b.float().abs().max()))
    return worst


@pytest.mark.parametrize("layout", ["qwen", "qwen2", "qwen3"])
@pytest.mark.parametrize("int4", [False, True], ids=["float", "int4"])
def test_slots_equal_the_growing_cache(tmp_path: Path, layout: str, int4: bool) -> None:
    changes: dict[str, Any] = LONG_CONTEXT if layout == "qwen" else {}
    model = tiny_model(tmp_path, layout, int4, **changes)
    assert difference(model) < 5e-6
    assert difference(adapted(model)) < 5e-6


def test_rows_that_are_not_wanted_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a graph for a fixed number of rows, which may be more than there are slots."""
    monkeypatch.setattr(SlotSession, "rows_for", lambda self, count: 1 << (count + 1).bit_length())
    assert difference(tiny_model(tmp_path, "qwen", True, **LONG_CONTEXT)) < 5e-6


def interpreted(folder: str) -> float:
    model = tiny_model(Path(folder), "qwen", True, **LONG_CONTEXT)
    return difference(adapted(model), (7,), steps=1)


def test_the_kernels_of_a_slot_equal_the_decoder_through_the_interpreter(tmp_path: Path) -> None:
    assert run_interpreted("tests.inference.test_slot_session", "interpreted", str(tmp_path)) < 5e-6


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["qwen", "qwen2", "qwen3"])
@pytest.mark.parametrize("int4", [False, True], ids=["float", "int4"])
def test_slots_equal_the_growing_cache_on_the_gpu(tmp_path: Path, layout: str, int4: bool) -> None:
    model = tiny_model(tmp_path, layout, int4, torch.bfloat16, "cuda", **(WIDE if int4 else {}))
    lengths = (9, 1, 5, 3, 40, 100)
    assert difference(model, lengths) < 3e-2
    assert difference(adapted(model), lengths) < 3e-2


@pytest.mark.gpu
def test_the_others_in_a_batch_change_no_bit_on_the_gpu(tmp_path: Path) -> None:
    """With as many rows, which is a graph of the same kernels."""
    model = adapted(tiny_model(tmp_path, "qwen2", True, torch.bfloat16, "cuda", **WIDE))
    layers = DecodeLayers(sessions.decoder_of(model))  # type: ignore[arg-type]
    layers.refresh()

    def answer(slot: int, others: dict[int, int]) -> Tensor:
        session = SlotSession(layers, 16, CHUNK)
        for number, length in {**others, slot: 9}.items():
            session.read_prompt(layers, PromptPiece(number, prompt(length), 0, length))
        steps = [session.step_slots(layers, [*others, slot])[-1].clone() for _ in range(20)]
        return torch.stack(steps)

    expected = answer(0, {1: 2, 2: 3, 3: 4, 4: 30})
    for slot, others in ((7, {8: 70, 1: 3, 2: 9, 9: 9, 10: 1}), (3, {n: n for n in range(4, 11)})):
        assert torch.equal(answer(slot, others), expected)


@pytest.mark.gpu
def test_the_engine_answers_as_infer_on_the_gpu(tmp_path: Path) -> None:
    """64 requests on one adapter and its base at once, in float32, where rounding decides nothing."""
    from tests.serving.test_engine import PROMPTS, Asked, engine_of
    from tests.serving.test_engine import expected as by_infer
    from tests.support.oracles import small_tokenizer
    from train.model.tokenizer import load_tokenizer

    small_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    model = tiny_model(tmp_path, "qwen2", True, torch.float32, "cuda", **WIDE)
    wanted = {prompt: by_infer(model, tokenizer, prompt) for prompt in PROMPTS}
    for slots in (1, 8, 64):
        with engine_of({"base": model}, tokenizer, slots=slots) as engine:
            asked = [(PROMPTS[n % 6], Asked(engine, tokenizer.encode(PROMPTS[n % 6]))) for n in range(64)]
            assert [one.text() for _, one in asked] == [wanted[prompt] for prompt, _ in asked]
