"""lm-evaluation-harness over the server: a task of C-Eval's form, whose log-likelihoods are those of whole forward passes.

LM_EVAL names a Python with `lm_eval[api]` and transformers; without that, an environment is made from the package
registry. C-Eval itself is on a hub; the rows here were written for this test.
"""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from tests.support.environments import plain_environment, python_of
from tests.support.exports import export
from tests.support.published import ROWS, publish_tokenizer
from tests.support.runs import tiny_run
from tests.support.server import serving
from train.model.loading import load
from train.model.tokenizer import load_tokenizer

ROWS_OF_TASK = [
    {"question": "法国的首都是哪里？", "A": "罗马", "B": "巴黎", "C": "奥斯陆", "D": "柏林", "answer": "B"},
    {"question": "2 + 2 等于多少？", "A": "3", "B": "5", "C": "4", "D": "22", "answer": "C"},
    {"question": "一周有几天？", "A": "七天", "B": "五天", "C": "十天", "D": "两天", "answer": "A"},
]
TASK = """
task: ceval_form
dataset_path: json
dataset_kwargs: {data_files: {validation: ROWS_FILE}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{question.strip()}}\\nA. {{A}}\\nB. {{B}}\\nC. {{C}}\\nD. {{D}}\\n答案："
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: "{{['A', 'B', 'C', 'D'].index(answer)}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def log_likelihood(model: torch.nn.Module, context: list[int], choice: list[int]) -> float:
    with torch.no_grad():
        logs = model(torch.tensor([context + choice])).logits[0].double().log_softmax(-1)
    return float(sum(logs[len(context) + n - 1, token] for n, token in enumerate(choice)))


@pytest.mark.slow
def test_its_log_likelihoods_are_those_of_the_model(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    python = python_of(
        tmp_path_factory.mktemp("lm") / "venv", "LM_EVAL", ("lm_eval[api]==0.4.13", "transformers==5.24.0")
    )
    run = tiny_run(tmp_path, "qwen", vocab_size=ROWS)
    publish_tokenizer(tmp_path / "models/base-Int4")
    merged = export(run, layout="qwen2", dtype="float32", passport=0)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS_OF_TASK))
    (tasks / "ceval_form.yaml").write_text(TASK.replace("ROWS_FILE", str(tasks / "rows.jsonl")))
    with serving(tmp_path, f"model={merged}") as served:
        name = served.ask("/v1/models")[1]["data"][0]["id"]
        to = f"model={name},base_url={served.url}/v1/completions,tokenizer={merged},tokenizer_backend=huggingface"
        words = ["--model", "local-completions", "--model_args", f"{to},num_concurrent=2,max_retries=1,timeout=300"]
        words += ["--include_path", str(tasks), "--tasks", "ceval_form", "--batch_size", "1"]
        words += ["--log_samples", "--output_path", str(tmp_path / "out")]
        variables = {**plain_environment(), "OPENAI_API_KEY": "none", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        subprocess.run([python, "-m", "lm_eval", "run", *words], check=True, env=variables, cwd=tmp_path)
    (samples,) = (tmp_path / "out").rglob("samples_ceval_form_*.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    model, tokenizer = load(merged, torch.float32), load_tokenizer(merged)
    for one in sorted(found, key=lambda sample: sample["doc_id"]):
        row = ROWS_OF_TASK[one["doc_id"]]
        asked = f"{row['question']}\n" + "".join(f"{key}. {row[key]}\n" for key in "ABCD") + "答案："
        expected = [log_likelihood(model, tokenizer.encode(asked), tokenizer.encode(f" {key}")) for key in "ABCD"]
        values = [float(response[0]) for response in one["filtered_resps"]]
        assert values == pytest.approx(expected, abs=1e-3)
    assert len(found) == len(ROWS_OF_TASK)
