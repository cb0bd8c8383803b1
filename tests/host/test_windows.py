"""Windows hosts: each finding made to fail by the files of an imaginary machine, and the remedy that it names."""

from pathlib import Path

import pytest

from train.host.windows import check_windows, file_system_of, inspect_windows

WSL2 = "Linux version 5.15.167.4-microsoft-standard-WSL2 (root@host) (gcc 11.2.0)"
WSL1 = "Linux version 4.4.0-19041-Microsoft (Microsoft@Microsoft.com)"
DOCKER = "Linux version 6.10.14-linuxkit (root@buildkitsandbox)"


def machine(root: Path, kernel: str, gigabytes: int = 16, mount: str = "ext4", files: tuple[str, ...] = ()) -> Path:
    """A root folder with such a kernel and memory, whose / is of type `mount`, and with these empty files."""
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "proc").mkdir()
    (root / "proc/version").write_text(kernel)
    (root / "proc/meminfo").write_text(f"MemTotal:       {gigabytes * 1_000_000} kB\n")
    (root / "proc/mounts").write_text(f"none / {mount} rw 0 0\nC:\\ /mnt/c 9p rw 0 0\n")
    return root


def states(root: Path, checkout: str = "/home/me/project") -> dict[str, tuple[str, str]]:
    """Name of each finding -> its state and remedy."""
    findings = check_windows(inspect_windows(Path(checkout), root))
    return {finding.name: (finding.state, finding.remedy) for finding in findings if finding}


SOUND = ("dev/dxg", "usr/lib/wsl/lib/libcuda.so.1")


def test_a_sound_wsl_is_ok(tmp_path: Path) -> None:
    found = states(machine(tmp_path, WSL2, files=SOUND))
    assert {name: state for name, (state, _) in found.items()} == {
        "Windows": "ok",
        "WSL's card": "ok",
        "Windows' memory": "ok",
        "file system": "ok",
    }


def test_a_machine_without_windows_has_no_such_checks(tmp_path: Path) -> None:
    assert not states(machine(tmp_path, "Linux version 6.8.0-48-generic (buildd@lcy02)"))


def test_wsl_1_has_no_gpu(tmp_path: Path) -> None:
    state, remedy = states(machine(tmp_path, WSL1))["Windows"]
    assert state == "fail"
    assert "--set-version" in remedy


@pytest.mark.parametrize(
    ("files", "state", "remedy"),
    [
        ((), "warn", "wsl --update"),
        (("dev/dxg",), "fail", "driver in Windows"),
        ((*SOUND, "usr/lib/x86_64-linux-gnu/libcuda.so.1"), "fail", "purge"),
    ],
)
def test_the_card_of_wsl(tmp_path: Path, files: tuple[str, ...], state: str, remedy: str) -> None:
    found = states(machine(tmp_path, WSL2, files=files))["WSL's card"]
    assert found[0] == state
    assert remedy in found[1]


@pytest.mark.parametrize(("kernel", "remedy"), [(WSL2, ".wslconfig"), (DOCKER, "Docker Desktop")])
def test_little_memory_names_the_setting(tmp_path: Path, kernel: str, remedy: str) -> None:
    state, text = states(machine(tmp_path, kernel, gigabytes=8, files=SOUND))["Windows' memory"]
    assert state == "warn"
    assert remedy in text


def test_a_checkout_on_windows_disk_is_slow(tmp_path: Path) -> None:
    root = machine(tmp_path, WSL2, files=SOUND)
    assert states(root)["file system"][0] == "ok"
    state, remedy = states(root, "/mnt/c/Users/me/project")["file system"]
    assert state == "warn"
    assert "cd ~" in remedy


def test_the_file_system_of_a_path_is_that_of_its_longest_mount() -> None:
    mounts = "none / ext4 rw\nC: /mnt/c 9p rw\nx /mnt/c/My\\040disk xfs rw\nshort\n"
    kinds = [file_system_of(Path(path), mounts) for path in ("/a", "/mnt/c/x", "/mnt/c/My disk/x", "/mnt/cd")]
    assert kinds == ["ext4", "9p", "xfs", "ext4"]
