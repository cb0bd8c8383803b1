"""Adapters written here load in stock peft and the other way round, with equal logits; A and B are float32; equal files."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from tests.support.oracles import llama, modelscope_qwen, tiny_checkpoint, tiny_config, tiny_decoder
from train.common.errors import UserError
from train.common.files import read_json
from train.config.recipe import Recipe
from train.model import lora
from train.model.decoder import Decoder, linear_names
from train.model.int4_linear import Int4Linear
from train.model.layouts import DecoderConfig

IDS = torch.arange(3, 40)[None]


def recipe(**changes: Any) -> Recipe:
    return Recipe(**{"model": "Qwen/tiny", "rank": 4, "alpha": 8.0, "dropout": 0.0, **changes})


def randomize(model: nn.Module) -> None:
    """Give every A and B random values, as if the adapter were trained."""
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.3)


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


class StockConfig(DecoderConfig):
    """The decoder's config with what stock peft asks every causal model for."""

    model_type = "qwen3"


def reference(layout: str, decoder: Decoder) -> nn.Module:
    """The stock model with the same weights."""
    if layout == "qwen3":  # no reference in this environment: export/test_qwen3_transformers.py compares with one
        stock: Any = copy.deepcopy(decoder)
        stock.config = StockConfig(**decoder.config.to_dict())
        stock.prepare_inputs_for_generation = lambda *args, **kwargs: {}  # peft looks whether there is one
        return stock  # type: ignore[no-any-return]
    model = llama(decoder.config) if layout == "qwen2" else modelscope_qwen(decoder.config)
    missing, extra = model.load_state_dict(decoder.state_dict(), strict=False)
    assert not extra and all("o_proj.bias" in name or "inv_freq" in name for name in missing), (missing, extra)
    return model


LAYOUT = pytest.mark.parametrize("layout", ["qwen2", "qwen", "qwen3"])
RSLORA = pytest.mark.parametrize("rslora", [False, True])


@RSLORA
@LAYOUT
def test_ours_loads_in_stock_peft(layout: str, rslora: bool, tmp_path: Path) -> None:
    decoder = tiny_decoder(tiny_config(layout))
    stock = reference(layout, decoder)
    plain = logits(decoder)
    ours = lora.attach(decoder, recipe(rslora=rslora))
    randomize(ours)
    lora.save_adapter(ours, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(stock, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-4)
    assert (logits(ours) - plain).abs().max() > 0.1, "the adapter changes nothing: this test would prove nothing"


@RSLORA
@LAYOUT
def test_stock_pefts_loads_here(layout: str, rslora: bool, tmp_path: Path) -> None:
    decoder = tiny_decoder(tiny_config(layout))
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=list(linear_names(layout)))
    config.use_rslora = rslora
    theirs = get_peft_model(reference(layout, decoder), config)
    randomize(theirs)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    ours = lora.load_adapter(decoder, tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    assert not lora.trainable(ours)


@LAYOUT
def test_on_int4_the_logits_are_those_of_stock_peft_on_the_dequantised_base(layout: str, tmp_path: Path) -> None:
    from train.model.loading import load

    decoder = load(tiny_checkpoint(tmp_path / "base", tiny_config(layout), int4=True), torch.float32)
    dense = tiny_decoder(tiny_config(layout))
    state = {name: p for name, p in decoder.state_dict().items() if name in dense.state_dict()}
    for name, module in decoder.named_modules():
        if isinstance(module, Int4Linear):
            state[f"{name}.weight"] = module.dequantized(torch.float32)
    dense.load_state_dict(state)
    stock = reference(layout, dense)
    ours = lora.attach(decoder, recipe())
    randomize(ours)
    lora.save_adapter(ours, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(stock, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 4, 4096])
def test_gradients_reach_every_parameter_on_int4(tokens: int, tmp_path: Path) -> None:
    from train.model.loading import load

    model = lora.attach(load(tiny_checkpoint(tmp_path / "base", tiny_config(), int4=True), torch.float32), recipe())
    randomize(model)
    ids = torch.randint(0, 300, (1, tokens + 1), generator=torch.Generator().manual_seed(tokens))
    model(input_ids=ids, labels=ids).loss.backward()
    for name, p in lora.trainable(model).items():
        assert p.grad is not None and p.grad.isfinite().all(), name
        # With one token the softmax has one term: no gradient
        no_gradient = tokens == 1 and ("q_proj" in name or "k_proj" in name)
        assert no_gradient or p.grad.any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_and_b_are_float32_on_any_base(dtype: torch.dtype) -> None:
    in_lora: list[tuple[torch.dtype, torch.dtype]] = []
    model = lora.attach(tiny_decoder(tiny_config()).to(dtype), recipe())
    randomize(model)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    layer.lora_A["default"].register_forward_hook(lambda m, x, y: in_lora.append((x[0].dtype, y.dtype)))
    out: list[torch.dtype] = []
    layer.register_forward_hook(lambda m, x, y: out.append(y.dtype))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert in_lora == [(torch.float32, torch.float32)] and out == [dtype]
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.any() for p in lora.trainable(model).values())


def test_a_depends_on_the_seed_and_its_name_alone() -> None:
    def initial(seed: int, noise: int) -> dict[str, Tensor]:
        model = tiny_decoder(tiny_config())
        torch.manual_seed(noise)
        return {name: p.detach() for name, p in lora.trainable(lora.attach(model, recipe(seed=seed))).items()}

    first, again, other = initial(1, 10), initial(1, 11), initial(2, 10)
    a = [name for name in first if ".lora_A." in name]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in a)
    assert all(not first[name].any() for name in first if ".lora_B." in name)
    assert first[a[0]].abs().max() <= 1 / 8 and first[a[0]].std() > 0.05, "Kaiming: uniform in ±1/sqrt(64)"


def test_equal_adapters_are_equal_bytes_with_no_path_in_them(tmp_path: Path) -> None:
    for name in ("one", "two"):
        model = lora.attach(tiny_decoder(tiny_config()), recipe())
        randomize(model)
        lora.save_adapter(model, tmp_path / name)
    for file in (lora.CONFIG, lora.WEIGHTS):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert '"base_model_name_or_path": "Qwen/tiny"' in (tmp_path / "one" / lora.CONFIG).read_text()
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == [lora.CONFIG, lora.WEIGHTS]


@LAYOUT
def test_the_config_has_the_fields_of_stock_peft(layout: str, tmp_path: Path) -> None:
    """And the parameters are called as peft's, so checkpoints of runs that trained peft's layers still load."""
    ours = lora.attach(tiny_decoder(tiny_config(layout)), recipe(dropout=0.1))
    lora.save_adapter(ours, tmp_path)
    keys = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": list(linear_names(layout))}
    stock = LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path="Qwen/tiny", inference_mode=True, **keys)
    expected = {name: sorted(v) if isinstance(v, set) else v for name, v in stock.to_dict().items()}
    assert read_json(tmp_path / lora.CONFIG) == expected
    theirs = get_peft_model(tiny_decoder(tiny_config(layout)), LoraConfig(**keys))
    assert {name: p.shape for name, p in lora.trainable(theirs).items()} == {
        name: p.shape for name, p in lora.trainable(ours).items()
    }
    assert list(lora.trainable(theirs)) == list(lora.trainable(ours))


@LAYOUT
def test_gradients_of_rslora_are_those_of_stock_peft(layout: str, tmp_path: Path) -> None:
    """And not those of plain LoRA with the same alpha: its factor is half of this one, and the rank is four."""
    grads = []
    for rslora in (True, False):
        ours = lora.attach(tiny_decoder(tiny_config(layout)), recipe(rslora=rslora))
        randomize(ours)
        ours(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({name: p.grad for name, p in lora.trainable(ours).items()})
    keys = {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": list(linear_names(layout))}
    theirs = get_peft_model(tiny_decoder(tiny_config(layout)), LoraConfig(**keys))
    randomize(theirs)
    theirs(input_ids=IDS, labels=IDS).loss.backward()
    expected = lora.trainable(theirs)
    assert expected.keys() == grads[0].keys()
    for name, p in expected.items():
        torch.testing.assert_close(grads[0][name], p.grad, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max()), msg=name)
        assert not torch.allclose(grads[1][name], p.grad, rtol=1e-2)


def test_delta_is_what_the_adapter_adds(tmp_path: Path) -> None:
    decoder = tiny_decoder(tiny_config("qwen"))
    merged = copy.deepcopy(decoder)
    model = lora.attach(decoder, recipe(targets="c_attn,c_proj"))
    randomize(model)
    lora.save_adapter(model, tmp_path)
    changes = lora.delta(tmp_path)
    assert sorted(changes) == sorted(
        f"transformer.h.{n}.{m}" for n in (0, 1) for m in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")
    )
    for name, (a, b, scale) in changes.items():
        merged.get_submodule(name).weight.data += scale * (b @ a)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)


def test_an_unknown_target_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no linear is called q_proj in layout qwen.*c_attn, c_proj, w2, w1"):
        lora.targets("qwen", "q_proj,w1")
    assert lora.targets("qwen2", "v_proj, q_proj") == ["q_proj", "v_proj"]


def remove_weights(folder: Path) -> None:
    (folder / lora.WEIGHTS).unlink()


def cut_off(folder: Path) -> None:
    (folder / lora.WEIGHTS).write_bytes((folder / lora.WEIGHTS).read_bytes()[:-5])


def set_dora(folder: Path) -> None:
    (folder / lora.CONFIG).write_text(
        (folder / lora.CONFIG).read_text().replace('"use_dora": false', '"use_dora": true')
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [(remove_weights, "no adapter there"), (cut_off, "damaged"), (set_dora, "DoRA, and no lengths")],
)
def test_a_bad_adapter_is_refused(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    lora.save_adapter(lora.attach(tiny_decoder(tiny_config()), recipe()), tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        lora.load_adapter(tiny_decoder(tiny_config()), tmp_path)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    lora.save_adapter(lora.attach(tiny_decoder(tiny_config()), recipe()), tmp_path)
    with pytest.raises(UserError, match="trained on another model"):
        lora.load_adapter(tiny_decoder(tiny_config("qwen")), tmp_path)
    with pytest.raises(UserError, match="trained on another model"):
        lora.load_adapter(tiny_decoder(tiny_config(intermediate_size=96)), tmp_path)
