"""The benchmarks themselves: what they leave out and why, how reports become tables, and the whole of them on a CPU with a tiny shape."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bench import __main__ as bench
from tests.bench import curves, merge, packing, shapes, table, worker
from tests.bench.spec import Shape, Spec, beyond, shapes_of
from tests.oracles import tiny_checkpoint, tiny_config
from train.errors import UserError

ROOT = Path(__file__).parent.parent
SPEC = Spec("ours", "tiny", ((1, 32), (2, 64)), True, 0.05, 8, 1, 2, "cpu", "rows.jsonl")


def python(*words: str) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# What is measured, and what is left out


def test_shapes_in_words() -> None:
    assert shapes_of("1x512, 8×2048") == [(1, 512), (8, 2048)]
    for wrong in ("", "512", "1x", "axb"):
        with pytest.raises(ValueError, match="invalid literal"):
            shapes_of(wrong)


def test_what_is_beyond_a_shape_that_did_not_fit() -> None:
    assert beyond((4, 2048), [(8, 512), (1, 2048)]) == (1, 2048)
    assert beyond((8, 256), [(8, 512), (1, 2048)]) is None


def test_a_spec_goes_to_a_worker_and_comes_back_the_same() -> None:
    assert Spec.load(SPEC.dump()) == SPEC
    assert SPEC.with_shapes([(3, 4)]).shapes == ((3, 4),)


def test_every_arm_in_every_setting() -> None:
    specs = list(bench._specs(bench.Options(arms="ours,stock", model="tiny", shapes="1x32"), "cpu"))
    assert [(s.dropout, s.checkpointing, s.arm) for s in specs[:3]] == [
        (0.0, False, "ours"),
        (0.0, False, "stock"),
        (0.0, True, "ours"),
    ]
    assert len(specs) == 8


@pytest.mark.parametrize(
    ("wrong", "said"), [({"arms": "theirs"}, "no arm is called theirs"), ({"dropout": "some"}, "not understood")]
)
def test_what_cannot_be_measured_is_refused(wrong: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        list(bench._specs(bench.Options(**{"shapes": "1x32", **wrong}), "cpu"))  # type: ignore[arg-type]


class Workers:
    """Workers that answer by a script: of each shape a rate, "fit" (no room), or "" (ended without a word)."""

    def __init__(self, script: dict[Shape, Any]) -> None:
        self.script, self.asked = script, []  # type: ignore[var-annotated]

    def __call__(self, spec: Spec, options: bench.Options) -> list[dict[str, Any]]:
        self.asked.append(spec.shapes)
        rows: list[dict[str, Any]] = []
        for shape in spec.shapes:
            answer = self.script[shape]
            if answer == "":
                Path(spec.rows).with_suffix(".log").write_text("warming up\nSegmentation fault\n\n")
                return rows
            if answer == "fit":
                return [*rows, spec.row(shape, skipped="does not fit: out of memory (7.6 GiB)")]
            rows.append(spec.row(shape, tokens_per_s=answer, peak_gib=1.0))
        return rows


def group(script: dict[Shape, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: float = 1e18) -> Any:
    spec = Spec("ours", "tiny", tuple(script), False, 0.0, 8, 1, 2, "cpu", str(tmp_path / "rows.jsonl"))
    workers = Workers(script)
    monkeypatch.setattr(bench, "_worker", workers)
    return bench._group(spec, bench.Options(seconds=5), until), workers.asked


def test_after_no_room_another_worker_goes_on_and_larger_ones_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = {(1, 512): 10, (1, 2048): "fit", (8, 512): 30, (4, 2048): 40}
    rows, asked = group(script, tmp_path, monkeypatch)
    assert [(row["batch"], row.get("tokens_per_s"), row.get("skipped", "")[:12]) for row in rows] == [
        (1, 10, ""),
        (1, None, "does not fit"),
        (4, None, "does not fit"),
        (8, 30, ""),
    ]
    assert "1x2048 did not" in rows[2]["skipped"]
    assert asked == [((1, 512), (1, 2048), (8, 512), (4, 2048)), ((8, 512),)]


def test_a_worker_that_ends_without_a_word_costs_its_shape_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, _ = group({(1, 32): "", (2, 32): 7}, tmp_path, monkeypatch)
    assert rows[0]["skipped"] == "failed: Segmentation fault"
    assert rows[1]["tokens_per_s"] == 7


def test_nothing_begins_once_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, asked = group({(1, 32): 1, (2, 32): 2}, tmp_path, monkeypatch, until=-1.0)
    assert [row["skipped"] for row in rows] == ["not begun: seconds=5 are over"] * 2
    assert asked == []
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2


def test_out_of_memory_is_told_from_a_failure() -> None:
    assert worker.reason(torch.OutOfMemoryError("CUDA out of memory. Tried")).startswith("does not fit: out of memory")
    assert worker.reason(RuntimeError("shapes\ndiffer")) == "failed: RuntimeError: shapes differ"


# Random models


@pytest.mark.parametrize("name", ["tiny"])
def test_a_random_decoder_learns_numbers_that_are_finite(name: str) -> None:
    model = shapes.random_decoder(shapes.config(name), torch.device("cpu"), torch.float32)
    assert model.training
    assert not any(p.requires_grad for p in model.parameters())
    ids = torch.randint(0, 256, (1, 16))
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)


def test_weights_a_token_meets_are_those_of_the_names() -> None:
    billions = {name: shapes.weights(shapes.config(name)) / 1e9 for name in ("1.8b", "7b", "14b", "72b")}
    assert billions == pytest.approx({"1.8b": 1.525, "7b": 7.10, "14b": 13.39, "72b": 71.0}, rel=0.01)


# Tables


def row(arm: str, rate: int | None, **more: Any) -> dict[str, Any]:
    found = {"tokens_per_s": rate, "peak_gib": 2.0} if rate else {"skipped": "does not fit: out of memory (7.6 GiB)"}
    return {
        "arm": arm,
        "model": "1.8b",
        "batch": 1,
        "length": 512,
        "checkpointing": True,
        "dropout": 0.0,
        **found,
        **more,
    }


def test_a_table_has_the_ratio_beside_each_peer() -> None:
    rows = [row("ours", 3000), row("stock", 1000), row("unsloth", None), row("ours", 4000, dropout=0.05)]
    drawn = table.table(rows)
    cells = [list(column.cells) for column in drawn.columns]
    assert [str(column.header) for column in drawn.columns][4:] == ["ours", "stock", "×", "unsloth", "×"]
    assert [column[0] for column in cells[4:]] == ["3,000 · 2.00", "1,000 · 2.00", "3.0", "no room", ""]
    assert [column[1] for column in cells[4:]] == ["4,000 · 2.00", "", "", "", ""]


def test_the_lines_of_another_programs_benchmark() -> None:
    lines = (
        "noise\nunsloth-ckunsloth bs=1 seq=512 0.2810 s/it      1822 tok/s peak 2.88 GiB loss 12.1\n"
        "hf-bnb-liger-ck1 bs=4 seq=2048 0.6 s/it 13512 tok/s peak 6.36 GiB loss nan\n"
        "unsloth-ck0  bs=8 seq=512 0.18 s/it 22158 tok/s peak 8.63 GiB loss 11.9\n"
    )
    found = merge.peers(lines)
    assert [(r["arm"], r["batch"], r["checkpointing"], r["tokens_per_s"], r["peak_gib"]) for r in found] == [
        ("unsloth", 1, True, 1822, 2.88),
        ("hf-bnb-liger", 4, True, 13512, 6.36),
        ("unsloth", 8, False, 22158, 8.63),
    ]
    assert found[0]["checkpointing_kind"] == "unsloth"


def test_reports_of_one_visit_become_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = {
        "device": "a card",
        "date": "2026-11-22",
        "versions": {"torch": "2.7.1"},
        "rows": [row("ours", 1), row("ours", 2)],
    }
    (tmp_path / "a.json").write_text(json.dumps(first))
    (tmp_path / "b.json").write_text(json.dumps({**first, "device": "another", "rows": [row("ours", 3000)]}))
    (tmp_path / "peers.log").write_text("unsloth-ck1 bs=1 seq=512 0.2 s/it 1500 tok/s peak 2.88 GiB loss 1\n")
    (tmp_path / "peers.versions.json").write_text('{"unsloth": "1"}')
    assert merge.main([str(tmp_path / name) for name in ("out.json", "a.json", "b.json", "peers.log")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert [(r["arm"], r["tokens_per_s"]) for r in found["rows"]] == [("ours", 3000), ("unsloth", 1500)]
    assert (found["device"], found["versions"]["peers"]) == ("a card", {"unsloth": "1"})
    assert "2.0" in capsys.readouterr().out
    assert merge.main([]) == 2


@pytest.mark.parametrize("path", sorted((ROOT / "tests/bench/results").glob("*.json")), ids=lambda p: p.stem)
def test_reports_that_are_kept_have_what_a_report_has(path: Path) -> None:
    report = json.loads(path.read_text())
    assert report.keys() >= {"device", "date", "versions", "rows"}
    assert report["rows"]
    for found in report["rows"]:
        assert found["arm"]
        assert found.get("skipped") or found.get("tokens_per_s", 0) > 0 or found.get("final_loss", 0) > 0


# Curves


def test_curves_are_summed_up_and_drawn(tmp_path: Path) -> None:
    ours = [3.0 - 0.01 * n for n in range(100)]
    losses = {"ours": ours, "stock": [x + 0.01 for x in ours], "ours-again": [x - 0.02 for x in ours]}
    found = {row["arm"]: row for row in curves.summed_up(losses)}
    assert found["stock"]["apart_mean"] == pytest.approx(0.01)
    assert found["stock"]["over_ours"] == pytest.approx(1 + 0.01 / (sum(ours[-50:]) / 50))
    assert "over_ours" not in found["ours"]
    curves.draw(losses, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert curves.summed_up({}) == []


CURVES = """
import sys
from dataclasses import replace
from tests.bench import curves
from train.config import build, pairs
options = build(curves.Options, pairs(sys.argv[1:]))
for arm in ("ours", "stock"):
    curves._train(replace(options, only=arm))
"""


@pytest.mark.slow
def test_ours_and_the_stock_stack_learn_the_same(tmp_path: Path) -> None:
    """Six whole steps in float32, from the same weights: decoder, Int4, adapters, loss, clipping, optimizer and schedule."""
    base = tiny_checkpoint(tmp_path / "base-Int4", tiny_config("qwen2", tie_word_embeddings=True), int4=True)
    words = ["data=data/demo.jsonl", f"base={base}", "steps=6", "batch=2", "length=128", "dropout=0", "rank=8"]
    python("-c", CURVES, *words, f"out={tmp_path}")
    ours, stock = (curves.read(tmp_path / f"{arm}.jsonl") for arm in ("ours", "stock"))
    assert len(ours) == 6
    assert ours == pytest.approx(stock, rel=2e-6)
    assert ours[0] - min(ours) > 0.1


# The whole of it


@pytest.mark.slow
def test_the_whole_benchmark_on_a_cpu(tmp_path: Path) -> None:
    setting = ["shapes=1x32", "checkpointing=on", "dropout=0.05", "rank=8", "warm=1", "counted=2"]
    said = python("-m", "tests.bench", "arms=ours", *setting, f"out={tmp_path / 'out.json'}")
    report = json.loads((tmp_path / "out.json").read_text())
    (found,) = report["rows"]
    assert found["tokens_per_s"] > 0
    assert 0.1 < found["peak_gib"] < 8
    assert 5.5 < found["loss"] < 8.0  # near log 512: random weights know nothing
    assert report["versions"]["torch"] == torch.__version__
    assert "says nothing about speed" in said
    assert "ours" in said.split("peak GiB")[1]


def test_help_names_every_key() -> None:
    said = python("-m", "tests.bench", "--help")
    assert all(f"{name}=" in said for name in ("arms", "shapes", "gpus", "seconds", "patience", "out"))


def test_packing_takes_what_its_arms_need() -> None:
    options = packing.Options(batch=4, checkpointing=True, only="packed")
    assert packing._overrides(options) == {
        "length": "512",
        "batch": "4",
        "dropout": "0.0",
        "checkpointing": "true",
        "pack": "on",
        "accumulation": "1",
    }
    assert packing._overrides(packing.Options(only="padded"))["pack"] == "off"
