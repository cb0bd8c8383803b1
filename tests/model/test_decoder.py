"""The decoder against the reference models, and its padding, packing and cache against each conversation alone."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.oracles import llama, modelscope_qwen, tiny_config, tiny_decoder
from train.model.decoder import Decoder, ntk_alpha

LENGTHS = (1, 7, 64, 300)
LAYOUTS = ("qwen", "qwen2")  # of which a reference is in this environment; Qwen3: export/test_current_transformers.py


def ids_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 512, shape, generator=torch.Generator().manual_seed(seed))


def reference(model: Decoder) -> nn.Module:
    oracle = modelscope_qwen(model.config) if model.config.layout == "qwen" else llama(model.config)
    missing, extra = oracle.load_state_dict(model.state_dict(), strict=False)
    assert not extra
    assert all("inv_freq" in n or n.endswith("o_proj.bias") for n in missing)
    return oracle


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_logits_equal_the_reference(layout: str, length: int) -> None:
    model, ids = tiny_decoder(tiny_config(layout)), ids_of(2, length)
    torch.testing.assert_close(model(ids).logits, reference(model)(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [20, 33, 70, 200])
@pytest.mark.parametrize(("ntk", "logn"), [(True, False), (False, True), (True, True)])
@torch.no_grad()
def test_beyond_seq_length_logn_and_ntk_follow_the_reference(length: int, ntk: bool, logn: bool) -> None:
    model = tiny_decoder(tiny_config("qwen", seq_length=32, use_dynamic_ntk=ntk, use_logn_attn=logn))
    ids = ids_of(1, length)
    plain = tiny_decoder(tiny_config("qwen"))(ids).logits
    ours = model(ids).logits
    torch.testing.assert_close(ours, reference(model)(ids).logits, atol=1e-4, rtol=0)
    assert torch.equal(ours, plain) == (length <= 32)


def test_ntk_alpha_is_the_published_formula() -> None:
    lengths = [1, 31, 32, 33, 64, 65, 128, 129, 1000]
    expected = [max(2 ** math.ceil(math.log(n / 32, 2) + 1) - 1, 1) for n in lengths]
    assert ntk_alpha(torch.tensor(lengths), 32).tolist() == expected


def sample_conversations() -> list[Tensor]:
    return [ids_of(n, seed=n) for n in (5, 50, 1, 23)]


LONG = {"seq_length": 16, "use_dynamic_ntk": True, "use_logn_attn": True}  # both act in the longer conversations
CONFIGS = [("qwen", {}), ("qwen2", {}), ("qwen3", {}), ("qwen", LONG)]


@pytest.mark.parametrize(("layout", "extra"), CONFIGS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_batch_equals_each_alone(layout: str, extra: dict[str, Any], side: str) -> None:
    model, rows = tiny_decoder(tiny_config(layout, **extra)), sample_conversations()
    width = max(map(len, rows))
    batch, mask = torch.full((len(rows), width), 3), torch.zeros(len(rows), width, dtype=torch.long)
    for n, row in enumerate(rows):
        columns = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        batch[n, columns], mask[n, columns] = row, 1
    logits = model(batch, attention_mask=mask).logits
    for n, row in enumerate(rows):
        torch.testing.assert_close(logits[n][mask[n].bool()], model(row[None]).logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("layout", "extra"), CONFIGS)
@torch.no_grad()
def test_a_packed_row_equals_each_alone(layout: str, extra: dict[str, Any]) -> None:
    model, rows = tiny_decoder(tiny_config(layout, **extra)), sample_conversations()
    packed = torch.cat([*rows, torch.zeros(4, dtype=torch.long)])[None]
    segments = torch.cat(
        [torch.full((len(r),), n + 1) for n, r in enumerate(rows)] + [torch.zeros(4, dtype=torch.long)]
    )
    logits = model(packed, segment_ids=segments[None]).logits[0]
    for n, row in enumerate(rows):
        torch.testing.assert_close(logits[segments == n + 1], model(row[None]).logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("layout", "extra"), CONFIGS)
@torch.no_grad()
def test_a_growing_cache_equals_the_whole(layout: str, extra: dict[str, Any]) -> None:
    """With left padding too. Dynamic NTK keeps the factor of the prompt, so the prompt is longer than seq_length."""
    model, ids = tiny_decoder(tiny_config(layout, **extra)), ids_of(2, 30)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, :4] = 0
    whole, past = model(ids, attention_mask=mask).logits, None
    parts: list[Tensor] = []
    for start, end in ((0, 22), (22, 23), (23, 30)):
        out = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=past, use_cache=True)
        past, parts = out.past_key_values, [*parts, out.logits]
    grown = torch.cat(parts, dim=1)
    torch.testing.assert_close(grown[mask.bool()], whole[mask.bool()], atol=1e-4, rtol=0)


def test_the_loss_is_the_sum_over_labelled_tokens() -> None:
    model, ids = tiny_decoder(tiny_config("qwen2")), ids_of(2, 20)
    model.requires_grad_(False)
    labels = ids.clone()
    labels[0, :9] = -100
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    plain = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(model(ids, labels=labels).loss, plain)


@pytest.mark.parametrize("layout", [*LAYOUTS, "qwen3"])
def test_checkpointing_changes_no_gradient(layout: str) -> None:
    model, ids, grads = tiny_decoder(tiny_config(layout)).train(), ids_of(2, 20), []
    model.lm_head.requires_grad_(False)  # as in every training of this program
    for enabled in (False, True):
        model.set_checkpointing("on" if enabled else "off")
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad.clone() for n, p in model.named_parameters() if p.grad is not None])
    assert grads[0]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
@pytest.mark.parametrize(("layout", "extra"), CONFIGS)
@torch.no_grad()
def test_a_gpu_computes_what_the_cpu_does(
    layout: str, extra: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    """Alone, packed, left-padded and with a cache; the error is relative to the norm of the logits."""
    model, ids = tiny_decoder(tiny_config(layout, **extra)), ids_of(2, 30)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, :4] = 0
    segments = torch.tensor([[1] * 12 + [2] * 17 + [0]] * 2)
    cases: list[dict[str, Tensor]] = [{}, {"attention_mask": mask}, {"segment_ids": segments}]
    expected = [model(ids, **case).logits for case in cases]
    model = model.to("cuda", dtype)
    for case, want in zip(cases, expected, strict=True):
        got = model(ids.cuda(), **{name: value.cuda() for name, value in case.items()}).logits.cpu()
        tokens = case.get("attention_mask", torch.ones_like(ids)).bool()
        error = (got - want)[tokens].norm() / want[tokens].norm()
        assert error < tolerance, (case.keys(), error)
    out = model(ids[:, :20].cuda(), use_cache=True)
    last = model(ids[:, 20:].cuda(), past_key_values=out.past_key_values, use_cache=True).logits.cpu()
    assert (last - expected[0][:, 20:]).norm() / expected[0][:, 20:].norm() < tolerance
