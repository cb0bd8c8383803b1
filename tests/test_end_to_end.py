"""All commands on a CPU, as a user types them: quantize, data, train, export, compare, infer; real files, no fakes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.oracles import tiny_checkpoint, tiny_config
from train.common.files import read_json, sha256
from train.model.folder import find_damage, read_manifest

ROOT = Path(__file__).parent.parent
ROWS = (("What is your name?", "Cai."), ("你叫什么？", "阿才。"), ("One word for cold?", "Ice."), ("2 + 2?", "4."))
STEPS = 20
# One child process for all commands: each would spend most of its time on importing torch and deepspeed
SCRIPT = """
import json, sys
from train.__main__ import main
for words in json.loads(sys.argv[1]):
    print(f"=== {words[0]}", flush=True)
    status = main(words)
    sys.stderr.flush()
    print(f"=== exit {status}", flush=True)
"""


def run_all(commands: list[list[str]], timeout: int = 240) -> list[str]:
    """Run each command; what each printed. Fails at an exit status but 0, a warning or a traceback."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(commands)]
    environment = {**os.environ, "COLUMNS": "120", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )
    assert process.returncode == 0, process.stdout
    assert [line for line in process.stdout.splitlines() if "Traceback" in line or "Warning" in line] == [], (
        process.stdout
    )
    outputs = []
    for part in process.stdout.split("=== ")[1:]:
        head, _, rest = part.partition("\n")
        if head.startswith("exit "):
            assert head == "exit 0", process.stdout
        else:
            outputs.append(rest)
    assert len(outputs) == len(commands), process.stdout
    return outputs


def commands(root: Path) -> list[list[str]]:
    folders = [f"models={root / 'models'}", f"runs={root / 'runs'}"]
    training = [
        "processes=1",
        "length=96",
        f"steps={STEPS}",
        "warmup=2",
        "learning_rate=0.02",
        "rank=4",
        "save_every=0",
    ]
    return [
        ["quantize", "model=base", "group_size=32", folders[0]],
        ["data", f"data={root / 'conversations.jsonl'}", "model=base-Int4", "length=96", folders[0]],
        [
            "train",
            f"data={root / 'conversations.jsonl'}",
            "model=base-Int4",
            "recipe=demo",
            "run=all",
            *training,
            *folders,
        ],
        ["export", "run=all", *folders],
        ["compare", "run=all", "max_tokens=12", *folders],
        ["infer", "run=all", f"prompt={ROWS[0][0]}", "max_tokens=12", *folders],
    ]


def start(root: Path, layout: str) -> str:
    """A float base and a data set below `root`; the sha256 of the base's weights."""
    base = tiny_checkpoint(root / "models" / "base", tiny_config(layout, tie_word_embeddings=layout == "qwen2"))
    rows: list[dict[str, Any]] = [{"instruction": q, "input": "", "output": a} for q, a in ROWS]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (root / "conversations.jsonl").write_text(text, encoding="utf-8")
    return sha256(base / "model.safetensors")


def check(root: Path, before: str, compared: str, inferred: str) -> None:
    """Everything that the commands should leave below `root`, and the outputs of the last two."""
    run, merged = root / "runs" / "all", root / "runs" / "all" / "merged"
    assert sha256(root / "models" / "base" / "model.safetensors") == before
    for folder in (root / "models" / "base-Int4", merged):
        manifest = read_manifest(folder)
        assert manifest is not None and find_damage(folder, manifest, full=True) == []
    record = read_json(run / "run.json")
    assert record["steps"] == STEPS and record["loss"]["last"] < record["loss"]["first"] - 0.5
    assert "quantization_config" not in read_json(merged / "config.json")
    assert read_json(merged / "manifest.json")["parity"]["agreement"] > 0.9
    answers = [json.loads(line) for line in (run / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["question"] for row in answers] == [question for question, _ in ROWS]
    assert all(row["seen"] and row["before"] != row["after"] for row in answers)
    assert answers[0]["after"].rstrip("…") in inferred, "compare and infer ask the same model"
    assert all(word in compared for word in ("question", "before", "after", ROWS[0][0], f"loss of {STEPS} steps"))
    assert (run / "report.md").is_file() and (run / "loss.png").is_file()
    assert [path.name for path in root.rglob(".*") if path.suffix in (".tmp", ".old")] == []


def test_from_a_float_base_to_an_answer_in_both_layouts(tmp_path: Path) -> None:
    before = {layout: start(tmp_path / layout, layout) for layout in ("qwen2", "qwen")}
    outputs = run_all([words for layout in before for words in commands(tmp_path / layout)])
    check(tmp_path / "qwen2", before["qwen2"], *outputs[4:6])
    check(tmp_path / "qwen", before["qwen"], *outputs[10:12])
