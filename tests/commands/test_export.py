"""`make export`: the prompt it writes, when there is nothing to do, what it replaces and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tests.support.exports import adapted, equal_logits, export, hashes, merged_state
from tests.support.oracles import tiny_checkpoint, tiny_config
from tests.support.runs import tiny_run
from train.commands.export import Options, run
from train.common.errors import UserError
from train.common.files import read_json, write_json
from train.data.rows.formats import Turn
from train.data.tokens.chat_template import prompt
from train.inference.trained import find_source
from train.model import lora
from train.model.folder import QWEN1_CODE
from train.model.loading import load
from train.model.tokenizer import load_tokenizer


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
    settings = read_json(out / "tokenizer_config.json")
    assert (out / "chat_template.jinja").read_text(encoding="utf-8") == settings["chat_template"]
    assert other or settings["model_max_length"] == 77
    turns = [Turn("user", "One?\nTwo\nthree"), Turn("assistant", "Yes."), Turn("user", "四?")]
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    template_in_file = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
        settings["chat_template"]
    )
    tokenizer = load_tokenizer(base)
    for first, used in (([], system), ([{"role": "system", "content": "Another."}], "Another.")):
        expected = tokenizer.decode(prompt(turns, tokenizer, used, template), skip_control=False)
        assert template_in_file.render(messages=[*first, *messages], add_generation_prompt=True) == expected
    assert (f"{template}, system message {system!r}" if system else "no system message") in capsys.readouterr().out
    chosen = find_source(Path("models"), Path("runs"), model=str(out))
    assert (chosen.recipe["system"], chosen.recipe["template"]) == (system, template)


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
    expected = lora.load_adapter(load(tmp_path / "models" / "base", torch.float32), folder / "adapter").eval()
    assert equal_logits(expected, load(out, torch.float32)) and not equal_logits(
        adapted(folder), load(out, torch.float32)
    )
    measured = read_json(out / "manifest.json")["parity"]
    assert (
        measured["against"] == "the adapter on base"
        and measured["adapter_on_int4"]["divergence"] > measured["divergence"]
    )
    assert "against the adapter on the base that was trained on" in capsys.readouterr().out


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
def test_a_refused_export_writes_nothing(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = tiny_run(tmp_path)
    tiny_checkpoint(tmp_path / "models" / "wider", tiny_config("qwen2", intermediate_size=192))
    options = {"run": "tiny", "models": str(tmp_path / "models"), "runs": str(tmp_path / "runs")}
    with pytest.raises(UserError, match=message):
        run(Options(**{**options, **changes}))
    assert not (folder / "merged").exists()


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    folder, mine = tiny_run(tmp_path), tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("keep me")
    with pytest.raises(UserError, match="no export of this program"):
        export(folder, out=str(mine))
    assert (mine / "letter.txt").read_text() == "keep me"


def test_another_base_than_the_one_trained_on_is_refused(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path)
    tiny_checkpoint(tmp_path / "models" / "base-Int4", tiny_config(tie_word_embeddings=True), int4=True, seed=5)
    with pytest.raises(UserError, match=r"not what run 'tiny' was trained on: model\.safetensors differ"):
        export(folder)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_qwen_1_s_switches_are_left_to_its_users_and_the_command_sets_the_right_one(
    tmp_path: Path, name: str, capsys: Any
) -> None:
    folder, base = tiny_run(tmp_path, "qwen"), tmp_path / "models" / "base-Int4"
    for code in QWEN1_CODE:
        (base / code).write_text("# published")
    config = read_json(export(folder, dtype=name) / "config.json")
    assert (config["bf16"], config["fp16"], config["fp32"]) == (False, False, False)
    switch = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}[name]
    output = capsys.readouterr().out
    assert f"trust_remote_code=True, {switch}=True)" in output
    assert "Qwen-1's own code" not in output


@pytest.mark.parametrize("layout", ["qwen", "qwen2"])
def test_code_that_the_config_names_and_that_is_not_there_is_told(tmp_path: Path, layout: str, capsys: Any) -> None:
    """A Qwen2 run in the layout of Qwen-1, and a Qwen-1 base that came without its code."""
    out = export(tiny_run(tmp_path, layout), layout="qwen")
    assert read_json(out / "config.json")["auto_map"]["AutoModelForCausalLM"] == "modeling_qwen.QWenLMHeadModel"
    output = capsys.readouterr().out
    assert f"modeling_qwen.py, qwen_generation_utils.py, tokenization_qwen.py are not in {out}" in output
    assert "LAYOUT=qwen2" in output
    assert "AutoModelForCausalLM" not in output, "no command that would fail"


@pytest.mark.parametrize(("layout", "other"), [("qwen3", "qwen"), ("qwen3", "qwen2"), ("qwen2", "qwen3")])
@pytest.mark.parametrize("kind", ["hf", "gptq"])
def test_a_layout_that_lacks_the_norms_of_the_heads_is_refused(
    tmp_path: Path, layout: str, other: str, kind: str
) -> None:
    folder = tiny_run(tmp_path, layout)
    with pytest.raises(UserError, match="only Qwen3 has a norm of each head of q and k"):
        export(folder, layout=other, format=kind)
    assert not (folder / "merged").exists() and not (folder / "gptq").exists()
