"""The image that is tested, and a house for one user of it: folders of data, models and runs that are a stranger's as
much as ours.

IMAGE= names the image (default: the one that `make image` built). TEST_ON_GPU=1 (make image-test GPU=1): what can run on a GPU runs there too. A
missing engine or image fails, it does not skip: who asks for these tests means them.
"""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.oracles import tiny_checkpoint, tiny_config

ROOT = Path(__file__).resolve().parents[2]
ROWS = (("What is your name?", "Cai."), ("你叫什么？", "阿才。"), ("One word for cold?", "Ice."), ("2 + 2?", "4."))
LEARN = "recipe=demo length=96 warmup=2 learning_rate=0.02 rank=4".split()  # noqa: SIM905
BAD = re.compile(r"warn|traceback|deprecat|\[W\d{4} ", re.IGNORECASE)


@pytest.fixture(scope="session")
def image() -> str:
    """name:tag of an image that is there."""
    ask = ["bash", "-c", ". docker/common.sh; image_name"]
    name = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    found = subprocess.run(["docker", "image", "inspect", name], capture_output=True, text=True)
    assert found.returncode == 0, f"no image {name}: make image, or IMAGE=. {found.stderr}"
    return name


def accelerators() -> list[str]:
    return ["cpu", "gpu"] if os.environ.get("TEST_ON_GPU") else ["cpu"]


@dataclass
class House:
    """Folders that belong to `user`, and commands run as that user; `said` is checked line by line."""

    root: Path
    image: str
    user: int
    accelerator: str = "cpu"
    said: list[str] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        folders = {f"{name.upper()}_DIR": str(self.root / name) for name in ("data", "models", "runs")}
        identity = {"USER_ID": str(self.user), "GROUP_ID": str(self.user), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
        return {**os.environ, **folders, **identity, "IMAGE": self.image, "ACCELERATOR": self.accelerator}

    def compose(self, *words: str, status: int = 0, stdin: str = "") -> str:
        """`docker compose run --rm WORDS`; see check. Fails on another exit status and on a line that no user should
        see."""
        command = ["docker", "compose", "run", "--rm", "-T", *words]
        return self.check(subprocess.run(command, **self.how(stdin)), status)  # type: ignore[call-overload]

    def how(self, stdin: str = "") -> dict[str, object]:
        return {
            "cwd": ROOT,
            "env": self.environment,
            "input": stdin,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            "timeout": 400,
        }

    def check(self, done: "subprocess.CompletedProcess[str]", status: int = 0) -> str:
        """What it said: the standard error, then the standard output; the two reach us by ways of their own, in no
        order."""
        said = done.stderr + done.stdout
        assert done.returncode == status, said
        assert [line for line in said.splitlines() if BAD.search(line)] == [], said
        return said

    def own(self, user: int) -> None:
        """Give the folders to `user`: a container's root may, whoever runs the tests."""
        command = ["docker", "run", "--rm", "--network", "none", "--user", "0", "-v", f"{self.root}:/house"]
        subprocess.run([*command, "--entrypoint", "chown", self.image, "-R", f"{user}:{user}", "/house"], check=True)


def furnish(root: Path) -> None:
    for name in ("data", "models", "runs"):
        (root / name).mkdir(parents=True)
    tiny_checkpoint(root / "models" / "base", tiny_config("qwen2", tie_word_embeddings=True))
    rows = [json.dumps({"instruction": q, "input": "", "output": a}, ensure_ascii=False) for q, a in ROWS]
    (root / "data" / "talk.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


@pytest.fixture
def house(tmp_path: Path, image: str, request: pytest.FixtureRequest) -> Iterator[House]:
    """A house of user 4242 on the CPU; parametrize indirectly with (user, accelerator) for another."""
    user, accelerator = getattr(request, "param", (4242, "cpu"))
    furnish(tmp_path / "house")
    made = House(tmp_path / "house", image, user, accelerator)
    made.own(user)
    yield made
    made.own(os.getuid())  # so that pytest can remove it


@pytest.fixture
def empty(tmp_path: Path, image: str) -> House:
    """A house of user 4242 with nothing in it, for what starts no container."""
    for name in ("data", "models", "runs"):
        (tmp_path / name).mkdir()
    return House(tmp_path, image, 4242)
