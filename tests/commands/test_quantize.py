"""`make quantize`: the name of the folder, and what is printed."""

from pathlib import Path

import pytest

from tests.support.oracles import tiny_checkpoint, tiny_config
from train.commands.quantize import Options, run
from train.common.errors import UserError
from train.common.files import read_json, write_json


@pytest.mark.parametrize(
    ("layout", "out", "name"),
    [("keep", "", "Tiny-Int4"), ("qwen", "", "Tiny-Qwen1-Int4"), ("qwen2", "", "Tiny-Int4"), ("keep", "mine", "mine")],
)
def test_the_folder_is_named_after_what_was_done(
    tmp_path: Path, layout: str, out: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_checkpoint(tmp_path / "Tiny", tiny_config("qwen2"))
    options = Options(model=str(source), models=str(tmp_path), group_size=32, layout=layout, out=out)
    run(options)
    assert (tmp_path / name / "manifest.json").is_file()
    output = capsys.readouterr().out
    written = "qwen" if layout == "qwen" else "qwen2"
    assert f"{tmp_path / name}: layout {written}, Int4 in groups of 32, rounded to nearest." in output
    assert ("c_attn " if layout == "qwen" else "q_proj ") in output
    run(options)
    assert "nothing to do" in capsys.readouterr().out


def test_code_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_checkpoint(tmp_path / "Tiny", tiny_config("qwen2"))
    run(Options(model=str(source), models=str(tmp_path), group_size=32, layout="qwen"))
    assert "modeling_qwen.py" in capsys.readouterr().out
    run(Options(model=str(source), models=str(tmp_path), group_size=32))
    assert "modeling_qwen.py" not in capsys.readouterr().out


def test_the_switches_for_the_type_of_the_weights_are_off(tmp_path: Path) -> None:
    """A float base of Qwen-1 may have bf16 on; the packed weights are float16."""
    source = tiny_checkpoint(tmp_path / "Tiny", tiny_config("qwen"))
    config = read_json(source / "config.json")
    write_json(source / "config.json", {**config, "bf16": True, "fp16": False, "fp32": False})
    run(Options(model=str(source), models=str(tmp_path), group_size=32))
    written = read_json(tmp_path / "Tiny-Int4" / "config.json")
    assert [written[key] for key in ("bf16", "fp16", "fp32")] == [False, False, False]


def test_a_damaged_tokenizer_is_found_before_anything_is_written(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "Tiny", tiny_config("qwen2"))
    (source / "qwen.tiktoken").write_text("IQ== 5")
    with pytest.raises(UserError, match=r"qwen.tiktoken:1: "):
        run(Options(model=str(source), models=str(tmp_path), group_size=32))
    assert not (tmp_path / "Tiny-Int4").exists()


def test_a_model_in_a_hub_cache_gives_its_name(tmp_path: Path) -> None:
    cache = tmp_path / "models--Qwen--Tiny"
    tiny_checkpoint(cache / "snapshots" / "abc", tiny_config("qwen2"))
    run(Options(model=str(cache), models=str(tmp_path), group_size=32))
    assert (tmp_path / "Tiny-Int4" / "manifest.json").is_file()
