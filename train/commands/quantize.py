"""Make an Int4 folder in AutoGPTQ's format, as Qwen publishes them, from a float folder.

Each linear of the blocks is rounded to the nearest code, with the best of several scales for each group; embeddings, norms
and the head are written in float16. One block is in memory at a time. layout= writes the model in the other published layout.
No calibration data is read: the format is GPTQ's, the algorithm is not. Where there is a published GPTQ checkpoint of the
model, it is usually better: make model fetches it. The mean relative errors are printed at the end.
"""

from dataclasses import dataclass
from pathlib import Path

from train.common.errors import UserError
from train.common.names import below
from train.config.options import option
from train.export.quantize import QuantizeJob, is_done, write
from train.model.folder import display_name, missing_code, resolve
from train.model.loading import check_folder, read_folder_config
from train.ops.gptq import Scheme

SUFFIX = {"qwen": "-Qwen1", "qwen2": "-Qwen2"}  # in the name of a folder whose layout was changed to this one


@dataclass(frozen=True)
class Options:
    """Make an Int4 (GPTQ format) folder of a float model."""

    model: str = option("Qwen2.5-Coder-0.5B-Instruct", "float model: a folder, or a name below models/")
    out: str = option("", "name of the new folder below models/; empty: the model's, with what was done to it")
    layout: str = option("keep", "published layout to write", ("keep", "qwen", "qwen2"))
    group_size: int = option(128, "weights that share one scale; -1: a whole row", ("32", "64", "128", "-1"))
    models: str = option("models", "folder that models are kept in")


def run(options: Options) -> None:
    source = resolve(options.model, Path(options.models))
    config, published = read_folder_config(source)
    if "quantization_config" in published:
        raise UserError(f"{source} is quantised already. Give its float folder: the same name without -Int4.")
    check_folder(source)
    layout = config.layout if options.layout == "keep" else options.layout
    suffix = SUFFIX[layout] if layout != config.layout else ""
    if options.out:
        below(options.models, options.out, "out")
    target = Path(options.models) / (options.out or f"{display_name(source)}{suffix}-Int4")
    job = QuantizeJob(source, target, config, published, layout, Scheme(group_size=options.group_size))
    if is_done(job):
        print(f"{target}: made already, names and sizes checked: nothing to do.")
    else:
        _report(job, write(job))


def _report(job: QuantizeJob, errors: dict[str, list[float]]) -> None:
    print(
        f"{job.target}: layout {job.layout}, Int4 in groups of {job.scheme.group_size}, rounded to nearest. "
        "Mean relative error of the weights:"
    )
    print("  " + ", ".join(f"{name} {100 * sum(values) / len(values):.1f} %" for name, values in errors.items()))
    if note := missing_code(job.target, job.layout):
        print(f"  {note}")
