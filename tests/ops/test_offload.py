"""Inputs of blocks and the embedding's table in the host's memory: not a bit of a loss or a gradient is another."""

import gc
import json
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import memory
from tests.support.oracles import tiny_checkpoint, tiny_config
from tests.training.test_graph_step import PACKED, RAGGED, adapted, batch_of
from train.commands import train as verb
from train.common.errors import UserError
from train.config.options import build
from train.config.recipe import Recipe, load_recipe
from train.inference.trained import load_run
from train.model import decoder, lora
from train.model.architecture import Shape
from train.model.loading import load
from train.ops import offload
from train.ops.offload import Host, HostEmbedding, Shelf
from train.runs import folder as folder_module
from train.training import deepspeed_engine, loop, memory_estimate
from train.training.graph_step import Step
from train.training.memory_estimate import Setting

BATCHES = (PACKED, RAGGED, [[64], [64], [64], [12]])  # of two shapes; the last one needs a larger room


def learnt(model: Any, how: str, graphs: bool, times: int = 3) -> list[tuple[float, Tensor]]:
    """Loss and gradient of batches whose shapes take turns."""
    base = model.get_base_model()
    base.set_checkpointing(how)
    names = {p: name for name, p in lora.trainable(model).items()}
    step = Step(base, names, 64, graphs)
    step.vector.data = step.vector.data.to(next(iter(names)).dtype)
    step.bind()
    torch.manual_seed(0)
    found: list[tuple[float, Tensor]] = []
    for n in range(times * len(BATCHES)):
        step.vector.grad = None
        loss = step(batch_of(BATCHES[n % len(BATCHES)]))
        loss.backward()
        assert step.vector.grad is not None
        found.append((float(loss), step.vector.grad.clone()))
    assert any(shape.forth is not None for shape in step.shapes.values()) == graphs
    return found


def assert_same(found: list[tuple[float, Tensor]], wanted: list[tuple[float, Tensor]]) -> None:
    assert [loss for loss, _ in found] == [loss for loss, _ in wanted]
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(found, wanted, strict=True))
    assert wanted[0][1].abs().max() > 0


# --- inputs of blocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["qwen", "qwen2"])
@pytest.mark.parametrize("dropout", ["0", "0.1"])
def test_offload_is_checkpointing_to_the_bit(tmp_path: Path, layout: str, dropout: str) -> None:
    model = adapted(tmp_path, layout, True, torch.float32, "cpu", dropout=dropout)
    assert_same(learnt(model, "offload", False, 1), learnt(model, "on", False, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("dropout", ["0", "0.1"])
def test_offload_on_a_gpu_is_checkpointing_to_the_bit(tmp_path: Path, dropout: str, graphs: bool) -> None:
    """Run, captured, replayed; in pinned memory, and with other work in the copies' way."""
    model = adapted(tmp_path, "qwen", True, torch.bfloat16, "cuda", dropout=dropout)
    wanted = learnt(model, "on", graphs)
    assert_same(learnt(model, "offload", graphs), wanted)
    base = model.get_base_model()
    base.keep_embedding_on_host()
    assert_same(learnt(model, "offload", graphs), wanted)


@pytest.mark.gpu
def test_a_slow_bus_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each copy begins some milliseconds late: whoever did not wait for it would compute with something else."""
    model = adapted(tmp_path, "qwen", True, torch.bfloat16, "cuda")
    wanted = learnt(model, "on", False)
    plain = offload.Lane.copy

    def late(lane: offload.Lane, to: Tensor, x: Tensor) -> None:
        with torch.cuda.stream(lane.stream):
            torch.cuda._sleep(5_000_000)
        plain(lane, to, x)

    monkeypatch.setattr(offload.Lane, "copy", late)
    assert_same(learnt(model, "offload", False), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_offload_leaves_two_inputs_on_the_card(graphs: bool) -> None:
    """Twelve blocks of a shape whose inputs are most of what checkpointing keeps."""
    shape, rows = Shape("qwen", 12, 512, 4, 4, 128, 512, 512), {"input_ids": torch.ones(4, 2048, dtype=torch.long)}
    batch, peaks = rows | {"labels": rows["input_ids"]}, {}
    for how in ("on", "offload"):
        model = lora.attach(memory.decoder(shape, torch.device("cuda")), Recipe(rank=8, dropout=0.0)).train()
        base: Any = model.get_base_model()
        base.set_checkpointing(how)
        step = Step(base, {p: name for name, p in lora.trainable(model).items()}, 2048, graphs)
        step.vector.data = step.vector.data.bfloat16()
        step.bind()
        for n in range(4):  # run, captured, replayed
            if n < 2:
                torch.cuda.reset_peak_memory_stats()
            step(batch).backward()
        peaks[how] = torch.cuda.max_memory_allocated()
        del model, base, step
        gc.collect()
        torch.cuda.empty_cache()
    kept = {how: memory_estimate.kept(shape, Setting(4, 2048, how, graphs=graphs)) for how in peaks}
    assert peaks["on"] - peaks["offload"] > 0.7 * (kept["on"] - kept["offload"])


class Lagging(offload.Lane):
    """A lane on the CPU that copies as late as it may: when somebody waits for it."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.waiting: list[tuple[Tensor, Tensor]] = []

    def copy(self, to: Tensor, x: Tensor) -> None:
        self.waiting.append((to, x))

    def join(self) -> None:
        assert len(self.waiting) == 1, "joined with nothing under way, which no capture allows, or with two"
        for to, x in self.waiting:
            to.copy_(x)
        self.waiting.clear()


def test_nobody_uses_what_has_not_arrived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With copies that are made only when they are waited for."""
    model = adapted(tmp_path, "qwen2", True, torch.float32, "cpu")
    wanted = learnt(model, "on", False, 1)
    lanes: list[Lagging] = []
    monkeypatch.setattr(offload, "Lane", lambda device: lanes.append(Lagging()) or lanes[-1])  # type: ignore[func-returns-value]
    assert_same(learnt(model, "offload", False, 1), wanted)
    assert [lane.waiting for lane in lanes] == [[]], "every copy is joined: a capture would not end otherwise"


def test_a_shelf_is_a_stack_with_two_on_the_device() -> None:
    host = Host(torch.device("cpu"))
    host.lane = Lagging()
    shelf, inputs = Shelf(host, 5, torch.empty(3, 2)), [torch.full((3, 2), float(n)) for n in range(6)]
    for x in inputs:
        shelf.append(x.clone())
        assert shelf.moving is None or not shelf.here
    assert host.room.numel() == 4 * 6  # all but the last block's and what came after it
    for x in reversed(inputs):
        assert len(shelf.here) + (shelf.moving is not None) <= 2
        assert torch.equal(shelf.pop(), x)
    assert shelf.size == 0
    assert shelf.moving is None


def test_a_single_block_needs_no_room() -> None:
    host = Host(torch.device("cpu"))
    shelf = Shelf(host, 1, torch.empty(3, 2))
    shelf.append(torch.zeros(3, 2))
    shelf.append(torch.ones(3, 2))
    assert (float(shelf.pop().sum()), float(shelf.pop().sum()), host.room.numel()) == (6.0, 0.0, 0)


def test_a_larger_batch_leaves_the_room_of_the_smaller_alone() -> None:
    """Graphs go on using the room that they were captured with."""
    host = Host(torch.device("cpu"))
    small = host.places(2, torch.empty(4, 2))
    small.fill_(1)
    large = host.places(2, torch.empty(8, 2))
    assert large.data_ptr() != small.data_ptr()
    assert host.places(2, torch.empty(4, 2)).data_ptr() == large.data_ptr()
    assert float(small.sum()) == 16.0


def test_the_decoders_own_passes_send_each_blocks_input_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no kernels run, autograd trains: with the same numbers, and nothing but the inputs on the host."""
    sent: list[torch.Size] = []

    class Counted(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool) -> None:
            super().__init__(lambda x: sent.append(x.shape) or x.clone(), lambda x: x)  # type: ignore[func-returns-value]

    monkeypatch.setattr(decoder, "save_on_cpu", Counted)
    torch.manual_seed(0)
    config = tiny_config("qwen2")
    model: Any = decoder.Decoder(config).train()
    model.lm_head.requires_grad_(False)
    ids, slopes = torch.randint(0, 512, (2, 20)), []
    for how in ("on", "offload"):
        model.set_checkpointing(how)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        slopes.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*slopes, strict=True))
    whole = torch.Size([2, 20, config.hidden_size])
    assert [shape for shape in sent if shape.numel()] == [whole] * config.num_hidden_layers


# --- the embedding ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["off", "offload"])
def test_an_embedding_on_the_host_changes_nothing(tmp_path: Path, how: str) -> None:
    model = adapted(tmp_path, "qwen", True, torch.float32, "cpu")
    wanted = learnt(model, how, False, 1)
    model.get_base_model().keep_embedding_on_host()
    assert_same(learnt(model, how, False, 1), wanted)


def test_its_table_stays_where_it_is() -> None:
    """Moving the model moves everything else; asked with ids from anywhere it answers there."""
    table = torch.randn(10, 4)
    model = torch.nn.Sequential(HostEmbedding(table), torch.nn.Linear(4, 2)).to("meta")
    assert model[0].weight.device.type == "cpu"
    assert model[1].weight.device.type == "meta"
    assert list(model[0].parameters()) == []
    assert torch.equal(model[0](torch.tensor([[3, 1]])), table[[3, 1]][None])


def test_the_loader_leaves_it_and_loads_the_same(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "base", tiny_config("qwen"), int4=True)
    ids = torch.tensor([[1, 2, 3]])
    there, here = load(folder, torch.float32), load(folder, torch.float32, embedding="host")
    assert isinstance(here.get_input_embeddings(), HostEmbedding)
    assert torch.equal(here(ids).logits, there(ids).logits)


def test_a_head_that_is_the_table_stays_on_the_device(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "base", tiny_config("qwen2", tie_word_embeddings=True), int4=True)
    model: Any = load(folder, torch.float32, embedding="host")
    assert model.get_input_embeddings().weight is model.lm_head.weight


# --- a whole run --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fused_house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base and data, where the fused passes train on the CPU too."""
    tiny_checkpoint(tmp_path / "models" / "base-Int4", tiny_config("qwen"), int4=True)
    made = [{"instruction": f"Question {n}?", "output": f"Answer {n}. " * (1 + n % 4)} for n in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(deepspeed_engine, "FUSED_ON", ("cpu",))
    return tmp_path


def train(run: str, **keys: Any) -> None:
    values = {"data": "data.jsonl", "model": "base-Int4", "recipe": "smoke", "run": run, "batch": "2", "length": "96"}
    verb.run(verb.parse({**values, "rank": "4", "steps": "4", **keys}))


def adapter(run: str) -> bytes:
    return (Path("runs") / run / "adapter" / lora.WEIGHTS).read_bytes()


def test_a_run_from_the_host_writes_the_same_bytes(fused_house: Path) -> None:
    """And is loaded as any other: export and infer need no word of it."""
    train("plain")
    train("host", checkpointing="offload", embedding="host")
    assert adapter("host") == adapter("plain")
    model, _, record = load_run(Path("runs") / "host", Path("models"), torch.float32)
    assert (record["recipe"]["checkpointing"], record["recipe"]["embedding"]) == ("offload", "host")
    assert isinstance(model.get_base_model().get_input_embeddings(), torch.nn.Embedding)


def test_a_run_of_an_older_program_is_gone_on_with() -> None:
    """Whose recipe had a switch for checkpointing, and no word for the embedding."""
    recipe = asdict(Recipe())
    same: dict[str, Any] = {
        "data": {"path": "d", "sha256": "1"},
        "base": {"files": {}},
        "from": None,
        "dtype": "float32",
    }
    old = {key: value for key, value in recipe.items() if key != "embedding"} | {"checkpointing": True}
    assert (
        folder_module.changes(
            {**same, "rows_per_step": 4, "recipe": old}, {**same, "rows_per_step": 4, "recipe": recipe}
        )
        == []
    )


def test_a_run_goes_on_with_another_place_for_either(fused_house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where things stand is no input of a run: begun one way, cut off, finished another way, the same bytes."""
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


@pytest.mark.parametrize(("tied", "said"), [(False, "stays in the host's memory"), (True, "stays on the card")])
def test_what_stands_where_is_said(tmp_path: Path, tied: bool, said: str) -> None:
    base = tiny_checkpoint(tmp_path / "base", tiny_config("qwen2", tie_word_embeddings=tied))
    lines = verb._on_the_host(Recipe(checkpointing="offload", embedding="host"), base)
    assert len(lines) == 2
    assert said in lines[1]
    assert verb._on_the_host(Recipe(), base) == []


# --- the words of a recipe ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "means"),
    [("on", "on"), ("True", "on"), ("yes", "on"), ("false", "off"), ("0", "off"), ("offload", "offload")],
)
def test_checkpointing_has_three_values_and_knows_its_old_two(text: str, means: str) -> None:
    assert build(Recipe, {"checkpointing": text}).checkpointing == means


def test_a_recipe_written_by_an_older_program_is_read(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("checkpointing: true\n")
    assert load_recipe(str(tmp_path / "old.yaml"), {}).checkpointing == "on"


def test_another_word_is_refused_with_the_three() -> None:
    with pytest.raises(UserError, match=r"checkpointing=half: expected one of off, on, offload"):
        build(Recipe, {"checkpointing": "half"})
    with pytest.raises(UserError, match=r"embedding=card: expected one of device, host"):
        build(Recipe, {"embedding": "card"})
