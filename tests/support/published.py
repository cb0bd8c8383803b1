"""The tokenizer that Qwen publishes, from an installed package that is never imported, for bases with random weights."""

import importlib.util
import json
import shutil
from pathlib import Path

ROWS = 151936  # of the embedding of a small Qwen


def publish_tokenizer(folder: Path) -> None:
    """Give a model folder with ROWS rows qwen.tiktoken, and its stop tokens."""
    spec = importlib.util.find_spec("dashscope")
    assert spec is not None, "the test section of env.lock installs dashscope"
    shutil.copyfile(Path(str(spec.origin)).parent / "resources/qwen.tiktoken", folder / "qwen.tiktoken")
    stops = {"eos_token_id": [151645, 151643], "pad_token_id": 151643}
    (folder / "generation_config.json").write_text(json.dumps(stops))
