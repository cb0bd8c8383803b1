"""docker/entrypoint.sh, run for real in a folder that stands for /workspace, with stand-ins for Python and nvidia-smi."""

import os
import subprocess
from pathlib import Path

import pytest

from train.__main__ import VERBS

ENTRY = Path(__file__).resolve().parents[2] / "docker/entrypoint.sh"
PYTHON = """#!/bin/sh
if [ "$1" = -c ]; then exit ${FAKE_CARD:-0}; fi
printf '<%s>' "$@"
echo " ptxas=${TRITON_PTXAS_PATH-none} cards=${CUDA_VISIBLE_DEVICES-all}"
"""
SMI = """#!/bin/sh
[ -n "$FAKE_DRIVER" ] || { echo "NVIDIA-SMI has failed"; exit 9; }
echo "$FAKE_DRIVER"
"""


@pytest.fixture
def work(tmp_path: Path) -> Path:
    for name in ("data", "models", "runs", "bin", "venv/lib/python3.10/site-packages/nvidia/cuda_nvcc/bin"):
        (tmp_path / name).mkdir(parents=True)
    for name, text in (("bin/python", PYTHON), ("bin/nvidia-smi", SMI)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def enter(work: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {
        k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "TRITON_PTXAS_PATH", "ACCELERATOR")
    }
    here = {
        "PATH": f"{work}/bin:{os.environ['PATH']}",
        "WORK_DIR": str(work),
        "APP_DIR": str(ENTRY.parent.parent),
        "VIRTUAL_ENV": f"{work}/venv",
    }
    command = [str(ENTRY), *words]
    return subprocess.run(command, env={**clean, **here, **variables}, capture_output=True, text=True)


def test_hands_over_with_keys_in_lower_case_and_values_as_typed(work: Path) -> None:
    done = enter(work, "infer", "PROMPT=What Is A=B?", "FROM=x", "ENGINE=Stock", "run=R", "plain WORD", "epochs=3")
    assert done.returncode == 0, done.stderr
    said = "<-m><train><infer><prompt=What Is A=B?><from_run=x><engine=Stock><run=R><plain WORD><epochs=3>"
    assert done.stdout.startswith(said)
    assert done.stderr == ""


def test_without_a_word_it_says_what_there_is(work: Path) -> None:
    assert enter(work).stdout.startswith("<-m><train><help>")


@pytest.mark.parametrize(
    ("verb", "folder", "elsewhere"),
    [
        ("train", "runs", "RUNS=/x"),
        ("export", "runs", "runs=/x"),
        ("model", "models", "MODELS=/x"),
        ("quantize", "models", "OUT=/x"),
    ],
)
def test_a_folder_that_cannot_be_written_is_told_with_its_remedy(
    work: Path, verb: str, folder: str, elsewhere: str
) -> None:
    (work / folder).rmdir()
    done = enter(work, verb)
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"{work}/{folder} is not writable for user {os.getuid()}." in done.stderr
    assert "Remedy: mount a folder of yours" in done.stderr
    assert enter(work, verb, elsewhere).returncode == 0
    assert enter(work, verb, "--help").returncode == 0
    assert enter(work, "doctor").returncode == 0  # tells it in its own words


@pytest.mark.parametrize(
    ("uids", "user"),
    [
        ("0 0 4294967295\n", '"$(id -u):$(id -g)"'),
        ("0 1000 1\n1 200000 65536\n", "0:0"),  # a rootless engine's
        ("0 100000 65536\n", '"$(id -u):$(id -g)"'),  # userns-remap: uid 0 is nobody of the host
    ],
)
def test_the_remedy_names_the_user_that_is_you(work: Path, uids: str, user: str) -> None:
    (work / "uid_map").write_text(uids)
    (work / "runs").rmdir()
    (work / "runs").touch()
    done = enter(work, "train", UID_MAP=str(work / "uid_map"))
    assert done.returncode == 2 and f"--user {user}; is the disk full" in done.stderr, done.stderr


def test_nothing_is_left_behind(work: Path) -> None:
    enter(work, "train")
    enter(work, "model")
    assert [list((work / name).iterdir()) for name in ("data", "models", "runs")] == [[], [], []]


def test_a_gpu_that_was_asked_for_must_be_usable(work: Path) -> None:
    assert enter(work, "train", ACCELERATOR="gpu", FAKE_CARD="2").returncode == 2
    assert enter(work, "train", ACCELERATOR="gpu").returncode == 0
    assert enter(work, "train", ACCELERATOR="auto", FAKE_CARD="2").returncode == 0
    assert enter(work, "data", ACCELERATOR="gpu", FAKE_CARD="2").returncode == 0  # needs none
    assert "cards=\n" in enter(work, "train", ACCELERATOR="cpu", FAKE_CARD="2").stdout
    assert "cards=all" in enter(work, "train", ACCELERATOR="auto").stdout


@pytest.mark.parametrize(
    ("driver", "there", "taken"),
    [
        ("470.223.02", True, True),
        ("515.43.04", True, True),
        ("525.60.13", True, False),
        ("", True, False),
        ("470.223.02", False, False),
    ],
)
def test_an_old_driver_gets_the_assembler_of_its_age(work: Path, driver: str, there: bool, taken: bool) -> None:
    ptxas = work / "venv/lib/python3.10/site-packages/nvidia/cuda_nvcc/bin/ptxas"
    if there:
        ptxas.touch()
    said = enter(work, "train", FAKE_DRIVER=driver).stdout
    assert f"ptxas={ptxas if taken else 'none'} " in said
    if taken:
        assert "ptxas=/mine " in enter(work, "train", FAKE_DRIVER=driver, TRITON_PTXAS_PATH="/mine").stdout


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_each_verb_is_checked_for_what_the_table_says(work: Path, verb: str) -> None:
    """Folders that it writes to must be there; a GPU that was asked for must be usable for whoever uses one."""
    uses_gpu = VERBS[verb].gpu != "-"
    assert enter(work, verb, ACCELERATOR="gpu", FAKE_CARD="2").returncode == (2 if uses_gpu else 0)
    for folder in ("data", "models", "runs"):
        (work / folder).rmdir()
        done = enter(work, verb)
        must = getattr(VERBS[verb], folder) == "write"
        assert (done.returncode, "is not writable" in done.stderr) == ((2, True) if must else (0, False))
        (work / folder).mkdir()


# --- a plain docker run


def mountinfo(work: Path, *mounts: tuple[str, str]) -> str:
    """A file as /proc/self/mountinfo: (mount point, type) a line, and the container's own disk."""
    lines = [
        f"{n} 1 0:{n} / {point} rw - {kind} source rw" for n, (point, kind) in enumerate([("/", "overlay"), *mounts])
    ]
    (work / "mountinfo").write_text("\n".join(lines) + "\n")
    return str(work / "mountinfo")


@pytest.mark.parametrize(("verb", "folder"), [("train", "runs"), ("export", "runs"), ("model", "models")])
def test_what_would_vanish_with_the_container_is_refused(work: Path, verb: str, folder: str) -> None:
    bare = mountinfo(work)
    done = enter(work, verb, MOUNTS=bare)
    assert done.returncode == 2
    assert f"{work}/{folder} is no mount: what is written there would vanish with the container." in done.stderr
    assert f'-v "$PWD/{folder}:{work}/{folder}"; or -e KEEP=no' in done.stderr
    kept = enter(work, verb, MOUNTS=bare, KEEP="no")
    assert kept.returncode == 0
    assert "vanishes with the container (KEEP=no)" in kept.stderr


@pytest.mark.parametrize(
    ("point", "kind", "status"),
    [
        ("{work}/runs", "ext4", 0),
        ("{work}", "ext4", 0),
        ("{work}/runs", "tmpfs", 2),
        ("{work}/run", "ext4", 2),
        ("{work}/runs/deeper", "ext4", 2),
    ],
)
def test_a_mount_keeps_what_lies_in_it(work: Path, point: str, kind: str, status: int) -> None:
    assert enter(work, "train", MOUNTS=mountinfo(work, (point.format(work=work), kind))).returncode == status


def test_another_folder_for_runs_must_be_a_mount_too(work: Path) -> None:
    mounts = mountinfo(work, (f"{work}/my\\040runs", "ext4"))
    assert enter(work, "train", f"runs={work}/my runs", MOUNTS=mounts).returncode == 0
    assert enter(work, "train", "runs=/elsewhere", MOUNTS=mounts).returncode == 2


def test_verbs_that_keep_nothing_need_no_mount(work: Path) -> None:
    for verb in ("infer", "data", "doctor", "plan", "help"):
        assert enter(work, verb, MOUNTS=mountinfo(work)).returncode == 0


def test_bash_and_python_are_these_programs(work: Path) -> None:
    assert enter(work, "bash", "-c", "echo a shell").stdout == "a shell\n"
    assert enter(work, "python", "-V").stdout.startswith("<-V>")


def test_a_plain_run_is_told_of_the_ten_seconds(work: Path) -> None:
    assert "--stop-timeout 300" in enter(work, "train", COMMANDS_AS="docker").stderr
    assert enter(work, "train", COMMANDS_AS="compose").stderr == ""
    assert enter(work, "infer", COMMANDS_AS="docker").stderr == ""


def test_a_read_only_container_needs_a_tmp(work: Path) -> None:
    done = enter(work, "infer", TMPDIR=f"{work}/none")
    assert done.returncode == 2 and "--tmpfs /tmp:exec,mode=1777" in done.stderr
    assert enter(work, "infer", "--help", TMPDIR=f"{work}/none").returncode == 0


def test_a_folder_mounted_read_only_is_said_to_be(work: Path) -> None:
    (work / "bin/mktemp").write_text(
        '#!/bin/sh\ncase "$*" in *runs*) echo "mktemp: runs/x: Read-only file system" >&2; exit 1 ;; esac\nexec /usr/bin/mktemp "$@"\n'
    )
    (work / "bin/mktemp").chmod(0o755)
    done = enter(work, "train")
    assert done.returncode == 2 and "runs is mounted read-only." in done.stderr and "without :ro" in done.stderr
