"""Adapters of other programs: computed as stock peft does, or refused by the name of the setting. Never read as plain."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from tests.support.oracles import llama, tiny_checkpoint, tiny_config, tiny_decoder
from train.common.errors import UserError
from train.common.files import read_json, write_json
from train.config.recipe import Recipe
from train.export import merge
from train.model import lora
from train.model.adapter_file import CONFIG, PICKLED, WEIGHTS, read_adapter
from train.model.loading import load

ASSETS = Path(__file__).parents[1] / "assets"
CURRENT = ASSETS / "adapters" / "peft-0.21-rslora-patterns"
IDS = torch.arange(3, 40)[None]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def stock_base() -> nn.Module:
    """The tiny decoder's weights in transformers' own model."""
    model = llama(tiny_config())
    model.load_state_dict(tiny_decoder(tiny_config()).state_dict(), strict=False)
    return model


def stock_adapter(folder: Path, **settings: Any) -> PeftModel:
    """An adapter made and saved by stock peft, with random A and B."""
    keys = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 16, "target_modules": LINEARS, **settings}
    model = get_peft_model(stock_base(), LoraConfig(**keys))
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.data.add_(torch.randn(p.shape, generator=generator) * 0.2)
    model.save_pretrained(str(folder))
    return model


def change(folder: Path, **settings: Any) -> None:
    write_json(folder / CONFIG, {**read_json(folder / CONFIG), **settings})


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    stock_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


# --- computed ---------------------------------------------------------------------------------------------------------

COMPUTED = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rslora, r 64": {"use_rslora": True, "r": 64},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 64, "layers.1.mlp.down_proj": 2}},
    "rank_pattern": {"rank_pattern": {"layers.0.self_attn.q_proj": 8, "v_proj": 2}},
    "patterns, rslora": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"k_proj": 3}, "use_rslora": True},
    "layers_to_transform": {"layers_to_transform": [1]},
    "a regular expression": {"target_modules": r".*\.mlp\.(up|down)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "no task": {"task_type": None},
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_what_stock_peft_writes_is_computed_as_it_does(kind: str, tmp_path: Path) -> None:
    expected = logits(stock_adapter(tmp_path / "adapter", **COMPUTED[kind]))
    ours = lora.load_adapter(tiny_decoder(tiny_config()), tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4)
    assert not lora.trainable(ours)

    merged = tiny_decoder(tiny_config())
    for name, (a, b, scale) in lora.delta(tmp_path / "adapter").items():
        merged.get_submodule(name).weight.data += scale * (b @ a)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(stock_base())).abs().max() > 0.5, "the adapter changes nothing: proves nothing"


def test_an_adapter_of_current_peft_gives_its_logits(tmp_path: Path) -> None:
    base = load(tiny_checkpoint(tmp_path / "base", tiny_config()), torch.float32)
    ours = lora.load_adapter(base, CURRENT)
    expected = load_file(CURRENT / "expected.safetensors")["last_logits"]
    torch.testing.assert_close(logits(ours)[0, -1], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("file", ["cases/adapter_config-peft-0.18.json", f"adapters/{CURRENT.name}/{CONFIG}"])
def test_keys_of_newer_pefts_that_are_not_set_are_read(file: str, plain: Path) -> None:
    before = lora.delta(plain)
    newer = {**read_json(ASSETS / file), "use_rslora": False, "rank_pattern": None, "alpha_pattern": {}}
    write_json(plain / CONFIG, {**newer, "r": 4, "lora_alpha": 16, "a_key_of_tomorrow": None, "another": []})
    after = lora.delta(plain)
    assert before.keys() == after.keys()
    assert all(torch.equal(x, y) for name in before for x, y in zip(before[name][:2], after[name][:2], strict=True))
    assert {scale for *_, scale in after.values()} == {4.0}
    lora.load_adapter(tiny_decoder(tiny_config()), plain)


def test_rslora_is_not_read_as_plain(plain: Path) -> None:
    write_json(plain / CONFIG, read_json(ASSETS / "cases/adapter_config-rslora.json"))
    assert {scale for *_, scale in lora.delta(plain).values()} == {8.0}  # 16 / sqrt(4)


def test_settings_of_training_and_origin_change_nothing(plain: Path) -> None:
    """auto_mapping is set by Unsloth; stock peft would import what it names."""
    before = lora.delta(plain)
    mapping = {"base_model_class": "Qwen2ForCausalLM", "parent_library": "no.such.module", "unsloth_fixed": True}
    change(plain, auto_mapping=mapping, lora_dropout=0.3, revision="main", eva_config={"rho": 2.0}, peft_version="1.0")
    change(plain, ensure_weight_tying=True, init_lora_weights="eva", qalora_group_size=16, runtime_config={"x": 1})
    after = lora.delta(plain)
    assert all(torch.equal(before[name][1], after[name][1]) and before[name][2] == after[name][2] for name in before)


def test_an_adapter_of_the_head_is_merged(tmp_path: Path) -> None:
    """Not of a tied one, which is the embedding too: that is refused before anything is written."""
    for tied in (False, True):
        base = tiny_checkpoint(tmp_path / f"base-{tied}", tiny_config(tie_word_embeddings=tied))
        if tied:  # a published file may store the head a second time
            state = load_file(base / "model.safetensors")
            save_file(
                {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, base / "model.safetensors"
            )
    folder = tmp_path / "adapter"
    model = stock_adapter(folder, target_modules=["lm_head"])
    state = load_file(folder / WEIGHTS)
    save_file({name: t for name, t in state.items() if ".lora_" in name}, folder / WEIGHTS)
    job = merge.MergeJob(tmp_path / "base-False", folder, torch.float32, "qwen2", 1 << 30)
    merged = {name: t for block in merge.merged_blocks(job) for name, t in block.items()}
    layer: Any = model.get_submodule("base_model.model.lm_head")
    expected = layer.base_layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(merged["lm_head.weight"], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="has no lm_head, which the adapter"):
        list(merge.merged_blocks(merge.MergeJob(tmp_path / "base-True", folder, torch.float32, "qwen2", 1 << 30)))


# --- refused by name --------------------------------------------------------------------------------------------------

WRITTEN_BY_PEFT: dict[str, tuple[dict[str, Any], str]] = {
    "pissa": ({"init_lora_weights": "pissa"}, 'init_lora_weights="pissa": it changed the weights of the base'),
    "pissa_niter": ({"init_lora_weights": "pissa_niter_4"}, 'init_lora_weights="pissa_niter_4": it changed'),
    "olora": ({"init_lora_weights": "olora"}, 'init_lora_weights="olora": it changed'),
    "bias=all": ({"bias": "all"}, 'bias="all": it changes biases'),
    "bias=lora_only": ({"bias": "lora_only"}, 'bias="lora_only": it changes biases'),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, r'modules_to_save=\["lm_head"\]: it holds whole modules'),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "tensors other than A and B.*embed_tokens"),
}


def refused(folder: Path, message: str) -> None:
    """By both readers: export's, and the one that loads it on a base."""
    for attempt in (lambda: lora.delta(folder), lambda: lora.load_adapter(tiny_decoder(tiny_config()), folder)):
        with pytest.raises(UserError, match=message) as caught:
            attempt()
        assert str(folder) in str(caught.value)


@pytest.mark.parametrize("kind", WRITTEN_BY_PEFT)
def test_what_stock_peft_writes_and_is_not_computed_is_refused(kind: str, tmp_path: Path) -> None:
    settings, message = WRITTEN_BY_PEFT[kind]
    stock_adapter(tmp_path / "adapter", **settings)
    refused(tmp_path / "adapter", message)


NEWER: dict[str, tuple[Any, str]] = {
    "alora_invocation_tokens": ([5, 6], "aLoRA acts only on"),
    "arrow_config": ({"top_k": 3}, "Arrow chooses"),
    "bias": ("some", "it changes biases"),
    "fan_in_fan_out": (True, "stores its weights transposed"),
    "kasa_config": ({"beta": 0.0001}, "this setting is not known here"),
    "layer_replication": ([[0, 2], [1, 2]], "it repeats blocks"),
    "lora_bias": (True, "B has a bias"),
    "megatron_config": ({"x": 1}, "Megatron"),
    "monteclora_config": ({"x": 1}, "this setting is not known here"),
    "target_parameters": (["mlp.gate_proj.weight"], "not linears"),
    "task_type": ("SEQ_CLS", "only CAUSAL_LM"),
    "trainable_token_indices": ([1, 2], "rows of the embedding"),
    "use_bdlora": ({"x": 1}, "this setting is not known here"),
    "use_qalora": (True, "QALoRA pools"),
    "velora_config": ({"x": 1}, "this setting is not known here"),
    "a_key_of_tomorrow": (0.5, "this setting is not known here"),
}


@pytest.mark.parametrize("key", NEWER)
def test_a_setting_that_is_not_computed_is_refused_by_name(key: str, plain: Path) -> None:
    value, reason = NEWER[key]
    change(plain, **{key: value})
    refused(plain, f"\n  {key}=.*{reason}")


@pytest.mark.parametrize("init", ["corda", "lora_ga", "loftq", "PiSSA", "mica", "an_init_of_tomorrow", 2])
def test_an_initialisation_that_changes_the_base_or_is_unknown_is_refused(init: Any, plain: Path) -> None:
    change(plain, init_lora_weights=init)
    refused(plain, f"init_lora_weights={json.dumps(init)}: (it changed the weights|this initialisation is not known)")


def test_all_reasons_are_given_at_once_and_what_to_do(plain: Path) -> None:
    change(plain, fan_in_fan_out=True, bias="all", a_key_of_tomorrow=[1])
    refused(plain, r"fan_in_fan_out=(.|\n)*a_key_of_tomorrow=(.|\n)*bias=(.|\n)*merge_and_unload.*MODEL=")


def test_another_method_is_named(tmp_path: Path) -> None:
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    get_peft_model(stock_base(), config).save_pretrained(str(tmp_path / "ia3"))
    refused(tmp_path / "ia3", "peft_type is IA3")
    write_json(tmp_path / "ia3" / CONFIG, {"fine_tune_type": "lora", "num_layers": 8})  # MLX
    refused(tmp_path / "ia3", "peft_type is missing: this is not an adapter of peft")


def test_patterns_that_versions_of_peft_read_differently_are_refused(tmp_path: Path) -> None:
    """0.12 looks up alpha by the key that matched first, whichever pattern it is in; since 0.14 each has its own."""
    patterns = {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"layers.0.self_attn.q_proj": 64}}
    folder = tmp_path / "adapter"
    stock_adapter(folder, **patterns)
    refused(folder, "versions of peft disagree about model.layers.0.self_attn.q_proj, whose alpha is 16 or 64")
    change(folder, exclude_modules=None)  # a key of 0.14
    assert lora.delta(folder)["model.layers.0.self_attn.q_proj"][2] == 64 / 8
    names = {f"model.layers.{n}.self_attn.q_proj": alpha for n, alpha in ((0, 64), (1, 16))}
    change(folder, rank_pattern=dict.fromkeys(names, 8), alpha_pattern=names)
    assert lora.delta(folder)["model.layers.0.self_attn.q_proj"][2] == 64 / 8


# --- damaged, or not there --------------------------------------------------------------------------------------------


def test_a_pickle_gets_a_command_that_converts_it(plain: Path) -> None:
    expected = lora.delta(plain)
    torch.save(load_file(plain / WEIGHTS), plain / PICKLED)
    (plain / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"adapter_model\.bin, a pickle, which is not read here") as caught:
        read_adapter(plain)
    command = str(caught.value).splitlines()[-1].strip()
    assert command.startswith("python -c ")
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, cwd=plain, check=True)
    assert torch.equal(lora.delta(plain)["model.layers.1.mlp.up_proj"][1], expected["model.layers.1.mlp.up_proj"][1])


def test_what_is_not_an_adapter_says_what_it_is(tmp_path: Path, plain: Path) -> None:
    with pytest.raises(UserError, match="It holds a whole model: give that as MODEL="):
        read_adapter(tiny_checkpoint(tmp_path / "model", tiny_config()))
    outputs = tmp_path / "outputs"
    for step in (500, 1000):
        (outputs / f"checkpoint-{step}").mkdir(parents=True)
        (outputs / f"checkpoint-{step}" / CONFIG).touch()
    with pytest.raises(UserError, match="There are adapters in checkpoint-1000, checkpoint-500: name one"):
        read_adapter(outputs)
    with pytest.raises(
        UserError, match=r"no adapter there \(adapter_config.json and adapter_model.safetensors missing"
    ):
        read_adapter(tmp_path / "nothing")


def not_finite(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    state[sorted(state)[0]][0, 0] = float("nan")
    save_file(state, folder / WEIGHTS)


def no_b(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    del state[next(name for name in sorted(state) if ".lora_B." in name)]
    save_file(state, folder / WEIGHTS)


def text(content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / CONFIG).write_bytes(content)

    return write


def setting(**settings: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        change(folder, **settings)

    return write


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "NaN": (not_finite, r"model\.layers\.0\.mlp\.down_proj has non-finite values.*diverged"),
    "no B": (no_b, r"down_proj has no B of the same rank"),
    "another rank": (setting(r=8), r"the rank of model\.layers\.0\S* is 4, but adapter_config\.json says 8"),
    "no rank": (setting(r=None), "r=null: expected a whole number from 1"),
    "rank 0": (setting(r=0), "r=0: expected a whole number"),
    "alpha as text": (setting(lora_alpha="16"), 'lora_alpha="16": expected a number'),
    "rslora as text": (setting(use_rslora="false"), 'use_rslora="false": expected true or false'),
    "a pattern as a list": (setting(rank_pattern=["q_proj"]), r"rank_pattern=\[.*expected ranks by name"),
    "a pattern of text": (setting(alpha_pattern={"q_proj": "8"}), "alpha_pattern=.*expected alphas by name"),
    "no regular expression": (setting(rank_pattern={"q_proj(": 4}), "rank_pattern=.*expected ranks"),
    "empty": (text(b""), "the adapter is damaged"),
    "a comma": (text(b'{"r": 4,}'), "the adapter is damaged"),
    "a list": (text(b"[1]"), "not a JSON object"),
    "no UTF-8": (text(b'{"r": "\xff"}'), "the adapter is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(kind: str, plain: Path) -> None:
    damage, message = DAMAGE[kind]
    damage(plain)
    refused(plain, message)


# --- to start training from -------------------------------------------------------------------------------------------


def recipe(**changes: Any) -> Recipe:
    return Recipe(**{"model": "Qwen/tiny", "rank": 4, "alpha": 16.0, "dropout": 0.0, **changes})


@pytest.mark.parametrize(("settings", "alpha"), [({}, 16.0), ({"use_rslora": True}, 32.0)])
def test_training_starts_with_what_the_adapter_computes(settings: Any, alpha: float, tmp_path: Path) -> None:
    expected = logits(stock_adapter(tmp_path / "adapter", **settings))
    adapter = read_adapter(tmp_path / "adapter")
    lora.check_start(adapter, recipe(alpha=alpha))
    lora.check_targets(adapter, recipe(), tiny_config())
    model = lora.attach(tiny_decoder(tiny_config()), recipe(alpha=alpha))
    lora.copy_adapter(adapter, model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_another_scale_is_refused_with_the_alpha_to_give(tmp_path: Path) -> None:
    stock_adapter(tmp_path / "adapter", use_rslora=True, r=8)
    adapter = read_adapter(tmp_path / "adapter")
    message = r"alpha is 45\.254834 \(use_rslora with lora_alpha 16\) there and 16 here\. Give rank=8 alpha=45\.254834"
    with pytest.raises(UserError, match=message):
        lora.check_start(adapter, recipe(rank=8))
    lora.check_start(adapter, recipe(rank=8, alpha=45.254834))


@pytest.mark.parametrize("patterns", [{"rank_pattern": {"q_proj": 8}}, {"alpha_pattern": {"q_proj": 8}}])
def test_unequal_linears_are_refused(patterns: dict[str, Any], tmp_path: Path) -> None:
    stock_adapter(tmp_path / "adapter", **patterns)
    with pytest.raises(UserError, match=r"different ranks or scales.*alpha_pattern"):
        lora.check_start(read_adapter(tmp_path / "adapter"), recipe())


def test_patterns_that_give_all_linears_the_same_are_no_obstacle(tmp_path: Path) -> None:
    stock_adapter(tmp_path / "adapter", r=2, lora_alpha=8, rank_pattern={".*": 4}, alpha_pattern={".*": 16})
    lora.check_start(read_adapter(tmp_path / "adapter"), recipe())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, r"has none for model\.layers.*Give targets=q_proj,v_proj\."),
        ({"layers_to_transform": [1]}, r"has none for model\.layers\.0.*layers_to_transform.*MODEL="),
        ({"target_modules": ["lm_head", *LINEARS]}, r"also for lm_head\. .*never the head\. Merge"),
    ],
)
def test_other_linears_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    stock_adapter(tmp_path / "adapter", **settings)
    state = {name: t for name, t in load_file(tmp_path / "adapter" / WEIGHTS).items() if ".lora_" in name}
    save_file(state, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(UserError, match=message):
        lora.check_targets(read_adapter(tmp_path / "adapter"), recipe(), tiny_config())
