"""The recipes of five public projects from end to end on the CPU: a tiny base of each layout, and data as the project
had it. The samples in tests/assets/recipes were written for these tests.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.support.oracles import tiny_checkpoint, tiny_config
from tests.test_end_to_end import run_all
from train.common.files import read_json
from train.config.recipe import RECIPES

SAMPLES = Path(__file__).parent / "assets" / "recipes"
PREFERENCES = Path(__file__).parents[1] / "data" / "preference.jsonl"
SHORT = ("processes=1", "precision=fp32", "length=256", "batch=2", "accumulation=1", "warmup=2", "learning_rate=0.02")
STEPS = 12
QUESTION = "鱼会不会被水呛到？"


def train(recipe: str | Path, data: str, base: str, run: str, *more: str) -> list[str]:
    words = [f"data={SAMPLES / data}", f"recipe={recipe}", f"model={base}", f"run={run}", f"steps={STEPS}"]
    return ["train", *words, *SHORT, *more]


def commands(root: Path) -> dict[str, list[str]]:
    """What a user types, without models= and runs=; `root` has the voice recipe and the questions."""
    ask = ["infer", f"questions={root / 'questions.txt'}", "no_repeat_ngram_size=2", "max_tokens=8"]
    calibrate = [f"data={SAMPLES / 'chat.json'}", "rows=4", "length=256", "held_out=2", "group_size=32"]
    merged = root / "runs" / "chat" / "merged"
    riddles = "ruozhiba.jsonl"
    return {
        "notes": ["data", f"data={SAMPLES / 'notes.txt'}", f"out={root / 'notes.jsonl'}"],
        "medical": train("medical-1.8b", "notes.txt", "qwen-Int4", "medical"),
        "compare": ["compare", "run=medical", "max_tokens=8"],
        "voice": train(root / "voice.yaml", "cmedqa_alpaca.json", "qwen-Int4", "voice"),
        "float32": ["export", "run=voice", "dtype=float32"],
        "before": [*ask, "model=qwen2", f"answers={root / 'before.txt'}"],
        "tcm": train("tcm-1.5", "tcm.json", "qwen2", "tcm"),
        "after": [*ask, "run=tcm", f"answers={root / 'after.txt'}"],
        "chat": train("published-gptq", "chat.json", "qwen", "chat"),
        "merge": ["export", "run=chat"],
        "gptq": ["quantize", f"model={merged}", "method=gptq", *calibrate, "out=chat-Int4"],
        "one": ["infer", "model=chat-Int4", "prompt=水在几度结冰？", "max_tokens=8"],
        "riddles": train("ruozhiba-0.5b", riddles, "qwen2", "float"),
        **{f"to_{bits}": ["quantize", "model=qwen2", f"bits={bits}", "group_size=32"] for bits in (4, 8)},
        **{f"on_{bits}": train("ruozhiba-0.5b", riddles, f"qwen2-Int{bits}", f"on_{bits}") for bits in (4, 8)},
        "off_8": train("ruozhiba-0.5b", riddles, "qwen2-Int8", "off_8", "checkpointing=off"),
        **{kind: train("ruozhiba-0.5b", riddles, "qwen2", kind, f"load_as={kind}") for kind in ("nf4", "int8")},
        "off_nf4": train("ruozhiba-0.5b", riddles, "qwen2", "off_nf4", "load_as=nf4", "checkpointing=off"),
        "merge_nf4": ["export", "run=nf4"],
        "dpo": train("dpo", str(PREFERENCES), "qwen-Int4", "dpo", "from=medical", "rank=64", "alpha=16"),
        "table": ["infer", "run=on_8", f"questions={root / 'q.csv'}", f"answers={root / 'a.csv'}", "max_tokens=8"],
    }


@pytest.fixture(scope="module")
def outputs(root: Path) -> dict[str, str]:
    """What each command printed; one child process for all, because importing torch and deepspeed takes longest."""
    tiny_checkpoint(root / "models" / "qwen", tiny_config("qwen"))
    tiny_checkpoint(root / "models" / "qwen-Int4", tiny_config("qwen"), int4=True)
    tiny_checkpoint(root / "models" / "qwen2", tiny_config("qwen2", tie_word_embeddings=True))
    voice = (RECIPES / "voice-7b.yaml").read_text(encoding="utf-8")
    texts = {
        "voice.yaml": voice.replace("data/demo.jsonl", str(SAMPLES / "voice.json")),
        "questions.txt": "四君子汤由哪几味药组成？\n请解释黄芪的功效。\n",
        "q.csv": f"question\n{QUESTION}\n",
    }
    for name, text in texts.items():
        (root / name).write_text(text, encoding="utf-8")
    known = {"data": [], "quantize": [f"models={root / 'models'}"]}
    both = [f"models={root / 'models'}", f"runs={root / 'runs'}"]
    lines = commands(root)
    printed = run_all([[*words, *known.get(words[0], both)] for words in lines.values()], timeout=900)
    return dict(zip(lines, printed, strict=True))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


def record(root: Path, run: str) -> dict[str, Any]:
    """run.json of a run whose loss fell."""
    found: dict[str, Any] = read_json(root / "runs" / run / "run.json")
    assert found["steps"] == STEPS
    assert found["loss"]["last"] < found["loss"]["first"] - 0.5
    return found


def weights(root: Path, run: str) -> bytes:
    return (root / "runs" / run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_medical_notes_become_conversations_and_teach_an_int4_base_of_qwen_1(
    root: Path, outputs: dict[str, str]
) -> None:
    written = [json.loads(line)["messages"] for line in (root / "notes.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(written) == 8
    assert [turn["content"] for turn in written[0]] == ["感冒有哪些症状？", "鼻塞、流涕、打喷嚏，有时低热。"]
    assert record(root, "medical")["recipe"]["rank"] == 64
    assert all(word in outputs["compare"] for word in ("before", "after", "感冒"))


def test_voice_has_two_stages_without_long_answers_and_is_exported_in_float32(
    root: Path, outputs: dict[str, str]
) -> None:
    from safetensors.torch import load_file

    assert record(root, "voice/stages/1")["cleaned"]["counts"] == {"answers": 0}
    second = read_json(root / "runs" / "voice" / "run.json")["cleaned"]
    assert second["counts"] == {"answers": 2} and second["kept"] == 5
    merged = root / "runs" / "voice" / "merged"
    assert {str(tensor.dtype) for tensor in load_file(merged / "model.safetensors").values()} == {"torch.float32"}
    assert read_json(merged / "config.json")["torch_dtype"] == "float32"
    assert outputs["float32"]


def test_tcm_adapts_two_linears_of_a_float_qwen2_base_with_the_plain_template(
    root: Path, outputs: dict[str, str]
) -> None:
    adapter = read_json(root / "runs" / "tcm" / "adapter" / "adapter_config.json")
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (8, 32, 0.1)
    assert sorted(adapter["target_modules"]) == ["q_proj", "v_proj"]
    recipe = record(root, "tcm")["recipe"]
    assert (recipe["template"], recipe["system"]) == ("plain", "")
    before, after = ((root / name).read_text(encoding="utf-8") for name in ("before.txt", "after.txt"))
    assert before != after and outputs["after"]


def test_published_gptq_merges_a_run_and_calibrates_on_its_training_set(root: Path, outputs: dict[str, str]) -> None:
    assert record(root, "chat")["recipe"]["mask"] == "published"
    quantised = read_json(root / "models" / "chat-Int4" / "config.json")["quantization_config"]
    assert (quantised["bits"], quantised["quant_method"]) == (4, "gptq")
    assert "perplexity" in outputs["gptq"].lower()


def test_dpo_goes_on_from_a_run_and_prefers_the_chosen_answers(root: Path, outputs: dict[str, str]) -> None:
    found = read_json(root / "runs" / "dpo" / "run.json")
    assert found["recipe"]["loss"] == "dpo" and abs(found["loss"]["first"] - math.log(2)) < 1e-4
    assert found["loss"]["last"] < found["loss"]["first"] - 0.3
    assert "chosen preferred 100%" in outputs["dpo"]


def test_ruozhiba_teaches_float_gptq_and_loaded_bases_with_checkpointing(root: Path, outputs: dict[str, str]) -> None:
    runs = ("float", "on_4", "on_8", "nf4", "int8")
    for run in runs:
        assert record(root, run)["recipe"]["checkpointing"] == "on"
    assert weights(root, "on_8") == weights(root, "off_8"), "to compute a block again changes nothing, at 8 bits too"
    assert weights(root, "nf4") == weights(root, "off_nf4")
    assert len({weights(root, run) for run in runs}) == len(runs)
    assert any("load_as=nf4" in note for note in record(root, "nf4")["decisions"])
    manifest = read_json(root / "runs" / "nf4" / "merged" / "manifest.json")  # written only where the answers agree
    assert manifest["inputs"]["load_as"] == "nf4" and outputs["merge_nf4"]
    assert QUESTION in (root / "a.csv").read_text(encoding="utf-8-sig") and outputs["table"]
