"""docker/setup, run for real in a temporary folder with a stand-in for Python, pip and uv that writes down what it is told."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/bin/sh
here=$(dirname "$0")
case "$*" in
*version_info*) echo "${FAKE_VERSION:-3.11}" ;;
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo "executable = $0" >"$3/pyvenv.cfg" ;;
"-m pip config get "*) [ -n "$FAKE_MIRROR" ] && [ "$5" = global.index-url ] && echo "$FAKE_MIRROR" ;;
"-m pip install "*) echo "pip $*" >>log && cp "$0" "$here/uv" ;;
"docker/lock.py select "*) shift 2; echo "lines of $*" ;;
"pip check "* | "pip uninstall "*) echo "afterwards $*" >>log ;;
"pip install "*) echo "uv $* : $(tail -n 1 ${VENV:-.venv}/requirements.txt) : ${UV_DEFAULT_INDEX-} ${PIP_CONSTRAINT-} : cards=${CUDA_VISIBLE_DEVICES-all}" >>log
    [ "$FAKE_FAIL" != "$(tail -n 1 ${VENV:-.venv}/requirements.txt)" ] ;;
esac
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "docker", tmp_path / "docker")
    shutil.copy(ROOT / "env.lock", tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3.11").write_text(PYTHON)
    (tmp_path / "bin/python3.11").chmod(0o755)
    return tmp_path


def setup(project: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_", "TORCH", "PYTHON", "CUDA", "VENV"))
    }
    clean["PATH"] = f"{project}/bin:{os.environ['PATH']}"
    (project / "log").unlink(missing_ok=True)
    return subprocess.run(
        ["docker/setup", *words], cwd=project, env={**clean, **variables}, capture_output=True, text=True
    )


def stages(project: Path) -> list[str]:
    """Which sections were installed, in order; uv's own as `pip`."""
    log = (project / "log").read_text().splitlines() if (project / "log").exists() else []
    log = [line for line in log if not line.startswith("afterwards")]
    return [line.split(" : ")[1].removeprefix("lines of ") if line.startswith("uv") else "pip" for line in log]


ALL = ["pip", "build", "common torch-registry", "source", "test"]


def test_everything_by_hash_in_order_then_nothing(project: Path) -> None:
    first = setup(project, TORCH="registry")
    assert first.returncode == 0, first.stderr
    assert stages(project) == ALL
    log = (project / "log").read_text().splitlines()
    assert all("--require-hashes" in line and "--no-deps" in line for line in log)
    assert all(("--no-build-isolation" in line) == ("lines of source" in line) for line in log)
    for line in log[1:]:  # what is built from source must not ask a GPU's driver for the CUDA toolkit
        assert line.endswith("cards=" if "lines of source" in line else "cards=all")
    second = setup(project)
    assert (second.stdout, second.stderr, stages(project)) == ("", "", [])


def test_cut_off_then_repaired(project: Path) -> None:
    broken = setup(project, TORCH="cu118", FAKE_FAIL="lines of source")
    assert broken.returncode == 2
    assert "Run the same command again" in broken.stderr
    assert setup(project).returncode == 0
    assert stages(project) == [*ALL[:2], "common torch-cu118", *ALL[3:]]  # and the flavour asked for is remembered


def test_another_torch_lock_or_python_makes_it_anew(project: Path) -> None:
    setup(project, TORCH="registry")
    assert setup(project, TORCH="cu128").returncode == 0
    assert "common torch-cu128" in stages(project)
    assert setup(project).stdout == ""
    with (project / "env.lock").open("a") as file:
        file.write("# changed\n")
    setup(project)
    assert "common torch-cu128" in stages(project)


def test_the_mirror_of_pip_is_used_and_its_constraints_are_not(project: Path) -> None:
    setup(project, TORCH="registry", FAKE_MIRROR="https://mirror.example/simple", PIP_CONSTRAINT="/limits.txt")
    lines = [line for line in (project / "log").read_text().splitlines() if line.startswith("uv")]
    assert [line.split(" : ")[2].strip() for line in lines] == ["https://mirror.example/simple"] * 4


def test_no_python_that_fits(project: Path) -> None:
    result = setup(project, PYTHON=str(project / "bin/python3.11"), FAKE_VERSION="3.12")
    assert result.returncode == 2
    assert "no Python 3.10 or 3.11" in result.stderr
    assert "apt-get install" in result.stderr
    assert not (project / ".venv").exists()


def test_a_folder_that_is_no_venv_is_not_touched(project: Path) -> None:
    (project / ".venv").mkdir()
    (project / ".venv/precious").touch()
    assert setup(project).returncode == 2
    assert (project / ".venv/precious").exists()


@pytest.mark.parametrize(
    ("cards", "flavour"),
    [
        (["570.86.10 12.0"], "cu128"),
        (["570.86.10 8.6", "570.86.10 10.0"], "cu128"),
        (["550.54.15 9.0"], "registry"),
        (["525.60.13 8.0"], "registry"),
        (["515.43.04 7.5"], "cu118"),
        (["470.223.02 "], "cu118"),  # so old that it does not know the question
        ([], "registry"),
    ],
)
def test_the_default_torch_follows_the_card_and_its_driver(project: Path, cards: list[str], flavour: str) -> None:
    drivers, capabilities = ([card.split(" ")[i] for card in cards] for i in (0, 1))
    unknown = 'Field "compute_cap" is not a valid field to query.'
    (project / "driver").write_text("\n".join(drivers))
    (project / "capability").write_text("\n".join(capabilities) or unknown)
    (project / "bin/nvidia-smi").write_text(
        '#!/bin/sh\ncase "$1" in *compute_cap) cat capability ;; *) cat driver ;; esac\n'
    )
    (project / "bin/nvidia-smi").chmod(0o755)
    said = setup(project, "torch").stdout
    assert f"TORCH={flavour}: " in said
    assert len(said.split(f"TORCH={flavour}: ")[1]) > 10  # and says why


def test_an_unknown_torch_is_refused(project: Path) -> None:
    result = setup(project, TORCH="rocm")
    assert result.returncode == 2
    assert "expected cu118, cu128, registry" in result.stderr


@pytest.mark.parametrize(
    ("cuda", "torch", "taken"), [("11.8", "", "cu118"), ("12.8", "", "cu128"), ("11.8", "registry", "registry")]
)
def test_the_images_has_no_test_tools_and_torch_by_cuda(project: Path, cuda: str, torch: str, taken: str) -> None:
    """And is checked while uv is still there, which then goes."""
    done = setup(project, "image", CUDA=cuda, TORCH=torch, VENV=str(project / "venv"))
    assert done.returncode == 0, done.stderr
    assert stages(project) == ["pip", "build", f"common torch-{taken}", "source"]
    last = [line for line in (project / "log").read_text().splitlines() if line.startswith("afterwards")]
    assert [" ".join(line.split()[1:3]) for line in last] == ["pip check", "pip uninstall"]
    assert last[1].endswith(" uv")
