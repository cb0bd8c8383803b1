"""Every way in which a machine is known to fail: what is inspected of it, and the finding."""

from dataclasses import replace
from pathlib import Path

import pytest

from train.host import checks
from train.host.checks import (
    check_card,
    check_driver,
    check_folder,
    check_generation,
    check_libraries,
    check_lock,
    check_machine,
    check_memory,
    check_shared_memory,
    check_torch,
    check_triton,
    must_have_card,
)
from train.host.machine import HIDDEN, NO_NVIDIA_SMI, Card, Machine, installed_versions

ROOT = Path(__file__).resolve().parents[2]
GB = 10**9
CARD = Card("NVIDIA RTX 4060", (8, 9), 8 * GB, 7 * GB)
GOOD = Machine(
    (CARD,),
    "535.183.01",
    torch="2.7.1+cu118",
    cuda="11.8",
    compiler="/usr/bin/gcc",
    python_headers=True,
    shared_memory=8 * GB,
)
BARE = Machine(nvidia_smi_error=NO_NVIDIA_SMI, torch="2.7.1", cuda="12.6")


# --- cards


def test_a_machine_on_which_everything_works() -> None:
    card = check_card(GOOD)
    assert (card.state, card.text) == ("ok", "NVIDIA RTX 4060, compute capability 8.9, 7.0 of 8.0 GB free")
    for finding in (check_driver(GOOD), check_generation(GOOD), check_shared_memory(GOOD, 1)):
        assert finding
        assert (finding.state, finding.remedy) == ("ok", "")


@pytest.mark.parametrize(
    ("machine", "text", "remedy"),
    [
        (BARE, "no NVIDIA card", "ACCELERATOR=cpu"),
        (replace(BARE, nvidia_smi_error=HIDDEN), "CUDA_VISIBLE_DEVICES", "Unset it"),
        (replace(BARE, on_pci_bus=True), "no driver answers", "Install the driver"),
        (replace(BARE, in_container=True, kernel_driver="535.1"), "host has driver 535.1", "container toolkit"),
        (
            replace(BARE, nvidia_smi_error="Failed to initialize NVML: Driver/library version mismatch"),
            "mismatch",
            "restart",
        ),
        (
            replace(BARE, nvidia_smi_error="couldn't communicate with\nthe NVIDIA driver."),
            "communicate with the",
            "modprobe",
        ),
    ],
)
def test_why_no_card_is_visible(machine: Machine, text: str, remedy: str) -> None:
    wanted, optional = check_card(machine, 1), check_card(machine, 0)
    assert wanted.state == "fail"
    assert text in wanted.text
    assert remedy in wanted.remedy
    # a warning, because training on the CPU is hardly what the owner of such a machine expects
    assert optional.state == ("ok" if machine is BARE else "warn")


def test_fewer_cards_than_asked_for() -> None:
    finding = check_card(GOOD, 2)
    assert (finding.state, finding.remedy) == ("fail", "GPUS=1")


@pytest.mark.parametrize(
    ("driver", "cuda", "state"),
    [
        ("450.80.02", "11.8", "ok"),
        ("450.51.06", "11.8", "fail"),
        ("470.223.02", "11.8", "ok"),
        ("515.43.04", "12.6", "fail"),
        ("525.60.13", "12.6", "ok"),
        ("525.60.13", "12.8", "ok"),
        ("1000.1", "12.8", "ok"),  # compared as numbers, not as text
    ],
)
def test_the_driver_and_the_cuda_version(driver: str, cuda: str, state: str) -> None:
    finding = check_driver(replace(GOOD, driver=driver, cuda=cuda))
    assert finding
    assert finding.state == state
    if cuda != "11.8" and state == "fail":
        assert "CUDA=11.8" in finding.remedy  # the build that this driver does run


def test_without_driver_or_cuda_there_is_no_finding() -> None:
    assert check_driver(BARE) is None
    assert check_generation(BARE) is None
    assert check_driver(replace(GOOD, cuda="")) is None
    assert check_driver(replace(GOOD, cuda="13.0")) is None  # a version that is not in the table


@pytest.mark.parametrize(
    ("capability", "cuda", "state", "remedy"),
    [
        ((9, 0), "11.8", "ok", ""),
        ((10, 0), "11.8", "fail", "CUDA=12.8"),
        ((12, 0), "12.6", "fail", "TORCH=cu128"),
        ((12, 0), "12.8", "ok", ""),
        ((7, 0), "12.8", "fail", "CUDA=11.8"),
        ((6, 1), "11.8", "ok", ""),
        ((3, 5), "11.8", "fail", "another card"),
    ],
)
def test_the_generation_of_the_card(capability: tuple[int, int], cuda: str, state: str, remedy: str) -> None:
    finding = check_generation(replace(GOOD, cards=(replace(CARD, capability=capability),), cuda=cuda))
    assert finding
    assert finding.state == state
    assert remedy in finding.remedy


def test_two_cards_of_two_generations_are_judged_by_the_one_that_fails() -> None:
    cards = (replace(CARD, capability=(12, 0)), CARD)
    finding = check_generation(replace(GOOD, cards=cards))
    assert finding
    assert finding.state == "fail"


def test_must_have_card_ends_with_every_reason(capsys: pytest.CaptureFixture[str]) -> None:
    must_have_card(GOOD)
    assert capsys.readouterr() == ("", "")
    blackwell = replace(GOOD, cards=(replace(CARD, capability=(12, 0)),), driver="390.1")
    with pytest.raises(SystemExit) as end:
        must_have_card(blackwell)
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.count("error: ") == error.count("Remedy: ") == 2
    assert "390.1" in error
    assert "CUDA=12.8" in error


def test_every_check_runs_in_turn_and_torch_is_probed_where_it_is_installed(tmp_path: Path) -> None:
    probes = []

    def probe() -> dict[str, object]:
        probes.append("torch")
        return {"seen": 1, "errors": []}

    findings = [finding for finding in check_machine(GOOD, 1, tmp_path / "env.lock", probe) if finding]
    names = ["card", "driver", "generation", "torch", "CUDA libraries", "packages", "Triton", "shared memory"]
    assert [finding.name for finding in findings] == names
    assert probes == ["torch"]
    bare = [finding.name for finding in check_machine(Machine(), 0, tmp_path / "env.lock", probe) if finding]
    assert bare == ["card", "torch", "packages", "shared memory"]
    assert probes == ["torch"], "not installed: not probed"


# --- what is installed


@pytest.mark.parametrize(
    ("machine", "probe", "state", "text"),
    [
        (GOOD, {"seen": 1, "errors": []}, "ok", "computes on the card"),
        (GOOD, {"seen": 2, "errors": []}, "ok", "2 cards"),
        (BARE, {"seen": 0, "errors": []}, "ok", "the CPU"),
        (GOOD, {"seen": 0, "errors": []}, "fail", "none of the cards"),
        (GOOD, {"seen": 1, "errors": ["card 0: no kernel image is available"]}, "fail", "no kernel image"),
        (GOOD, {"died": "libcudnn.so.9: cannot open"}, "fail", "libcudnn"),
        (replace(GOOD, cuda=""), {"seen": 0, "errors": []}, "fail", "CPU"),
        (Machine(), {}, "fail", "not installed"),
    ],
)
def test_torch(machine: Machine, probe: dict[str, object], state: str, text: str) -> None:
    finding = check_torch(machine, probe)
    assert finding.state == state
    assert text in finding.text
    assert bool(finding.remedy) == (state == "fail")


def test_cuda_libraries() -> None:
    wanted = ["filelock", 'nvidia-cublas-cu11==11.11.3.6; platform_system == "Linux"', 'triton==3.3.1; x == "y"']
    assert check_libraries(wanted, {"nvidia-cublas-cu11": "11.11.3.6", "triton": "3.3.1"}).state == "ok"
    finding = check_libraries(wanted, {"nvidia-cublas-cu11": "11.1"})
    assert finding.state == "fail"
    assert "nvidia-cublas-cu11 11.1; triton is missing" in finding.text


LOCK = """# === section: common ===
here==1.0 \\
    --hash=sha256:00
numpy==1.26.4
old==1.0 ; python_version == "3.10" \\
    --hash=sha256:00
old==2.0 ; python_version == "3.11" \\
    --hash=sha256:00

# === section: test ===
pytest==9.2.0
"""


@pytest.mark.parametrize("python", ["3.10", "3.11"])
def test_packages_against_the_lock(python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "PYTHON", python)
    old = {"3.10": "1.0", "3.11": "2.0"}[python]
    assert check_lock(LOCK, {"here": "1.0", "numpy": "1.26.4", "old": old}).text == "3, as pinned in env.lock"
    finding = check_lock(LOCK, {"here": "1.0", "numpy": "2.0", "old": old})
    assert (finding.state, finding.text) == ("fail", "do not match env.lock: numpy is 2.0, not 1.26.4")
    assert "here 1.0 is missing" in check_lock(LOCK, {}).text
    assert check_lock("", {}).state == "fail"


def test_the_real_lock_is_read_completely() -> None:
    """Every package that env.lock pins for this Python, except torch's builds and the tools, is compared."""
    finding = check_lock((ROOT / "env.lock").read_text(), {})
    assert int(finding.text.split(" and ")[-1].split()[0]) > 70
    assert "transformers" in installed_versions()


# --- Triton


@pytest.mark.parametrize(
    ("machine", "text", "remedy"),
    [
        (replace(GOOD, compiler=""), "no C compiler", "gcc"),
        (replace(GOOD, python_headers=False), "no Python.h", "-dev"),
        (replace(GOOD, driver="470.223.02"), "470.223.02", "TRITON_PTXAS_PATH"),
        (replace(GOOD, cards=(replace(CARD, capability=(6, 1)),)), "6.1", ""),
    ],
)
def test_without_triton_training_is_slower(machine: Machine, text: str, remedy: str, tmp_path: Path) -> None:
    finding = check_triton(machine, tmp_path / "cache")
    assert finding
    assert finding.state == "warn"
    assert text in finding.text
    assert finding.text.endswith("the slower PyTorch path is used")
    assert remedy in finding.remedy


def test_with_triton(tmp_path: Path) -> None:
    old = replace(GOOD, driver="470.223.02", ptxas="/somewhere/ptxas")
    for machine in (GOOD, old):
        finding = check_triton(machine, tmp_path / "cache")
        assert finding
        assert finding.state == "ok"
    assert check_triton(BARE, tmp_path) is None


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.os, "access", lambda path, mode: False)  # for root it is always true
    finding = check_triton(GOOD, tmp_path / "cache")
    assert finding
    assert finding.state == "warn"
    assert "TRITON_CACHE_DIR" in finding.remedy


# --- memory and disk


def test_shared_memory_matters_to_several_cards() -> None:
    small = replace(GOOD, shared_memory=64 << 20)
    assert check_shared_memory(small).state == "ok"
    assert check_shared_memory(small, 2).state == "warn"
    assert check_shared_memory(replace(small, cards=(CARD, CARD))).state == "warn"
    assert check_shared_memory(replace(GOOD, cards=(CARD, CARD))).state == "ok"


def test_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_folder("runs", tmp_path / "not" / "there").state == "ok"
    full = check_folder("runs", tmp_path, needed=1 << 60)
    assert full.state == "fail"
    assert "RUNS=path" in full.remedy
    monkeypatch.setattr(checks.os, "access", lambda path, mode: False)
    forbidden = check_folder("runs", tmp_path / "a")
    assert forbidden.state == "fail"
    assert "may not write" in forbidden.text
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    assert check_folder("runs", tmp_path / "runs").state == "fail"


@pytest.mark.parametrize(
    ("needed", "free", "total", "state", "remedy"),
    [
        (4, 7, 8, "ok", ""),
        (9, 7, 8, "fail", "Int4"),
        (7.5, 7, 8, "fail", "nvidia-smi"),
        (6.5, 7, 8, "warn", "batch=1"),
        (9, 8, None, "fail", "smaller base"),
        (4, 8, None, "ok", ""),
    ],
)
def test_memory(needed: float, free: int, total: int | None, state: str, remedy: str) -> None:
    finding = check_memory("memory", int(needed * GB), free * GB, total and total * GB)
    assert finding.state == state
    assert remedy in finding.remedy
