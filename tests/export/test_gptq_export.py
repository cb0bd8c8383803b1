"""FORMAT=gptq and FORMAT=adapter: unchanged codes, an adapter that adds what it added, and nothing half written."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.support.exports import IDS, adapted, equal_logits, export, hashes
from tests.support.runs import tiny_run
from train.commands.export import Options
from train.common.errors import UserError
from train.common.files import read_json, write_json
from train.config.options import build
from train.data.tokens.chat_template import chat_template
from train.export import adapter_export, gguf_export, gptq_export, merge
from train.export.adapter_export import write_adapter
from train.export.gptq_export import base_blocks, new_names, relaid, vllm_command
from train.export.model_card import CardSource, _training, base_id, languages, license_of, metadata
from train.model import lora
from train.model.layouts import convert_tensors
from train.model.loading import load, read_folder_config
from train.ops.gptq import unpack_rows


def card(folder: Path) -> dict[str, Any]:
    """The metadata of a folder's README.md."""
    _, head, _ = (folder / "README.md").read_text().split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(head)
    return found


@pytest.mark.parametrize(("layout", "to"), [("qwen", ""), ("qwen", "qwen"), ("qwen2", "")])
def test_base_and_adapter_are_the_trained_model(
    tmp_path: Path, layout: str, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_run(tmp_path, layout)
    export(folder, format="gptq", layout=to)
    made = folder / "gptq"
    assert read_folder_config(made / "base")[0].layout == (to or "qwen2")
    model = lora.load_adapter(load(made / "base", torch.float32), made / "adapter").eval()
    assert equal_logits(model, adapted(folder))
    assert not equal_logits(model, load(made / "base", torch.float32))
    out = capsys.readouterr().out
    assert "packed weights were read back and dequantised: equal to the base's, bit for bit" in out
    trust = " --trust-remote-code" if to == "qwen" else ""
    command = f"vllm serve base{trust} --enable-lora --max-lora-rank 8 --max-loras 1 --lora-modules tiny=adapter"
    assert command in (made / "README.md").read_text() and "--max-lora-rank 8" in out
    template = (made / "base" / "chat_template.jinja").read_text()
    assert template == chat_template("You are a helpful assistant.", "chatml")
    assert read_json(made / "base" / "tokenizer_config.json")["chat_template"] == template


def test_a_base_of_the_same_layout_is_untouched(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path, "qwen2")
    export(folder, format="gptq")
    old, new = (
        load_file(path / "model.safetensors") for path in (tmp_path / "models" / "base-Int4", folder / "gptq/base")
    )
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    assert (
        load_file(folder / "adapter/adapter_model.safetensors").keys()
        == load_file(folder / "gptq/adapter/adapter_model.safetensors").keys()
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_of_c_attn_are_cut_by_columns(tmp_path: Path, bits: int) -> None:
    """Against codes that are unpacked, cut as floats are, and compared."""
    tiny_run(tmp_path, "qwen")
    base = tmp_path / "models" / "base-Int4"
    config, _ = read_folder_config(base)
    (state,) = (s for n, s in enumerate(base_blocks(base, "qwen")) if n == 1)
    found = relaid(state, config, bits)
    module = "transformer.h.0.attn.c_attn"
    codes = unpack_rows(state[f"{module}.qweight"], bits)  # [K, 3N]
    expected = convert_tensors({f"{module}.weight": codes.t().float()}, config, "qwen2")
    names = new_names(module, config)
    assert [name.rpartition(".")[2] for name in names] == ["q_proj", "k_proj", "v_proj"]
    for name in names:
        assert torch.equal(unpack_rows(found[f"{name}.qweight"], bits).t().float(), expected[f"{name}.weight"])
        assert torch.equal(found[f"{name}.g_idx"], state[f"{module}.g_idx"])
    assert len([name for name in found if name.endswith(".bias")]) == 3


def test_ranks_and_scales_of_their_own_become_one_rank_and_one_alpha(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path, "qwen")
    config, _ = read_folder_config(tmp_path / "models" / "base-Int4")
    settings, state = (
        read_json(folder / "adapter/adapter_config.json"),
        load_file(folder / "adapter/adapter_model.safetensors"),
    )
    settings["alpha_pattern"] = {"transformer.h.0.mlp.w1": 4}
    settings["rank_pattern"] = {"transformer.h.1.mlp.w2": 2}
    prefix = "base_model.model.transformer.h.1.mlp.w2.lora_"
    state[f"{prefix}A.weight"], state[f"{prefix}B.weight"] = (
        state[f"{prefix}A.weight"][:2].clone(),
        state[f"{prefix}B.weight"][:, :2].clone(),
    )
    write_json(folder / "adapter/adapter_config.json", settings)
    save_file(state, folder / "adapter/adapter_model.safetensors")
    (tmp_path / "new").mkdir()
    write_adapter(folder / "adapter", tmp_path / "new", config, "qwen2", "owner/name")
    written = read_json(tmp_path / "new/adapter_config.json")
    assert (written["r"], written["alpha_pattern"], written["rank_pattern"]) == (4, {}, {})
    assert written["base_model_name_or_path"] == "owner/name"
    old = {
        f"{m}.weight": scale * (b.double() @ a.double()) for m, (a, b, scale) in lora.delta(folder / "adapter").items()
    }
    new = {
        f"{m}.weight": scale * (b.double() @ a.double()) for m, (a, b, scale) in lora.delta(tmp_path / "new").items()
    }
    expected = convert_tensors(old, config, "qwen2")
    assert expected.keys() == new.keys()
    assert all(torch.allclose(new[name], value, rtol=1e-6, atol=1e-9) for name, value in expected.items())


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="base-Int4 has float weights"):
        export(tiny_run(tmp_path / "float", int4=False), format="gptq")
    folder = tiny_run(tmp_path / "a", "qwen2")
    with pytest.raises(UserError, match="whose grouped heads Qwen-1 does not have"):
        export(folder, format="gptq", layout="qwen")
    with pytest.raises(UserError, match="ONTO=base is for merged models"):
        export(folder, format="adapter", onto="base")
    with pytest.raises(UserError, match="Leave the key out"):
        build(Options, {"onto": ""})
    for name, message in (("gptq", "no GPTQ export of this program"), ("adapter", "no adapter exported by this")):
        mine = tmp_path / f"mine-{name}"
        mine.mkdir()
        (mine / "letter.txt").write_text("keep me")
        with pytest.raises(UserError, match=message):
            export(folder, format=name, out=str(mine))
        assert [path.name for path in mine.iterdir()] == ["letter.txt"]


def test_the_same_command_again_does_nothing_and_damage_is_written_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_run(tmp_path, "qwen")
    for name, made in (("gptq", "gptq"), ("adapter", "peft")):
        export(folder, format=name)
        first = hashes(folder / made)
        capsys.readouterr()
        export(folder, format=name)
        assert "nothing to do" in capsys.readouterr().out
        next(folder.glob(f"{made}/**/adapter_config.json")).write_text("{}")
        export(folder, format=name)
        assert hashes(folder / made) == first


def test_nothing_is_left_of_a_stopped_export_and_the_disk_is_asked_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_run(tmp_path, "qwen")
    before = sorted(folder.iterdir())

    def stop(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gptq_export, "check", stop)
        with pytest.raises(KeyboardInterrupt):
            export(folder, format="gptq")
    with monkeypatch.context() as patch:
        patch.setattr(gptq_export, "free_bytes", lambda path: 10**6)
        with pytest.raises(UserError, match=r"GB of disk, 0\.0 GB are free"):
            export(folder, format="gptq")
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(("form", "writer"), [("adapter", adapter_export), ("gguf", gguf_export), ("hf", merge)])
def test_the_disk_is_asked_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, writer: Any
) -> None:
    folder = tiny_run(tmp_path)
    before = sorted(folder.iterdir())
    monkeypatch.setattr(writer, "free_bytes", lambda path: 10**6)
    with pytest.raises(UserError, match=r"GB of disk, 0\.0+ GB are free"):
        export(folder, format=form)
    assert sorted(folder.iterdir()) == before


def test_a_changed_code_is_found_before_the_folder_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, write = tiny_run(tmp_path, "qwen"), gptq_export.write

    def damaged(job: gptq_export.GptqJob, into: Path, advance: Any) -> None:
        write(job, into, advance)
        state = load_file(into / "base/model.safetensors")
        state["model.layers.0.mlp.up_proj.qweight"][0, 0] ^= 1
        save_file(state, into / "base/model.safetensors", {"format": "pt"})

    monkeypatch.setattr(gptq_export, "write", damaged)
    with pytest.raises(UserError, match=r"up_proj\.weight .* is not what was to be written"):
        export(folder, format="gptq")
    assert not (folder / "gptq").exists()


def test_the_adapter_alone_names_its_base_by_its_id(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path, "qwen2")
    base = tmp_path / "models" / "base-Int4"
    write_json(base / "manifest.json", {"source": {"hub": "owner/Base-Int4"}, "license": "Apache-2.0", "files": {}})
    (base / "LICENSE").write_text("the licence")
    record = read_json(folder / "run.json")
    record["base"]["files"] = {n: h for n, h in record["base"]["files"].items() if n != "manifest.json"}
    write_json(folder / "run.json", record)
    export(folder, format="adapter")
    made = folder / "peft"
    assert read_json(made / "adapter_config.json")["base_model_name_or_path"] == "owner/Base-Int4"
    assert (made / "adapter_model.safetensors").read_bytes() == (
        folder / "adapter/adapter_model.safetensors"
    ).read_bytes()
    found = card(made)
    assert (found["base_model"], found["base_model_relation"], found["library_name"]) == (
        "owner/Base-Int4",
        "adapter",
        "peft",
    )
    assert (found["license"], found["license_link"]) == ("apache-2.0", "LICENSE") and (made / "LICENSE").is_file()


@pytest.mark.parametrize(("form", "made", "link"), [("gptq", "gptq", "base/LICENSE"), ("adapter", "peft", "LICENSE")])
@pytest.mark.parametrize("layout", ["qwen", "qwen2"])
def test_the_licence_of_an_unknown_base_is_linked_where_it_is(
    tmp_path: Path, layout: str, form: str, made: str, link: str
) -> None:
    """The base is not in the lock: only its LICENSE file tells that there is a licence."""
    folder = tiny_run(tmp_path, layout)
    (tmp_path / "models" / "base-Int4" / "LICENSE").write_text("the licence")
    export(folder, format=form)
    found = card(folder / made)
    assert (found["license"], found["license_link"]) == ("other", link)
    assert (folder / made / link).read_text() == "the licence"


def test_the_card_tells_what_the_run_measured_and_how_it_is_made_again(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path, "qwen2")
    record = read_json(folder / "run.json")
    record["held_out"] = {"conversations": 9, "loss": {"before": 2.5, "last": 1.25}, "sha256": "0"}
    write_json(folder / "run.json", record)
    out = export(folder)
    found, text = card(out), (out / "README.md").read_text()
    (result,) = found["model-index"][0]["results"]
    assert [one["value"] for one in result["metrics"]] == [2.5, 1.25]
    assert result["metrics"][1]["name"] == "Loss on 9 held-out conversations, after training"
    assert found["language"] == ["zh", "en"] and found["pipeline_tag"] == "text-generation"
    assert "base_model" not in found  # a hub takes no name without an owner
    assert "make train DATA=conversations.jsonl MODEL=base-Int4 RECIPE=runs/tiny/recipe.yaml RUN=tiny" in text
    assert "make export RUN=tiny" in text and str(tmp_path) not in text


def test_licences_ids_and_data_sets_as_the_hubs_write_them(tmp_path: Path) -> None:
    published, made = Path("Qwen-1_8B-Chat-Int4"), Path("Qwen2.5-Coder-0.5B-Instruct-GPTQ-Int4")
    assert base_id(published) == "Qwen/Qwen-1_8B-Chat-Int4"
    assert base_id(made) == "Qwen/Qwen2.5-Coder-0.5B-Instruct-GPTQ-Int4"  # there is one on the hub
    assert base_id(Path("Qwen2.5-Coder-0.5B-Instruct-Int4")) == "Qwen/Qwen2.5-Coder-0.5B-Instruct"
    assert base_id(Path("Qwen2.5-Coder-0.5B-Instruct-Qwen1-Int4")) == "Qwen2.5-Coder-0.5B-Instruct-Qwen1-Int4"
    assert license_of(published) == (
        "Tongyi Qianwen Research",
        "https://huggingface.co/Qwen/Qwen-1_8B-Chat-Int4/blob/main/LICENSE",
    )
    record = {"run": "r", "data": {"path": "hub:owner/set:part#train, mine.jsonl", "sha256": ""}, "recipe": {}}
    found = metadata(CardSource(record, published, "merged", {}, {}))
    assert (found["license"], found["license_name"]) == ("other", "tongyi-qianwen-research")
    assert found["datasets"] == ["owner/set"] and "model-index" not in found
    assert languages(["你好，世界"]) == ["zh"] and languages(["Hello"]) == ["en"] and languages([]) == []


def test_the_rank_that_vllm_is_told_is_one_that_it_knows() -> None:
    assert "--max-lora-rank 64 " in vllm_command("", "r", 33) and "--max-lora-rank 8 " in vllm_command("", "r", 1)
    assert vllm_command("a/b", "r", 8).endswith("r=a/b/adapter")
    assert IDS.ndim == 2


def test_a_card_names_the_method_of_the_training() -> None:
    record = {"steps": 3, "tokens": 1000}
    recipe = {"rank": 4, "alpha": 8.0, "learning_rate": 1e-3}
    assert _training(record, recipe) == "* training: LoRA, r 4, alpha 8.0, learning rate 0.001, 3 steps, 1,000 tokens"
    changed = _training(record, {**recipe, "rslora": True, "lora_plus": 8.0, "neftune": 5.0})
    assert "LoRA begun as PiSSA, r 4" in _training(record, {**recipe, "start": "pissa"})
    assert "rsLoRA, r 4" in changed and "B's rate 8 times that (LoRA+), NEFTune 5, 3 steps" in changed
