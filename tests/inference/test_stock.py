"""ENGINE=stock on a tiny Llama: its answers, stopping one, and permission for a checkpoint's own code."""

import json
import threading
from pathlib import Path

import pytest
import torch

from tests.support.oracles import small_tokenizer, tiny_checkpoint, tiny_config
from train.commands.infer import Options, run
from train.common.errors import UserError
from train.common.files import write_json
from train.config.options import build
from train.inference.generate import answers
from train.inference.sampling import Sampling
from train.inference.stock import check_trust, load_stock, stock_stream
from train.model.decoder import Decoder
from train.model.tokenizer import load_tokenizer
from train.ops.gptq import Scheme, quantize


def options(root: Path, **values: str) -> Options:
    return build(Options, {"models": str(root / "models"), "runs": str(root / "runs"), "max_tokens": "8", **values})


def tiny_llama(folder: Path, int4: bool = False) -> Path:
    """A Llama checkpoint as transformers saves it, or as auto-gptq does, with the small tokenizer in stock form."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 512, "max_position_embeddings": 256, "bos_token_id": 256, "eos_token_id": 258}
    model = LlamaForCausalLM(LlamaConfig(initializer_range=0.3, **sizes))
    model.save_pretrained(folder, safe_serialization=True)
    if int4:
        _quantize(folder, model)
    small_tokenizer(folder)
    load_tokenizer(folder).save(folder)
    (folder / "qwen.tiktoken").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", {**settings, "tokenizer_class": "PreTrainedTokenizerFast"})
    return folder


def _quantize(folder: Path, model: torch.nn.Module) -> None:
    from safetensors.torch import save_file

    scheme = Scheme(group_size=32)
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if "proj" in name:
            parts = {**quantize(tensor, scheme), "bias": torch.zeros(tensor.shape[0]).half()}
            state |= {f"{name.removesuffix('.weight')}.{part}": value.contiguous() for part, value in parts.items()}
        else:
            state[name] = tensor.half()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "quantization_config": scheme.to_config()})


@pytest.mark.parametrize("int4", [False, True])
def test_stock_answers_equal_those_of_our_loop_on_the_same_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], int4: bool
) -> None:
    folder = tiny_llama(tmp_path / "models" / "llama", int4)
    run(options(tmp_path, model="llama", engine="stock", prompt="hi"))
    out, err = capsys.readouterr()
    model, _ = load_stock(folder, False, torch.float32, torch.device("cpu"))
    assert out == answers(model, load_tokenizer(folder), ["hi"], max_new_tokens=8)[0] + "\n"
    assert "8 tokens, the most that were asked for" in err


def test_loading_int4_does_not_change_how_later_models_are_made(tmp_path: Path) -> None:
    """auto-gptq switches off torch's initialisers and transformers' tying of weights; both have to be on again."""
    load_stock(tiny_llama(tmp_path, int4=True), False, torch.float32, torch.device("cpu"))
    assert torch.nn.Linear(8, 8).weight.std() > 0.1
    model = Decoder(tiny_config("qwen2", tie_word_embeddings=True))
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_stock_answer_can_be_stopped(tmp_path: Path) -> None:
    model, tokenizer = load_stock(tiny_llama(tmp_path), False, torch.float32, torch.device("cpu"))
    notes: list[str] = []
    pieces = stock_stream(model, tokenizer, [1, 2], 200, Sampling(), notes.append)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if "work" in thread.name]
    assert notes == []


def test_a_seed_makes_a_stock_answer_repeat_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llama(tmp_path / "models" / "llama")
    outputs = []
    for seed in ("1", "1", "2"):
        run(options(tmp_path, model="llama", engine="stock", prompt="hi", temperature="1.5", seed=seed))
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_a_checkpoint_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "models" / "m", tiny_config("qwen2"))
    with pytest.raises(UserError, match="ENGINE=stock cannot load it"):
        run(options(tmp_path, model="m", engine="stock", prompt="hi"))


def own_code(folder: Path) -> Path:
    """A checkpoint with a class of its own, which makes a file when its code is executed."""
    tiny_llama(folder)
    (folder / "modeling_own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaForCausalLM\n"
        f"Path({str(folder / 'executed')!r}).touch()\n"
        "class Own(LlamaForCausalLM):\n    pass\n"
    )
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}})
    return folder


def test_code_of_a_checkpoint_runs_only_when_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = own_code(tmp_path / "models" / "own")
    message = (
        r"would run with your rights:\n  classes: modeling_own.Own\n  files:   modeling_own.py\n.*TRUST_REMOTE_CODE=1"
    )
    with pytest.raises(UserError, match=message):
        run(options(tmp_path, model="own", engine="stock", prompt="hi"))
    with pytest.raises(UserError):  # ours does not know Llama, and never reads its code
        run(options(tmp_path, model="own", prompt="hi", trust_remote_code="on"))
    assert not (folder / "executed").exists()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, _ = load_stock(folder, True, torch.float32, torch.device("cpu"))
    assert type(model).__name__ == "Own"
    assert (folder / "executed").exists()


def test_code_of_a_tokenizer_needs_permission_too(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    check_trust(tmp_path, False)
    write_json(tmp_path / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}})
    with pytest.raises(UserError, match=r"tokenization_own\.Own"):
        check_trust(tmp_path, False)
    check_trust(tmp_path, True)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", tiny_config("qwen2"))
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.ones(2)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle.*Use ENGINE=ours"):
        load_stock(folder, False, torch.float32, torch.device("cpu"))
