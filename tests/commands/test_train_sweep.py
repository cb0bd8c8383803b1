"""A sweep: which runs, in which order, what is refused before the first, and the table."""

from pathlib import Path

import pytest

from tests.support.tiny_training import train, workspace, write_rows
from train.commands import train_sweep as sweep
from train.common.errors import UserError
from train.common.files import read_json
from train.config.recipe import RECIPES, load_recipe, read_sweep

__all__ = ["workspace"]  # the fixture


def test_every_combination_of_numbers_the_last_key_fastest(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    text = (RECIPES / "smoke.yaml").read_text(encoding="utf-8")
    recipe.write_text(text.replace("\nrank: 8 ", "\nrank: [8, 16] "), encoding="utf-8")
    assert read_sweep("smoke", {}) == []
    assert read_sweep(str(recipe), {}) == [{"rank": "8"}, {"rank": "16"}]
    assert read_sweep(str(recipe), {"learning_rate": "1e-3,1e-4"}) == [
        {"rank": rank, "learning_rate": rate} for rank in ("8", "16") for rate in ("1e-3", "1e-4")
    ]
    assert read_sweep(str(recipe), {"rank": "4"}) == [], "what is typed takes the place of the list"
    assert read_sweep("smoke", {"system": "Be kind, be brief.", "targets": "q_proj,v_proj"}) == []
    with pytest.raises(UserError, match=r'several values are a sweep.* ARGS="rank=8"'):
        load_recipe(str(recipe), {})


def test_a_sweep_trains_each_value_once_and_ends_in_one_table(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(workspace / "sweep.jsonl", 20)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    keys = {"data": "sweep.jsonl", "run": "swept", "rank": "2,8", "steps": 4, "held_out": 4, "near": 1, "processes": 1}
    train(**keys)
    records = [read_json(workspace / "runs" / f"swept-rank{rank}" / "run.json") for rank in (2, 8)]
    assert [record["recipe"]["rank"] for record in records] == [2, 8]
    table = (workspace / "runs" / "swept.sweep.md").read_text(encoding="utf-8")
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert rows[0].startswith("| rank | steps | loss, last epoch | held out before |")
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| 2", "| 8"]
    losses = [record["held_out"]["loss"]["best"] for record in records]
    assert f"**{min(losses):.4f}**" in table and table.count("**") == 2
    assert rows[2] in capsys.readouterr().out


def test_without_held_out_conversations_the_table_says_what_it_cannot_tell(tmp_path: Path) -> None:
    from train.common.files import write_json

    record = {"steps": 3, "loss": {"last_epoch": 1.25}, "tokens": 100, "timings": {"steps_seconds": 2.0}}
    (tmp_path / "a").mkdir()
    write_json(tmp_path / "a" / "run.json", record)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "read_run", lambda folder: read_json(folder / "run.json"))
        text = sweep.table([{"rank": "8"}], [tmp_path / "a"])
    assert "| 8 | 3 | 1.2500 | – | – | – | 50 | a |" in text
    assert "add held_out=0.05" in text


def test_a_mistake_in_the_last_value_is_found_before_the_first_run(workspace: Path) -> None:
    with pytest.raises(UserError, match="rank=0"):
        train(run="wrong", rank="8,0", processes=1)
    assert not list((workspace / "runs").glob("wrong*"))


def test_a_run_that_stops_ends_the_sweep_with_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--no-such-word"]
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    started: list[str] = []
    assert sweep.train_each((name, words) for name in ("a", "b") if not started.append(name)) == 2
    assert started == ["a"]
