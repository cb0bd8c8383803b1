"""The form of run.json, inputs.json and an export's parity: which keys are there, and which type each value has.

Whoever reads a record relies on it, so a record that was cut off, edited or written by something else is refused when it
is read, with the key. Knows types only, not what the values mean.
"""

from typing import Any

NUMBER, TEXT_OR_NONE = (int, float), (str, type(None))
NUMBER_OR_NONE = (int, float, type(None))
HASHES = {"*": str}  # file name -> sha256

# A key that ends in ? may be missing; * stands for every key; a list holds the form of each entry.
RECORD: dict[str, Any] = {
    "run": str,
    "recipe": {"model": str, "system?": str, "template?": str},
    "data": {"path": str, "sha256": str},
    "base": {"files": HASHES},
    "machine": {"gpus": [str], "cores": int, "memory_gb": NUMBER},
    "peak_memory?": {"host": int, "gpu": (int, type(None))},
    "versions": HASHES,
    "code": {"version": str, "commit": TEXT_OR_NONE},
    "timings": {"steps_seconds": NUMBER},
    "tokens": int,
    "losses_sha256?": str,
    "adapter?": HASHES,
    "weights?": HASHES,  # instead of an adapter where every weight was trained
    "lineage?": list,
    "loss?": dict,
    "held_out?": {"conversations": int, "loss": {"before": NUMBER_OR_NONE, "last": NUMBER_OR_NONE}, "sha256": str},
    "cleaned?": {"counts": dict, "kept": int, "sha256": str},
}
# What `verify` needs besides: a finished run of any version has it.
VERIFIED: dict[str, Any] = {
    "inputs_sha256": str,
    "recipe_sha256": str,
    "losses_sha256": str,
    "lineage": [{"run": str, "adapter": HASHES}],
    "starts?": [{"processes": int}],
    "lock": TEXT_OR_NONE,
    "runtime": dict,
    "device": str,
    "processes": int,
    "steps": int,
}
_AGREEMENT = {"agreement": NUMBER, "tokens": int, "divergence": NUMBER}  # of two models
PARITY: dict[str, Any] = {  # what an export's manifest says of it
    **_AGREEMENT,
    "against": str,
    "computed_in": str,
    "adapter_on_int4": _AGREEMENT,
    "without_adapter": _AGREEMENT,
}
INPUTS: dict[str, Any] = {
    "data": {"path": str, "sha256": str},
    "base": {"files": HASHES},
    "from": (dict, type(None)),
    "recipe": dict,
    "rows_per_step": int,
    "rows?": str,
    "dtype": str,
}


def find_problem(value: Any, form: Any, place: str = "") -> str:
    """The first key whose value does not have its form, as a sentence without its end; empty if all do."""
    if isinstance(form, dict) and form:
        return _problem_in_object(value, form, place)
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{place} is {value!r:.60}, expected a list"
        return next(filter(None, (find_problem(one, form[0], f"{place}.{n}") for n, one in enumerate(value))), "")
    right = isinstance(value, form) and (form is not int or not isinstance(value, bool))
    return "" if right else f"{place} is {value!r:.60}"


def _problem_in_object(value: Any, form: dict[str, Any], place: str) -> str:
    if not isinstance(value, dict):
        return f"{place or 'the file'} is {value!r:.60}, expected an object"
    keys = dict.fromkeys(value, form["*"]) if "*" in form else form
    for key, inner in keys.items():
        name = key.removesuffix("?")
        at = f"{place}.{name}".lstrip(".")
        if name not in value and key == name:
            return f"{at} is missing"
        if name in value and (problem := find_problem(value[name], inner, at)):
            return problem
    return ""
