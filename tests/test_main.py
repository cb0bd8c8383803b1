"""python -m train: the message and the exit status when a verb cannot continue."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from train import __main__
from train.__main__ import main


class OutOfMemoryError(RuntimeError):
    """As torch's own, which the program knows by its name."""


GPU = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB of which\nmore advice"
CPU = "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
CASES = [
    (
        OutOfMemoryError(GPU),
        ["Tried to allocate 2.00 GiB.\n", "batch=1", "length=", "checkpointing=on", "another base"],
    ),
    (RuntimeError(CPU), ["out of memory", "batch=1"]),
    (MemoryError(), ["out of memory: MemoryError"]),
    (OSError(28, "No space left on device", "runs/x/a"), ["runs/x/a: the disk is full", "Free some space"]),
    (
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        ["the disk is full"],
    ),
    (PermissionError(13, "Permission denied", "/runs"), ["/runs: Permission denied. Make it writable"]),
    (OSError(30, "Read-only file system", "/runs"), ["/runs: Read-only file system"]),
]


def fails(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(verb: str, words: list[str]) -> None:
        raise error

    monkeypatch.setattr(__main__, "run", run)


@pytest.mark.parametrize(("error", "words"), CASES, ids=lambda case: type(case).__name__)
def test_a_limit_of_the_machine_is_one_message_with_a_remedy(
    error: Exception, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fails(error, monkeypatch)
    assert main(["train"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "more advice" not in message
    assert all(word in message for word in words), message


def test_torchs_own_error_has_the_expected_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    fails(torch.OutOfMemoryError("CUDA out of memory."), monkeypatch)
    assert main(["infer"]) == 1


@pytest.mark.parametrize("error", [RuntimeError("shapes"), FileNotFoundError(2, "No such file", "x"), ValueError("x")])
def test_an_error_of_the_program_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(error, monkeypatch)
    with pytest.raises(type(error)):
        main(["train"])


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, train.__main__ as m; m.main(['--help']); print('torch' in sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert process.stdout.splitlines()[-1] == "False"
