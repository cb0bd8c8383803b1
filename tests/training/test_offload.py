"""Training with block inputs and the embedding table in the host's memory: not one bit of the result changes."""

import gc
import json
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.test_offload import LateCopies
from tests.support import memory
from tests.support.fused_step import PACKED, RAGGED, adapted_decoder, batch_of, bound_step
from tests.support.oracles import tiny_checkpoint, tiny_config, tiny_decoder
from train.commands import train as command
from train.common.errors import UserError
from train.config.options import build
from train.config.recipe import Recipe, load_recipe
from train.inference.trained import load_run
from train.model import decoder, lora
from train.model.architecture import Shape
from train.model.loading import load
from train.ops import offload
from train.ops.offload import HostEmbedding
from train.runs import resume
from train.training import deepspeed_engine, loop, memory_estimate, prepare
from train.training.graph_step import GraphStep
from train.training.memory_setting import Setting

BATCHES = (PACKED, RAGGED, [[64], [64], [64], [12]])  # of two shapes; the last one needs a larger buffer


def losses_and_grads(model: Any, checkpointing: str, graphs: bool, times: int = 3) -> list[tuple[float, Tensor]]:
    """Of `times` rounds of BATCHES, whose shapes take turns."""
    model.get_base_model().set_checkpointing(checkpointing)
    step = bound_step(model, graphs=graphs)
    torch.manual_seed(0)
    results: list[tuple[float, Tensor]] = []
    for n in range(times * len(BATCHES)):
        step.vector.grad = None
        loss = step(batch_of(BATCHES[n % len(BATCHES)]))
        loss.backward()
        assert step.vector.grad is not None
        results.append((float(loss), step.vector.grad.clone()))
    assert any(passes.forward_graph is not None for passes in step.shapes.values()) == graphs
    return results


def assert_same(results: list[tuple[float, Tensor]], expected: list[tuple[float, Tensor]]) -> None:
    assert [loss for loss, _ in results] == [loss for loss, _ in expected]
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(results, expected, strict=True))
    assert expected[0][1].abs().max() > 0


# --- inputs of blocks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["qwen", "qwen2", "qwen3"])
@pytest.mark.parametrize("dropout", ["0", "0.1"])
def test_offload_equals_checkpointing_to_the_bit(tmp_path: Path, layout: str, dropout: str) -> None:
    model = adapted_decoder(tmp_path, layout, True, torch.float32, "cpu", dropout=dropout)
    assert_same(losses_and_grads(model, "offload", False, 1), losses_and_grads(model, "on", False, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("dropout", ["0", "0.1"])
def test_offload_on_a_gpu_equals_checkpointing_to_the_bit(tmp_path: Path, dropout: str, graphs: bool) -> None:
    """Run, captured, replayed; in pinned memory; with and without the embedding on the host."""
    model = adapted_decoder(tmp_path, "qwen", True, torch.bfloat16, "cuda", dropout=dropout)
    expected = losses_and_grads(model, "on", graphs)
    assert_same(losses_and_grads(model, "offload", graphs), expected)
    base = model.get_base_model()
    base.keep_embedding_on_host()
    assert_same(losses_and_grads(model, "offload", graphs), expected)


@pytest.mark.gpu
def test_slow_copies_change_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each copy starts some milliseconds late: a reader that does not wait for it would compute something else."""
    model = adapted_decoder(tmp_path, "qwen", True, torch.bfloat16, "cuda")
    expected = losses_and_grads(model, "on", False)
    copy = offload.CopyStream.copy

    def late(stream: offload.CopyStream, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(stream.stream):
            torch.cuda._sleep(5_000_000)
        copy(stream, target, source)

    monkeypatch.setattr(offload.CopyStream, "copy", late)
    assert_same(losses_and_grads(model, "offload", False), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_offload_leaves_two_inputs_on_the_card(graphs: bool) -> None:
    """Twelve blocks of a shape whose inputs are most of what checkpointing keeps."""
    shape, rows = Shape("qwen", 12, 512, 4, 4, 128, 512, 512), {"input_ids": torch.ones(4, 2048, dtype=torch.long)}
    batch, peaks = rows | {"labels": rows["input_ids"]}, {}
    for checkpointing in ("on", "offload"):
        model = lora.attach(memory.decoder(shape, torch.device("cuda")), Recipe(rank=8, dropout=0.0)).train()
        base: Any = model.get_base_model()
        base.set_checkpointing(checkpointing)
        step = GraphStep(base, {p: name for name, p in lora.trainable(model).items()}, 2048, graphs)
        step.vector.data = step.vector.data.bfloat16()
        step.bind()
        for n in range(4):  # run, captured, replayed
            if n < 2:
                torch.cuda.reset_peak_memory_stats()
            step(batch).backward()
        peaks[checkpointing] = torch.cuda.max_memory_allocated()
        del model, base, step
        gc.collect()
        torch.cuda.empty_cache()
    kept = {key: memory_estimate.saved_bytes(shape, Setting(4, 2048, key, graphs=graphs)) for key in peaks}
    assert peaks["on"] - peaks["offload"] > 0.7 * (kept["on"] - kept["offload"])


def test_no_tensor_is_read_before_it_has_arrived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With copies that happen only when something waits for them."""
    model = adapted_decoder(tmp_path, "qwen2", True, torch.float32, "cpu")
    expected = losses_and_grads(model, "on", False, 1)
    streams: list[LateCopies] = []
    monkeypatch.setattr(offload, "CopyStream", lambda device: streams.append(LateCopies()) or streams[-1])
    assert_same(losses_and_grads(model, "offload", False, 1), expected)
    assert [stream.waiting for stream in streams] == [[]], "a copy without a join: a capture would not end"


def test_the_decoders_own_passes_send_each_blocks_input_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no kernels run, autograd trains: with the same values, and only the inputs of blocks on the host."""
    sent: list[torch.Size] = []

    class Counted(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool) -> None:
            super().__init__(lambda x: sent.append(x.shape) or x.clone(), lambda x: x)

    monkeypatch.setattr(decoder, "save_on_cpu", Counted)
    torch.manual_seed(0)
    config = tiny_config("qwen2")
    model: Any = tiny_decoder(config).train()
    model.lm_head.requires_grad_(False)
    ids, grads = torch.randint(0, 512, (2, 20)), []
    for checkpointing in ("on", "offload"):
        model.set_checkpointing(checkpointing)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    whole = torch.Size([2, 20, config.hidden_size])
    assert [shape for shape in sent if shape.numel()] == [whole] * config.num_hidden_layers


# --- the embedding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", ["off", "offload"])
def test_an_embedding_on_the_host_changes_nothing(tmp_path: Path, checkpointing: str) -> None:
    model = adapted_decoder(tmp_path, "qwen", True, torch.float32, "cpu")
    expected = losses_and_grads(model, checkpointing, False, 1)
    model.get_base_model().keep_embedding_on_host()
    assert_same(losses_and_grads(model, checkpointing, False, 1), expected)


def test_a_model_loaded_with_its_embedding_on_the_host_is_the_same(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "base", tiny_config("qwen"), int4=True)
    ids = torch.tensor([[1, 2, 3]])
    on_device, on_host = load(folder, torch.float32), load(folder, torch.float32, embedding="host")
    assert isinstance(on_host.get_input_embeddings(), HostEmbedding)
    assert torch.equal(on_host(ids).logits, on_device(ids).logits)


def test_a_head_tied_to_the_table_stays_on_the_device(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "base", tiny_config("qwen2", tie_word_embeddings=True), int4=True)
    model: Any = load(folder, torch.float32, embedding="host")
    assert model.get_input_embeddings().weight is model.lm_head.weight


# --- a whole run --------------------------------------------------------------------------------------------------


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base and data, in which the fused step trains on the CPU too."""
    tiny_checkpoint(tmp_path / "models" / "base-Int4", tiny_config("qwen"), int4=True)
    rows = [{"instruction": f"Question {n}?", "output": f"Answer {n}. " * (1 + n % 4)} for n in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(deepspeed_engine, "FUSED_DEVICES", ("cpu",))
    return tmp_path


def train(run: str, **keys: Any) -> None:
    values = {"data": "data.jsonl", "model": "base-Int4", "recipe": "smoke", "run": run, "batch": "2", "length": "96"}
    command.run(command.parse({**values, "rank": "4", "steps": "4", **keys}))


def adapter(run: str) -> bytes:
    return (Path("runs") / run / "adapter" / lora.WEIGHTS).read_bytes()


def test_a_run_from_the_host_writes_the_same_bytes(workplace: Path) -> None:
    """And it is loaded like any other: export and infer need no option for it."""
    train("plain")
    train("host", checkpointing="offload", embedding="host")
    assert adapter("host") == adapter("plain")
    model, _, record = load_run(Path("runs") / "host", Path("models"), torch.float32)
    assert (record["recipe"]["checkpointing"], record["recipe"]["embedding"]) == ("offload", "host")
    assert isinstance(model.get_base_model().get_input_embeddings(), torch.nn.Embedding)


def test_a_run_of_an_older_program_can_be_continued() -> None:
    """Its recipe has a bool for checkpointing, and no key for the embedding."""
    recipe = asdict(Recipe())
    same: dict[str, Any] = {
        "data": {"path": "d", "sha256": "1"},
        "base": {"files": {}},
        "from": None,
        "dtype": "float32",
    }
    old = {key: value for key, value in recipe.items() if key != "embedding"} | {"checkpointing": True}
    assert (
        resume.changes(
            {**same, "rows_per_step": 4, "recipe": old}, {**same, "rows_per_step": 4, "recipe": recipe}, recipe
        )
        == []
    )


def test_a_run_continues_with_other_places_for_both(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tensors are is no input of a run: started one way, interrupted, finished the other way, the same bytes."""
    train("straight")
    real = loop._step

    def cut(task: Any, learner: Any, now: int, *rest: Any) -> Any:
        if now == 1:
            signal.raise_signal(signal.SIGTERM)
        return real(task, learner, now, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_step", cut)
        with pytest.raises(SystemExit):
            train("moved", checkpointing="offload", embedding="host")
    assert not (Path("runs") / "moved" / "run.json").exists()
    train("moved", checkpointing="on", embedding="device")
    assert adapter("moved") == adapter("straight")


@pytest.mark.parametrize(("tied", "message"), [(False, "stays in the host's memory"), (True, "stays on the card")])
def test_the_places_are_printed(tmp_path: Path, tied: bool, message: str) -> None:
    base = tiny_checkpoint(tmp_path / "base", tiny_config("qwen2", tie_word_embeddings=tied))
    lines = prepare.host_memory_notes(Recipe(checkpointing="offload", embedding="host"), base)
    assert len(lines) == 2
    assert message in lines[1]
    assert prepare.host_memory_notes(Recipe(), base) == []


# --- the keys of a recipe -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("on", "on"), ("True", "on"), ("yes", "on"), ("false", "off"), ("0", "off"), ("offload", "offload")],
)
def test_checkpointing_has_three_values_and_accepts_a_bool(text: str, value: str) -> None:
    assert build(Recipe, {"checkpointing": text}).checkpointing == value


def test_a_recipe_written_by_an_older_program_is_read(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("checkpointing: true\n")
    assert load_recipe(str(tmp_path / "old.yaml"), {}).checkpointing == "on"


def test_another_value_is_refused_and_the_three_are_named() -> None:
    with pytest.raises(UserError, match=r"checkpointing=half: expected one of auto, off, on, offload"):
        build(Recipe, {"checkpointing": "half"})
    with pytest.raises(UserError, match=r"embedding=card: expected one of auto, device, host"):
        build(Recipe, {"embedding": "card"})
