"""What an export was made from, as its manifest.json records it: decides whether an export has to be written again."""

from pathlib import Path
from typing import Any

from train.common.device import dtype_name
from train.common.errors import UserError
from train.common.files import sha256
from train.export.merge import MergeJob
from train.model.architecture import STORED
from train.model.folder import find_damage, read_manifest
from train.runs.record_form import PARITY, find_problem

READERS = "readers"  # key of the inputs: the other programs whose answers are in the passport


def is_weight_file(name: str) -> bool:
    """Whether the outputs of a model depend on this file of its folder."""
    return name == "config.json" or name.endswith((".safetensors", ".bin"))


def weight_hashes(folder: Path) -> dict[str, str]:
    """The files of a model folder that a merge reads: name -> sha256."""
    return {path.name: sha256(path) for path in sorted(folder.iterdir()) if is_weight_file(path.name)}


def check_base(record: dict[str, Any], base: Path) -> dict[str, str]:
    """Check that `base` has the very weights that the run of `record` (its run.json) was trained on.

    Returns:
        Its weight_hashes.
    Raises:
        UserError: a file differs.
    """
    present = weight_hashes(base)
    trained = {name: digest for name, digest in record["base"]["files"].items() if is_weight_file(name)}
    if present != trained:
        different = sorted(n for n in present.keys() | trained.keys() if present.get(n) != trained.get(n))
        raise UserError(
            f"{base} is not what run {record['run']!r} was trained on: {', '.join(different[:3])} differ. Fetch or "
            "quantise the base again as it was, or train again under another RUN=."
        )
    return present


def export_inputs(run: str, job: MergeJob, base: dict[str, str], onto: bool, conversations: int) -> dict[str, Any]:
    """Everything that an export depends on, for its manifest.

    Args:
        run: its name. base: weight_hashes of the folder that was trained on. onto: whether job.weights is another one that was asked for.
        conversations: how many of them the comparison reads at most.
    """
    return {
        "run": run,
        "base": base,
        "onto": weight_hashes(job.weights) if onto else None,
        **(_adapter_hashes(job.adapter) if job.adapter else {"weights": weight_hashes(job.weights)}),
        "dtype": dtype_name(job.dtype),
        "layout": job.layout,
        "shard_bytes": job.shard_bytes,
        "verify": conversations,
        "system": job.system,  # infer reads these two
        "template": job.template,
        **({} if job.load_as == STORED else {"load_as": job.load_as}),
    }


def _adapter_hashes(adapter: Path) -> dict[str, str]:
    return {
        "adapter": sha256(adapter / "adapter_model.safetensors"),
        "adapter_config": sha256(adapter / "adapter_config.json"),
    }


def covers(recorded: dict[str, Any] | None, wanted: dict[str, Any]) -> bool:
    """Whether an export from the inputs `recorded` is the one that is `wanted`: programs that read it may be more."""
    known = {READERS: [], **(recorded or {})}
    return {**known, READERS: []} == {READERS: [], **wanted, **{READERS: []}} and set(wanted.get(READERS, [])) <= set(
        known[READERS]
    )


def recorded_parity(out: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """What was measured when `out` was exported; None if there is no complete export from `inputs`.

    Raises:
        UserError: `out` is something else than an export, which is never replaced.
    """
    manifest = read_manifest(out) or {}
    if "parity" not in manifest:
        if out.exists() and (out.is_file() or any(out.iterdir())):
            raise UserError(
                f"{out} exists and is no export of this program. Choose another folder with out=, or remove it."
            )
        return None
    if not covers(manifest.get("inputs"), inputs) or find_damage(out, manifest, full=False):
        return None
    measured: dict[str, Any] = manifest["parity"]
    return None if find_problem(measured, PARITY) else measured
