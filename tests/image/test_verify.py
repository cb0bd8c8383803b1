"""make verify-image with a real engine: the image passes; thirty changes of its files and settings are each named. What
takes the place of a layer: tests/docker/test_verify.py."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from docker import verify

pytestmark = pytest.mark.image
SITE = "/opt/venv/lib/python3*/site-packages"
FILES = {  # what is done to the image -> what is said
    "a source": ("RUN echo >>/app/train/training/loop.py", "/app/train/training/loop.py: a file"),
    "byte code": ("RUN echo >>/app/train/training/__pycache__/loop.cpython-3*.pyc", "/app/train/training/__pycache__/loop.cpython-3"),
    "a source more": ("RUN touch /app/train/evil.py", "/app/train/evil.py"),
    "a source less": ("RUN rm /app/train/training/guard.py", "/app/train/training/.wh.guard.py: takes a file away"),
    "a mode": ("RUN chmod 666 /app/train/training/loop.py", "/app/train/training/loop.py: a file"),
    "an owner": ("RUN chown 1000 /app/env.lock", "/app/env.lock: a file"),
    "the lock": ("RUN echo >>/app/env.lock", "/app/env.lock: a file"),
    "image.json": ("RUN sed -i s/0.1/9.9/ /app/image.json", "/app/image.json: a file"),
    "the entrypoint's script": ("RUN echo >>/usr/local/bin/entrypoint.sh", "/usr/local/bin/entrypoint.sh: a file"),
    "another python": ("RUN ln -s /bin/true /usr/local/bin/python", "/usr/local/bin/python: a link"),
    "a library": (f"RUN for f in {SITE}/peft/__init__.py; do echo >>$f; done", "/peft/__init__.py: a file"),
    "a library's byte code": (f"RUN for f in {SITE}/peft/__pycache__/__init__*.pyc; do echo >>$f; done", "/peft/__pycache__/__init__"),
    "a library's list": (f"RUN for f in {SITE}/peft-*/RECORD; do echo >>$f; done", "/RECORD: a file"),
    "a native library": (f"RUN for f in {SITE}/numpy/core/_multiarray_umath*.so; do echo >>$f; done", "_multiarray_umath"),
    "a path file": (f"RUN for s in {SITE}; do echo import os >$s/evil.pth; done", "/evil.pth: a file"),
    "sitecustomize": ("RUN for s in /usr/lib/python3.*/; do touch $s/sitecustomize.py; done", "/sitecustomize.py: a "),
    "a package less": (f"RUN rm -r {SITE}/einops", "/.wh.einops: takes a file away"),
    "tini": ("RUN cp /bin/true /usr/bin/tini", "/usr/bin/tini: a file"),
    "Python's library": ("RUN for f in /usr/lib/python3.*/os.py; do echo >>$f; done", "/os.py: a file"),
    "Python's byte code": ("RUN for f in /usr/lib/python3.*/__pycache__/os.*.pyc; do echo >>$f; done", "/__pycache__/os.cpython-3"),
    "a preloaded library": ("RUN touch /etc/ld.so.preload", "/etc/ld.so.preload: a file"),
    "dpkg's list": ("RUN echo >>/var/lib/dpkg/status", "/var/lib/dpkg/status: a file"),
    "a set-user-id bit": ("RUN chmod u+s /bin/bash", "bin/bash: a file that this checkout does not put there, mode 4755"),
    "a path of the world": ("RUN chmod 777 /app", "/app: a directory"),
}  # fmt: skip
SETTINGS = {
    "the entrypoint": ('ENTRYPOINT ["/bin/sh"]', "setting Entrypoint.0: /bin/sh in the image"),
    "the command": ('CMD ["demo"]', "setting Cmd.0: demo in the image"),
    "a variable": ("ENV LD_PRELOAD=/evil.so", "setting Env.LD_PRELOAD"),
    "a search path": ("ENV PYTHONPATH=/evil", "setting Env.PYTHONPATH: PYTHONPATH=/evil in the image"),
    "a label": ("LABEL qwen-finetune.cuda=12.8", "setting Labels.qwen-finetune.cuda: 12.8 in the image"),
    "the commit": ("LABEL org.opencontainers.image.revision=dddd", "it is of commit dddd"),
    "the user": ("USER 0", "setting User: 0 in the image"),
    "a health check": ("HEALTHCHECK CMD evil", "setting Healthcheck.Test"),
    "a trigger": ("ONBUILD RUN evil", "setting OnBuild.0"),
    "a volume": ("VOLUME /app", "setting Volumes./app"),
}  # fmt: skip


def test_the_image_is_what_the_checkout_builds(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([image]) == 0
    assert "every setting are what this checkout builds, to the bit" in capsys.readouterr().out


def tampered(image: str, folder: Path, *lines: str) -> str:
    """An image to which this was done, a layer or a setting a line."""
    name = "qwen-finetune-tampered:test"
    end = [] if "USER 0" in lines else ["USER 1000:1000"]
    (folder / "Dockerfile").write_text("\n".join([f"FROM {image}", "USER 0", *lines, *end]) + "\n")
    done = subprocess.run(["docker", "build", "-q", "-t", name, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return name


@pytest.fixture(scope="module", autouse=True)
def tidy() -> Iterator[None]:
    yield
    subprocess.run(["docker", "image", "rm", "-f", "qwen-finetune-tampered:test"], capture_output=True)


@pytest.mark.slow
def test_every_file_is_named_in_its_layer(image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All in one image, since its archive is gigabytes; a layer hides no other."""
    name = tampered(image, tmp_path, *(line for line, _ in FILES.values()))
    assert verify.main([name, str(tmp_path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    first = next(int(line.split(":")[2].split()[1]) for line in lines if "is not one that this checkout builds" in line)
    for number, (what, (_, said)) in enumerate(FILES.items(), first):
        assert any(f"layer {number}: " in line and said in line for line in lines), (what, lines)


@pytest.mark.parametrize("what", SETTINGS)
def test_every_setting_is_named(what: str, image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line, said = SETTINGS[what]
    assert verify.main([tampered(image, tmp_path, line), str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert said in told and "layer" not in told, told


def test_there_are_thirty_and_more() -> None:
    assert len(FILES) + len(SETTINGS) >= 30
