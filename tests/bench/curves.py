"""The same 300 steps in this program and in others, or in fp8: same base, data, order and first weights.

    python -m tests.bench.curves data=FILE base=FOLDER [steps=300] [out=runs/curves] …

ours         as `make train` does it: our decoder, kernels and engine
stock        transformers' LlamaForCausalLM with auto_gptq's QuantLinear, peft, DeepSpeed ZeRO-2, float16 (stack.py)
ours-again   ours with other first weights and other dropout, the data in the same order: how much two runs of one
             program differ
ours-fp8     ours with precision=fp8, on a card that has it

A row is one conversation, padded to the longest of its batch, since the stock stack cannot pack. Each arm runs in a
process of its own and writes OUT/ARM.jsonl, a line a step; ours also OUT/ARM-held-out.json, the mean loss of later
conversations before and after, computed without dropout and without fp8. Then OUT/curves.json has the sums and OUT/curves.png the
curves in one picture.
"""

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from tests.bench.picture import draw
from tests.bench.real_data import Conversations, run_arms
from tests.bench.spec import heading
from train.common.files import write_json
from train.config.options import build, describe, option, pairs
from train.config.recipe import Recipe, load_recipe
from train.data.tokens.batches import IGNORE

ARMS = ("ours", "stock", "ours-again", "ours-fp8")
LAST = 50  # steps whose mean is the final loss


@dataclass(frozen=True)
class Options:
    """What is trained, on which data."""

    data: str = option("", "file or files, as for make train")
    base: str = option("", "folder of an Int4 base in layout qwen2")
    steps: int = option(300, "optimizer steps")
    batch: int = option(8, "conversations a step")
    length: int = option(512, "tokens of a conversation at most; longer ones are cut")
    held_out: int = option(64, "batches of later conversations, in the same epoch, whose loss is measured too")
    rank: int = option(64, "LoRA: r")
    dropout: float = option(0.05, "LoRA: dropout")
    learning_rate: float = option(3e-4, "the peak")
    arms: str = option("ours,stock,ours-again", f"which, by comma: {', '.join(ARMS)}")
    out: str = option("runs/curves", "folder for lines, summary and picture")
    only: str = option("", "one arm, in this process", ("", *ARMS))


def main(words: list[str]) -> int:
    if {"-h", "--help"} & set(words):
        print(f"{__doc__}\n{describe(Options)}")
        return 0
    options = build(Options, pairs(words))
    if options.only:
        _train(options)
        return 0
    if unknown := set(options.arms.split(",")) - set(ARMS):
        print(
            f"error: arms={options.arms}: there are {', '.join(ARMS)}, not {', '.join(sorted(unknown))}.",
            file=sys.stderr,
        )
        return 2
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    arms = [arm for arm in ARMS if arm in options.arms.split(",")]
    failed = run_arms("tests.bench.curves", arms, options)
    losses = {arm: read(out / f"{arm}.jsonl") for arm in arms if (out / f"{arm}.jsonl").is_file()}
    rows = sum_up(losses)
    add_held_out(rows, out)
    rows += [row for row in failed if row["arm"] not in losses]
    settings = {f.name: getattr(options, f.name) for f in fields(Options) if f.name not in ("only", "arms", "out")}
    settings |= {name: Path(settings[name]).name for name in ("data", "base")}
    write_json(out / "curves.json", {**heading(), "settings": settings, "rows": rows})
    print(json.dumps(rows))
    draw(losses, out / "curves.png")
    return 0


def read(path: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


def sum_up(losses: dict[str, list[float]]) -> list[dict[str, Any]]:
    """A row for each arm: its final loss (the mean of the last steps), and its distance from ours."""
    rows = []
    for arm, values in losses.items():
        row: dict[str, Any] = {"arm": arm, "steps": len(values), "final_loss": statistics.fmean(values[-LAST:])}
        if arm != "ours" and "ours" in losses:
            distance = [abs(a - b) for a, b in zip(losses["ours"], values)]
            row["over_ours"] = row["final_loss"] / statistics.fmean(losses["ours"][-LAST:])
            row |= {"apart_mean": statistics.fmean(distance), "apart_most": max(distance)}
        rows.append(row)
    return rows


def add_held_out(rows: list[dict[str, Any]], out: Path) -> None:
    """The held-out losses of the arms that have them, and how much larger each is than ours."""
    found = {row["arm"]: out / f"{row['arm']}-held-out.json" for row in rows}
    losses = {arm: json.loads(path.read_text()) for arm, path in found.items() if path.is_file()}
    for row in rows:
        if row["arm"] in losses:
            row["held_out"] = losses[row["arm"]]
            if "ours" in losses:
                row["held_out_over_ours"] = row["held_out"]["after"] / losses["ours"]["after"]


def _recipe(options: Options) -> Recipe:
    """The default recipe with one conversation a row; ours-again has another seed of weights and dropout."""
    same = ("steps", "batch", "length", "rank", "dropout", "learning_rate")
    values = {name: str(getattr(options, name)) for name in same}
    fixed = {"pack": "off", "accumulation": "1", "checkpointing": "off", "model": Path(options.base).name}
    recipe = load_recipe("qlora", {**values, **fixed})
    if options.only == "ours-fp8":
        return replace(recipe, precision="fp8")
    return replace(recipe, seed=recipe.seed + 1) if options.only == "ours-again" else recipe


def _train(options: Options) -> None:
    """One arm: write the loss of each step as soon as it is known."""
    import torch

    from train.runs import checkpoint
    from train.training.loop import learning_rate

    recipe = _recipe(options)
    order = load_recipe("qlora", {}).seed  # the seed of the order of samples: the same for every arm
    data = Conversations(options.data, Path(options.base), recipe, recipe.steps + options.held_out, order)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint.seed_all(recipe.seed)
    held_out = [data.batch(step) for step in range(recipe.steps, recipe.steps + options.held_out)]
    step_of_arm, evaluate = (_stock if options.only == "stock" else _ours)(options, recipe, device)
    before = evaluate(held_out)
    with (Path(options.out) / f"{options.only}.jsonl").open("w") as file:
        for step in range(recipe.steps):
            rate = learning_rate(recipe, step, recipe.steps)
            loss = step_of_arm(data.batch(step), data.schedule.label_count(step), rate)
            file.write(json.dumps({"step": step + 1, "loss": loss, "learning_rate": rate}) + "\n")
            file.flush()
            if step % 50 == 0:
                print(f"{options.only}: step {step + 1}, loss {loss:.4f}", flush=True)
    if before is not None:
        write_json(Path(options.out) / f"{options.only}-held-out.json", {"before": before, "after": evaluate(held_out)})


Step = Callable[[dict[str, Any], int, float], float]  # batch, its labelled tokens, learning rate -> their mean loss
Evaluate = Callable[[list[dict[str, Any]]], float | None]  # batches -> the mean loss of their labelled tokens


def _ours(options: Options, recipe: Recipe, device: Any) -> tuple[Step, Evaluate]:
    import torch

    from tests.bench.arms import join
    from train.common.device import pick_dtype
    from train.model import lora
    from train.model.loading import load
    from train.training.deepspeed_engine import Engine

    dtype = pick_dtype(device, recipe.precision)
    join(device)
    model = lora.attach(load(Path(options.base), dtype, device, keep_float=device.type == "cpu"), recipe)
    engine = Engine(model.train(), recipe, dtype, 1)

    def step(batch: dict[str, Any], labels: int, rate: float) -> float:
        total = engine.forward_backward(batch, labels)
        engine.step(last=True, rate=rate)
        return float(total) / labels

    @torch.no_grad()
    def evaluate(batches: list[dict[str, Any]]) -> float | None:
        model.eval()
        sums = [float(engine.evaluate(batch)) for batch in batches]
        model.train()
        count = sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches)
        return sum(sums) / count if count else None

    return step, evaluate


def _stock(options: Options, recipe: Recipe, device: Any) -> tuple[Step, Evaluate]:
    import torch

    from tests.bench.arms import join
    from tests.bench.stack import adapt, deepspeed_engine, stock_from
    from train.model import lora

    dtype = torch.float16 if device.type == "cuda" else torch.float32
    join(device)
    model = adapt(
        stock_from(Path(options.base), device, dtype), recipe.rank, recipe.dropout, checkpointing=False
    ).train()
    trainable = lora.trainable(model)
    for name, p in trainable.items():
        if ".lora_A." in name:
            p.data.copy_(lora.initial_lora_a(name, p.shape, recipe.seed))
    betas = (recipe.beta1, recipe.beta2)
    optimizer = torch.optim.AdamW(
        trainable.values(), lr=1.0, betas=betas, eps=recipe.epsilon, weight_decay=recipe.weight_decay
    )
    engine = deepspeed_engine(model, optimizer, recipe.batch, dtype)

    def step(batch: dict[str, Any], labels: int, rate: float) -> float:
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        ids, targets, mask = (batch[key].to(device) for key in ("input_ids", "labels", "segment_ids"))
        loss = engine(input_ids=ids, attention_mask=(mask > 0).long(), labels=targets).loss
        engine.backward(loss)
        engine.step()
        return float(loss)

    return step, lambda batches: None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
