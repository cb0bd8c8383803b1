"""`make quantize`: the name of the folder, and what is printed."""

from pathlib import Path

import pytest

from tests.support.oracles import tiny_checkpoint, tiny_config
from train.commands.quantize import Options, run


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
