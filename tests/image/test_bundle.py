"""make bundle and make unbundle with a real engine: what was saved here and removed is there again, and works without a
network."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.test_bundle import TAGS, about, blob, manifest_with, pack, promise, read, resum
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


def names() -> set[str]:
    return set(docker("image", "ls", "--no-trunc", "--format", "{{.Repository}}:{{.Tag}} {{.ID}}").split("\n"))


FOREIGN = {
    "a name of its own": lambda f: promise(f, image="debian:bookworm"),
    "an index beside it": lambda f: f.update({"index.json": json.dumps(TAGS).encode()}),
    "an archive of docker save": lambda f: f.update({"image.tar": f["saved"]}),
    "a list of images": lambda f: manifest_with(f, lambda m: m.update(TAGS)),
    "another fingerprint": lambda f: promise(f, fingerprint="1111 2222"),
    "a layer that is not the config's": lambda f: swap_layer(f),
}


def swap_layer(files: dict[str, bytes]) -> None:
    """Another layer, promised, in the manifest and named by its hash; only the config knows another."""
    old = about(files)["layers"]
    new = blob(files, files.pop(f"image/{old}")[:-512])
    manifest_with(files, lambda m: m["layers"][0].update(digest=f"sha256:{new}", size=len(files[f"image/{new}"])))
    promise(files, layers=new)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_hostile_bundle_changes_no_name_of_the_engine(name: str, small: str, tmp_path: Path) -> None:
    here, there = clone(tmp_path / "here"), clone(tmp_path / "there")
    make(here, "bundle", "MODEL=none", f"OUT={tmp_path}/b.tar", IMAGE=small)
    files = read(tmp_path / "b.tar") | {"saved": subprocess.run(["docker", "save", small], capture_output=True).stdout}
    docker("image", "rm", small)
    before = names()
    FOREIGN[name](files)
    files.pop("saved")
    resum(files)
    pack(tmp_path / "b.tar", files)
    done = subprocess.run(
        ["make", "unbundle", f"BUNDLE={tmp_path}/b.tar"],
        cwd=there,
        env={key: value for key, value in os.environ.items() if key != "IMAGE"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "othing was loaded" in done.stderr, done.stdout + done.stderr
    assert names() == before and not (there / ".env").exists()


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
