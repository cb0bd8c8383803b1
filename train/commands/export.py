"""Merge a run's adapter into its base and write float weights that stock tools load, verified before they get their name.

The default is float16: the scales and biases of an Int4 base are float16, and it keeps three bits more of each weight than
bfloat16. The very Int4 weights that were trained against are dequantised; `onto` takes a float checkpoint instead.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from train.common.errors import UserError
from train.common.files import free_bytes, recover, sha256, staged
from train.common.progress import bar
from train.config.options import option
from train.config.recipe import Recipe
from train.data.conversations import training_data
from train.evaluation import parity
from train.export.merge import Job, size, write
from train.model.folder import find_damage, read_manifest, resolve, write_manifest
from train.model.layouts import DecoderConfig
from train.model.loading import load, read_folder_config
from train.model.lora import load_adapter
from train.model.tokenizer import load_tokenizer
from train.runs.folder import read_run

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
GB, GIB = 10**9, 2**30


@dataclass(frozen=True)
class Options:
    """Merge a run into float weights: runs/RUN/merged."""

    run: str = option("", "name of a finished run below runs/")
    dtype: str = option("float16", "type of the weights", (*DTYPES, *SHORT))
    layout: str = option("", "empty: the base's; qwen2: loads without remote code everywhere", ("", "qwen", "qwen2"))
    onto: str = option("", "empty: the Int4 base that was trained on; or a float model or folder to merge onto")
    out: str = option("", "folder to write; empty: runs/RUN/merged")
    shard_size: float = option(4.0, "GB in one file, at most")
    verify: int = option(30, "conversations of the run's own data on which the result is compared")
    models: str = option("models", "folder of the models")
    runs: str = option("runs", "folder of the runs")


def run(options: Options) -> None:
    # what, from where, to where
    if not options.run:
        raise UserError("which run? RUN= names a folder below runs/. Example: make export RUN=demo")
    folder = Path(options.runs) / options.run
    record = read_run(folder)
    base = resolve(record["recipe"]["model"], Path(options.models))
    _check_base(record, base)
    job, out = _job(options, folder, base, record["recipe"]), Path(options.out) if options.out else folder / "merged"
    inputs = _inputs(options, job, base)
    recover(out)
    if (found := _finished(out, inputs)) is not None:
        print(f"{out}: nothing to do, it was exported from these inputs before.")
        return _closing(options, out, job, found)
    _check_space(out, job)
    _place(size(job), job.dtype)  # what comparing needs is asked for before the merge, too

    # merge, read back, compare; only then it gets its name
    print(
        f"Merging {folder / 'adapter'} into {job.weights}: {size(job) / GB:.2f} GB, {_named(job.dtype)}, layout {job.layout}"
    )
    with staged(out) as aside:
        with bar("merging", size(job), "MB", 1e6) as advance:
            write(job, aside, advance)
        found = _verify(options, record, base, job, aside)
        _require(found, job)
        write_manifest(aside, {"inputs": inputs, "parity": found})
    _closing(options, out, job, found)


def _check_base(record: dict[str, Any], base: Path) -> None:
    """An adapter belongs to the weights that it was trained on, to the last bit."""
    now = _weight_hashes(base)
    then = {name: known for name, known in record["base"]["files"].items() if _counts(name)}
    if now != then:
        differ = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
        raise UserError(
            f"{base} is not what run {record['run']!r} was trained on: {', '.join(differ[:3])} differ. Fetch or quantise the base "
            "again as it was, or train again under another RUN=."
        )


def _job(options: Options, folder: Path, base: Path, recipe: dict[str, Any]) -> Job:
    weights = resolve(options.onto, Path(options.models)) if options.onto else base
    config, published = read_folder_config(weights)
    if options.onto:
        _check_onto(base, weights, config, published)
    if options.shard_size <= 0:
        raise UserError(f"shard_size={options.shard_size}: expected GB in one file, more than 0. Example: shard_size=4")
    if options.verify < 1:
        raise UserError(f"verify={options.verify}: expected 1 or more; an export that nobody compared is not written.")
    dtype = DTYPES[SHORT.get(options.dtype, options.dtype)]
    layout, shard_bytes = options.layout or config.layout, int(options.shard_size * GB)
    return Job(weights, folder / "adapter", dtype, layout, shard_bytes, recipe["system"], recipe["template"])


def _check_onto(base: Path, weights: Path, config: DecoderConfig, published: dict[str, Any]) -> None:
    """A float checkpoint of the model that was trained, in the same layout."""
    if "quantization_config" in published:
        raise UserError(f"onto={weights}: these weights are quantised. Name a float checkpoint, or leave ONTO= out.")
    trained, _ = read_folder_config(base)
    shape = ("layout", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    wrong = [k for k in (*shape, "intermediate_size", "rope_theta") if getattr(config, k) != getattr(trained, k)]
    if wrong:
        found = ", ".join(f"{k} {getattr(config, k)} (trained: {getattr(trained, k)})" for k in wrong)
        raise UserError(f"onto={weights}: not the model that the run was trained on: {found}.")


def _inputs(options: Options, job: Job, base: Path) -> dict[str, Any]:
    """Everything that the result depends on, so that a second run can tell that there is nothing to do."""
    return {
        "run": options.run,
        "base": _weight_hashes(base),
        "onto": _weight_hashes(job.weights) if options.onto else None,
        "adapter": sha256(job.adapter / "adapter_model.safetensors"),
        "adapter_config": sha256(job.adapter / "adapter_config.json"),
        "dtype": _named(job.dtype),
        "layout": job.layout,
        "shard_bytes": job.shard_bytes,
        "verify": options.verify,
        "system": job.system,  # these two are read by infer
        "template": job.template,
    }


def _weight_hashes(folder: Path) -> dict[str, str]:
    """What the merge reads of a model folder: name -> sha256."""
    return {path.name: sha256(path) for path in sorted(folder.iterdir()) if _counts(path.name)}


def _counts(name: str) -> bool:
    """Whether a model's numbers depend on this file of its folder."""
    return name == "config.json" or name.endswith((".safetensors", ".bin"))


def _finished(out: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """What was measured, if `out` is whole and came from `inputs`; None if it has to be written.

    An older export is replaced. Raises UserError if `out` is a folder of anything else.
    """
    manifest = read_manifest(out) or {}
    if "parity" not in manifest:
        if out.exists() and (out.is_file() or any(out.iterdir())):
            raise UserError(f"{out} exists and is no export of this program. Choose another with out=, or remove it.")
        return None
    if manifest["inputs"] != inputs or find_damage(out, manifest, full=False):
        print(f"{out}: an export from other inputs is there; it is replaced.")
        return None
    found: dict[str, Any] = manifest["parity"]
    return found


def _check_space(out: Path, job: Job) -> None:
    # An older export is replaced last: it still counts
    need, free = int(size(job) * 1.02) + 50 * 10**6, free_bytes(out)
    if free < need:
        raise UserError(
            f"{out}: needs {need / GB:.1f} GB of disk, {free / GB:.1f} GB are free. "
            "Free some, choose another disk with out=, or a smaller type with DTYPE=float16."
        )


def _verify(options: Options, record: dict[str, Any], base: Path, job: Job, written: Path) -> dict[str, Any]:
    """Compare the written folder, read from the disk, with the adapter on what it was merged onto, and on Int4."""
    name, rows = _rows(options, record, base)
    device, dtype = _place(size(job), job.dtype)
    keep = dtype is torch.float32  # room for the merged model in float32 is room for the base's weights in it
    print(
        f"Comparing it with the adapter on its base: {len(rows)} conversations of {name}, computed in {_named(dtype)} on {device.type}"
    )
    onto = job.weights if job.weights != base else None
    with bar("comparing", len(rows) * (4 if onto else 3), "answers") as advance:

        def seen(model: nn.Module) -> parity.States:
            return parity.states(model, rows, advance)

        def adapted(folder: Path) -> Any:
            return load_adapter(load(folder, dtype, device, keep_float=keep), job.adapter).eval()

        # each model is gone when its states are there: one is in memory at a time
        on_int4, without = _with_and_without(adapted(base), seen)
        reference = seen(adapted(onto)) if onto else on_int4
        result = seen(load(written, dtype, device))
    print("Counting equal answers", flush=True)
    measured = parity.compare(reference, result).to_json()
    return {
        "against": f"the adapter on {job.weights.name}",
        "data": name,
        "rows": len(rows),
        "computed_in": _named(dtype),
        **measured,
        "adapter_on_int4": parity.compare(on_int4, result).to_json() if onto else measured,
        "without_adapter": parity.compare(on_int4, without).to_json(),
    }


def _with_and_without(model: Any, seen: Callable[[nn.Module], parity.States]) -> tuple[parity.States, parity.States]:
    adapted = seen(model)
    with model.disable_adapter():
        return adapted, seen(model)


def _rows(options: Options, record: dict[str, Any], base: Path) -> tuple[str, list[parity.Row]]:
    """What to compare on: the run's own data if it is still here as it was, else the built-in questions."""
    recipe, tokenizer = Recipe(**record["recipe"]), load_tokenizer(base)
    context = read_folder_config(base)[0].seq_length
    conversations, name = training_data(record)
    for some, called in ((conversations, name), (parity.examples(), "the built-in list")):
        if rows := parity.rows(some[: options.verify], tokenizer, recipe.template, recipe.system, context):
            return called, rows
    raise UserError(f"{base}: no question fits its context of {context} tokens.")


def _place(written_bytes: int, dtype: torch.dtype) -> tuple[torch.device, torch.dtype]:
    """Where and in which type to compare: float32 where it fits, else the type that is written.

    Raises:
        UserError: neither the GPU nor the memory holds the merged model.
    """
    import psutil

    free = {"cpu": psutil.virtual_memory().available}
    if torch.cuda.is_available():
        free = {"cuda": torch.cuda.mem_get_info()[0], **free}
    wide = written_bytes * 4 // dtype.itemsize
    for need, kind in ((wide, torch.float32), (written_bytes, dtype)):
        for device, room in free.items():
            if room > 1.15 * need + GIB:
                return torch.device(device), kind
    raise UserError(
        f"comparing needs {written_bytes * 1.15 / GB + 1:.1f} GB of memory, {free['cpu'] / GB:.1f} GB are free. Close other programs, "
        "or export on a machine with more memory: copy runs/ and models/ there."
    )


def _require(found: dict[str, Any], job: Job) -> None:
    got = parity.Parity.of(found)
    if not got.holds(job.dtype):
        raise UserError(
            f"the merged model does not answer as the adapter on its base did: {got}; expected at least "
            f"{parity.AGREEMENT[job.dtype]:.1%} and at most {parity.DIVERGENCE[job.dtype]:.0e}.\n"
            "Nothing was written. Try DTYPE=float32; if that fails too, the base or the adapter is damaged: train again."
        )


def _closing(options: Options, out: Path, job: Job, found: dict[str, Any]) -> None:
    """What was written, how well it agrees, and what to do with it."""
    files = sorted(out.glob("*.safetensors"))
    total = sum(path.stat().st_size for path in files) / GB
    count = "one file" if len(files) == 1 else f"{len(files)} files"
    without, int4 = found["without_adapter"], found["adapter_on_int4"]
    print(f"\n{out}: {total:.2f} GB, {_named(job.dtype)}, layout {job.layout}, {count} of weights")
    print(f"  against {found['against']}, computed in {found['computed_in']}: {parity.Parity.of(found)}")
    if options.onto:
        print(f"  against the adapter on the Int4 base: {parity.Parity.of(int4)}")
    print(f"  for scale, the base without the adapter: {parity.Parity.of(without)}")
    if without["divergence"] < 1e-6:
        print(
            "  The adapter changes nothing: look at the run's losses, and train longer or with a higher learning_rate."
        )
    system = f"system message {job.system!r}" if job.system else "no system message"
    print(f"  {'prompt':14} {job.template}, {system}, as trained: the default of the chat template in {out.name}/")
    for name, how in _uses(options.run, out, job).items():
        print(f"  {name:14} {how}")


def _uses(run: str, out: Path, job: Job) -> dict[str, str]:
    """What to do with the folder: tool -> command."""
    uses = {"chat": f"make infer MODEL={out}"}
    if job.layout == "qwen2":
        return uses | {
            "transformers": f'AutoModelForCausalLM.from_pretrained("{out}")   # 4.37 or newer',
            "vLLM": f"vllm serve {out}",
            "llama.cpp": f"python convert_hf_to_gguf.py {out}",
        }
    if (out / "modeling_qwen.py").is_file():
        uses["transformers"] = f'AutoModelForCausalLM.from_pretrained("{out}", trust_remote_code=True)'
        uses["model.chat"] = "its code does not read the template: give it the system message above, system=…"
    return uses | {"vLLM, llama.cpp": f"make export RUN={run} LAYOUT=qwen2   # the same model, no code of its own"}


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
