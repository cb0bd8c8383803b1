"""IA3, VeRA, LoHa and LoKr as stock peft computes them: values, gradients, files in both directions, packed and merged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import IA3Config, LoHaConfig, LoKrConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.model.test_lora import IDS, logits, recipe, reference
from tests.support.oracles import tiny_checkpoint, tiny_config, tiny_decoder
from train.common.errors import UserError
from train.common.files import read_json
from train.export.merge import merge_block
from train.export.peft_updates import updates_of
from train.model import adapters, lora
from train.model.adapter_file import CONFIG, WEIGHTS
from train.model.decoder import linear_names
from train.model.layouts import LAYOUTS
from train.model.loading import load
from train.model.lora_layers import AdaptedModel
from train.model.packed_linear import PackedLinear
from train.model.peft_file import read_peft
from train.model.peft_layers import METHODS, Ia3Linear, MethodLinear, count
from train.ops.structured_linear import hadamard

KEYS: dict[str, dict[str, Any]] = {"vera": {"seed": 5, "rank": 8}, "lokr": {"lokr_factor": 4}, "loha": {}, "ia3": {}}


def ours(method: str, model: Any, **keys: Any) -> AdaptedModel:
    return adapters.attach(model, recipe(method=method, **{**KEYS[method], **keys}))


def stock(method: str, layout: str, model: nn.Module, **keys: Any) -> Any:
    """The same adapter, made by stock peft."""
    names = LAYOUTS[layout]
    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": list(linear_names(layout))}
    if method == "ia3":
        down = f"{names.mlp}.{names.down}"
        wanted = {*linear_names(layout)} - {names.down} | {down}
        wanted |= {f"{names.attention}.{names.out}"} if names.out == names.down else set()
        return get_peft_model(
            model, IA3Config(task_type="CAUSAL_LM", target_modules=[*wanted], feedforward_modules=[down])
        )
    config = {
        "vera": lambda: VeraConfig(r=8, projection_prng_key=5, **common),
        "loha": lambda: LoHaConfig(r=4, alpha=8, **common),
        "lokr": lambda: LoKrConfig(**{"r": 4, "alpha": 4, "decompose_factor": 4, **common, **keys}),
    }[method]()
    return get_peft_model(model, config)


def stock_parameter(name: str) -> str:
    return name.replace("ia3_change", "ia3_l")


def randomize(model: nn.Module) -> None:
    """Values as after a training, the same in both."""
    generator = torch.Generator().manual_seed(7)
    for name, p in sorted(lora.trainable(model).items(), key=lambda item: stock_parameter(item[0])):
        values = torch.randn(p.shape, generator=generator) * 0.3
        p.data.copy_(1 + values if "ia3_l" in name else values)


def backward(model: Any) -> dict[str, Tensor]:
    F.cross_entropy(model.train()(input_ids=IDS).logits[0, :-1], IDS[0, 1:]).backward()
    return {stock_parameter(name): p.grad for name, p in lora.trainable(model).items() if p.grad is not None}


@pytest.mark.parametrize("layout", ["qwen2", "qwen", "qwen3"])
@pytest.mark.parametrize("method", METHODS)
def test_values_and_gradients_are_those_of_stock_peft(method: str, layout: str) -> None:
    mine = ours(method, tiny_decoder(tiny_config(layout)))
    theirs = stock(method, layout, reference(layout, tiny_decoder(tiny_config(layout))))
    plain = logits(tiny_decoder(tiny_config(layout)))
    torch.testing.assert_close(logits(mine), plain, rtol=1e-4, atol=1e-4, msg="it does not begin as the base")
    randomize(mine)
    randomize(theirs)
    assert (logits(mine) - plain).abs().max() > 0.05
    torch.testing.assert_close(logits(mine), logits(theirs), rtol=1e-4, atol=1e-4)
    with mine.disable_adapter():
        torch.testing.assert_close(logits(mine), plain, rtol=1e-4, atol=1e-4)
    found, expected = backward(mine), backward(theirs)
    assert found.keys() == expected.keys() and len(found) >= len(linear_names(layout))
    for name, grad in expected.items():
        own = found[name].reshape(grad.shape)
        torch.testing.assert_close(own, grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()), msg=name)


@pytest.mark.parametrize("layout", ["qwen2", "qwen"])
@pytest.mark.parametrize("method", METHODS)
def test_files_go_to_stock_peft_and_come_from_it(method: str, layout: str, tmp_path: Path) -> None:
    mine = ours(method, tiny_decoder(tiny_config(layout)))
    randomize(mine)
    adapters.save_adapter(mine, tmp_path / "ours")
    other = reference(layout, tiny_decoder(tiny_config(layout)))
    theirs = PeftModel.from_pretrained(other, str(tmp_path / "ours"), is_trainable=True)
    torch.testing.assert_close(logits(theirs), logits(mine), rtol=1e-4, atol=1e-4)
    for p in lora.trainable(theirs).values():
        p.data *= 1.1
    theirs.save_pretrained(str(tmp_path / "theirs"))
    back = adapters.load_adapter(tiny_decoder(tiny_config(layout)), tmp_path / "theirs")
    torch.testing.assert_close(logits(back), logits(theirs), rtol=1e-4, atol=1e-4)
    assert not lora.trainable(back) and (logits(back) - logits(mine)).abs().max() > 0.01
    made, read = (read_json(tmp_path / name / CONFIG) for name in ("ours", "theirs"))
    assert made.keys() == read.keys()
    files = [load_file(tmp_path / name / WEIGHTS) for name in ("ours", "theirs")]
    assert {n: t.shape for n, t in files[0].items()} == {n: t.shape for n, t in files[1].items()}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_with_an_adapter_of_stock_peft(method: str, tmp_path: Path) -> None:
    theirs = stock(method, "qwen2", reference("qwen2", tiny_decoder(tiny_config())))
    randomize(theirs)
    theirs.save_pretrained(str(tmp_path))
    adapter, settings = adapters.read(tmp_path), recipe(method=method, **KEYS[method])
    adapters.check_start(adapter, settings)
    adapters.check_values(adapter)
    adapters.check_targets(adapter, settings, tiny_config())
    mine = ours(method, tiny_decoder(tiny_config()))
    adapters.copy_adapter(adapter, mine)
    torch.testing.assert_close(logits(mine), logits(theirs), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=rf"its adapter is {adapter.title}\. Give method={method}"):  # type: ignore[union-attr]
        adapters.check_start(adapter, recipe())
    with pytest.raises(UserError, match=r"it is also for .*Give targets="):
        adapters.check_targets(adapter, recipe(method=method, **KEYS[method], targets="q_proj"), tiny_config())


@pytest.mark.parametrize("method", METHODS)
def test_on_packed_weights_it_is_that_of_the_dequantised_ones_and_merges(method: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "base", tiny_config("qwen"), int4=True)
    model = ours(method, load(folder, torch.float32))
    randomize(model)
    adapters.save_adapter(model, tmp_path / "adapter")
    frozen = adapters.load_adapter(load(folder, torch.float32), tmp_path / "adapter")
    torch.testing.assert_close(logits(frozen), logits(model), rtol=1e-4, atol=1e-4)
    merged, updates = load(folder, torch.float32), updates_of(read_peft(tmp_path / "adapter"))
    for name in updates:
        packed: Any = merged.get_submodule(name)
        assert isinstance(packed, PackedLinear)
        kept = ("qweight", "qzeros", "scales", "g_idx", "bias")
        state = {f"{name}.{key}": getattr(packed, key) for key in kept if getattr(packed, key) is not None}
        state = merge_block(state, {}, 4, torch.float32, updates=updates)
        weight = state[f"{name}.weight"]
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias=f"{name}.bias" in state)
        dense.load_state_dict({key.rpartition(".")[2]: values for key, values in state.items()})
        merged.set_submodule(name, dense)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-3, atol=1e-3)


def test_lokr_with_each_factor_in_two_parts_is_read_but_not_continued(tmp_path: Path) -> None:
    keys = {"r": 1, "alpha": 1, "decompose_factor": -1, "decompose_both": True}
    theirs = stock("lokr", "qwen2", reference("qwen2", tiny_decoder(tiny_config())), **keys)
    randomize(theirs)
    theirs.save_pretrained(str(tmp_path))
    assert {"lokr_w1_a", "lokr_w2_b"} <= {name.rpartition(".")[2] for name in load_file(tmp_path / WEIGHTS)}
    back = adapters.load_adapter(tiny_decoder(tiny_config()), tmp_path)
    torch.testing.assert_close(logits(back), logits(theirs), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"other parts of .*decompose_both"):
        adapters.check_targets(adapters.read(tmp_path), recipe(method="lokr", rank=1), tiny_config())


def test_loha_of_a_few_rows_is_computed_without_its_weight() -> None:
    torch.manual_seed(0)
    factors = [torch.randn(*size, dtype=torch.float64) for size in ((96, 3), (3, 64), (96, 3), (3, 64))]
    x = torch.randn(2, 2, 64, dtype=torch.float64)
    expected = F.linear(x, (factors[0] @ factors[1]) * (factors[2] @ factors[3]))
    with torch.no_grad():
        torch.testing.assert_close(hadamard(x, *factors), expected)
    inputs = [t.requires_grad_() for t in (x, *factors)]
    torch.testing.assert_close(hadamard(*inputs), expected)
    assert torch.autograd.gradcheck(hadamard, inputs)


def test_ia3_and_vera_in_16_bits(tmp_path: Path) -> None:
    """A factor near 1 keeps its digits; VeRA's A and B are one copy for all linears."""
    base = nn.Linear(64, 32).to(torch.bfloat16)
    layer = Ia3Linear(base, scales_input=False)
    layer.part("ia3_change").data = torch.full((32, 1), 1e-3).to(torch.bfloat16)
    x = torch.randn(8, 64).to(torch.bfloat16)
    torch.testing.assert_close(layer(x).float(), base(x).float() * 1.001, rtol=2**-8, atol=2**-8)
    ones = torch.ones(1, 64).to(torch.bfloat16)
    base.weight.data.fill_(64.0)
    base.bias.data.zero_()
    layer.part("ia3_change").data.fill_(2**-7)
    assert layer(ones)[0, 0] == 4096 * (1 + 2**-7)
    model = ours("vera", tiny_decoder(tiny_config()).to(torch.bfloat16)).to(torch.bfloat16)
    for p in lora.trainable(model).values():
        p.data = p.data.to(torch.bfloat16)
    pairs = {id(m.shared[0].pair(torch.bfloat16)[0]) for m in model.modules() if hasattr(m, "shared")}
    assert len(pairs) == 1 and logits(model).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_counts_and_values_at_the_beginning(method: str, tmp_path: Path) -> None:
    model = ours(method, tiny_decoder(tiny_config()))
    layers = [m for m in model.modules() if isinstance(m, MethodLinear)]
    settings = recipe(method=method, **KEYS[method])
    inputs = [getattr(layer, "scales_input", False) for layer in layers]
    sizes = [(layer.in_features, layer.out_features) for layer in layers]
    counted = sum(
        count(method, k, n, settings.rank, settings.lokr_factor, down)
        for (k, n), down in zip(sizes, inputs, strict=True)
    )
    assert counted == sum(p.numel() for p in lora.trainable(model).values())
    torch.manual_seed(99)
    again = ours(method, tiny_decoder(tiny_config()))
    torch.testing.assert_close(lora.trainable(again), lora.trainable(model), rtol=0, atol=0)
    for name in ("one", "two"):
        adapters.save_adapter(model, tmp_path / name)
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()


def edited(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("method", "changes", "problem"),
    [
        ("ia3", {"modules_to_save": ["lm_head"]}, "modules_to_save=.*whole modules"),
        ("vera", {"bias": "all"}, "bias=.*changes biases"),
        ("vera", {"r": "8"}, "r=.*a whole number"),
        ("loha", {"rank_pattern": {"q_proj": 2}}, "rank_pattern=.*rank of their own"),
        ("loha", {"alpha": None}, "alpha=null: expected a number"),
        ("loha", {"use_new": True}, "use_new=true: this setting is not known"),
        ("loha", {"r": 5}, r"damaged \(the parts of .* do not fit"),
        ("lokr", {"alpha": 16}, "alpha=16 with r=4: peft 0.12 leaves LoKr's alpha out"),
        ("lokr", {"peft_type": "LOHA"}, "has tensors other than those of LoHa"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    method: str, changes: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    adapters.save_adapter(ours(method, tiny_decoder(tiny_config())), tmp_path)
    edited(tmp_path, **changes)
    with pytest.raises(UserError, match=problem):
        adapters.load_adapter(tiny_decoder(tiny_config()), tmp_path)


def test_damaged_tensors_are_refused(tmp_path: Path) -> None:
    for method in METHODS:
        adapters.save_adapter(ours(method, tiny_decoder(tiny_config())), tmp_path / method)
        state = load_file(tmp_path / method / WEIGHTS)
        name = next(name for name in state if ".layers.1." in name)
        state[name].view(-1)[0] = float("nan")
        save_file(state, tmp_path / method / WEIGHTS)
        with pytest.raises(UserError, match="non-finite values"):
            adapters.load_adapter(tiny_decoder(tiny_config()), tmp_path / method)
        with pytest.raises(UserError, match=r"does not have|in the adapter and|columns"):
            adapters.load_adapter(tiny_decoder(tiny_config("qwen")), tmp_path / method)
    state = {name: t for name, t in load_file(tmp_path / "vera" / WEIGHTS).items() if "vera_A" not in name}
    save_file(state, tmp_path / "vera" / WEIGHTS)
    with pytest.raises(UserError, match="without its projections A and B"):
        adapters.load_adapter(tiny_decoder(tiny_config()), tmp_path / "vera")


def test_another_shape_cannot_be_continued(tmp_path: Path) -> None:
    for method in METHODS:
        adapters.save_adapter(ours(method, tiny_decoder(tiny_config())), tmp_path / method)
    wrong: dict[str, tuple[dict[str, Any], str]] = {
        "vera": ({"seed": 6}, "its VeRA differs: seed is 5 there and 6 here. Give seed=5"),
        "loha": (
            {"alpha": 4.0, "rank": 2},
            "rank is 4 there and 2 here, alpha is 8 there and 4 here. Give rank=4 alpha=8",
        ),
        "lokr": ({"lokr_factor": 8}, "its LoKr has other parts of .*Give lokr_factor="),
    }
    for method, (keys, problem) in wrong.items():
        settings, adapter = recipe(method=method, **{**KEYS[method], **keys}), adapters.read(tmp_path / method)
        with pytest.raises(UserError, match=problem):
            check_continued(adapter, settings)


def check_continued(adapter: Any, settings: Any) -> None:
    """As FROM= does: by the keys, then by the shapes."""
    adapters.check_start(adapter, settings)
    adapters.check_targets(adapter, settings, tiny_config())
