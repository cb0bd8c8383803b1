"""Merge a run's adapter into its base and write float weights for stock tools. A folder gets its name once it is verified.

The default type is float16: the scales and biases of an Int4 base are float16, and it keeps three bits more of each weight
than bfloat16. ONTO=int4: the very Int4 weights that were trained on are dequantised; ONTO=FOLDER takes a float
checkpoint of the same model instead. README.md is a model card.

format=gguf writes files for llama.cpp and Ollama to runs/RUN/gguf, with a Modelfile. Where the base is symmetric Int4
without activation order, they are the base itself as Q4_0 and the adapter, without a loss; else the merged model.

format=gptq writes the Int4 base with its very codes to runs/RUN/gptq/base and the adapter to runs/RUN/gptq/adapter, for
vLLM. They have Qwen2's names, into which a Qwen-1 base is cut without a change of its codes; layout=qwen keeps its own.

format=adapter writes the adapter alone to runs/RUN/peft, with the base's id on the hub.

passport.json says whether training, infer and other programs (readers=) give the same greedy answers from these files.
"""

import shlex
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from train.common.commands import make
from train.common.device import DTYPES, dtype_name
from train.common.errors import UserError
from train.common.files import read_json, recover, staged
from train.common.names import below
from train.common.progress import bar
from train.config.options import option
from train.config.recipe import Recipe
from train.evaluation.parity import Parity
from train.export import adapter_export, gguf_export, gptq_export, manifest, merge, passport, readers, verify
from train.export.adapter_export import AdapterJob, adapter_of, adapter_rank
from train.export.gguf_export import GgufJob
from train.export.gguf_model import load_gguf
from train.export.gguf_tensors import why_not_q4_0
from train.export.gptq_export import GptqJob
from train.export.merge import GB, MergeJob
from train.export.model_card import CardSource, base_id, write_card
from train.export.passport_job import PROMPTS, PROMPTS_ON_CPU, PassportJob, Written, load_adapted, write_passport
from train.model.adapters import check_low_rank, more_than_low_rank
from train.model.architecture import STORED
from train.model.folder import describe_files, missing_code, read_manifest, resolve, write_manifest
from train.model.layouts import check_convertible, stock_layout
from train.model.loading import check_folder, load, read_folder_config
from train.runs.folder import read_run, result_folder

INT4 = "int4"  # ONTO= of the base itself


@dataclass(frozen=True)
class Options:
    """Merge a run into float weights: runs/RUN/merged."""

    run: str = option("", "name of a finished run below runs/")
    dtype: str = option("float16", "type of the weights", tuple(DTYPES))
    layout: str = option(
        "", "empty: the base's; qwen2: loads without remote code everywhere", ("", "qwen", "qwen2", "qwen3")
    )
    onto: str = option(INT4, "int4: the base that was trained on; or a float model or folder to merge onto")
    out: str = option("", "folder to write; empty: runs/RUN/ and merged, gguf, gptq or peft, by format")
    format: str = option(
        "hf",
        "hf: merged; gguf: for llama.cpp and Ollama; gptq: Int4 base and adapter for vLLM; adapter: for peft",
        ("hf", "gguf", "gptq", "adapter"),
    )
    encoding: str = option(
        "auto",
        "with format=gguf; auto: q4_0 where this is exact, else the merged model in dtype=; q8_0: the merged model",
        ("auto", "q4_0", "q8_0", "float"),
    )
    shard_size: float = option(4.0, "GB in one file, at most", interval="(0, 1000]")
    verify: int = option(
        30, "conversations of the run's own data on which the result is compared", interval="[1, 1000000]"
    )
    passport: int = option(
        -1,
        "prompts to which training's forward pass and infer should give equal greedy answers, in passport.json; 0: none; "
        f"-1: {PROMPTS} on a GPU, {PROMPTS_ON_CPU} on a CPU",
        interval="[-1, 64]",
    )
    readers: str = option(
        "",
        "Python programs of environments with transformers (format=hf) or xllamacpp (gguf), with commas between them: the "
        "passport has their greedy answers too",
    )
    models: str = option("models", "folder of the models")
    runs: str = option("runs", "folder of the runs")

    @property
    def float_model(self) -> str:
        """What is merged onto instead of the base; empty for the base."""
        return "" if self.onto == INT4 else self.onto


def run(options: Options) -> None:
    # what to merge, from where, to where
    if not options.run:
        raise UserError("which run? RUN= names a folder below runs/. Example: make export RUN=demo")
    folder = below(options.runs, options.run, "run")
    record = read_run(folder)
    recipe = Recipe.from_record(record["recipe"])
    base = resolve(recipe.model, Path(options.models))
    hashes = manifest.check_base(record, base)
    readers.check(options.readers, options.format, options.passport)
    if options.format == "gguf":
        return _export_gguf(options, folder, base, recipe, record)
    if options.encoding != "auto":
        raise UserError(f"encoding={options.encoding} is of GGUF files: add FORMAT=gguf.")
    if options.format != "hf":
        return _export_beside(options, folder, base, recipe, record)
    job = _job(options, folder, base, recipe)
    out = Path(options.out) if options.out else folder / "merged"

    # is it there already?
    if options.readers and job.layout == "qwen":
        raise UserError(f"readers={options.readers}: transformers has no LAYOUT=qwen of its own. Add LAYOUT=qwen2.")
    inputs = manifest.export_inputs(options.run, job, hashes, bool(options.float_model), options.verify)
    inputs |= readers.as_input(options.readers, options.format)
    recover(out)
    if (measured := manifest.recorded_parity(out, inputs)) is not None:
        print(f"{out}: nothing to do, it was exported from these inputs before.")
        return _report(options, out, job, measured)
    if read_manifest(out):
        print(f"{out}: an export from other inputs is there; it is replaced.")
    merge.check_space(job, out)
    verify.comparison_device(job)  # refuses for lack of memory before the merge, not after it

    # merge, read back, compare; then it gets its name
    size = merge.written_bytes(job)
    what = f"Merging {job.adapter} into {job.weights}" if job.adapter else f"Writing {job.weights}"
    print(f"{what}: {size / GB:.2f} GB, {dtype_name(job.dtype)}, layout {job.layout}")
    with staged(out) as temporary:
        with bar("merging", size, "MB", 1e6) as advance:
            merge.write(job, temporary, advance)
        contents = "merged" if job.adapter else "full"
        source = CardSource(record, base, contents, _typed(options, job), _uses(job.layout))
        written = Written(partial(load, temporary), temporary)
        parity = write_passport(_passport_job(options, job, base, record), temporary, written)
        write_card(temporary, replace(source, parity=parity))
        with ThreadPoolExecutor(1) as pool:  # the disk works while the answers are compared
            files = pool.submit(describe_files, temporary)
            measured = _compare(verify.prepare(record, base, job, options.verify), temporary)
        verify.require_parity(measured, job.dtype)
        write_manifest(temporary, {"inputs": inputs, "parity": measured}, files.result())
    _report(options, out, job, measured)


def _passport_job(options: Options, job: MergeJob, base: Path, record: dict[str, Any]) -> PassportJob:
    return PassportJob(record, base, job, options.passport, readers.find(options.readers, options.format))


def _export_gguf(options: Options, folder: Path, base: Path, recipe: Recipe, record: dict[str, Any]) -> None:
    """GGUF files: of the Int4 base and the adapter, or of the merged model, which is exported first."""
    reason = f"ONTO={options.onto} is merged onto" if options.float_model else why_not_q4_0(base)
    adapter = adapter_of(folder)
    if adapter is None:
        reason = "every weight was trained, in floats"
    elif not reason and (title := more_than_low_rank(adapter)):
        reason = f"the adapter is {title}, of which llama.cpp reads A and B only"
    if options.encoding == "q4_0" and reason:
        raise UserError(f"encoding=q4_0 would lose precision: {reason}. Leave it out, or take encoding=q8_0.")
    exact = options.encoding in ("auto", "q4_0") and not reason
    if not exact:
        if options.encoding == "auto":
            print(f"Q4_0 would lose precision: {reason}. Writing the merged model instead.")
        run(replace(options, format="hf", encoding="auto", out="", readers=""))
    weights = base if exact else folder / "merged"
    encoding = "q4_0" if exact else "q8_0" if options.encoding == "q8_0" else gguf_export.float_encoding(weights)
    job = GgufJob(folder.name, base, adapter, weights, encoding, recipe.system, recipe.template)
    out = Path(options.out) if options.out else folder / "gguf"
    recover(out)
    if gguf_export.is_written(out, inputs := job.inputs() | readers.as_input(options.readers, "gguf")):
        print(f"{out}: nothing to do, it was exported from these inputs before.")
        return _report_gguf(out, job)
    gguf_export.check_space(job, out)
    size = gguf_export.size_of(job)
    merged = _job(replace(options, layout="", dtype="float16"), folder, base, recipe)  # for the passport
    print(f"Writing {job.model_name}: {size / GB:.2f} GB" + (f"; {job.adapter_name}" if exact else ""))
    with staged(out) as temporary:
        with bar("writing", size, "MB", 1e6) as advance:
            gguf_export.write(job, temporary, advance)
        with bar("reading back", size, "MB", 1e6) as advance:
            checked = gguf_export.check(job, temporary, advance)
        files = [temporary / name for name in (job.model_name, job.adapter_name) if name]
        written = Written(partial(load_gguf, files[0], files[1] if exact else None), *files)
        parity = write_passport(_passport_job(options, merged, base, record), temporary, written)
        typed = {"format": "gguf", "encoding": "" if options.encoding == "auto" else options.encoding}
        typed |= {"onto": merged.weights.name if options.float_model else ""}
        write_card(temporary, CardSource(record, base, job.contents, typed, gguf_export.commands(job, ""), parity))
        write_manifest(temporary, {"inputs": inputs, "gguf": {"checked": checked}})
    _report_gguf(out, job)


def _report_gguf(out: Path, job: GgufJob) -> None:
    """What was written, what was checked, and how the files are used."""
    manifest = read_manifest(out) or {}
    print(f"\n{out}: {job.model_name}{f', {job.adapter_name}' if job.adapter_name else ''}, {gguf_export.MODELFILE}")
    print(f"  {manifest['gguf']['checked']}")
    _print_passport(out)
    for program, command in gguf_export.commands(job, str(out)).items():
        print(f"  {program:14} {command}")


def _print_passport(out: Path) -> None:
    if (out / passport.PASSPORT).is_file():
        print(f"  {passport.in_words(read_json(out / passport.PASSPORT))}")


def _export_beside(options: Options, folder: Path, base: Path, recipe: Recipe, record: dict[str, Any]) -> None:
    """The adapter, alone or beside the base that it was trained on. Neither is merged, so the base cannot be another."""
    if options.float_model:
        raise UserError(f"ONTO={options.onto} is for merged models: leave it out with FORMAT={options.format}.")
    adapter = adapter_of(folder)
    if adapter is None:
        raise UserError(
            f"run {folder.name!r} trained every weight: there is no adapter for FORMAT={options.format}. Leave FORMAT= out, or "
            "take FORMAT=gguf; `make quantize` makes the export Int4."
        )
    if options.format == "adapter":
        return _export_adapter(options, folder, base, recipe, record)
    check_low_rank(adapter, "vLLM reads A and B only")
    layout = options.layout or stock_layout(read_folder_config(base)[0].layout)
    gptq_export.check_base(base, layout)
    prompt = (recipe.system, recipe.template)
    size = int(options.shard_size * GB)
    job = GptqJob(folder.name, base, adapter, layout, size, *prompt, base_id(base))
    out = Path(options.out) if options.out else folder / "gptq"
    recover(out)
    if gptq_export.is_written(out, inputs := job.inputs()):
        print(f"{out}: nothing to do, it was exported from these inputs before.")
        return _report_gptq(out, job)
    gptq_export.check_space(job, out)
    size = gptq_export.size_of(job)
    merged = _job(replace(options, layout="", dtype="float16"), folder, base, recipe)  # for the passport
    print(f"Writing {base.name} in layout {layout} and its adapter: {size / GB:.2f} GB")
    with staged(out) as temporary:
        with bar("writing", size, "MB", 1e6) as advance:
            gptq_export.write(job, temporary, advance)
        with bar("reading back", size, "MB", 1e6) as advance:
            checked = gptq_export.check(job, temporary, advance)
        use = {"vLLM, in this folder": gptq_export.vllm_command("", job.run, adapter_rank(job.adapter), job.layout)}
        parts = (temporary / gptq_export.BASE, temporary / gptq_export.ADAPTER)
        written = Written(partial(load_adapted, *parts), *parts)
        parity = write_passport(_passport_job(options, merged, base, record), temporary, written)
        typed = {"format": "gptq", "layout": options.layout}
        write_card(temporary, CardSource(record, base, "packed", typed, use, parity))
        write_manifest(temporary, {"inputs": inputs, "gptq": {"checked": checked}})
    _report_gptq(out, job)


def _report_gptq(out: Path, job: GptqJob) -> None:
    checked = (read_manifest(out) or {})["gptq"]["checked"]
    print(f"\n{out}: {gptq_export.BASE}/ and {gptq_export.ADAPTER}/, layout {job.layout}")
    print(f"  {checked}")
    _print_passport(out)
    print(f"  {'vLLM':14} {gptq_export.vllm_command(str(out), job.run, adapter_rank(job.adapter), job.layout)}")


def _export_adapter(options: Options, folder: Path, base: Path, recipe: Recipe, record: dict[str, Any]) -> None:
    """The adapter alone.

    Raises:
        UserError: another layout than the base's is asked for.
    """
    if options.layout and options.layout != read_folder_config(base)[0].layout:
        raise UserError(
            f"layout={options.layout}: FORMAT=adapter keeps the base's layout. FORMAT=gptq writes the other."
        )
    job = AdapterJob(folder.name, base, folder / "adapter", base_id(base))
    out = Path(options.out) if options.out else folder / "peft"
    recover(out)
    if adapter_export.is_written(out, inputs := job.inputs()):
        print(f"{out}: nothing to do, it was exported from these inputs before.")
        return
    adapter_export.check_space(job, out)
    merged = _job(replace(options, dtype="float16"), folder, base, recipe)  # for the passport
    with staged(out) as temporary:
        adapter_export.write(job, temporary)
        loading = f'model = AutoModelForCausalLM.from_pretrained("{job.base_id}")\nmodel = PeftModel.from_pretrained(model, ".")'
        written = Written(partial(load_adapted, base, temporary, load_as=merged.load_as), temporary)
        parity = write_passport(_passport_job(options, merged, base, record), temporary, written)
        use = {"peft, in this folder": loading}
        write_card(temporary, CardSource(record, base, "adapter", {"format": "adapter"}, use, parity))
        write_manifest(temporary, {"inputs": inputs, "adapter": {"base": job.base_id}})
    print(f"{out}: the adapter, for {job.base_id}")
    _print_passport(out)


def _typed(options: Options, job: MergeJob) -> dict[str, str]:
    """The options of an export that its model card repeats."""
    default = Options()
    own = {"layout": options.layout, "dtype": options.dtype if options.dtype != default.dtype else ""}
    onto = job.weights.name if options.float_model else ""
    return {key: value for key, value in {**own, "onto": onto}.items() if value}


def _uses(layout: str) -> dict[str, str]:
    """How programs use a merged model, for its card: title -> commands in its folder."""
    trust = ", trust_remote_code=True" if layout == "qwen" else ""
    load = [
        f'tokenizer = AutoTokenizer.from_pretrained("."{trust})',
        f'model = AutoModelForCausalLM.from_pretrained("."{trust})',
    ]
    served = "vllm serve ." + (" --trust-remote-code" if layout == "qwen" else "")
    return {"transformers, in this folder": "\n".join(load), "vLLM, in this folder": served}


def _job(options: Options, folder: Path, base: Path, recipe: Recipe) -> MergeJob:
    weights = resolve(options.float_model, Path(options.models)) if options.float_model else base
    if options.float_model:
        merge.check_onto(base, weights)
    adapter = adapter_of(folder)
    if adapter is None:
        if options.float_model:
            raise UserError(
                f"ONTO={options.onto}: run {folder.name!r} trained every weight: it is merged onto nothing. Leave it out."
            )
        weights = result_folder(folder)
    check_folder(weights)
    if options.shard_size <= 0:
        raise UserError(f"shard_size={options.shard_size}: expected GB in one file, more than 0. Example: shard_size=4")
    if options.verify < 1:
        raise UserError(f"verify={options.verify}: expected 1 or more; an export that was not compared is not written.")
    own = read_folder_config(weights)[0].layout
    layout = options.layout or own
    check_convertible(own, layout)
    shard_bytes = int(options.shard_size * GB)
    prompt = (recipe.system, recipe.template)
    dtype, device = DTYPES[options.dtype], merge.merge_device()
    load_as = STORED if options.float_model else recipe.load_as
    return MergeJob(weights, adapter, dtype, layout, shard_bytes, *prompt, device, load_as)


def _compare(comparison: verify.Comparison, written: Path) -> dict[str, Any]:
    c = comparison
    other = "the adapter on its base" if c.job.adapter else "the trained model"
    rows = f"{len(c.rows)} conversations of {c.data}"
    print(f"Comparing it with {other}: {rows}, computed in {dtype_name(verify.DTYPE)} on {c.device.type}")
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
    if options.float_model:
        print(f"  against the adapter on the base that was trained on: {Parity.from_json(int4)}")
    _print_passport(out)
    print(f"  for scale, the base before training: {Parity.from_json(without)}")
    if without["divergence"] < 1e-6:
        print(
            "  The training has changed nothing. See the run's losses, and train longer or with a higher learning_rate."
        )
    system = f"system message {job.system!r}" if job.system else "no system message"
    print(f"  {'prompt':14} {job.template}, {system}, as trained: the default of the chat template in {out.name}/")
    for tool, command in _commands(options, out, job).items():
        print(f"  {tool:14} {command}")
    if note := missing_code(out, job.layout):
        print(f"  {note}")


def _commands(options: Options, out: Path, job: MergeJob) -> dict[str, str]:
    """What to do with the folder: tool -> command."""
    commands = {"chat": make("infer", model=out, models=options.models)}
    if job.layout != "qwen":
        version = "4.51" if job.layout == "qwen3" else "4.37"
        return commands | {
            "transformers": f'AutoModelForCausalLM.from_pretrained("{out}")   # {version} or newer',
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
