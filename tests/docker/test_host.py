"""docker/host: what a host says before a GPU container is started on it, with stand-ins for nvidia-smi and docker on PATH."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.host.checks import OLDEST_DRIVER

SCRIPT = Path(__file__).resolve().parents[2] / "docker" / "host"
SMI = """#!/bin/sh
case "$1" in
*compute_cap*) [ -z "$FAKE_OLD" ] || { echo 'Field "compute_cap" is not a valid field to query.'; exit 2; } ;;
esac
printf '%s\\n' "$FAKE_CARDS"
exit ${FAKE_STATUS:-0}
"""
TOOLS = ("bash", "cat", "cut", "env", "head", "sed", "sleep", "sort", "tail", "timeout")


class Host:
    """A PATH with the tools of every Linux, and a PCI bus."""

    def __init__(self, root: Path) -> None:
        self.bin, self.pci = root / "bin", root / "pci"
        self.bin.mkdir()
        self.pci.mkdir()
        for name in TOOLS:
            found = next(p for p in (Path("/bin", name), Path("/usr/bin", name)) if p.exists())
            (self.bin / name).symlink_to(found)

    def program(self, name: str, text: str = "#!/bin/sh\n") -> "Host":
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)
        return self

    def card(self) -> "Host":
        (self.pci / "0").mkdir()
        (self.pci / "0/vendor").write_text("0x10de\n")
        (self.pci / "0/class").write_text("0x030000\n")
        return self

    def engine(self, runtimes: str) -> "Host":
        return self.program("docker", f"#!/bin/sh\n[ \"$1\" = info ] && echo '{runtimes}'\n")

    def check(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": str(self.bin), "PCI": str(self.pci), **variables}
        started = time.monotonic()
        done = subprocess.run([SCRIPT, *words], env=env, capture_output=True, text=True)
        assert time.monotonic() - started < 10
        assert done.stdout == ""
        assert done.returncode == (2 if done.stderr else 0), done.stderr
        assert done.stderr.count("error: ") == done.stderr.count("Remedy: ")
        return done


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path).engine('{"runc":{}} []').program("nvidia-smi", SMI).program("nvidia-container-runtime-hook")


@pytest.mark.parametrize(
    ("cards", "cuda"),
    [
        ("535.183.01, 8.9", "11.8"),
        ("450.80.02, 7.5", "11.8"),
        ("570.86.10, 12.0", "12.8"),
        ("525.60.13, 9.0", "12.6"),
        ("570.86.10, 9.0\n570.86.10, 9.0", "11.8"),
    ],
)
def test_a_host_that_runs_it_hears_nothing(host: Host, cards: str, cuda: str) -> None:
    assert host.check(cuda, FAKE_CARDS=cards).stderr == ""
    assert host.check(CUDA=cuda, FAKE_CARDS=cards).stderr == ""


@pytest.mark.parametrize(
    ("cards", "cuda", "said", "remedy"),
    [
        ("440.33.01, 7.5", "11.8", "older than 450.80.02", "a newer driver."),
        ("470.223.02, 8.0", "12.8", "older than 525.60.13", "make image CUDA=11.8"),
        ("570.86.10, 12.0", "11.8", "compute capability 12.0, Blackwell", "make image CUDA=12.8"),
        ("570.86.10, 8.6\n570.86.10, 10.0", "12.6", "compute capability 10.0", "make image CUDA=12.8"),
    ],
)
def test_a_driver_too_old_and_a_card_too_new(host: Host, cards: str, cuda: str, said: str, remedy: str) -> None:
    told = host.check(cuda, FAKE_CARDS=cards).stderr
    assert told.count("error: ") == 1
    assert said in told
    assert remedy in told


def test_an_old_driver_that_does_not_know_the_question(host: Host) -> None:
    assert host.check("11.8", FAKE_CARDS="470.223.02", FAKE_OLD="1").stderr == ""
    assert "older than 525.60.13" in host.check("12.8", FAKE_CARDS="470.223.02", FAKE_OLD="1").stderr


def test_no_driver(host: Host) -> None:
    (host.bin / "nvidia-smi").unlink()
    assert "ACCELERATOR=cpu" in host.check().stderr
    told = host.card().check().stderr
    assert "an NVIDIA card is in this host, but no driver" in told
    assert "ubuntu-drivers install" in told


def test_a_driver_that_does_not_answer(host: Host) -> None:
    failed = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    assert "couldn't communicate" in host.card().check(FAKE_CARDS=failed, FAKE_STATUS="9").stderr
    mismatch = "Failed to initialize NVML: Driver/library version mismatch"
    assert "restart this host" in host.check(FAKE_CARDS=mismatch, FAKE_STATUS="18").stderr


def test_cards_that_are_slow_to_wake_up_are_no_reason_to_refuse(host: Host) -> None:
    host.program("nvidia-smi", "#!/bin/sh\nexec sleep 60\n")
    assert host.check().stderr == ""


def test_no_container_toolkit(host: Host) -> None:
    (host.bin / "nvidia-container-runtime-hook").unlink()
    told = host.check(FAKE_CARDS="535.183.01, 8.9").stderr
    assert "toolkit is missing" in told
    assert "nvidia-ctk runtime configure --runtime=docker" in told


@pytest.mark.parametrize("told", ['{"nvidia":{"path":"x"}} []', '{"runc":{}} [{"ID":"nvidia.com/gpu=all"}]'])
def test_the_engine_may_know_the_toolkit_by_a_runtime_or_a_device(host: Host, told: str) -> None:
    (host.bin / "nvidia-container-runtime-hook").unlink()
    assert host.engine(told).check(FAKE_CARDS="535.183.01, 8.9").stderr == ""


def test_an_engine_that_hangs_is_not_waited_for(host: Host) -> None:
    (host.bin / "nvidia-container-runtime-hook").unlink()
    host.program("docker", "#!/bin/sh\nexec sleep 60\n")
    assert "toolkit is missing" in host.check(FAKE_CARDS="535.183.01, 8.9").stderr


def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run([Path(sys.executable).parent / "shellcheck", SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_it_says_the_same_drivers_as_the_program_inside() -> None:
    text = SCRIPT.read_text()
    assert f"needed={OLDEST_DRIVER[11]} ;;" in text
    assert f"needed={OLDEST_DRIVER[12]} ;;" in text
    assert os.access(SCRIPT, os.X_OK)
