"""GGUF exports in llama.cpp itself: its prompts and logits beside this program's, on a small random model.

LLAMA_CPP names a Python with its bindings; without that, an environment is made from the package registry. The same for
a real model: python -m tests.bench.readers.
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


def test_it_gives_the_prompts_and_the_logits_of_this_program(tmp_path: Path, llama: str) -> None:
    """Measured: 2e-6 nats for Q4_0, because llama.cpp rounds the inputs of its products to 8 bits; 2e-8 for F32.

    Random weights have near ties, so answers of Q4_0 may differ. Those of F32 have tokens that end within a character.
    """
    folder = tiny_run(tmp_path, vocab_size=ROWS)
    publish_tokenizer(tmp_path / "models/base-Int4")
    export(folder, format="gguf", readers=llama)
    export(folder, format="gguf", encoding="float", dtype="float32", readers=llama, out=str(folder / "merged-gguf"))
    for name, most in (("gguf", 1e-4), ("merged-gguf", 1e-6)):
        found = read_json(folder / name / "passport.json")["readers"][-1]
        assert (found["reader"], found["equal_prompts"]) == ("llama.cpp", len(DATA))
        assert found["logits"]["divergence"] < most
    assert found["equal_answers"] == len(DATA)
