"""GGUF exports in llama.cpp itself: its prompts, greedy answers and logits beside this program's, on small random models.

LLAMA_CPP names a Python with its bindings; without that, an environment is made from the package registry. The same for a
real model: python -m tests.bench.readers.
"""

from pathlib import Path

import pytest

from tests.support.environments import python_of
from tests.support.exports import export
from tests.support.published import ROWS, publish_tokenizer
from tests.support.runs import DATA, tiny_run
from train.common.files import read_json

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return python_of(tmp_path_factory.mktemp("llama") / "venv", "LLAMA_CPP", ("xllamacpp==2026.10.11549",))


@pytest.mark.parametrize("layout", ["qwen2", "qwen", "qwen3"])
def test_it_gives_the_answers_of_this_program(tmp_path: Path, llama: str, layout: str) -> None:
    folder = tiny_run(tmp_path, layout, vocab_size=ROWS)
    publish_tokenizer(tmp_path / "models/base-Int4")
    export(folder, format="gguf", readers=llama)
    export(folder, format="gguf", encoding="float", dtype="float32", readers=llama, out=str(folder / "merged-gguf"))
    packed, merged = (read_json(folder / name / "passport.json")["readers"][-1] for name in ("gguf", "merged-gguf"))
    assert packed["reader"] == merged["reader"] == "llama.cpp"
    assert packed["equal_prompts"] == merged["equal_prompts"] == len(DATA)
    # float32 weights: what is left is its cache of keys and values in float16
    assert merged["equal_answers"] == len(DATA) and merged["logits"]["agreement"] == 1
    assert merged["logits"]["divergence"] < 1e-5 and merged["logits"]["largest_difference"] < 0.02
    # Q4_0: it rounds the inputs of these products to 8 bits
    assert packed["logits"]["divergence"] < 0.01 and packed["logits"]["agreement"] > 0.9
