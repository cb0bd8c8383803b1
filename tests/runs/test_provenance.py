"""What a run was made of: hashes of contents, not names or dates; commit, lock, versions, image."""

import subprocess
from pathlib import Path

import pytest

from train.runs import provenance


def folder(path: Path) -> Path:
    (path / "sub").mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "sub" / "weights.bin").write_bytes(b"\x00\x01")
    return path


def test_every_file_is_hashed_by_content(tmp_path: Path) -> None:
    one, two = provenance.hash_folder(folder(tmp_path / "a")), provenance.hash_folder(folder(tmp_path / "b"))
    assert one == two
    assert sorted(one) == ["config.json", "sub/weights.bin"]
    (tmp_path / "b" / "config.json").write_text("{ }")
    assert provenance.hash_folder(tmp_path / "b") != one


def test_the_manifest_of_a_base_and_hidden_files_do_not_count(tmp_path: Path) -> None:
    before = provenance.hash_folder(folder(tmp_path / "a"))
    (tmp_path / "a" / "manifest.json").write_text('{"source": "a mirror"}')
    (tmp_path / "a" / ".cache").mkdir()
    (tmp_path / "a" / ".cache" / "x").write_text("x")
    assert provenance.hash_folder(tmp_path / "a") == before


def test_the_program_is_identified_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(tmp_path), *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.code()["commit"] is None
    git("init", "-q")
    (tmp_path / "a.py").write_text("a = 1\n")
    git("add", "a.py")
    git("-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "-m", "one")
    assert provenance.code() | {"version": ""} == {"version": "", "commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "a.py").write_text("a = 2\n")
    assert provenance.code()["dirty"] is True


def test_env_lock_is_hashed_if_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.lock() is None
    (tmp_path / "env.lock").write_bytes(b"")
    assert provenance.lock() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_versions_and_machine_are_recorded() -> None:
    assert provenance.versions()["transformers"] == "4.34.1"
    assert provenance.machine()["cores"] >= 1


def test_a_container_is_recorded_with_its_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IMAGE_FILE", "RUNTIME_NAME", "IMAGE_DIGEST"):
        monkeypatch.delenv(name, raising=False)
    assert provenance.runtime() == {"name": "local", "image": None, "digest": None}
    (tmp_path / "image.json").write_text('{"commit": "abc"}')
    monkeypatch.setenv("IMAGE_FILE", str(tmp_path / "image.json"))
    monkeypatch.setenv("IMAGE_DIGEST", "sha256:1")
    assert provenance.runtime() == {"name": "container", "image": {"commit": "abc"}, "digest": "sha256:1"}
