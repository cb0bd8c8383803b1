"""The benchmarks: what they leave out and why, how reports become tables, and all of it on a CPU with a tiny shape."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.bench import __main__ as bench
from tests.bench import arms, card, curves, decode, merge, packing, picture, pool, real_data, shapes, table, worker
from tests.bench.spec import Shape, Spec, parse_shapes, smaller_refused
from tests.support.oracles import tiny_checkpoint, tiny_config
from train.common.errors import UserError
from train.config.recipe import load_recipe
from train.training import deepspeed_engine
from train.training.distributed import RankInfo

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable
SPEC = Spec("ours", "tiny", 2, 64, "on", 0.05, 8, "device", 1, 2, "cpu")


def python(*words: str) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# --- what is measured, and what is left out


def test_shapes_are_parsed() -> None:
    assert parse_shapes("1x512, 8×2048") == [(1, 512), (8, 2048)]
    for wrong in ("", "512", "1x", "axb"):
        with pytest.raises(ValueError, match="invalid literal"):
            parse_shapes(wrong)


def test_a_shape_that_cannot_fit_is_known_from_a_smaller_one() -> None:
    assert smaller_refused((4, 2048), [(8, 512), (1, 2048)]) == (1, 2048)
    assert smaller_refused((8, 256), [(8, 512), (1, 2048)]) is None


def test_an_order_survives_the_way_to_a_worker() -> None:
    assert Spec.load(SPEC.dump()) == SPEC
    assert "embedding" not in SPEC.row()
    assert replace(SPEC, embedding="host", again=True).row()["arm"] == "ours again"
    assert table.checkpointing_label(replace(SPEC, embedding="host").row()) == "on, embedding on the host"
    assert table.key(SPEC.row()) == ("tiny", 2, 64, "on", 0.05, 1, 8)


def settings(**given: str) -> list[list[Spec]]:
    return list(bench._settings(bench.Options(model="tiny", **given), "cpu"))  # type: ignore[arg-type]


def test_every_arm_is_measured_in_every_setting_and_ours_again_after_the_others() -> None:
    found = settings(arms="ours,stock", shapes="4x2048,1x512")
    assert [(s[0].dropout, s[0].shape, s[0].checkpointing) for s in found[:3]] == [
        (0.0, (4, 2048), "off"),
        (0.0, (4, 2048), "on"),
        (0.0, (1, 512), "off"),
    ]
    assert len(found) == 8
    assert [(s.arm, s.keep, s.again) for s in found[0]] == [
        ("ours", True, False),
        ("stock", False, False),
        ("ours", False, True),
    ]
    alone = settings(arms="ours,stock", shapes="1x512", checkpointing="offload", dropout="0")
    assert [s.arm for s in alone[0]] == ["ours"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"arms": "theirs"}, "no arm is called theirs"),
        ({"dropout": "some"}, "not understood"),
        ({"checkpointing": "yes"}, "yes is none of"),
    ],
)
def test_unknown_values_are_refused(wrong: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(**{"shapes": "1x32", **wrong})


class Script:
    """Workers with scripted results for each arm and shape.

    A rate; "fit": out of memory; "crowd": out of memory unless alone; "": no row, another worker is needed.
    """

    def __init__(self, answers: dict[tuple[str, Shape], Any]) -> None:
        self.answers, self.living, self.asked = answers, set(), []  # type: ignore[var-annotated]

    def __call__(self, folder: Path, arm: str, gpus: int, patience: float) -> "Script.One":
        return Script.One(self, arm)

    class One:
        def __init__(self, script: "Script", arm: str) -> None:
            self.script, self.arm = script, arm
            script.living.add(self)

        @property
        def alive(self) -> bool:
            return self in self.script.living

        def end(self) -> None:
            self.script.living.discard(self)

        def measure(self, spec: Spec) -> dict[str, Any] | None:
            self.script.asked.append((spec.arm, spec.shape, spec.again))
            answer = self.script.answers[spec.arm, spec.shape]
            if answer == "crowd":
                answer = 5 if len(self.script.living) == 1 else "fit"
            if answer in ("", "fit"):
                self.end()
                return spec.row(skipped="does not fit: out of memory (7.6 GiB)") if answer else None
            return spec.row(tokens_per_s=answer, peak_gib=1.0)


def measured(
    answers: dict[tuple[str, Shape], Any], monkeypatch: pytest.MonkeyPatch, until: float = 1e18
) -> tuple[list[dict[str, Any]], Script]:
    script = Script(answers)
    monkeypatch.setattr(pool, "WorkerProcess", script)
    arms = ",".join(dict.fromkeys(arm for arm, _ in answers))
    shapes = ",".join(f"{b}x{n}" for b, n in dict.fromkeys(shape for _, shape in answers))
    specs = settings(arms=arms, shapes=shapes, checkpointing="off", dropout="0")
    return list(bench._measure(specs, pool.WorkerPool(Path(), 1, 1.0), 5, until)), script


def test_shapes_larger_than_one_that_did_not_fit_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    answers = {("ours", shape): n for shape, n in {(1, 512): 10, (1, 2048): "fit", (8, 512): 30, (4, 2048): 40}.items()}
    rows, script = measured(answers, monkeypatch)
    assert [row.get("tokens_per_s") for row in rows] == [10, None, 30, None]
    assert "1x2048 did not" in rows[3]["skipped"]
    assert len(script.asked) == 3


def test_a_shape_that_does_not_fit_beside_others_is_tried_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    rows, script = measured({("ours", (4, 64)): 10, ("stock", (4, 64)): "crowd"}, monkeypatch)
    assert [(row["arm"], row["tokens_per_s"]) for row in rows] == [("ours", 10), ("stock", 5), ("ours again", 10)]
    assert [arm for arm, *_ in script.asked] == ["ours", "stock", "stock", "ours"]


def test_nothing_is_begun_after_the_time_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    rows, script = measured({("ours", (1, 32)): 1, ("ours", (2, 32)): 2}, monkeypatch, until=-1.0)
    assert [row["skipped"] for row in rows] == ["not begun: seconds=5 are over"] * 2
    assert script.asked == []


def test_memory_that_is_left_behind_twice_gives_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    rows, _ = measured({("ours", (1, 32)): ""}, monkeypatch)
    assert rows[0]["skipped"] == "failed: memory was left behind twice"


def worker_of(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: float = 20.0
) -> dict[str, Any] | None:
    """The row for SPEC of a worker whose program is `code`, with the variables orders and rows."""
    (tmp_path / "python").write_text(f"#!{PYTHON}\nimport sys, time, json\norders, rows = sys.argv[-2:]\n{code}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(pool.sys, "executable", str(tmp_path / "python"))
    worker = pool.WorkerProcess(tmp_path, "ours", 1, patience)
    row = worker.measure(SPEC)
    worker.end(0.1)
    assert not worker.alive
    return row


def test_a_worker_that_ends_or_is_silent_costs_only_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = worker_of("sys.exit('warming up\\nSegmentation fault\\n\\n')", tmp_path, monkeypatch)
    assert row is not None
    assert row["skipped"] == "failed: Segmentation fault"
    row = worker_of("time.sleep(60)", tmp_path, monkeypatch, patience=0.5)
    assert row is not None
    assert row["skipped"] == "failed: silent for 0.5 s"


@pytest.mark.parametrize(("fused", "zero"), [((), 0), ((), 3), (("cpu",), 2)])
def test_a_closed_engine_releases_its_model(fused: tuple[str, ...], zero: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's hooks and its table of modules would hold it: a run of several stages would pay for each."""
    monkeypatch.setattr(deepspeed_engine, "FUSED_DEVICES", fused)
    cpu, ids = torch.device("cpu"), torch.randint(0, 100, (2, 32))
    recipe = load_recipe(
        "qlora",
        {"rank": "4", "batch": "2", "accumulation": "1", "length": "32", "zero": str(zero), "checkpointing": "off"},
    )
    one: Any = arms.Ours.engine_for(recipe, "tiny", arms.join(cpu), cpu)
    one.forward_backward({"input_ids": ids, "labels": ids}, 62)
    one.step(last=True, rate=1e-4)
    inner = one.engine  # DeepSpeed's
    references = [weakref.ref(x) for x in (inner, inner.module, inner.optimizer, *inner.parameters())]
    one.close()
    del one, inner
    worker.allocated_bytes(cpu)
    assert not [x for x in references if x() is not None]


def test_a_worker_writes_a_row_or_asks_for_another_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = "while not open(orders).read().endswith('\\n'): time.sleep(0.01)"
    program = wait + "\nopen(rows, 'a').write({!r} + '\\n'); time.sleep(9)"
    row = worker_of(program.format(json.dumps({"tokens_per_s": 7})), tmp_path, monkeypatch)
    assert row == {"tokens_per_s": 7}
    assert worker_of(program.format("null"), tmp_path, monkeypatch) is None


def test_orders_are_followed_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "orders"
    path.write_text(SPEC.dump() + "\n" + SPEC.dump()[:20])
    orders = worker.follow(path)
    assert next(orders) == SPEC
    path.write_text(SPEC.dump() + "\n" + replace(SPEC, batch=3).dump() + "\n\n")
    assert [spec.batch for spec in orders] == [3]


def test_out_of_memory_is_distinguished_from_a_failure() -> None:
    assert worker.describe_error(torch.OutOfMemoryError("CUDA out of memory. Tried")).startswith(
        "does not fit: out of memory"
    )
    assert worker.describe_error(RuntimeError("shapes\ndiffer")) == "failed: RuntimeError: shapes differ"


# --- the state of the card during a measurement


class FakeSensor:
    """A card that is limited by its power cap in every other reading."""

    def __init__(self) -> None:
        self.readings = 0

    def read(self) -> card.Reading:
        self.readings += 1
        return card.Reading(1980 - 300 * (self.readings % 2), 2619, 699.6, 61, 4 * (self.readings % 2))


def test_a_card_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "EVERY", 0.001)
    sensor = FakeSensor()
    with card.Watch(sensor) as watch:
        while sensor.readings < 10:
            pass
    row = watch.summary()
    assert row["sm_mhz"][0] == 1680
    assert row["sm_mhz"][2] == 1980
    assert row["watts"] == [700, 700, 700]
    assert 0.4 < row["held_back"]["power cap"] < 0.6
    assert row["looks"] == sensor.readings
    assert "heat" not in row["held_back"]


def test_the_reason_why_a_card_cannot_be_read_is_in_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    assert card.sensor_of(torch.device("cpu")) == "no card"

    def refuse(index: int) -> None:
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    monkeypatch.setattr(card, "NvmlSensor", refuse)
    sensor = card.sensor_of(torch.device("cuda", 0))
    assert "libnvidia-ml" in str(sensor)
    with card.Watch(sensor) as watch:
        pass
    assert "libnvidia-ml" in watch.summary()["seen"]
    with card.Watch(FakeSensor()) as watch:
        pass
    assert watch.summary() == {"seen": "too short to be seen"}


LIBRARY = """
#include <string.h>
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **out) {
    *out = (void *)7; return strcmp(uuid, "GPU-one") ? 2 : 0;
}
int nvmlDeviceGetClockInfo(void *d, unsigned kind, unsigned *out) {
    *out = kind == 1 ? 1755 : 2619; return d != (void *)7;
}
int nvmlDeviceGetPowerUsage(void *d, unsigned *out) { *out = 512345; return 0; }
int nvmlDeviceGetTemperature(void *d, unsigned sensor, unsigned *out) { *out = 54; return sensor; }
int nvmlDeviceGetCurrentClocksThrottleReasons(void *d, unsigned long long *out) { *out = 1ull << 5 | 4; return 0; }
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to build a stand-in of the library")
def test_the_library_is_called_with_the_right_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ml.c").write_text(LIBRARY)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "ml.so", tmp_path / "ml.c"], check=True)
    open_library = ctypes.CDLL
    monkeypatch.setattr(card.ctypes, "CDLL", lambda name: open_library(str(tmp_path / "ml.so")))
    for uuid, fits in (("one", True), ("other", False)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index, uuid=uuid: SimpleNamespace(uuid=uuid))
        sensor = card.sensor_of(torch.device("cuda", 0))
        assert isinstance(sensor, str) is not fits
        if not isinstance(sensor, str):
            assert sensor.read() == card.Reading(1755, 2619, 512.345, 54, 36)


# --- random models


@pytest.mark.parametrize("name", ["tiny"])
def test_a_random_decoder_has_a_finite_loss(name: str) -> None:
    model = shapes.random_decoder(shapes.config(name), torch.device("cpu"), torch.float32)
    assert model.training
    assert not any(p.requires_grad for p in model.parameters())
    ids = torch.randint(0, 256, (1, 16))
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)


class FakeArm:
    grad_norm = 1.25

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.tensor(6.0)

    def close(self) -> None: ...


def test_an_arm_measured_once_more_has_no_peak_and_every_row_a_gradient_norm(tmp_path: Path, monkeypatch: Any) -> None:
    """Its graphs, and the memory that they took, are of its first measurement."""
    monkeypatch.setattr(worker, "join", lambda device: RankInfo())
    monkeypatch.setattr(worker, "build", lambda *_: FakeArm())
    monkeypatch.setattr(worker, "LEAST_SECONDS", 0.0)
    tiny = replace(SPEC, model="tiny", batch=1, length=8, warm=1, counted=1, keep=True)
    one = worker.Worker(torch.device("cpu"), tmp_path / "rows")
    assert one.do(tiny)
    assert one.do(replace(tiny, keep=False, again=True))
    first, again = map(json.loads, (tmp_path / "rows").read_text().splitlines())
    assert first["peak_gib"] > 0
    assert not set(worker.PEAKS) & set(again)
    assert first["grad_norm"] == again["grad_norm"] == 1.25
    drawn = table.make_table([first, again])
    assert [next(iter(column.cells)) for column in drawn.columns][-2:] == [
        f"{first['tokens_per_s']:,} · {first['peak_gib']:.2f} · |g| 1.25",
        f"{again['tokens_per_s']:,} · |g| 1.25",
    ]


def test_the_weights_of_a_shape_are_those_of_its_name() -> None:
    billions = {name: shapes.weights(shapes.config(name)) / 1e9 for name in ("1.8b", "7b", "14b", "72b")}
    assert billions == pytest.approx({"1.8b": 1.525, "7b": 7.10, "14b": 13.39, "72b": 71.0}, rel=0.01)


# --- tables


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


def test_a_table_has_the_ratio_beside_each_other_arm() -> None:
    rows = [row("ours", 3000), row("stock", 1000), row("unsloth", None), row("ours", 4000, dropout=0.05)]
    drawn = table.make_table(rows)
    cells = [list(column.cells) for column in drawn.columns]
    assert [str(column.header) for column in drawn.columns][4:] == ["ours", "stock", "×", "unsloth", "×"]
    control = table.make_table([*rows, row("ours again", 2500, checkpointing="on")])
    assert [next(iter(column.cells)) for column in control.columns][4:7] == ["3,000 · 2.00", "1,000 · 2.00", "2.5"]
    assert [column[0] for column in cells[4:]] == ["3,000 · 2.00", "1,000 · 2.00", "3.0", "no room", ""]
    assert [column[1] for column in cells[4:]] == ["4,000 · 2.00", "", "", "", ""]


def test_lines_of_another_programs_benchmark_become_rows() -> None:
    lines = (
        "noise\nunsloth-ckunsloth bs=1 seq=512 0.2810 s/it      1822 tok/s peak 2.88 GiB loss 12.1\n"
        "hf-bnb-liger-ck1 bs=4 seq=2048 0.6 s/it 13512 tok/s peak 6.36 GiB loss nan\n"
        "unsloth-ck0  bs=8 seq=512 0.18 s/it 22158 tok/s peak 8.63 GiB loss 11.9\n"
    )
    found = merge.peers(lines)
    assert [(r["arm"], r["batch"], r["checkpointing"], r["tokens_per_s"], r["peak_gib"]) for r in found] == [
        ("unsloth", 1, "on", 1822, 2.88),
        ("hf-bnb-liger", 4, "on", 13512, 6.36),
        ("unsloth", 8, "off", 22158, 8.63),
    ]
    assert found[0]["checkpointing_kind"] == "unsloth"


def test_the_state_of_the_card_is_added_to_another_programs_line() -> None:
    looks = [
        (9.5, 0, 1980, 100),
        (11.2, 0, 1500, 690),
        (11.2, 1, 300, 60),
        (11.7, 0, 1440, 700),
        (12.4, 0, 1455, 698),
        (14.0, 0, 1980, 90),
    ]
    log = "".join(f"2026/11/22 20:31:{s:06.3f}, {n}, {mhz}, 2619, {w}.5, 61\n" for s, n, mhz, w in looks)
    line = "unsloth-ck0  bs=4 seq=2048 0.2000 s/it     40960 tok/s peak 14.14 GiB loss 12.3 at 20:31:12"
    (found,) = merge.peers(line, card=log)
    assert (found["at"], found["tokens_per_s"]) == ("20:31:12", 40960)
    assert found["card"] == {
        "looks": 3,
        "sm_mhz": [1440, 1455, 1500],
        "memory_mhz": [2619] * 3,
        "watts": [690, 698, 700],
        "celsius": [61] * 3,
    }
    assert "card" not in merge.peers(line[:-12])[0]


def test_reports_of_one_visit_are_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
def test_committed_reports_are_complete(path: Path) -> None:
    report = json.loads(path.read_text())
    assert report.keys() >= {"device", "date", "versions", "rows"}
    assert report["rows"]
    for found in report["rows"]:
        assert found["arm"]
        measured = (found.get(key, 0) > 0 for key in ("tokens_per_s", "final_loss", "seconds"))  # seconds: of data
        assert found.get("skipped") or any(measured)


# --- curves


def test_curves_are_summed_and_drawn(tmp_path: Path) -> None:
    ours = [3.0 - 0.01 * n for n in range(100)]
    losses = {"ours": ours, "stock": [x + 0.01 for x in ours], "ours-again": [x - 0.02 for x in ours]}
    found = {row["arm"]: row for row in curves.sum_up(losses)}
    assert found["stock"]["apart_mean"] == pytest.approx(0.01)
    assert found["stock"]["over_ours"] == pytest.approx(1 + 0.01 / (sum(ours[-50:]) / 50))
    assert "over_ours" not in found["ours"]
    picture.draw(losses, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert curves.sum_up({}) == []


CURVES = """
import sys
from dataclasses import replace
from tests.bench import curves
from train.config.options import build, pairs
options = build(curves.Options, pairs(sys.argv[1:]))
for arm in ("ours", "stock"):
    curves._train(replace(options, only=arm))
"""


@pytest.mark.slow
def test_ours_and_the_stock_stack_have_the_same_losses(tmp_path: Path) -> None:
    """Six steps in float32 from the same weights: decoder, Int4, adapters, loss, clipping, optimizer and schedule."""
    base = tiny_checkpoint(tmp_path / "base-Int4", tiny_config("qwen2", tie_word_embeddings=True), int4=True)
    words = [
        "data=data/demo.jsonl",
        f"base={base}",
        "steps=6",
        "batch=2",
        "length=128",
        "dropout=0",
        "rank=8",
        "held_out=2",
    ]
    python("-c", CURVES, *words, f"out={tmp_path}")
    ours, stock = (curves.read(tmp_path / f"{arm}.jsonl") for arm in ("ours", "stock"))
    assert len(ours) == 6
    assert ours == pytest.approx(stock, rel=2e-6)
    assert ours[0] - min(ours) > 0.1


# --- decoding


def test_an_arm_of_decoding_that_is_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["decode", "out.json", "--arms", "ours,theirs"])
    with pytest.raises(SystemExit):
        decode.main()
    assert "no arm is called theirs. There are: ours, stock, ours-again" in capsys.readouterr().err


@pytest.mark.parametrize("arm", ["ours", "stock"])
def test_both_arms_decode_a_tiny_model_with_and_without_an_adapter(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("PROMPT", 6),
        ("NEW", 4),
        ("BATCHES", (1, 2)),
        ("REPEATS", 1),
        ("DEVICE", torch.device("cpu")),
    ):
        monkeypatch.setattr(decode, name, value)
    rows = list(decode.run_arm(arm, "tiny", ""))
    assert [(row["adapter"], row["batch"]) for row in rows] == [(False, 1), (False, 2), (True, 1), (True, 2)]
    assert all(row["tokens_per_s"] > 0 for row in rows), rows


# --- all of it


@pytest.mark.slow
def test_the_whole_benchmark_on_a_cpu(tmp_path: Path) -> None:
    setting = ["shapes=1x32", "checkpointing=on", "dropout=0.05", "rank=8", "warm=1", "counted=2"]
    output = python("-m", "tests.bench", "arms=ours", *setting, f"out={tmp_path / 'out.json'}")
    report = json.loads((tmp_path / "out.json").read_text())
    (found,) = report["rows"]
    assert found["tokens_per_s"] > 0
    assert 0.1 < found["peak_gib"] < 8
    assert 0 < found["grad_norm"] < 100
    assert "gradient norm" in output
    assert 5.5 < found["loss"] < 8.0  # near log 512, the loss of random guessing
    assert report["versions"]["torch"] == torch.__version__
    assert "says nothing about speed" in output
    assert "ours" in output.split("peak GiB")[1]


def test_help_names_every_key() -> None:
    output = python("-m", "tests.bench", "--help")
    assert all(f"{name}=" in output for name in ("arms", "shapes", "gpus", "seconds", "patience", "out"))


def test_an_arm_that_fails_gives_a_row(capfd: pytest.CaptureFixture[str]) -> None:
    found = real_data.run_arms("tests.bench.nothing", ("one", "two"), packing.Options())
    assert found == [{"arm": arm, "skipped": "failed: status 1"} for arm in ("one", "two")]
    assert "No module named tests.bench.nothing" in capfd.readouterr().err


PACKING = """
from dataclasses import replace
from tests.bench import packing
shape = dict(model="tiny", length=128, batch=2, warm=1, counted=2)
options = packing.Options(data="data/demo.jsonl", tokenizer={base!r}, out={out!r}, **shape)
for arm in packing.ARMS:
    packing._measure(replace(options, only=arm))
"""


@pytest.mark.slow
def test_packing_is_measured_on_real_data(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", tiny_config("qwen2"))
    python("-c", PACKING.format(base=str(base), out=str(tmp_path / "rows.jsonl")))
    found = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in found] == list(packing.ARMS)
    real_share = {row["arm"]: row["real"] for row in found}
    assert real_share["packed"] > real_share["padded"]
    assert real_share["longest"] >= real_share["padded"]


def test_packing_overrides_the_recipe_for_each_arm() -> None:
    options = packing.Options(batch=4, checkpointing="on", only="packed")
    assert packing._overrides(options) == {
        "length": "512",
        "batch": "4",
        "dropout": "0.0",
        "checkpointing": "on",
        "pack": "on",
        "accumulation": "1",
    }
    assert packing._overrides(packing.Options(only="padded"))["pack"] == "off"


def test_a_random_base_on_the_disk_is_one_that_loads(tmp_path: Path) -> None:
    from tests.bench import random_base, shapes
    from tests.support.oracles import small_tokenizer
    from train.model.loading import load

    (tmp_path / "tokenizer").mkdir()
    small_tokenizer(tmp_path / "tokenizer")
    random_base.write(tmp_path / "base", shapes.config("tiny"), tmp_path / "tokenizer", torch.device("cpu"))
    assert (tmp_path / "base" / "qwen.tiktoken").is_file()
    model = load(tmp_path / "base", torch.float32, torch.device("cpu"))
    logits = model(input_ids=torch.arange(8)[None]).logits
    assert logits.shape == (1, 8, 512) and logits.isfinite().all()


def test_the_memory_table_takes_what_auto_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, in a shape that it can compute."""
    from tests.bench import memory_table

    assert memory_table.choose("Qwen-14B", 8) is None
    name, recipe = memory_table.choose("Qwen-7B", 8) or ("", load_recipe("smoke", {}))
    assert name == "8gb" and recipe.batch * recipe.accumulation == 16 and recipe.embedding == "host"
    monkeypatch.setitem(memory_table.PUBLISHED, "tiny", shapes.SHAPES["tiny"])
    monkeypatch.setattr(memory_table, "COUNTED", 1)
    few = {"length": "64", "rows_per_step": "2"}
    monkeypatch.setattr(memory_table, "choose", lambda *cell, real=memory_table.choose: real(*cell, few))
    real_ids = torch.randint
    monkeypatch.setattr(torch, "randint", lambda low, high, size: real_ids(low, min(high, 500), size))
    row = memory_table.run_cell("tiny", 8)
    assert row["tokens_per_s"] > 0 and row["grad_norm"] > 0 and (row["batch"], row["checkpointing"]) == (2, "off")
    assert "8 GiB" in memory_table.text(row) and "nothing fits" in memory_table.text(
        memory_table.run_cell("Qwen-14B", 8)
    )


def test_commands_are_timed_in_turns(tmp_path: Path) -> None:
    from tests.bench import commands

    root = Path(__file__).parents[1]
    assert commands.main([str(tmp_path / "out.json"), str(root), "only=plan", "times=1"]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert [(row["command"], row["arm"]) for row in report["rows"]] == [("plan", "control"), ("plan", "here")]
    assert all(row["seconds"] > 0 and row["peak_gb"] > 0 for row in report["rows"])
    assert report["medians"]["plan"]["with_control"]["seconds"] > 0
    with pytest.raises(UserError, match=r"train data .*status 2"):
        commands.measure(root, ["data", "data=no-such-file"])


def test_the_timeline_of_a_command_has_its_milestones(tmp_path: Path) -> None:
    from tests.bench import train_timeline
    from tests.support.tiny_training import options, tiny_checkpoint, tiny_config, write_rows

    tiny_checkpoint(tmp_path / "models" / "tiny-Int4", tiny_config(), int4=True)
    given = options(data=write_rows(tmp_path / "data.jsonl"), models=tmp_path / "models", steps=3)
    rows = train_timeline.measure([f"{key}={value}" for key, value in given.items()])
    walls = [row["wall"] for row in train_timeline.milestones(rows)]
    assert len(walls) == len(train_timeline.MILESTONES) and walls == sorted(walls)
    watched = {name for names in train_timeline.WATCHED.values() for name in names}
    assert watched - {row["what"].removesuffix(" begins") for row in rows} == set()
    assert "first step done" in train_timeline.as_text(train_timeline.milestones(rows))


def test_medians_of_commands() -> None:
    from tests.bench.commands import medians

    rows = [
        {"command": "train", "arm": arm, "seconds": seconds, "first_step_seconds": seconds / 2, "weights": {"a": arm}}
        for arm, seconds in (("control", 4.0), ("here", 1.0), ("control", 8.0), ("here", 3.0), ("here", 2.0))
    ]
    found = medians(rows)["train"]
    assert found["control"]["seconds"] == 6 and found["here"] == {"seconds": 2, "first_step_seconds": 1}
    assert found["with_control"] == {"seconds": 0.333, "first_step_seconds": 0.333} and not found["equal_weights"]
