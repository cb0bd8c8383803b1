"""What is inspected of a machine, with a stand-in for nvidia-smi and with folders in place of /proc and /sys."""

import sys
from pathlib import Path

import pytest

from train.host import machine as machine_module
from train.host.machine import (
    Card,
    inspect_machine,
    installed_torch,
    installed_versions,
    probe_torch,
    query_cards,
    visible_cards,
)

GIB = 1 << 30
SMI = """#!/bin/sh
case "$1" in
*compute_cap) printf '%s' "$FAKE_CAPABILITIES"; exit ${FAKE_UNKNOWN:-0} ;;
*) printf '%s' "$FAKE_CARDS"; exit ${FAKE_STATUS:-0} ;;
esac
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root folder of a machine without a card, and a PATH with no program of the real machine but sh and sleep."""
    (tmp_path / "bin").mkdir()
    for name in ("sh", "sleep"):
        (tmp_path / "bin" / name).symlink_to(f"/bin/{name}")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("CC", "TRITON_PTXAS_PATH"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:   2097152 kB\n")
    return tmp_path


def program(machine: Path, name: str, text: str = SMI) -> None:
    path = machine / "bin" / name
    path.write_text(text)
    path.chmod(0o755)


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_machine_without_a_card(machine: Path) -> None:
    found = inspect_machine(machine)
    assert (found.cards, found.driver, found.nvidia_smi_error) == ((), "", "absent")
    assert (found.on_pci_bus, found.kernel_driver, found.in_container, found.compiler, found.shared_memory) == (
        False,
        "",
        False,
        "",
        0,
    )
    assert found.free_memory == 2 * GIB


def test_cards_as_nvidia_smi_lists_them(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(machine, "nvidia-smi")
    output = "NVIDIA H100, odd name, 81559, 81000, 570.86.10\nNVIDIA GB10, [N/A], [N/A], 570.86.10\n"
    monkeypatch.setenv("FAKE_CARDS", output)
    monkeypatch.setenv("FAKE_CAPABILITIES", "9.0\n12.1\n")
    found, driver, error = query_cards()
    assert found == (
        Card("NVIDIA H100, odd name", (9, 0), 81559 << 20, 81000 << 20),
        Card("NVIDIA GB10", (12, 1), None, None),
    )
    assert (driver, error) == ("570.86.10", "")


def test_an_old_driver_does_not_know_the_capability(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(machine, "nvidia-smi")
    monkeypatch.setenv("FAKE_CARDS", "Tesla T4, 15109, 15000, 470.223.02\n")
    monkeypatch.setenv("FAKE_CAPABILITIES", 'Field "compute_cap" is not a valid field to query.')
    monkeypatch.setenv("FAKE_UNKNOWN", "2")
    assert query_cards()[:2] == ((Card("Tesla T4", None, 15109 << 20, 15000 << 20),), "470.223.02")


@pytest.mark.parametrize(
    ("output", "status", "error"),
    [
        ("Failed to initialize NVML: Driver/library version mismatch", 18, "Failed to initialize NVML"),
        ("No devices were found", 6, "No devices were found"),
        ("", 0, "No devices were found"),
    ],
)
def test_a_driver_that_refuses(
    output: str, status: int, error: str, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(machine, "nvidia-smi")
    monkeypatch.setenv("FAKE_CARDS", output)
    monkeypatch.setenv("FAKE_STATUS", str(status))
    cards, driver, reported = query_cards()
    assert (cards, driver) == ((), "")
    assert reported.startswith(error)


@pytest.mark.parametrize(
    ("value", "left"),
    [
        (None, "abc"),
        ("", ""),
        ("-1", ""),
        ("1", "b"),
        ("2,0", "ca"),
        ("0,7,1", "a"),
        ("GPU-1f,GPU-2e", "ab"),
        ("x", ""),
    ],
)
def test_cards_that_cuda_visible_devices_leaves(value: str | None, left: str) -> None:
    assert "".join(card.name for card in visible_cards(tuple(map(Card, "abc")), value)) == left


def test_hidden_cards_are_no_error_of_the_driver(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(machine, "nvidia-smi")
    monkeypatch.setenv("FAKE_CARDS", "Tesla T4, 15109, 15000, 535.1\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert (inspect_machine(machine).cards, inspect_machine(machine).nvidia_smi_error) == ((), "hidden")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert len(inspect_machine(machine).cards) == 1


def test_a_driver_that_hangs_runs_into_the_time_limit(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(machine, "nvidia-smi", "#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(machine_module, "NVIDIA_SMI_SECONDS", 0.3)
    assert "no answer within" in query_cards()[2]


def test_what_proc_and_sys_contain(machine: Path) -> None:
    put(
        machine / "proc/driver/nvidia/version",
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12\n",
    )
    put(machine / "sys/bus/pci/devices/0000:00:1e.0/vendor", "0x10de\n")
    put(machine / "sys/bus/pci/devices/0000:00:1e.0/class", "0x030200\n")
    put(machine / ".dockerenv", "")
    found = inspect_machine(machine)
    assert (found.kernel_driver, found.on_pci_bus, found.in_container) == ("535.183.01", True, True)


def test_another_vendor_or_another_class_of_device_is_no_card(machine: Path) -> None:
    for number, (vendor, kind) in enumerate([("0x8086", "0x030000"), ("0x10de", "0x0c0330")]):
        put(machine / f"sys/bus/pci/devices/{number}/vendor", vendor)
        put(machine / f"sys/bus/pci/devices/{number}/class", kind)
    assert not inspect_machine(machine).on_pci_bus


def test_compiler_and_ptxas(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(machine, "clang", "#!/bin/sh\n")
    assert inspect_machine(machine).compiler == str(machine / "bin/clang")
    program(machine, "gcc", "#!/bin/sh\n")
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(machine / "none"))
    assert (inspect_machine(machine).compiler, inspect_machine(machine).ptxas) == (str(machine / "bin/gcc"), "")
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(machine / "bin/gcc"))
    assert inspect_machine(machine).ptxas == str(machine / "bin/gcc")


def test_torch_is_read_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "torch/__init__.py", "raise ImportError('imported')\n")
    put(tmp_path / "torch/version.py", "__version__ = '2.7.1+cu118'\ncuda: Optional[str] = '11.8'\nhip = None\n")
    real = sys.modules.pop("torch")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        assert installed_torch() == ("2.7.1+cu118", "11.8")
        (tmp_path / "torch/version.py").write_text("__version__ = '2.7.1+cpu'\ncuda: Optional[str] = None\n")
        assert installed_torch() == ("2.7.1+cpu", "")
    finally:
        sys.modules["torch"] = real


def test_this_environment() -> None:
    import torch

    assert installed_torch() == (torch.__version__, torch.version.cuda or "")
    versions = installed_versions()
    assert versions["transformers"] == "4.34.1"
    assert "transformers-stream-generator" in versions  # its own metadata may spell the name with underscores


def test_probing_torch_always_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe_torch() == {"seen": 0, "errors": []}  # conftest.py hides the cards
    monkeypatch.setattr(
        machine_module, "PROBE_PROGRAM", "import sys; sys.exit('libcudnn.so.9: cannot open shared object file')"
    )
    assert probe_torch() == {"died": "libcudnn.so.9: cannot open shared object file"}
    monkeypatch.setattr(machine_module, "PROBE_PROGRAM", "import os; os.kill(os.getpid(), 11)")
    assert "status -11" in probe_torch()["died"]
