"""The loss as a picture and as characters, and report.md."""

import struct
from pathlib import Path

import pytest

from tests.support.runs import tiny_run
from train.common.files import read_json
from train.evaluation.report import AnsweredQuestion, draw_losses, plot, smoothed, write_report

LOSSES = [{"step": n, "loss": 4.0 / n, "learning_rate": 1e-4 / n} for n in range(1, 61)]


def test_equal_losses_are_equal_bytes_of_a_png(tmp_path: Path) -> None:
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    draw_losses(LOSSES, "demo", a)
    draw_losses(LOSSES, "demo", b)
    content = a.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and width >= 1000 and height >= 600
    assert content == b.read_bytes() and [p.name for p in tmp_path.glob(".*")] == []


def test_a_chinese_name_and_a_single_step_are_drawn_without_a_warning(tmp_path: Path, recwarn: object) -> None:
    draw_losses(LOSSES[:1], "演示", tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 0
    assert not [w for w in recwarn if "Glyph" in str(w.message)]  # type: ignore[attr-defined]


def test_the_running_mean_does_not_lag() -> None:
    line = [float(n) for n in range(60, 0, -1)]
    assert smoothed(line) == pytest.approx(line)
    assert smoothed([2.0]) == [2.0] and smoothed([0.0, 3.0, 0.0])[1] == 1.0


def test_a_plot_falls_from_the_top_left_to_the_bottom_right() -> None:
    lines = plot([3.0, 2.0, 1.0, 0.0], width=10, height=3)
    assert [len(line) for line in lines] == [10, 10, 10]
    dots = [[ord(c) != 0x2800 for c in line] for line in lines]
    assert dots[0][0] and not dots[0][-1] and dots[-1][-1] and not dots[-1][0]
    assert all(any(row[x] for row in dots) for x in range(10))  # no gap
    assert plot([5.0], width=4, height=1) == ["⠉⠉⠉⠉"] and len(plot([0.0, 0.0], 4, 2)) == 2


def test_the_report_has_every_answer_in_full_as_valid_markdown(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    record = read_json(run / "run.json")
    answered = [
        AnsweredQuestion("a | b?", "line\nnext <b> `x`", "x" * 900, seen=True),
        AnsweredQuestion("新问题？", "前", "后", seen=False),
    ]
    parity = {"agreement": 1.0, "tokens": 9, "divergence": 1e-7}
    manifest = {"parity": {"against": "the adapter on base", **parity, "without_adapter": parity}}
    side = {
        "characters": 3.0,
        "lists": 0.5,
        "repeated": 0.0,
        "json": None,
        "bleu": 12.34,
        "chrf": 20.0,
        "rouge_l": 30.0,
    }
    loss = {"texts": 9, "tokens": 90, "before": 2.5, "after": 2.0, "interval": [-0.7, -0.3]}
    counts = {"answers": 2, "references": 1, "json": 0, "cut": 1}
    found = {"confidence": 0.95, "words": "characters", "set_aside": 1, "held_out": loss}
    found["answers"] = {**counts, "before": side, "after": side}
    write_report(run / "report.md", record, LOSSES, answered, found, "the merged model", manifest)
    text = (run / "report.md").read_text(encoding="utf-8")
    assert "| a \\| b? | line<br>next &lt;b> \\`x\\` | " + "x" * 900 + " |" in text
    assert "| held-out loss | 9 | 2.500 | 2.000 | -0.500 [-0.700, -0.300] |" in text
    assert (
        "| BLEU, held-out answers | 1 | 12.3 | 12.3 |  |" in text and "| answers that are lists | 2 | 50% | 50%" in text
    )
    assert "1 of 4 answers were cut off" in text
    assert "| 新问题？ * | 前 | 后 |" in text and "](loss.png)" in text
    assert "rank: 4\n" in text and "make infer RUN=tiny" in text and "100.00% of 9 answer tokens" in text
