"""What is in the image: what env.lock says, apt's list, the sources, nothing else; whole, and silent when imported."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from docker import sbom
from train.runs.provenance import ROOT

pytestmark = pytest.mark.image

PYTHON = "/opt/venv/bin/python"
CAGE = "--rm -i --network none --read-only --tmpfs /tmp:exec --cap-drop ALL --user 4242:4242".split()  # noqa: SIM905
CARD = {  # what the image is promised to hold: distribution -> module
    "torch": "torch",
    "transformers": "transformers",
    "peft": "peft",
    "optimum": "optimum",
    "einops": "einops",
    "datasets": "datasets",
    "mpi4py": "mpi4py.MPI",
    "deepspeed": "deepspeed",
    "auto-gptq": "auto_gptq",
    "transformers-stream-generator": "transformers_stream_generator",
}
# The lines that those may print, with DS_ACCELERATOR set; every one of them must still be printed, or it is to be deleted here.
# The program's own commands print none of them (train/__main__.py: quiet, train/training/deepspeed_engine.py: import_deepspeed).
PYTREE = (
    "transformers/utils/generic.py: FutureWarning: `torch.utils._pytree._register_pytree_node` is deprecated. "
    "Please use `torch.utils._pytree.register_pytree_node` instead.",
    "torch.utils._pytree._register_pytree_node(",
)
AMP = (
    "auto_gptq/nn_modules/triton_utils/kernels.py: FutureWarning: `torch.cuda.amp.custom_{0}(args...)` is deprecated. "
    "Please use `torch.amp.custom_{0}(args..., device_type='cuda')` instead."
)
ALLOWED = {
    # transformers 4.34.1 calls a function of torch by the name that it had in 2023
    "transformers": (),
    "peft": PYTREE,
    # so does auto-gptq 0.7.1; and it is built without its kernels, which torch 2.7.1 cannot load: the stock engine uses
    # its pure Python
    "auto_gptq": (
        *(line for name in ("fwd", "bwd") for line in (AMP.format(name), f"@custom_{name}")),
        AMP.format("fwd"),
        "@custom_fwd(cast_inputs=torch.float16)",
        "CUDA extension not installed.",
        "CUDA extension not installed.",
    ),
    # DeepSpeed says which accelerator it was told to take, at a level that no setting lowers
    "deepspeed": ("[INFO] [real_accelerator.py:get_accelerator] Setting ds_accelerator to cpu (override)",),
}
TAMPER = """FROM {}
USER 0
RUN rm -r /opt/venv/lib/python3*/site-packages/einops* && echo >>/app/train/training/loop.py \\
    && for site in /opt/venv/lib/python3*/site-packages; do echo >>$site/peft/__init__.py; done \\
    && printf '\\nPackage: evil\\nStatus: install ok installed\\nArchitecture: all\\n' >>/var/lib/dpkg/status \\
    && printf 'Maintainer: x\\nVersion: 1.0\\nDescription: x\\n' >>/var/lib/dpkg/status
"""
IMPORTS = """
import importlib, json, os, sys, tempfile
said = {}
for name in sys.argv[1:]:
    with tempfile.TemporaryFile() as file:
        kept = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        importlib.import_module(name)
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(kept[0], 1), os.dup2(kept[1], 2)
        file.seek(0)
        said[name] = file.read().decode()
print(json.dumps(said))
"""


def inside(image: str, *words: str, script: str = "", options: tuple[str, ...] = ()) -> str:
    """What Python in the image says, caged and as a user that the image does not know."""
    command = ["docker", "run", *CAGE, *options, "--entrypoint", PYTHON, image, *words]
    done = subprocess.run(command, input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def seen(image: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inventory and inspection, once for all: every file of the image is read."""
    return sbom.look(image)


@pytest.fixture(scope="session")
def locked() -> str:
    return (ROOT / "env.lock").read_text(encoding="utf-8")


def test_installed_is_what_env_lock_says(seen: tuple[dict[str, Any], dict[str, Any]], locked: str) -> None:
    found = seen[0]
    assert found["packages"] == {package.name: package.version for package in sbom.wanted(locked, found)}


def test_every_file_is_as_its_package_brought_it(seen: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert seen[0]["altered"] == []


def test_apt_is_what_its_list_says(seen: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert seen[0]["apt"] == seen[0]["apt_list"]
    assert len(seen[0]["apt"]) > 50


def test_the_sbom_is_of_this_image(seen: tuple[dict[str, Any], dict[str, Any]], locked: str) -> None:
    """Its components are the installed packages and apt's, by name and version, and no other."""
    bill = sbom.sbom(sbom.wanted(locked, seen[0]), seen[0])
    python = {c["name"]: c["version"] for c in bill["components"] if c["purl"].startswith("pkg:pypi/")}
    debian = {f"{c['name']}={c['version']}" for c in bill["components"] if c["purl"].startswith("pkg:deb/")}
    assert python == seen[0]["packages"]
    assert debian == set(seen[0]["apt"])


def test_sbom_and_provenance_are_written_and_hold(
    image: str, seen: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sbom, "look", lambda name: seen)
    for folder in ("a", "b"):
        assert sbom.write(image, tmp_path / folder) == 0
    for name in (sbom.SBOM, sbom.PROVENANCE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_image_that_was_tampered_with_is_told(
    image: str, seen: tuple[dict[str, Any], dict[str, Any]], locked: str, tmp_path: Path
) -> None:
    """A layer on top that takes a package away, changes one and the program, and adds a Debian package to dpkg's
    list."""
    found, inspected = seen
    bill = sbom.sbom(sbom.wanted(locked, found), found)
    origin = sbom.provenance(ROOT, found, inspected, sbom.render(bill))
    before = sbom.check(found, inspected, bill, origin, locked)
    other = f"{image.partition(':')[0]}-tampered:test"
    subprocess.run(["docker", "build", "-q", "-t", other, "-"], input=TAMPER.format(image).encode(), check=True)
    try:
        after = sbom.check(*sbom.look(other), bill, origin, locked)
    finally:
        subprocess.run(["docker", "image", "rm", "-f", other], check=True, capture_output=True)
    told = " | ".join(line for line in after if line not in before)
    assert "package einops 0.8.2: in env.lock, not in the image" in told
    assert "peft/__init__.py: not as its package brought it" in told
    assert "apt package evil 1.0: in the image, not in the SBOM" in told
    assert "file /app/train/training/loop.py: " in told
    assert f"digest layer {len(inspected['RootFS']['Layers'])} " in told
    assert "digest settings: " in told


def test_pip_finds_no_broken_requirement(image: str) -> None:
    """The image has no pip: this Python's is shown to it."""
    import pip

    folder = Path(pip.__file__).parent
    options = ("-v", f"{folder}:/shown/pip:ro", "-e", "PYTHONPATH=/shown")
    assert "No broken requirements found." in inside(image, "-m", "pip", "check", options=options)


def test_no_package_of_the_card_is_missing(seen: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert CARD.keys() <= seen[0]["packages"].keys()
    assert seen[0]["packages"]["transformers"] == "4.34.1"


def test_they_all_import_and_say_nothing_but_what_is_allowed(image: str) -> None:
    options = ("-e", "DS_ACCELERATOR=cpu")
    answer = inside(image, "-", *CARD.values(), script=IMPORTS, options=options)
    said = {name: told for name, text in json.loads(answer.splitlines()[-1]).items() if (told := plain(text))}
    assert said == {name: list(lines) for name, lines in ALLOWED.items() if lines}


def plain(text: str) -> list[str]:
    """Lines without clock, place of installation and line numbers."""
    text = re.sub(r"^\[[\d :,-]+\] ", "", text, flags=re.M)
    text = re.sub(r"^/\S*/site-packages/(\S+?):\d+:", r"\1:", text, flags=re.M)
    text = re.sub(r"(\.py):\d+:(\w+\])", r"\1:\2", text)
    return [line.strip() for line in text.splitlines() if line.strip()]


def test_the_lines_that_are_allowed_are_read_as_they_are_printed() -> None:
    assert plain("[2026-11-22 17:17:10,383] [INFO] [real_accelerator.py:254:get_accelerator] Setting\n\n") == [
        "[INFO] [real_accelerator.py:get_accelerator] Setting"
    ]
    assert plain("/opt/venv/lib/python3.10/site-packages/a/b.py:311: FutureWarning: x\n  f(\n") == [
        "a/b.py: FutureWarning: x",
        "f(",
    ]


def test_the_programs_own_commands_print_none_of_it(image: str) -> None:
    """`--help` of every verb, and DeepSpeed as training imports it: not one warning line."""
    script = "from train.__main__ import VERBS, main, quiet\nquiet()\nfrom train.training import deepspeed_engine as engine\nengine.import_deepspeed()\nfrom train.model import loading\nfrom train.inference import stock\nprint('end')\n"
    assert inside(image, "-", script=script, options=("-e", "PYTHONPATH=/app")) == "end\n"
