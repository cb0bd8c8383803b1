"""The image by plain `docker run`, without compose and make: mounts that keep what is written, a shell, little memory."""

import subprocess

import pytest

from tests.image.conftest import LEARN, House, accelerators
from train.common.files import read_json

pytestmark = pytest.mark.image
WORDS = ["train", "data=data/talk.jsonl", "model=base", "run=plain", "steps=4", *LEARN]


def plain(house: House, *words: str, options: tuple[str, ...] = (), folders: tuple[str, ...] = ()) -> tuple[int, str]:
    """`docker run` as docker/README.md has it, on the CPU: its status, and what it printed."""
    user = ["-u", f"{house.user}:{house.user}", "-e", "ACCELERATOR=cpu", "-e", "OMP_NUM_THREADS=1"]
    mounts = [part for name in folders for part in ("-v", f"{house.root / name}:/workspace/{name}")]
    command = ["docker", "run", "--rm", "--network", "none", *user, *mounts, *options, house.image, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "house", [(user, name) for name in accelerators() for user in (1000, 4242)], indirect=True, ids=str
)
def test_with_mounts_it_trains_and_names_commands_as_docker_has_them(house: House) -> None:
    status, said = plain(house, *WORDS, folders=("data", "models", "runs"))
    assert status == 0, said
    assert "docker stop kills after 10 seconds" in said
    assert "docker run … IMAGE infer RUN=plain" in said
    assert "make " not in said
    assert read_json(house.root / "runs/plain/run.json")["runtime"]["name"] == "container"
    status, said = plain(house, "infer", "RUN=plain", "PROMPT=Hi", "max_tokens=4", folders=("models", "runs"))
    assert status == 0, said


def test_without_a_mount_nothing_is_trained(house: House) -> None:
    status, said = plain(house, *WORDS, folders=("data", "models"))
    assert (status, "/workspace/runs is no mount" in said, "step 1" in said) == (2, True, False), said
    status, said = plain(house, *WORDS, folders=("data", "models"), options=("-e", "KEEP=no"))
    assert status == 0 and "vanishes with the container" in said, said
    status, said = plain(house, *WORDS, folders=("data", "models"), options=("--tmpfs", "/workspace/runs"))
    assert (status, "would vanish" in said) == (2, True), said


def test_a_shell_and_python_start(house: House) -> None:
    assert plain(house, "bash", "-c", "id -u") == (0, f"{house.user}\n")
    assert plain(house, "python", "-c", "import train.config.recipe as r; print(r.Recipe().rank)") == (0, "64\n")


def test_infer_before_any_run_says_what_to_do(house: House) -> None:
    status, said = plain(house, "infer", "PROMPT=Hi", folders=("data", "models", "runs"))
    assert status == 2 and "docker run … IMAGE train" in said, said


def test_too_little_memory_is_a_sentence(house: House) -> None:
    """Not status 137 after a minute. The rows are made long enough for what a tiny model takes."""
    learn = [word for word in LEARN if not word.startswith("length=")]
    words = [*WORDS[: -len(LEARN)], *learn, "length=8192", "batch=16", "checkpointing=off"]
    status, said = plain(
        house, *words, folders=("data", "models", "runs"), options=("-m", "1500m", "--memory-swap", "1500m")
    )
    assert status == 2 and "GB of memory on this CPU" in said, said


@pytest.mark.parametrize("memory", ["1g", "2500m"])
def test_it_fits_or_says_so_but_is_never_killed(house: House, memory: str) -> None:
    """Each command in a container of this size: status 137 would be the kernel's."""
    limit = ("-m", memory, "--memory-swap", memory)
    asked = (
        ["doctor", "MODEL=base"],
        WORDS,
        ["export", "run=plain"],
        ["infer", "run=plain", "PROMPT=Hi", "max_tokens=4"],
    )
    for words in asked:
        status, said = plain(house, *words, folders=("data", "models", "runs"), options=limit)
        assert status in (0, 2), (words[0], status, said)
        assert status == 0 or "memory" in said or not (house.root / "runs/plain/run.json").exists(), (words[0], said)
