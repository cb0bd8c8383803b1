"""The merge: every number, every file, the base untouched, and the plain models that load it."""

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.torch import load_file, save_file

from tests.support.oracles import llama, modelscope_qwen, tiny_checkpoint, tiny_config
from tests.support.runs import tiny_run
from train.commands import infer
from train.commands.export import Options, run
from train.common.errors import UserError
from train.common.files import read_json, sha256, write_json
from train.data.chat_template import prompt
from train.data.formats import Turn
from train.evaluation import parity
from train.export import merge
from train.model import lora
from train.model.layouts import DecoderConfig, read_config
from train.model.loading import load
from train.model.tokenizer import load_tokenizer
from train.ops.gptq import unpack_rows, zeros_of

IDS = torch.tensor([[72, 101, 108, 108, 111, 32, 119, 111, 114]])
TOKENS = {"qwen.tiktoken", "tokenizer_config.json"}
FILES = {"config.json", "generation_config.json", "manifest.json", "model.safetensors", *TOKENS}


def export(folder: Path, **options: object) -> Path:
    root = folder.parent.parent
    run(Options(run=folder.name, models=str(root / "models"), runs=str(root / "runs"), **options))  # type: ignore[arg-type]
    return Path(options.get("out", folder / "merged"))  # type: ignore[arg-type]


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def merged_state(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def oracle(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight of base + adapter in float64, written out anew: unpack, subtract, scale, add."""
    base = folder.parent.parent / "models" / "base-Int4"
    state, wanted = load_file(base / "model.safetensors"), {}
    delta = lora.delta(folder / "adapter")
    for name, tensor in state.items():
        module, _, part = name.rpartition(".")
        if part == "qweight":
            codes, group = unpack_rows(tensor), state[f"{module}.g_idx"].long()
            zeros = zeros_of(state[f"{module}.qzeros"], tensor.shape[1])
            weight = ((codes - zeros[group]).double() * state[f"{module}.scales"].double()[group]).T
        elif part in ("scales", "qzeros", "g_idx"):
            continue
        else:
            weight = tensor.double()
        if part in ("qweight", "weight") and module in delta:
            A, B, scale = delta[module]
            weight = weight + scale * (B.double() @ A.double())
        wanted[f"{module}.weight" if part == "qweight" else name] = weight
    return wanted


def ulp(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance from |x| to the next number of `dtype`, as float64."""
    rounded = x.abs().to(dtype)
    return (
        torch.nextafter(rounded.float(), torch.tensor(torch.inf)).double() - rounded.double()
        if dtype is torch.float32
        else ((rounded.view(torch.int16) + 1).view(dtype).double() - rounded.double())
    )


@pytest.mark.parametrize("layout", ["qwen2", "qwen"])
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_every_tensor_is_within_one_ulp_of_float64(tmp_path: Path, layout: str, name: str) -> None:
    folder, dtype = tiny_run(tmp_path, layout), getattr(torch, name)
    state, wanted = merged_state(export(folder, dtype=name)), oracle(folder)
    assert state.keys() == wanted.keys()
    for key, tensor in state.items():
        assert tensor.dtype is dtype
        assert ((tensor.double() - wanted[key]).abs() <= ulp(wanted[key], dtype)).all(), key
    changed = [key for key in state if key.removesuffix(".weight") in lora.delta(folder / "adapter")]
    assert len(changed) == {"qwen2": 14, "qwen": 10}[layout]


def test_the_base_is_untouched_and_the_files_are_exact(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path, "qwen")
    base = tmp_path / "models" / "base-Int4"
    (base / "modeling_qwen.py").write_bytes(b"raise SystemExit('never run')\r\n")
    (base / "LICENSE").write_text("theirs")
    (base / "quantize_config.json").write_text("{}")
    (base / "README.md").write_text("about another model")
    before, adapter = hashes(base), hashes(folder / "adapter")
    out = export(folder)
    assert hashes(base) == before and hashes(folder / "adapter") == adapter
    assert {p.name for p in out.iterdir()} == FILES | {"modeling_qwen.py", "LICENSE"}
    for name in ("modeling_qwen.py", "qwen.tiktoken", "LICENSE", "generation_config.json"):
        assert sha256(out / name) == before[name]
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []  # nothing half-written is left


def test_config_is_the_base_s_without_its_quantisation(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path, "qwen")
    published = read_json(tmp_path / "models" / "base-Int4" / "config.json")
    written = read_json(export(folder, dtype="bf16") / "config.json")
    published.pop("quantization_config")
    assert written == published | {"torch_dtype": "bfloat16", "bf16": True, "fp16": False, "fp32": False}


@pytest.mark.parametrize(("layout", "other"), [("qwen2", ""), ("qwen", ""), ("qwen", "qwen2"), ("qwen2", "qwen")])
@pytest.mark.parametrize(("template", "system"), [("chatml", 'Be "brief". 好'), ("chatml", ""), ("plain", "Be brief.")])
def test_the_prompt_of_the_training_is_the_export_s(
    tmp_path: Path, layout: str, other: str, template: str, system: str, capsys: Any
) -> None:
    folder, base = tiny_run(tmp_path, layout), tmp_path / "models" / "base-Int4"
    write_json(base / "tokenizer_config.json", {"chat_template": "the base's own", "model_max_length": 77})
    (base / "chat_template.jinja").write_text("the base's own")
    record = read_json(folder / "run.json")
    record["recipe"] |= {"template": template, "system": system}
    write_json(folder / "run.json", record)
    out = export(folder, layout=other)
    assert not (out / "chat_template.jinja").exists()
    settings = read_json(out / "tokenizer_config.json")
    assert other or settings["model_max_length"] == 77
    turns = [Turn("user", "One?\nTwo\nthree"), Turn("assistant", "Yes."), Turn("user", "四?")]
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    written = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(settings["chat_template"])
    ours = load_tokenizer(base)
    for given, own in (([], system), ([{"role": "system", "content": "Another."}], "Another.")):
        expected = ours.decode(prompt(turns, ours, own, template), skip_control=False)
        assert written.render(messages=[*given, *messages], add_generation_prompt=True) == expected
    assert (f"{template}, system message {system!r}" if system else "no system message") in capsys.readouterr().out
    chosen = infer.choose(infer.Options(model=str(out)))
    assert (chosen.recipe["system"], chosen.recipe["template"]) == (system, template)


def adapted(folder: Path) -> torch.nn.Module:
    base = load(folder.parent.parent / "models" / "base-Int4", torch.float32)
    return lora.load_adapter(base, folder / "adapter").eval()


@torch.no_grad()
def close(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return torch.allclose(a(IDS).logits, b(IDS).logits, atol=1e-4)


def test_qwen2_loads_strictly_into_the_plain_llama(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path, "qwen2")
    out = export(folder, dtype="float32")
    plain, state = llama(read_config(read_json(out / "config.json"))), merged_state(out)
    missing, extra = plain.load_state_dict(state, strict=False)
    # Tied head, no such bias
    assert not extra and all(n.endswith("o_proj.bias") or n == "lm_head.weight" for n in missing)
    assert close(adapted(folder), plain) and close(adapted(folder), load(out, torch.float32))


def test_qwen_loads_strictly_into_modelscope_s(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path, "qwen")
    out = export(folder, dtype="float32")
    plain, state = modelscope_qwen(read_config(read_json(out / "config.json"))), merged_state(out)
    missing, extra = plain.load_state_dict(state, strict=False)
    assert not extra and all("rotary" in n or "masked_bias" in n or n.endswith("attn.bias") for n in missing)
    assert close(adapted(folder), plain)


@pytest.mark.parametrize(("layout", "other"), [("qwen", "qwen2"), ("qwen2", "qwen")])
def test_another_layout_says_the_same(tmp_path: Path, layout: str, other: str) -> None:
    folder = tiny_run(tmp_path, layout)
    out = export(folder, dtype="float32", layout=other)
    written = load(out, torch.float32)
    assert written.config.layout == other and close(adapted(folder), written)
    tokenizer = {"qwen2": {"tokenizer.json"}, "qwen": {"qwen.tiktoken"}}[other]
    assert {p.name for p in out.iterdir()} == (FILES - {"qwen.tiktoken"}) | tokenizer
    stops = read_json(out / "generation_config.json")["eos_token_id"]
    assert stops == ([258, 256] if other == "qwen2" else 256)


def test_float_linears_merge_too(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path, "qwen2", int4=False)
    state, wanted = merged_state(export(folder, dtype="float32")), oracle(folder)
    assert all(torch.equal(state[n], wanted[n].float()) for n in wanted) and state.keys() == wanted.keys()


def with_biases(folder: Path, value: float) -> None:
    """Give every Int4 linear that has no bias one of `value`, as published GPTQ files do with zeros."""
    file = folder / "model.safetensors"
    state = load_file(file)
    for name in [n for n in state if n.endswith(".qweight")]:
        state.setdefault(name.replace("qweight", "bias"), torch.full((state[name].shape[1],), value).half())
    save_file(state, file, metadata={"format": "pt"})
    record = folder.parent.parent / "runs" / "tiny" / "run.json"
    known = read_json(record)
    known["base"]["files"]["model.safetensors"] = sha256(file)  # it was trained on this file
    record.write_text(json.dumps(known))


@pytest.mark.parametrize("layout", ["qwen", "qwen2"])
def test_zero_biases_of_an_int4_file_are_dropped_and_others_refused(tmp_path: Path, layout: str) -> None:
    folder, base = tiny_run(tmp_path, layout), tmp_path / "models" / "base-Int4"
    plain = merged_state(export(folder))
    with_biases(base, 0.0)
    assert merged_state(export(folder)).keys() == plain.keys()
    tiny_run(tmp_path, layout)
    with_biases(base, 0.5)
    with pytest.raises(UserError, match="bias is not zero"):
        export(folder, out=str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_shards_and_their_index(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path)
    out = export(folder, dtype="float32", shard_size=0.0001)
    index = read_json(out / "model.safetensors.index.json")
    files = sorted(p.name for p in out.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 2
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in merged_state(out).values())
    assert close(adapted(folder), load(out, torch.float32))


def test_the_second_run_has_nothing_to_do_and_other_inputs_replace_it(tmp_path: Path, capsys: Any) -> None:
    folder = tiny_run(tmp_path)
    first = hashes(export(folder))
    assert "nothing to do" not in capsys.readouterr().out
    assert hashes(export(folder)) == first
    assert "nothing to do" in capsys.readouterr().out
    assert merged_state(export(folder, dtype="float32")).popitem()[1].dtype is torch.float32


def test_two_exports_are_equal_bytes(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path)
    a, b = export(folder), export(folder, out=str(tmp_path / "again"))
    assert hashes(a) == hashes(b)


def test_onto_a_float_checkpoint(tmp_path: Path, capsys: Any) -> None:
    folder = tiny_run(tmp_path, "qwen2")
    tiny_checkpoint(tmp_path / "models" / "base", tiny_config("qwen2", tie_word_embeddings=True))
    out = export(folder, onto="base", dtype="float32")
    stock = lora.load_adapter(load(tmp_path / "models" / "base", torch.float32), folder / "adapter").eval()
    assert close(stock, load(out, torch.float32)) and not close(adapted(folder), load(out, torch.float32))
    found = read_json(out / "manifest.json")["parity"]
    assert found["against"] == "the adapter on base" and found["adapter_on_int4"]["divergence"] > found["divergence"]
    assert "against the adapter on the Int4 base" in capsys.readouterr().out


def test_the_check_holds_one_model_at_a_time(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    from train.commands import export as verb

    folder, alive = tiny_run(tmp_path), list[weakref.ref[Any]]()

    def loaded(*how: Any, **more: Any) -> Any:
        assert [ref for ref in alive if ref() is not None] == []
        model = load(*how, **more)
        alive.append(weakref.ref(model))
        return model

    tiny_checkpoint(tmp_path / "models" / "base", tiny_config("qwen2", tie_word_embeddings=True))
    monkeypatch.setattr(verb, "load", loaded)
    gc.disable()  # at its own times it would hide what is forgotten
    try:
        export(folder, onto="base")
    finally:
        gc.enable()
    assert len(alive) == 3
    said = capsys.readouterr().out
    assert "computed in float32 on cpu" in said and "against the adapter on base, computed in float32: " in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"onto": "base-Int4"}, "quantised"),
        ({"onto": "nowhere"}, "no folder"),
        ({"onto": "wider"}, "intermediate_size 192"),
        ({"shard_size": 0}, "shard_size"),
        ({"verify": 0}, "verify"),
        ({"run": ""}, "which run"),
        ({"run": "absent"}, "does not exist"),
    ],
)
def test_refusals_leave_nothing(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = tiny_run(tmp_path)
    tiny_checkpoint(tmp_path / "models" / "wider", tiny_config("qwen2", intermediate_size=192))
    places = {"run": "tiny", "models": str(tmp_path / "models"), "runs": str(tmp_path / "runs")}
    with pytest.raises(UserError, match=message):
        run(Options(**{**places, **changes}))
    assert not (folder / "merged").exists()


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    folder, mine = tiny_run(tmp_path), tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("keep me")
    with pytest.raises(UserError, match="no export of this program"):
        export(folder, out=str(mine))
    assert (mine / "letter.txt").read_text() == "keep me"


def test_a_merge_that_answers_otherwise_is_not_written(tmp_path: Path, monkeypatch: Any) -> None:
    """The adapter added with the wrong sign: the check sees it and nothing stays."""
    folder = tiny_run(tmp_path)
    right = merge.lora.delta
    monkeypatch.setattr(merge.lora, "delta", lambda f: {n: (A, -B, s) for n, (A, B, s) in right(f).items()})
    with pytest.raises(UserError, match="does not answer as the adapter"):
        export(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["adapter", "losses.jsonl", "run.json"]


def test_a_merge_without_the_adapter_is_not_written(tmp_path: Path, monkeypatch: Any) -> None:
    folder = tiny_run(tmp_path, scale=0.05)
    monkeypatch.setattr(merge, "add", lambda weight, change: weight)
    with pytest.raises(UserError, match="does not answer"):
        export(folder)


def test_another_base_than_the_one_trained_on_is_refused(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path)
    tiny_checkpoint(tmp_path / "models" / "base-Int4", tiny_config(tie_word_embeddings=True), int4=True, seed=5)
    with pytest.raises(UserError, match=r"not what run 'tiny' was trained on: model\.safetensors differ"):
        export(folder)


def test_a_full_disk_is_said_before(tmp_path: Path, monkeypatch: Any) -> None:
    from train.commands import export as verb

    folder = tiny_run(tmp_path)
    monkeypatch.setattr(verb, "free_bytes", lambda path: 10**6)
    with pytest.raises(UserError, match="GB of disk"):
        export(folder)


def test_too_large_for_float16_is_said(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path, scale=1e6)
    with pytest.raises(UserError, match="DTYPE=bfloat16"):
        export(folder)


def test_gone_or_changed_data_falls_back_to_the_built_in_list(tmp_path: Path, capsys: Any) -> None:
    folder = tiny_run(tmp_path)
    export(folder)
    assert "4 conversations of talk.jsonl" in capsys.readouterr().out
    (tmp_path / "talk.jsonl").write_text('{"instruction": "a", "input": "", "output": "b"}\n')
    export(folder, out=str(tmp_path / "b"))
    assert "8 conversations of the built-in list" in capsys.readouterr().out


def test_compare_measures_what_it_says() -> None:
    """Two heads over known hidden states: agreement and KL by hand."""
    hidden, head = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    flipped = torch.tensor([[2.0, 0.0], [0.0, -1.0], [0.0, 0.0]])
    found = parity.compare(parity.States(hidden, head), parity.States(hidden, flipped))
    p, q = torch.tensor([0.0, 1.0, 0.0]).double().softmax(0), torch.tensor([0.0, -1.0, 0.0]).double().softmax(0)
    assert found.tokens == 2 and found.agreement == 0.5
    assert found.divergence == pytest.approx(float((p * (p.log() - q.log())).sum() / 2))


def test_rows_that_share_a_pass_do_not_see_each_other(tmp_path: Path) -> None:
    tiny_run(tmp_path, "qwen", seq_length=1024)
    model = load(tmp_path / "models" / "base-Int4", torch.float32)
    rows = [([5, 6, 7, 8], [0, 0, 1, 1]), ([9, 10, 11], [1, 1, 1]), ([12] * 600, [0] * 599 + [1])]
    assert [len(pack) for pack in parity.packs(rows)] == [2, 1]
    together = parity.states(model, rows[:2]).hidden
    alone = torch.cat([parity.states(model, [row]).hidden for row in rows[:2]])
    assert together.shape[0] == 4 and torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_the_size_is_known_before(tmp_path: Path, tied: bool) -> None:
    folder = tiny_run(tmp_path, "qwen2", tie_word_embeddings=tied)
    out = export(folder, dtype="float32")
    job = merge.Job(tmp_path / "models" / "base-Int4", folder / "adapter", torch.float32, "qwen2", 10**9)
    assert merge.size(job) == sum(t.nbytes for t in merged_state(out).values())


def test_one_differing_token_is_a_tie_two_are_not() -> None:
    assert parity.Parity(40, 39 / 40, 1e-6).holds(torch.float16)
    assert not parity.Parity(40, 38 / 40, 1e-6).holds(torch.float16)
    assert not parity.Parity(4000, 0.998, 1e-6).holds(torch.float32)
    assert not parity.Parity(40, 1.0, float("nan")).holds(torch.float16)


def test_tiny_config_round_trip(tmp_path: Path) -> None:
    """The written config is read to the same architecture."""
    folder = tiny_run(tmp_path, "qwen2")
    config = read_config(json.loads((export(folder) / "config.json").read_text()))
    assert (
        isinstance(config, DecoderConfig)
        and config.to_dict() == tiny_config("qwen2", tie_word_embeddings=True).to_dict()
    )
