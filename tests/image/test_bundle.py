"""make bundle and make unbundle with a real engine: what was saved here and removed is there again, and works without a
network."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.image.conftest import LEARN, ROOT, furnish
from train.common.files import read_json

pytestmark = pytest.mark.image
SMALL = "qwen-finetune:bundle-test"


def docker(*words: str, stdin: bytes = b"") -> str:
    return subprocess.run(["docker", *words], input=stdin, check=True, capture_output=True).stdout.decode().strip()


def make(place: Path, *words: str, **variables: str) -> str:
    done = subprocess.run(["make", *words], cwd=place, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def clone(place: Path) -> Path:
    subprocess.run(["git", "clone", "-q", str(ROOT), str(place)], check=True)
    return place


@pytest.fixture
def small(tmp_path: Path) -> Iterator[str]:
    """An image of one file."""
    (tmp_path / "file").write_text("a layer")
    archive = subprocess.run(["tar", "-C", str(tmp_path), "-c", "file"], check=True, capture_output=True).stdout
    docker("import", "-", SMALL, stdin=archive)
    yield SMALL
    subprocess.run(["docker", "image", "rm", SMALL], capture_output=True)


def test_an_image_comes_back_from_its_archive(small: str, tmp_path: Path) -> None:
    before = docker("image", "inspect", "--format", "{{.Id}}", small)
    here, there = clone(tmp_path / "here"), clone(tmp_path / "there")
    make(here, "bundle", "MODEL=none", f"OUT={tmp_path}/b.tar", IMAGE=small)
    docker("image", "rm", small)
    assert "Ready" in make(there, "unbundle", f"BUNDLE={tmp_path}/b.tar")
    assert docker("image", "inspect", "--format", "{{.Id}}", small) == before
    assert f"IMAGE={small}" in (there / ".env").read_text().splitlines()


@pytest.mark.slow
def test_from_the_archive_to_a_trained_model(image: str, tmp_path: Path) -> None:
    """The real image, removed and loaded again: gigabytes, minutes. Then the source in the archive, and no other,
    trains with it."""
    here, there = tmp_path / "here", tmp_path / "there"
    furnish(here / "stock")
    clone(here / "clone")
    make(
        here / "clone",
        "bundle",
        f"MODEL={here}/stock/models/base",
        f"OUT={tmp_path}/b.tar",
        IMAGE=image,
        ACCELERATOR="cpu",
    )
    docker("tag", image, "qwen-finetune:kept")
    docker("image", "rm", image)
    try:
        there.mkdir()
        subprocess.run(f"tar -xOf {tmp_path}/b.tar source.tar | tar -x -C {there}", shell=True, check=True)
        assert "Ready" in make(there, "unbundle", f"BUNDLE={tmp_path}/b.tar")
        (here / "stock/data/talk.jsonl").rename(there / "data/talk.jsonl")
        words = ["DATA=data/talk.jsonl", "MODEL=base", "RUN=walk", "ARGS=" + " ".join(["steps=4", *LEARN])]
        settings = {name: value for name, value in os.environ.items() if name != "IMAGE"}
        done = subprocess.run(
            ["make", "train", *words], cwd=there, env={**settings, "ACCELERATOR": "cpu"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"in the container {image}" in done.stderr.splitlines()[0]
        assert read_json(there / "runs/walk/run.json")["steps"] == 4
    finally:
        subprocess.run(["docker", "tag", "qwen-finetune:kept", image], check=True)
        docker("image", "rm", "qwen-finetune:kept")
