"""docker/trees.py: the same tree from the same content, whatever the umask, the clock and the place of the checkout."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from docker import trees
from train.common.files import sha256

ROOT = Path(trees.__file__).parent.parent


@pytest.fixture(autouse=True)
def as_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only root gives files away; in the build it is root."""
    monkeypatch.setattr(os, "chown", lambda *words, **options: None)
    for name in ("VERSION", "COMMIT", "CUDA", "TORCH", "BASE"):
        monkeypatch.delenv(name, raising=False)


def manifest(tree: Path) -> dict[str, tuple[str, int, str]]:
    """Path -> mode, time, content or target of everything below `tree`."""
    found = {}
    for name in trees.below(tree):
        path, status = tree / name, (tree / name).lstat()
        inside = str(path.readlink()) if path.is_symlink() else sha256(path) if path.is_file() else ""
        found[name.as_posix()] = (stat.filemode(status.st_mode), int(status.st_mtime), inside)
    return found


def source(folder: Path, umask: int, time: int) -> Path:
    """A checkout of what the program's stage gets, made under `umask` at `time`."""
    names = [
        "train/common/errors.py",
        "train/__init__.py",
        "env.lock",
        "pyproject.toml",
        "docker/entrypoint.sh",
        "data/models.lock",
    ]
    before = os.umask(umask)
    try:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
            (folder / name).chmod((0o777 if name.endswith(".sh") else 0o666) & ~umask)
            os.utime(folder / name, (time, time))
    finally:
        os.umask(before)
    return folder


def test_the_program_is_the_same_from_any_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA", "11.8")
    monkeypatch.setenv("COMMIT", "abc")
    trees.program(source(tmp_path / "a", 0o022, 1_000_000_000), tmp_path / "one")
    trees.program(source(tmp_path / "b b/c", 0o077, 2_000_000_000), tmp_path / "two")
    one, two = manifest(tmp_path / "one"), manifest(tmp_path / "two")
    assert one == two
    assert one["usr/local/bin/entrypoint.sh"][0] == "-rwxr-xr-x"
    assert one["app/train/common/errors.py"][0] == "-rw-r--r--"
    assert {one[f"workspace/{name}"][0] for name in ("data", "models", "runs")} == {"drwxrwxrwx"}
    assert {time for _, time, _ in one.values()} == {trees.epoch()}
    assert f"app/train/common/__pycache__/errors.cpython-3{sys.version_info[1]}.pyc" in one
    assert "app/docker" not in one


def test_one_byte_shows(tmp_path: Path) -> None:
    first, other = source(tmp_path / "a", 0o022, 0), source(tmp_path / "b", 0o022, 0)
    (other / "train/common/errors.py").write_text((other / "train/common/errors.py").read_text() + "\nX = 1\n")
    trees.program(first, tmp_path / "one")
    trees.program(other, tmp_path / "two")
    one, two = manifest(tmp_path / "one"), manifest(tmp_path / "two")
    changed = {Path(name).name.split(".")[0] for name in one if one[name] != two[name]}
    assert changed == {"errors"}


def test_the_image_tells_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA", "12.8")
    monkeypatch.setenv("BASE", "ubuntu")
    trees.program(source(tmp_path / "a", 0o022, 0), tmp_path / "one")
    told = json.loads((tmp_path / "one/app/image.json").read_text())
    lock = sha256(ROOT / "env.lock")
    assert told["torch"] == "cu128"  # as docker/setup takes it, where none is named
    assert (told["cuda"], told["base"], told["lock_sha256"], told["source_date_epoch"]) == (
        "12.8",
        "ubuntu",
        lock,
        trees.epoch(),
    )
    assert told["version"]


def test_a_pyc_is_used_though_its_source_has_another_time(tmp_path: Path) -> None:
    """And it names the place where it will lie, not where it was made."""
    (tmp_path / "tree/app").mkdir(parents=True)
    module = tmp_path / "tree/app/told.py"
    module.write_text("def f(): raise ValueError\n")
    trees.compile_python([tmp_path / "tree/app"], sys.executable, tmp_path / "tree")
    (cached,) = (tmp_path / "tree/app/__pycache__").iterdir()
    assert b"/app/told.py" in cached.read_bytes()
    assert str(tmp_path).encode() not in cached.read_bytes()
    module.write_text("raise SystemExit('compiled anew')\n")  # unchecked: what counts is that the image is read-only
    subprocess.run([sys.executable, "-B", "-c", "import told"], cwd=module.parent, check=True)


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """A folder with what `packages` looks at."""
    site = tmp_path / "venv/lib/python3.10/site-packages"
    files = {
        "torch/version.py": "cuda: Optional[str] = '11.8'\n",
        "torch/a.py": "A = 1\n",
        "nvidia/x.so": "",
        "numpy/core/tests/test_a.py": "",
        "numpy/testing/b.py": "",
        "einops/tests/c.py": "",
        "pyarrow/libarrow_flight.so.1": "",
        "pyarrow/include/a.h": "",
        "pyarrow/libarrow.so.1": "",
        "transformers/models/auto/a.py": "A = 1\n",
        "transformers/models/bert/__init__.py": "A = 1\n",
        "transformers/models/bert/modeling_bert.py": "A = 1\n",
        **{f"bitsandbytes/libbitsandbytes_{name}.so": "" for name in ("cpu", "cuda118", "cuda126", "cuda128")},
        "torch-2.7.1.dist-info/direct_url.json": '{"url": "https://user:secret@mirror.example/torch.whl"}',
        "torch-2.7.1.dist-info/RECORD": 'torch/a.py,sha256=x,6\n"torch/gone,b.py",,\ntorch-2.7.1.dist-info/direct_url.json,,\n',
    }
    for name, text in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    (tmp_path / "venv/bin").mkdir()
    (tmp_path / "venv/bin/python").symlink_to(sys.executable)
    (tmp_path / "venv/.torch").touch()
    (tmp_path / "venv/requirements.txt").touch()
    return tmp_path / "venv"


def test_packages_are_parted_thinned_and_tell_no_mirror(venv: Path, tmp_path: Path) -> None:
    trees.packages(venv, tmp_path / "first", tmp_path / "second")
    inside = Path(*venv.parts[1:]) / "lib/python3.10/site-packages"
    first, second = tmp_path / "first" / inside, tmp_path / "second" / inside
    assert sorted(p.name for p in first.iterdir()) == ["nvidia", "torch", "torch-2.7.1.dist-info"]
    assert sorted(p.name for p in (second / "bitsandbytes").iterdir()) == [
        "libbitsandbytes_cpu.so",
        "libbitsandbytes_cuda118.so",
    ]
    assert not (second / "numpy/core/tests").exists()
    assert (second / "numpy/testing/b.py").exists()
    assert (second / "einops/tests/c.py").exists()
    assert [p.name for p in (second / "pyarrow").iterdir()] == ["libarrow.so.1"]
    compiled = sorted(p.name.split(".")[0] for p in (second / "transformers").rglob("*.pyc"))
    assert compiled == ["__init__", "a"]  # not the one that is rare
    assert (first / "torch-2.7.1.dist-info/RECORD").read_text() == "torch/a.py,sha256=x,6\n"
    assert not (first / "torch-2.7.1.dist-info/direct_url.json").exists()
    assert sorted(p.name for p in second.parents[2].iterdir()) == ["bin", "lib"]
    assert not venv.exists()


def test_a_bitsandbytes_without_torchs_cuda_is_refused(venv: Path, tmp_path: Path) -> None:
    (venv / "lib/python3.10/site-packages/bitsandbytes/libbitsandbytes_cuda118.so").unlink()
    with pytest.raises(AssertionError, match="cuda118"):
        trees.packages(venv, tmp_path / "first", tmp_path / "second")


def test_the_systems_tree_is_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, root = tmp_path / "base", tmp_path / "root"
    for name in ("usr/bin/old", "usr/bin/tool", "etc/conf", "var/log/dpkg.log", "etc/hosts"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("as it was")
    shutil.copytree(base, root, symlinks=True)
    (root / "usr/bin/tool").chmod(0o4755)
    (root / "etc/conf").write_text("changed")
    (root / "usr/bin/gcc").symlink_to("gcc-12")
    (root / "var/log/dpkg.log").write_text("a clock")
    (root / "etc/hosts").write_text("the builder's")
    (root / "etc/conf-old").write_text("backup")
    (root / "srv/new").mkdir(parents=True)
    listing = subprocess.CompletedProcess([], 0, "b=2\na=1\n")
    monkeypatch.setattr(trees.subprocess, "run", lambda *words, **options: listing)
    trees.system(base, tmp_path / "out", root)
    found = manifest(tmp_path / "out")
    files = {name: mode for name, (mode, _, _) in found.items() if not mode.startswith("d")}
    assert files == {
        "etc/conf": files["etc/conf"],
        "usr/bin/tool": "-rwsr-xr-x",
        "usr/bin/gcc": "lrwxrwxrwx",
        "opt/apt.list": files["opt/apt.list"],
    }
    assert "srv/new" in found
    assert (tmp_path / "out/opt/apt.list").read_text() == "a=1\nb=2\n"
    assert {time for _, time, _ in found.values()} == {trees.epoch()}
