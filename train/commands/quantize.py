"""Make an Int4 or Int8 folder in AutoGPTQ's format, as Qwen publishes them, from a float folder.

METHOD=nearest rounds each linear of the blocks to the nearest code, with the best of several scales for each group. No
calibration data is read: the format is GPTQ's, the algorithm is not.
METHOD=gptq is auto-gptq's algorithm, calibrated on the conversations of DATA= in the chat template: ROWS of them, each
cut to LENGTH tokens. HELD_OUT others measure the perplexity of the answers before, after rounding, and after GPTQ. The
same data, numbers and seed give the same bytes on the same machine.
Embeddings, norms and the head are written in float16. One block is in memory at a time. layout= writes the model in the
other published layout. Where there is a published GPTQ checkpoint of the model, make model fetches it.
"""

from dataclasses import dataclass
from pathlib import Path

from train.common.errors import UserError
from train.common.names import below
from train.config.options import SEEDS, option
from train.data.tokens.chat_template import DEFAULT_SYSTEM
from train.export.calibration import Calibration
from train.export.quantize import QuantizeJob, Result, is_done, trained_prompt, write
from train.model.folder import display_name, missing_code, resolve
from train.model.layouts import check_convertible
from train.model.loading import check_folder, read_folder_config
from train.ops.gptq import Scheme

SUFFIX = {"qwen": "-Qwen1", "qwen2": "-Qwen2"}  # in the name of a folder whose layout was changed to this one
DEMO_DATA = "data/demo.jsonl"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Options:
    """Make an Int4 or Int8 (GPTQ format) folder of a float model."""

    model: str = option("Qwen2.5-Coder-0.5B-Instruct", "float model: a folder, or a name below models/")
    out: str = option("", "name of the new folder below models/; empty: the model's, with what was done to it")
    layout: str = option("keep", "published layout to write", ("keep", "qwen", "qwen2", "qwen3"))
    group_size: int = option(128, "weights that share one scale; -1: a whole row", ("32", "64", "128", "-1"))
    method: str = option("nearest", "nearest: rounded; gptq: calibrated on data, by auto-gptq", ("nearest", "gptq"))
    bits: int = option(4, "of one weight", ("4", "8"))
    data: str = option("", "with method=gptq: conversations to calibrate on; empty: the demo's")
    rows: int = option(128, "conversations to calibrate on", interval="[1, 100000]")
    length: int = option(512, "tokens of one of them, at most", interval="[16, 131072]")
    held_out: int = option(32, "conversations that only measure the result", interval="[1, 100000]")
    seed: int = option(0, "of the choice of conversations", interval=SEEDS)
    models: str = option("models", "folder that models are kept in")


def run(options: Options) -> None:
    source = resolve(options.model, Path(options.models))
    config, published = read_folder_config(source)
    if "quantization_config" in published:
        raise UserError(f"{source} is quantised already. Give its float folder: the same name without -Int4.")
    check_folder(source)
    layout = config.layout if options.layout == "keep" else options.layout
    check_convertible(config.layout, layout)
    suffix = SUFFIX[layout] if layout != config.layout else ""
    suffix += "-GPTQ" if options.method == "gptq" else ""
    if options.out:
        below(options.models, options.out, "out")
    target = Path(options.models) / (options.out or f"{display_name(source)}{suffix}-Int{options.bits}")
    scheme = Scheme(options.bits, options.group_size)
    job = QuantizeJob(source, target, config, published, layout, scheme, _calibration(options, source))
    if is_done(job):
        print(f"{target}: made already, names and sizes checked: nothing to do.")
    else:
        _report(job, write(job))


def _calibration(options: Options, source: Path) -> Calibration | None:
    """What to calibrate on, in the prompt that an export was trained with, or else the usual one."""
    if options.method == "nearest":
        if options.data:
            raise UserError(
                f"data={options.data}: rounding to nearest reads no data. Add METHOD=gptq, or leave it out."
            )
        return None
    if not options.data:
        print("No DATA= is given: calibrating on the demo's few conversations. Your own data gives a better model.")
    prompt = trained_prompt(source)
    numbers = (options.rows, options.length, options.held_out, options.seed)
    system, template = prompt.get("system", DEFAULT_SYSTEM), prompt.get("template", "chatml")
    return Calibration(options.data or _demo_data(), *numbers, system, template)


def _demo_data() -> str:
    """The demo's data in the working folder, else the program's own copy."""
    return DEMO_DATA if Path(DEMO_DATA).is_file() else str(ROOT / DEMO_DATA)


def _report(job: QuantizeJob, result: Result) -> None:
    method = "rounded to nearest" if job.calibration is None else "by GPTQ"
    print(
        f"{job.target}: layout {job.layout}, Int{job.scheme.bits} in groups of {job.scheme.group_size}, {method}. "
        "Mean relative error of the weights:"
    )
    print("  " + ", ".join(f"{name} {100 * sum(v) / len(v):.1f} %" for name, v in result.errors.items()))
    if result.perplexity and result.counts:
        before, nearest, gptq = (result.perplexity[name] for name in ("float", "nearest", "gptq"))
        print(
            f"  Perplexity of the answers in {result.counts['held_out_rows']} held-out conversations: {before:.4f} in floats, "
            f"{nearest:.4f} rounded to nearest ({nearest / before - 1:+.2%}), {gptq:.4f} by GPTQ ({gptq / before - 1:+.2%})"
        )
        if gptq > nearest:
            print("  Rounding to nearest is better here: leave METHOD= out, or calibrate on more data: DATA=, ROWS=")
    if note := missing_code(job.target, job.layout):
        print(f"  {note}")
