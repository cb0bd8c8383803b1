"""env.lock: complete, hashed, and what pyproject.toml asks for."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from docker import lock

LOCK = lock.LOCK.read_text(encoding="utf-8")
SECTIONS = lock.split(LOCK)
FLAVOURS = ("torch-cu118", "torch-cu128", "torch-registry")


def entries(section: str) -> dict[Requirement, list[str]]:
    """Requirement -> its hashes. Every line must be one or the other."""
    found: dict[Requirement, list[str]] = {}
    for block in re.split(r"(?<!\\)\n", SECTIONS[section].strip()):
        line, *hashes = block.split(" \\\n    --hash=")
        found[Requirement(line)] = hashes
    return found


def test_sections() -> None:
    assert tuple(SECTIONS) == lock.SECTIONS
    assert "make lock" in LOCK.splitlines()[0]


@pytest.mark.parametrize("section", lock.SECTIONS)
def test_every_requirement_is_exact_and_hashed(section: str) -> None:
    for requirement, hashes in entries(section).items():
        exact = requirement.url or re.fullmatch(r"==[\w.+]+", str(requirement.specifier))
        assert exact, requirement
        assert hashes, requirement
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in hashes), requirement


@pytest.mark.parametrize("python", lock.PYTHONS)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_each_python_gets_each_package_once(python: str, flavour: str) -> None:
    here = {"python_version": python}
    sections = [name for name in lock.SECTIONS if name not in FLAVOURS or name == flavour]
    names = [r.name for name in sections for r in entries(name) if not r.marker or r.marker.evaluate(here)]
    assert len(names) == len(set(names))
    assert {"torch", "triton", "deepspeed", "transformers", "mpi4py"} < set(names)


def test_every_direct_dependency_is_locked_within_its_bound() -> None:
    locked = [r for name in lock.SECTIONS for r in entries(name)]
    for group in lock.wanted().values():
        for line in group:
            wanted = Requirement(line.split("#sha256")[0])
            matches = [r for r in locked if r.name == canonicalize_name(wanted.name)]
            assert matches, wanted
            if not wanted.url:
                assert any(r.specifier and wanted.specifier.contains(str(r.specifier)[2:]) for r in matches), wanted


def test_every_direct_dependency_says_why() -> None:
    """Each line of [project] carries its reason."""
    text = (lock.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = text.split("\ndependencies = [")[1].split("\n]")[0]
    lines = [line for line in block.splitlines() if line.strip().startswith('"')]
    assert lines
    assert [line for line in lines if not re.search(r",\s+# \S.{10,}", line)] == []


def test_torch_wheels_are_the_ones_of_two_public_locks() -> None:
    hashes = {
        (flavour, str(r.marker)[-5:-1]): h[0]
        for flavour in FLAVOURS[:2]
        for r, h in entries(flavour).items()
        if r.name == "torch"
    }
    assert hashes == {
        ("torch-cu118", "3.10"): "sha256:89433c62b02ec802d4c0887c867d935887ae8f00d7cc549ecf1c2640d096bd4c",
        ("torch-cu118", "3.11"): "sha256:a596d91c747d1fa601724e85b9c8797c8d7c62140aa1acf245773e911254bc45",
        ("torch-cu128", "3.10"): "sha256:d6c3cba198dc93f93422a8545f48a6697890366e4b9701f54351fc27e2304bd3",
        ("torch-cu128", "3.11"): "sha256:c301dc280458afd95450af794924c98fe07522dd148ff384739b810e3e3179f2",
    }


@pytest.mark.parametrize(
    "name", ["env.lock", "pyproject.toml", "docker/lock.py", "docker/setup", "Makefile", ".ci/run"]
)
def test_no_host_but_pytorchs(name: str) -> None:
    hosts = set(re.findall(r"https?://([^/\s\"']+)", (lock.ROOT / name).read_text(encoding="utf-8")))
    assert hosts <= {"download.pytorch.org"}


def test_fits_only_what_the_image_can_install() -> None:
    assert lock.fits("a-1-py3-none-any.whl", ("3.10",))
    assert lock.fits("a-1-cp39-abi3-manylinux_2_28_x86_64.whl", ("3.10",))
    assert lock.fits("a-1-cp311-cp311-manylinux2014_x86_64.whl", ("3.10", "3.11"))
    assert not lock.fits("a-1-cp311-cp311-manylinux2014_x86_64.whl", ("3.10",))
    assert not lock.fits("a-1-cp312-abi3-manylinux2014_x86_64.whl", ("3.11",))
    assert not lock.fits("a-1-cp310-cp310-manylinux_2_39_x86_64.whl", ("3.10",))
    assert not lock.fits("a-1-cp310-cp310-musllinux_1_2_x86_64.whl", ("3.10",))
    assert not lock.fits("a-1-cp310-cp310-manylinux2014_aarch64.whl", ("3.10",))


def test_a_package_without_a_wheel_for_each_python_is_refused() -> None:
    wheel = {"name": "a-1-cp311-cp311-manylinux2014_x86_64.whl", "hashes": {"sha256": "0" * 64}}
    with pytest.raises(SystemExit, match="no wheel for Python"):
        lock.entry({"name": "a", "version": "1", "wheels": [wheel]})


def test_select_prints_sections_and_refuses_others() -> None:
    def select(*names: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "docker/lock.py", "select", *names], cwd=lock.ROOT, capture_output=True, text=True
        )

    chosen = select("build", "source").stdout
    assert chosen == SECTIONS["build"].strip() + "\n" + SECTIONS["source"].strip() + "\n"
    assert select("torch-cu999").returncode == 1
    assert "torch-cu118" in select("torch-cu999").stderr
    assert select().returncode == 1


def test_a_split_lock_renders_to_itself() -> None:
    blocks = [lock.MARK.format(name) + "\n" + text.strip() for name, text in SECTIONS.items()]
    assert lock.HEADER + "\n" + "\n\n".join(blocks) + "\n" == LOCK


# --- the real installers, on the real files of the registry


def flipped(block: str) -> str:
    """A requirement with one digit of each hash changed, so also that of whichever file is chosen."""
    return re.sub("sha256:([0-9a-f])", lambda digit: f"sha256:{int(digit[1], 16) ^ 1:x}", block)


def blocks(*sections: str) -> dict[str, str]:
    """Name -> requirement with its hashes, of those that this Python installs."""
    here = [block for name in sections for block in re.split(r"(?<!\\)\n", SECTIONS[name].strip())]
    found = {Requirement(block.split(" \\\n")[0]): block for block in here}
    return {
        requirement.name: block
        for requirement, block in found.items()
        if not requirement.marker or requirement.marker.evaluate()
    }


def fetch(command: list[str], text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    folder.mkdir(parents=True)
    (folder / "requirements.txt").write_text(text)
    environment = {
        **os.environ,
        "PIP_CONSTRAINT": "",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "UV_HTTP_TIMEOUT": "300",
    } | lock.environment()
    command = [*command, "--require-hashes", "--no-deps", "-r", str(folder / "requirements.txt")]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_pip_refuses_uv_with_a_flipped_digit(tmp_path: Path) -> None:
    """The one package that pip installs: the true hash passes, the wrong one does not."""
    ((_, block),) = blocks("bootstrap").items()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-cache-dir", "-d", str(tmp_path / "files")]
    assert fetch(command, block, tmp_path / "true").returncode == 0
    refused = fetch(command, flipped(block), tmp_path / "flipped")
    assert refused.returncode != 0
    assert "DO NOT MATCH THE HASHES" in refused.stderr


@pytest.mark.slow
def test_uv_refuses_each_package_with_a_flipped_digit(tmp_path: Path) -> None:
    """Every other package that docker/setup installs here, downloaded and not installed. What uv computes for the file that it chose must be
    in the lock: so the refusal is of the one digit, and not of a file that the lock does not know."""
    everything = blocks("build", "common", "torch-registry", "source", "test")
    from_source = blocks("source")
    assert len(everything) > 120

    def attempt(name: str) -> str:
        target = tmp_path / name / "target"
        command = [lock.find_uv(), "pip", "install", "--no-cache", "--python", sys.executable, "--target", str(target)]
        command += ["--no-binary", ":all:"] if name in from_source else ["--no-build"]
        done = fetch(command, flipped(everything[name]), tmp_path / name)
        computed = re.search(r"Computed:\s+(sha256:[0-9a-f]{64})", done.stderr)
        refused = done.returncode != 0 and "Hash mismatch" in done.stderr and not list(target.glob("*.dist-info"))
        return "" if refused and computed and computed[1] in everything[name] else f"{name}: {done.stderr}"

    with ThreadPoolExecutor(4) as pool:
        problems = [said for said in pool.map(attempt, everything) if said]
    assert problems == []
