"""Merge a run's adapter into its base and write float weights for stock tools. A folder gets its name once it is verified.

The default type is float16: the scales and biases of an Int4 base are float16, and it keeps three bits more of each weight
than bfloat16. The very Int4 weights that were trained on are dequantised; `onto` takes a float checkpoint instead.

format=gguf writes files for llama.cpp and Ollama to runs/RUN/gguf, with a Modelfile. Where the base is symmetric Int4
without activation order, they are the base itself as Q4_0 and the adapter, without a loss; else the merged model.
"""

import shlex
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from train.common.commands import make
from train.common.device import DTYPES, dtype_name
from train.common.errors import UserError
from train.common.files import recover, staged
from train.common.names import below
from train.common.progress import bar
from train.config.options import option
from train.config.recipe import Recipe
from train.evaluation.parity import Parity
from train.export import gguf_export, manifest, merge, verify
from train.export.gguf_export import GgufJob
from train.export.gguf_tensors import why_not_q4_0
from train.export.merge import GB, MergeJob
from train.model.adapter_file import check_present
from train.model.folder import describe_files, missing_code, read_manifest, resolve, write_manifest
from train.model.loading import check_folder, read_folder_config
from train.runs.folder import read_run


@dataclass(frozen=True)
class Options:
    """Merge a run into float weights: runs/RUN/merged."""

    run: str = option("", "name of a finished run below runs/")
    dtype: str = option("float16", "type of the weights", tuple(DTYPES))
    layout: str = option("", "empty: the base's; qwen2: loads without remote code everywhere", ("", "qwen", "qwen2"))
    onto: str = option("", "empty: the Int4 base that was trained on; or a float model or folder to merge onto")
    out: str = option("", "folder to write; empty: runs/RUN/merged, or runs/RUN/gguf")
    format: str = option("hf", "hf: a folder of safetensors; gguf: files for llama.cpp and Ollama", ("hf", "gguf"))
    encoding: str = option(
        "auto",
        "with format=gguf; auto: q4_0 where this is exact, else the merged model in dtype=; q8_0: the merged model",
        ("auto", "q4_0", "q8_0", "float"),
    )
    shard_size: float = option(4.0, "GB in one file, at most", interval="(0, 1000]")
    verify: int = option(
        30, "conversations of the run's own data on which the result is compared", interval="[1, 1000000]"
    )
    models: str = option("models", "folder of the models")
    runs: str = option("runs", "folder of the runs")


def run(options: Options) -> None:
    # what to merge, from where, to where
    if not options.run:
        raise UserError("which run? RUN= names a folder below runs/. Example: make export RUN=demo")
    folder = below(options.runs, options.run, "run")
    record = read_run(folder)
    recipe = Recipe.from_record(record["recipe"])
    base = resolve(recipe.model, Path(options.models))
    hashes = manifest.check_base(record, base)
    if options.format == "gguf":
        return _export_gguf(options, folder, base, recipe)
    if options.encoding != "auto":
        raise UserError(f"encoding={options.encoding} is of GGUF files: add FORMAT=gguf.")
    job = _job(options, folder, base, recipe)
    out = Path(options.out) if options.out else folder / "merged"

    # is it there already?
    inputs = manifest.export_inputs(options.run, job, hashes, bool(options.onto), options.verify)
    recover(out)
    if (measured := manifest.recorded_parity(out, inputs)) is not None:
        print(f"{out}: nothing to do, it was exported from these inputs before.")
        return _report(options, out, job, measured)
    if read_manifest(out):
        print(f"{out}: an export from other inputs is there; it is replaced.")
    merge.check_space(job, out)
    verify.placement(job)  # refuses for lack of memory before the merge, not after it

    # merge, read back, compare; then it gets its name
    size = merge.written_bytes(job)
    print(
        f"Merging {folder / 'adapter'} into {job.weights}: {size / GB:.2f} GB, {dtype_name(job.dtype)}, layout {job.layout}"
    )
    with staged(out) as temporary:
        with bar("merging", size, "MB", 1e6) as advance:
            merge.write(job, temporary, advance)
        with ThreadPoolExecutor(1) as pool:  # the disk works while the answers are compared
            files = pool.submit(describe_files, temporary)
            measured = _compare(verify.prepare(record, base, job, options.verify), temporary)
        verify.require_parity(measured, job.dtype)
        write_manifest(temporary, {"inputs": inputs, "parity": measured}, files.result())
    _report(options, out, job, measured)


def _export_gguf(options: Options, folder: Path, base: Path, recipe: Recipe) -> None:
    """GGUF files: of the Int4 base and the adapter, or of the merged model, which is exported first."""
    reason = f"ONTO={options.onto} is merged onto" if options.onto else why_not_q4_0(base)
    if options.encoding == "q4_0" and reason:
        raise UserError(f"encoding=q4_0 would lose precision: {reason}. Leave it out, or take encoding=q8_0.")
    check_present(folder / "adapter")
    exact = options.encoding in ("auto", "q4_0") and not reason
    if not exact:
        if options.encoding == "auto":
            print(f"Q4_0 would lose precision: {reason}. Writing the merged model instead.")
        run(replace(options, format="hf", encoding="auto", out=""))
    weights = base if exact else folder / "merged"
    encoding = "q4_0" if exact else "q8_0" if options.encoding == "q8_0" else gguf_export.float_encoding(weights)
    job = GgufJob(folder.name, base, folder / "adapter", weights, encoding, recipe.system, recipe.template)
    out = Path(options.out) if options.out else folder / "gguf"
    recover(out)
    if gguf_export.is_written(out, inputs := job.inputs()):
        print(f"{out}: nothing to do, it was exported from these inputs before.")
        return _report_gguf(out, job)
    gguf_export.check_space(job, out)
    size = gguf_export.size_of(job)
    print(f"Writing {job.model_name}: {size / GB:.2f} GB" + (f"; {job.adapter_name}" if exact else ""))
    with staged(out) as temporary:
        with bar("writing", size, "MB", 1e6) as advance:
            gguf_export.write(job, temporary, advance)
        with bar("reading back", size, "MB", 1e6) as advance:
            checked = gguf_export.check(job, temporary, advance)
        write_manifest(temporary, {"inputs": inputs, "gguf": {"checked": checked}})
    _report_gguf(out, job)


def _report_gguf(out: Path, job: GgufJob) -> None:
    """What was written, what was checked, and how the files are used."""
    manifest = read_manifest(out) or {}
    print(f"\n{out}: {job.model_name}{f', {job.adapter_name}' if job.adapter_name else ''}, {gguf_export.MODELFILE}")
    print(f"  {manifest['gguf']['checked']}")
    lora = f" --lora {shlex.quote(str(out / job.adapter_name))}" if job.adapter_name else ""
    system = f" -sys {shlex.quote(job.system)}" if job.system else ""
    print(f"  {'llama.cpp':14} llama-cli -m {shlex.quote(str(out / job.model_name))}{lora} --temp 0{system}")
    print(f"  {'Ollama':14} cd {shlex.quote(str(out))} && ollama create {job.run} -f {gguf_export.MODELFILE}")


def _job(options: Options, folder: Path, base: Path, recipe: Recipe) -> MergeJob:
    weights = resolve(options.onto, Path(options.models)) if options.onto else base
    if options.onto:
        merge.check_onto(base, weights)
    check_folder(weights)
    check_present(folder / "adapter")
    if options.shard_size <= 0:
        raise UserError(f"shard_size={options.shard_size}: expected GB in one file, more than 0. Example: shard_size=4")
    if options.verify < 1:
        raise UserError(f"verify={options.verify}: expected 1 or more; an export that was not compared is not written.")
    layout = options.layout or read_folder_config(weights)[0].layout
    shard_bytes = int(options.shard_size * GB)
    prompt = (recipe.system, recipe.template)
    dtype, device = DTYPES[options.dtype], merge.merge_device()
    return MergeJob(weights, folder / "adapter", dtype, layout, shard_bytes, *prompt, device)


def _compare(comparison: verify.Comparison, written: Path) -> dict[str, Any]:
    c = comparison
    print(
        f"Comparing it with the adapter on its base: {len(c.rows)} conversations of {c.data}, "
        f"computed in {dtype_name(c.dtype)} on {c.device.type}"
    )
    with bar("comparing", c.passes, "answers") as advance:
        states = verify.answer_states(c, written, advance)
    print("Counting equal answers", flush=True)
    return verify.measure(c, states)


def _report(options: Options, out: Path, job: MergeJob, measured: dict[str, Any]) -> None:
    """Print what was written, how well it agrees, and what to do with it."""
    files = sorted(out.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files) / GB
    count = "one file" if len(files) == 1 else f"{len(files)} files"
    without, int4 = measured["without_adapter"], measured["adapter_on_int4"]
    print(f"\n{out}: {size:.2f} GB, {dtype_name(job.dtype)}, layout {job.layout}, {count} of weights")
    print(f"  against {measured['against']}, computed in {measured['computed_in']}: {Parity.from_json(measured)}")
    if options.onto:
        print(f"  against the adapter on the Int4 base: {Parity.from_json(int4)}")
    print(f"  for scale, the base without the adapter: {Parity.from_json(without)}")
    if without["divergence"] < 1e-6:
        print("  The adapter changes nothing. See the run's losses, and train longer or with a higher learning_rate.")
    system = f"system message {job.system!r}" if job.system else "no system message"
    print(f"  {'prompt':14} {job.template}, {system}, as trained: the default of the chat template in {out.name}/")
    for tool, command in _commands(options, out, job).items():
        print(f"  {tool:14} {command}")
    if note := missing_code(out, job.layout):
        print(f"  {note}")


def _commands(options: Options, out: Path, job: MergeJob) -> dict[str, str]:
    """What to do with the folder: tool -> command."""
    commands = {"chat": make("infer", model=out, models=options.models)}
    if job.layout == "qwen2":
        return commands | {
            "transformers": f'AutoModelForCausalLM.from_pretrained("{out}")   # 4.37 or newer',
            "vLLM": f"vllm serve {shlex.quote(str(out))}",
            "llama.cpp": f"python convert_hf_to_gguf.py {shlex.quote(str(out))}",
        }
    if (out / "modeling_qwen.py").is_file():
        switch = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[job.dtype]
        commands["transformers"] = (
            f'AutoModelForCausalLM.from_pretrained("{out}", trust_remote_code=True, {switch}=True)'
        )
        commands["model.chat"] = "its code does not read the template: pass the system message above as system=…"
    again = make("export", run=options.run, layout="qwen2", models=options.models, runs=options.runs)
    return commands | {"vLLM, llama.cpp": f"{again}   # the same model, no code of its own"}
