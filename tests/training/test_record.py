"""What the end of a run leaves: the adapter, with the prompt that it was trained in, and their hashes."""

from pathlib import Path

import pytest

from tests.support.tiny_training import train
from train.common.errors import UserError
from train.common.files import read_json
from train.data.tokens.chat_template import chat_template
from train.model import lora
from train.model.tokenizer import load_tokenizer
from train.runs.provenance import hash_folder

pytestmark = pytest.mark.usefixtures("workspace")


@pytest.mark.parametrize("model", ["tiny-Int4", "tiny-qwen"])
def test_the_adapter_carries_the_tokenizer_and_the_prompt_of_the_run(model: str) -> None:
    run = Path("runs") / f"prompt-{model}"
    train(run=run.name, model=model, steps=1, system='You are "Xiao Ming".')
    folder = run / "adapter"
    settings = read_json(folder / "tokenizer_config.json")
    assert settings["chat_template"] == chat_template('You are "Xiao Ming".')
    assert read_json(folder / lora.CONFIG)["base_model_name_or_path"] == model
    assert load_tokenizer(folder).encode("Hello") == load_tokenizer(Path("models") / model).encode("Hello")
    assert read_json(run / "run.json")["adapter"] == hash_folder(folder)
    assert "tokenizer_config.json" in read_json(run / "run.json")["adapter"]
    lora.delta(folder)


def test_a_base_with_damaged_tokenizer_settings_is_refused_before_training(workspace: Path) -> None:
    path = workspace / "models/tiny-Int4/tokenizer_config.json"
    path.write_text("{")
    try:
        with pytest.raises(UserError, match=r"tokenizer_config\.json:1:2: not JSON"):
            train(run="refused", steps=1)
    finally:
        path.unlink()
    assert not Path("runs/refused").exists()
