"""A static cache and its step against the decoder's growing cache: plain, through Triton's interpreter, and as a CUDA graph."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tests.support.oracles import small_tokenizer, tiny_checkpoint, tiny_config, tiny_decoder
from train.inference import decode_graph, sessions
from train.inference.decode_layers import Layers
from train.inference.generate import answers, stream
from train.inference.sampling import Sampling
from train.model import lora
from train.model.decoder import Decoder
from train.model.loading import load
from train.model.tokenizer import Tokenizer, load_tokenizer

STRETCH = {"use_dynamic_ntk": True, "use_logn_attn": True, "seq_length": 6}  # both act on prompts of 9 tokens
WIDE = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 384}  # groups of 128


def made(
    folder: Path, layout: str, int4: bool, dtype: torch.dtype = torch.float32, device: str = "cpu", **changes: Any
) -> Decoder:
    config = tiny_config(layout, **changes)
    group = 128 if changes.get("hidden_size") == 256 else 32
    return load(tiny_checkpoint(folder / layout, config, int4=int4, group_size=group, seed=2), dtype, device)


def adapted(model: Decoder, rank: int = 8) -> nn.Module:
    """An adapter on every linear, large enough to matter."""
    config = LoraConfig(
        r=rank, lora_alpha=12, target_modules=lora.targets(model.config.layout, "all"), lora_dropout=0.1
    )
    wrapped = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(3)
    for name, p in wrapped.named_parameters():
        if ".lora_" in name:
            p.data = (torch.randn(p.shape, generator=generator) * 0.1).to(p.device, torch.float32)
    return wrapped


def prompts(batch: int, width: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Random ids; row n has n tokens of padding before it."""
    ids = torch.randint(0, 500, (batch, width), generator=torch.Generator().manual_seed(batch))
    mask = (torch.arange(width)[None] >= torch.arange(batch)[:, None]).long()
    return ids.to(device), mask.to(device)


def difference(model: nn.Module, batch: int, width: int, steps: int = 4, graph: bool = False) -> float:
    """The largest relative difference of logits between a Static and the growing cache, fed the same tokens."""
    return float(differences(model, batch, width, steps, graph).max())


def differences(model: nn.Module, batch: int, width: int, steps: int, graph: bool) -> Tensor:
    """[1 + steps, batch]: of the prompt's logits and of each step's, row by row."""
    base: Any = sessions.decoder_of(model)
    device = str(base.device)
    ids, mask = prompts(batch, width, device)
    static = decode_graph.Static(Layers(base), batch, 32 if width < 20 else 512, graph)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
        want = out.logits[:, -1]
        found = [(static.start(model, ids, mask) - want).abs().amax(1) / want.abs().max()]
        for _ in range(steps):
            chosen = out.logits[:, -1].argmax(-1)
            positions, mask = positions[:, -1:] + 1, torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            out = model(
                input_ids=chosen[:, None],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            got, want = static.step(chosen), out.logits[:, -1]
            found.append((got - want).abs().amax(1) / want.abs().max())
            assert torch.equal(static.token, got.argmax(-1))
    return torch.stack(found).float().cpu()


@pytest.mark.parametrize("changes", [{}, STRETCH], ids=["usual", "beyond its context"])
@pytest.mark.parametrize("int4", [False, True], ids=["float", "int4"])
@pytest.mark.parametrize("layout", ["qwen", "qwen2"])
@pytest.mark.parametrize("short", [decode_graph.SHORT, 0], ids=["short prompts", "long prompts"])
def test_a_step_is_the_decoders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, int4: bool, changes: dict[str, Any], short: int
) -> None:
    monkeypatch.setattr(decode_graph, "SHORT", short)
    model = made(tmp_path, layout, int4, **changes)
    for batch, width in ((3, 9), (1, 5)):  # 5: logn begins to act within the answer, NTK stays off
        assert difference(model, batch, width) < 1e-5
        assert difference(adapted(model) if batch == 3 else model, batch, width) < 1e-5


def check_kernels(folder: Path) -> None:
    """The step by kernels, in the interpreter."""
    for layout, changes in (("qwen", WIDE), ("qwen2", STRETCH)):
        model = made(folder, layout, True, num_hidden_layers=1, **changes)
        for batch, width in ((1, 9), (2, 5)):
            assert difference(model, batch, width, steps=2) < 5e-6
        assert difference(adapted(model), 2, 9, steps=1) < 5e-6


def test_the_kernels_of_a_step_equal_the_decoder_through_the_interpreter(tmp_path: Path) -> None:
    code = (
        "import os; os.environ['TRITON_INTERPRET'] = '1'\n"
        "from pathlib import Path; from tests.inference.test_decode_graph import check_kernels\n"
        f"check_kernels(Path({str(tmp_path)!r}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def check_parts(device: str) -> None:
    """Attention in several parts of the keys, over grouped heads and long rows, against its definition."""
    from train.ops.kernels import decode_step as fast

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    for many, heads, key_heads, width, at in ((2, 4, 2, 16, 200), (1, 2, 2, 64, 255), (3, 2, 1, 32, 3)):
        qkv, angles = random(3, many, (heads + 2 * key_heads) * width), random(1, 256, width // 2)
        turns = (angles.cos(), angles.sin())
        pads = torch.arange(many, dtype=torch.int32, device=device)
        slot = torch.tensor([at], dtype=torch.int32, device=device)
        cache = (random(many, key_heads, 256, width), random(many, key_heads, 256, width))
        logn = random(256).abs()
        mine = [t.clone() for t in cache]
        want = decode_graph.attend(qkv, *turns, logn, pads, slot, *mine, heads)
        for splits in (1, 2, 4):
            again = [t.clone() for t in cache]
            got = fast.attend(qkv, *turns, logn, pads, slot, *again, heads, splits)
            assert torch.allclose(got, want, atol=2e-5), (many, splits)
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(again, mine))


def test_attention_in_parts_through_the_interpreter() -> None:
    code = "import os; os.environ['TRITON_INTERPRET'] = '1'\nfrom tests.inference.test_decode_graph import check_parts\ncheck_parts('cpu')"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


# answers and streams


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    small_tokenizer(tmp_path)
    return load_tokenizer(tmp_path)


QUESTIONS = ["a", "what is it?", "好", "twelve bottles of it", "no"]


def everything(model: nn.Module, tokenizer: Tokenizer) -> list[Any]:
    """What a model says, in batches, as a stream, and by chance."""
    said: list[Any] = [answers(model, tokenizer, QUESTIONS, max_new_tokens=24, batch=2)]
    for sampling in (
        Sampling(),
        Sampling(temperature=1.5, top_p=0.9, top_k=40, seed=7),
        Sampling(repetition_penalty=1.5),
        Sampling(temperature=0.7, repetition_penalty=1.2, seed=8),
    ):
        said.append("".join(stream(model, tokenizer, [1, 2, 3, 4], 24, sampling, lambda _: None)))
    return said


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding by Static although there is no GPU."""
    monkeypatch.setattr(sessions, "served", lambda model, batch: True)


@pytest.mark.parametrize("layout", ["qwen", "qwen2"])
def test_the_same_is_said_either_way(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    model = tiny_decoder(tiny_config(layout), seed=2)
    plain = everything(model, tokenizer)
    monkeypatch.setattr(sessions, "served", lambda model, batch: True)
    assert everything(model, tokenizer) == plain
    assert capsys.readouterr().err == ""


def test_nothing_is_served_without_a_gpu() -> None:
    assert not sessions.served(tiny_decoder(tiny_config()), 1)
    assert not sessions.served(nn.Linear(1, 1), 1)


def test_a_static_is_used_again_where_it_fits_and_never_by_two(ours: None) -> None:
    model = tiny_decoder(tiny_config())
    with sessions.leased(model, 1, 100) as first, sessions.leased(model, 1, 100) as second:
        assert first is not None
        assert second is not None
        assert first is not second
        assert first.capacity == decode_graph.BUCKET
    with sessions.leased(model, 1, decode_graph.BUCKET) as third:
        assert third is first
    with sessions.leased(model, 1, decode_graph.BUCKET + 1) as larger:
        assert larger is not third
        assert larger is not None
        assert larger.capacity == 2 * decode_graph.BUCKET
    with sessions.leased(model, 2, 100) as wider:
        assert wider is not larger
    sessions.forget(model)
    with sessions.leased(model, 2, 100) as fresh:
        assert fresh is not wider


def test_another_adapter_is_another_answer(ours: None, tmp_path: Path) -> None:
    """Switched off, its layers are read anew; moved by an optimizer, its numbers are."""
    model: Any = adapted(made(tmp_path, "qwen", True))
    with sessions.leased(model, 1, 10) as on:
        pass
    with model.disable_adapter(), sessions.leased(model, 1, 10) as off:
        assert on is not None
        assert off is not None
        assert off.layers is not on.layers
    with sessions.leased(model, 1, 10) as again:
        assert again is not None
        assert again.layers is not off.layers


def test_a_failure_to_make_one_is_one_line_and_the_slower_way(
    ours: None, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_decoder(tiny_config(), seed=2)
    plain = everything(model, tokenizer)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nand much more")

    capsys.readouterr()
    monkeypatch.setattr(sessions, "Static", full)
    assert answers(model, tokenizer, QUESTIONS, max_new_tokens=24, batch=8) == plain[0]
    assert capsys.readouterr().err == "Decoding goes the slower way, without a CUDA graph: CUDA out of memory.\n"


# on a GPU


@pytest.mark.gpu
def test_attention_in_parts_on_the_gpu() -> None:
    check_parts("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, STRETCH, WIDE], ids=["usual", "beyond its context", "wide"])
@pytest.mark.parametrize("int4", [False, True], ids=["float", "int4"])
@pytest.mark.parametrize("layout", ["qwen", "qwen2"])
def test_a_graph_is_the_decoders_on_the_gpu(tmp_path: Path, layout: str, int4: bool, changes: dict[str, Any]) -> None:
    sixteen = (torch.float16, 1e-2) if layout == "qwen" else (torch.bfloat16, 5e-2)
    for dtype, loss in ((torch.float32, 2e-5), sixteen):
        model = made(tmp_path, layout, int4, dtype, "cuda", **changes)
        assert difference(model, 3, 9, 6, graph=False) < loss
        assert difference(model, 3, 9, 6, graph=True) < loss
        assert difference(model, 1, 5, 6, graph=True) < loss
        wrapped = adapted(model)
        assert difference(wrapped, 3, 9, 6, graph=True) < loss
        assert difference(wrapped, 1, 9, 6, graph=True) < loss


@pytest.mark.gpu
@pytest.mark.parametrize("int4", [False, True], ids=["float", "int4"])
@pytest.mark.parametrize("layout", ["qwen", "qwen2"])
def test_the_same_is_said_either_way_on_the_gpu(
    tmp_path: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    layout: str,
    int4: bool,
) -> None:
    """Greedy answers and streams, and draws with a seed, in float32, with and without an adapter."""
    model = made(tmp_path, layout, int4, torch.float32, "cuda")
    for one in (model, adapted(model)):
        assert sessions.served(one, 2)
        graphs = everything(one, tokenizer)
        assert capsys.readouterr().err == ""
        with monkeypatch.context() as patch:
            patch.setattr(sessions, "served", lambda model, batch: False)
            assert everything(one, tokenizer) == graphs


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["1.8b", "0.5b"])
def test_two_blocks_of_a_published_shape_on_the_gpu(shape: str) -> None:
    """The tiles of real sizes, heads in several parts, adapters of rank 64; bfloat16.

    On random codes a few rows in a hundred stand where bfloat16 itself is off by percents (the decoder against its own copy in
    float32: 0.4 % in most rows, 3 % in some): what counts is each row's best step, which no wrong tile would give.
    """
    from tests.bench import shapes

    torch.manual_seed(0)
    c = shapes.config(shape)
    c.num_hidden_layers = 2
    model = shapes.random_decoder(c, torch.device("cuda"), torch.bfloat16).eval()
    for batch, width in ((1, 300), (32, 40), (3, 300)):
        rows = differences(model, batch, width, 4, True)[1:].amin(0)
        assert rows.max() < 2e-2, rows
    wrapped = adapted(model, 64)
    for batch, width in ((1, 300), (32, 40)):
        rows = differences(wrapped, batch, width, 4, True)[1:].amin(0)
        assert rows.max() < 2e-2, rows
