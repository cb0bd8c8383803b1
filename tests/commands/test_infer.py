"""Choosing a model, the chat and the one-shot, on tiny models; the stock way on a tiny Llama."""

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.oracles import small_tokenizer, tiny_checkpoint, tiny_config
from tests.support.runs import tiny_run
from train.commands.infer import Chat, Options, Speaker, choose, run
from train.common.errors import UserError
from train.common.files import write_json
from train.config.options import build
from train.data.formats import Turn
from train.inference.generate import answers
from train.inference.sampling import Sampling
from train.inference.stock import load_stock, refuse_unseen_code, stock_stream
from train.inference.trained import load_run
from train.model.loading import load
from train.model.tokenizer import Tokenizer, load_tokenizer
from train.ops.gptq import Scheme, quantize


def options(root: Path, **values: str) -> Options:
    return build(Options, {"models": str(root / "models"), "runs": str(root / "runs"), "max_tokens": "8", **values})


# which model


def test_a_run_is_its_merged_export_or_its_adapter(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path)
    source = choose(options(tmp_path, run="tiny"))
    assert (source.folder, source.adapter) == (folder, True)
    assert source.why == "run tiny: its adapter on base-Int4 (no merged export yet)"
    (folder / "merged").mkdir()
    assert choose(options(tmp_path, run="tiny")).adapter, "a folder without a manifest is half an export"
    write_json(folder / "merged" / "manifest.json", {})
    source = choose(options(tmp_path, run="tiny"))
    assert (source.folder, source.adapter) == (folder / "merged", False)
    assert source.recipe["template"] == "chatml"


def test_an_export_that_the_gpu_cannot_hold_gives_way_to_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_run(tmp_path)
    (folder / "merged").mkdir()
    write_json(folder / "merged" / "manifest.json", {})
    monkeypatch.setattr("train.commands.infer.fits", lambda *where: False)
    source = choose(options(tmp_path, run="tiny"))
    assert (source.folder, source.adapter) == (folder, True)
    assert source.why.endswith("its adapter on base-Int4 (the GPU has no room for the merged export)")
    assert not choose(options(tmp_path, run="tiny", engine="stock")).adapter  # it loads whole models only


def test_with_neither_the_newest_finished_run_is_taken(tmp_path: Path) -> None:
    older = tiny_run(tmp_path)
    newer, unfinished = tmp_path / "runs" / "another", tmp_path / "runs" / "unfinished"
    for folder in (newer, unfinished):
        folder.mkdir()
    (newer / "run.json").write_text((older / "run.json").read_text())
    os.utime(older / "run.json", (1, 1))
    source = choose(options(tmp_path))
    assert source.folder == newer
    assert "run another, the newest that is finished" in source.why
    os.utime(older / "run.json", (2**31, 2**31))
    assert choose(options(tmp_path)).folder == older


def test_without_any_run_the_default_base_is_taken_or_its_absence_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="make model MODEL=Qwen/Qwen-1_8B-Chat-Int4"):
        choose(options(tmp_path))
    base = tiny_checkpoint(tmp_path / "models" / "Qwen-1_8B-Chat-Int4", tiny_config("qwen"))
    source = choose(options(tmp_path))
    assert source.folder == base
    assert "the default base: there is no finished run" in source.why


def test_what_cannot_be_chosen_is_explained(tmp_path: Path) -> None:
    (tmp_path / "runs" / "half").mkdir(parents=True)
    with pytest.raises(UserError, match="give one of them"):
        choose(options(tmp_path, run="a", model="b"))
    with pytest.raises(UserError, match="run 'half' is not finished"):
        choose(options(tmp_path, run="half"))
    with pytest.raises(UserError, match="run 'none' does not exist"):
        choose(options(tmp_path, run="none"))
    tiny_run(tmp_path)
    with pytest.raises(UserError, match="make export RUN=tiny"):
        choose(options(tmp_path, run="tiny", engine="stock"))
    with pytest.raises(UserError, match="max_tokens=0"):
        run(options(tmp_path, run="tiny", max_tokens="0"))


# one-shot


def test_one_shot_prints_the_answer_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_run(tmp_path)
    run(options(tmp_path, prompt="What is your name?"))
    model, tokenizer, _ = load_run(folder, tmp_path / "models", torch.float32)
    expected = answers(model, tokenizer, ["What is your name?"], max_new_tokens=8)[0]
    base = answers(
        load(tmp_path / "models" / "base-Int4", torch.float32), tokenizer, ["What is your name?"], max_new_tokens=8
    )
    out, err = capsys.readouterr()
    assert out == expected + "\n"
    assert [expected] != base
    assert "run tiny, the newest that is finished" in err
    assert "chatml, the same answer each time, 512 tokens of context" in err


def test_system_and_template_of_the_run_are_used_unless_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_run(tmp_path)
    record = json.loads((folder / "run.json").read_text())
    record["recipe"] |= {"system": "Be brief.", "template": "plain"}
    write_json(folder / "run.json", record)
    asked: list[tuple[Any, ...]] = []

    def prompt(turns: list[Turn], _: Tokenizer, *how: str) -> list[int]:
        asked.append((turns, *how))
        return [1]

    monkeypatch.setattr("train.commands.infer.prompt", prompt)
    for given in ({}, {"system": "", "template": "chatml"}):
        run(options(tmp_path, run="tiny", prompt="hi", **given))
    turns = [Turn("user", "hi")]
    assert asked == [(turns, "Be brief.", "plain"), (turns, "", "chatml")]


# the chat


def echo(context: int = 60) -> Speaker:
    """Answers with the number of turns it was shown; a token for each character of all of them."""

    def ids(turns: list[Turn], system: str) -> list[int]:
        return [len(turns)] * sum(len(text) for text in (system, *(turn.text for turn in turns)))

    def say(ids: list[int], notify: Callable[[str], None]) -> Iterator[str]:
        yield f"seen {ids[-1]}"
        yield "."

    return Speaker(ids, say, context)


def talk(speaker: Speaker, *lines: str, system: str = "s") -> Chat:
    chat = Chat(speaker, system, max_tokens=10)
    chat.run(iter(lines))
    return chat


def test_a_chat_remembers_until_it_is_cleared(capsys: pytest.CaptureFixture[str]) -> None:
    chat = talk(echo(), "a", "", "b", "/clear", "c", "/quit", "d")
    assert capsys.readouterr().out == "seen 1.\nseen 3.\nseen 1.\n"
    assert chat.turns == [Turn("user", "c"), Turn("assistant", "seen 1.")]


def test_commands_answer_on_the_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    chat = talk(echo(), "/system Be brief.", "/system", "/system none", "/help", "/nonsense")
    out, err = capsys.readouterr()
    assert (out, chat.system) == ("", "")
    assert err.count("(system message: Be brief.)") == 2
    assert "(system message: none)" in err
    assert "(unknown command /nonsense)" in err
    assert err.count("/clear        forget") == 2


def test_the_oldest_turns_are_forgotten_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    chat = talk(
        echo(context=60), *("abcdefghij" for _ in range(4))
    )  # 17 tokens a question with its answer, 10 kept free
    assert "(the oldest 1 of the questions are forgotten: the context holds 60 tokens)" in capsys.readouterr().err
    assert [turn.text for turn in chat.turns[1::2]] == ["seen 3.", "seen 5.", "seen 5."]


def test_a_question_that_cannot_fit_is_refused_and_the_chat_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    chat = talk(echo(), "x" * 60, "a")
    out, err = capsys.readouterr()
    assert "this question has 61 tokens with its system message, the context holds 60" in err
    assert out == "seen 1.\n"
    assert len(chat.turns) == 2


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    speaker = echo()

    def interrupted(ids: list[int], notify: Callable[[str], None]) -> Iterator[str]:
        if len(ids) > 2:
            yield "half"
        raise KeyboardInterrupt

    chat = talk(Speaker(speaker.ids, interrupted, 60), "a", "abc")
    assert chat.turns == [Turn("user", "abc"), Turn("assistant", "half")]
    out, err = capsys.readouterr()
    assert err.count("(stopped)") == 2
    assert out == "half\n"


def test_piped_lines_are_turns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_checkpoint(tmp_path / "models" / "m", tiny_config())
    read, write = os.pipe()
    os.write(write, "hi\n/clear\nhi\n好\n".encode())
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        run(options(tmp_path, model="m", system=""))
    out, err = capsys.readouterr()
    model, tokenizer = load(tmp_path / "models" / "m", torch.float32), load_tokenizer(tmp_path / "models" / "m")
    first = answers(model, tokenizer, ["hi"], system="", max_new_tokens=8)[0]
    assert out.startswith(f"{first}\n{first}\n")
    assert "(the conversation is forgotten)" in err


# the stock way


def tiny_llama(folder: Path, int4: bool = False) -> Path:
    """A Llama checkpoint as transformers saves it, or as auto-gptq does, with the small tokenizer in stock form."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=256, initializer_range=0.3, **sizes))
    model.save_pretrained(folder, safe_serialization=True)
    if int4:
        _quantise(folder, model)
    small_tokenizer(folder)
    load_tokenizer(folder).save(folder)
    (folder / "qwen.tiktoken").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", {**settings, "tokenizer_class": "PreTrainedTokenizerFast"})
    return folder


def _quantise(folder: Path, model: torch.nn.Module) -> None:
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
def test_the_stock_way_says_what_the_same_weights_say_in_our_loop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], int4: bool
) -> None:
    folder = tiny_llama(tmp_path / "models" / "llama", int4)
    run(options(tmp_path, model="llama", engine="stock", prompt="hi"))
    out, err = capsys.readouterr()
    model, _ = load_stock(folder, False, torch.float32, torch.device("cpu"))
    assert out == answers(model, load_tokenizer(folder), ["hi"], max_new_tokens=8)[0] + "\n"
    assert "8 tokens, the most that were asked for" in err
    assert torch.nn.Linear(8, 8).weight.std() > 0.1, "auto-gptq must not leave torch without its initialisers"


def test_a_stock_answer_can_be_stopped(tmp_path: Path) -> None:
    model, tokenizer = load_stock(tiny_llama(tmp_path), False, torch.float32, torch.device("cpu"))
    notes: list[str] = []
    pieces = stock_stream(model, tokenizer, [1, 2], 200, Sampling(), notes.append)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if "work" in thread.name]
    assert notes == []


def test_a_stock_answer_is_drawn_by_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llama(tmp_path / "models" / "llama")
    said = []
    for seed in ("1", "1", "2"):
        run(options(tmp_path, model="llama", engine="stock", prompt="hi", temperature="1.5", seed=seed))
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_a_checkpoint_of_another_kind_is_refused_by_the_stock_way(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "models" / "m", tiny_config("qwen2"))
    with pytest.raises(UserError, match="the stock way cannot load it"):
        run(options(tmp_path, model="m", engine="stock", prompt="hi"))


def own_code(folder: Path) -> Path:
    """A checkpoint that brings a class, which leaves a mark where it is executed."""
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
    with pytest.raises(UserError):  # ours knows no Llama, and does not look at its code
        run(options(tmp_path, model="own", prompt="hi", trust_remote_code="on"))
    assert not (folder / "executed").exists()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, _ = load_stock(folder, True, torch.float32, torch.device("cpu"))
    assert type(model).__name__ == "Own"
    assert (folder / "executed").exists()


def test_code_of_a_tokenizer_counts_too(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    refuse_unseen_code(tmp_path, False)
    write_json(tmp_path / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}})
    with pytest.raises(UserError, match=r"tokenization_own\.Own"):
        refuse_unseen_code(tmp_path, False)
    refuse_unseen_code(tmp_path, True)
