"""A model in an archive: unpacked whole to models/NAME, or not at all, and nothing outside it."""

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.oracles import tiny_checkpoint, tiny_config
from train.commands import model as command
from train.common.errors import UserError
from train.common.files import read_json, sha256
from train.model import archives
from train.model.folder import write_manifest

KINDS = {".zip": "", ".tar": "w", ".tar.gz": "w:gz", ".tgz": "w:gz", ".tar.bz2": "w:bz2", ".tar.xz": "w:xz"}


@pytest.fixture
def published(tmp_path: Path) -> dict[str, bytes]:
    folder = tiny_checkpoint(tmp_path / "made", tiny_config("qwen"), int4=True)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def pack(path: Path, files: dict[str, bytes], mode: str = "") -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
            for name, content in files.items():
                out.writestr(name, content)
        return path
    with tarfile.open(path, mode or "w") as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def run(tmp_path: Path, model: Path, **options: Any) -> Path:
    command.run(command.Options(model=str(model), models=str(tmp_path / "models"), **options))
    return tmp_path / "models"


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize("inside", ["", "Some-Int4/", "a/b/c/"])
def test_every_kind_is_unpacked_and_recorded(
    tmp_path: Path, published: dict[str, bytes], suffix: str, inside: str, capsys: pytest.CaptureFixture[str]
) -> None:
    others = {f"{inside}onnx/model.onnx": b"x", f"{inside}run.sh": b"x", "notes/readme.md": b"x"}
    files = {f"{inside}{name}": content for name, content in published.items()} | others
    path = pack(tmp_path / f"Mine-Int4{suffix}", files, KINDS[suffix])
    folder = run(tmp_path, path) / "Mine-Int4"
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"} == published
    assert read_json(folder / "manifest.json")["source"] == {"archive": path.name, "sha256": sha256(path)}
    run(tmp_path, path, verify=True)
    assert "Nothing to do." in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["Mine-Int4"]


def test_an_archive_with_a_manifest_has_to_be_what_it_says(tmp_path: Path, published: dict[str, bytes]) -> None:
    write_manifest(tmp_path / "made", {"name": "Some/Tiny", "source": {"hub": "Some/Tiny"}})
    manifest = {"manifest.json": (tmp_path / "made" / "manifest.json").read_bytes()}
    run(tmp_path, pack(tmp_path / "good.zip", published | manifest))
    assert read_json(tmp_path / "models/good/manifest.json")["source"] == {"hub": "Some/Tiny"}
    changed = published | {"model.safetensors": published["model.safetensors"][:-1] + b"\x77"}
    with pytest.raises(
        UserError, match=r"bad\.zip: not what its own manifest\.json says: model\.safetensors has another"
    ):
        run(tmp_path, pack(tmp_path / "bad.zip", changed | manifest))
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["good"]


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
@pytest.mark.parametrize(
    "name", ["../evil.json", "/tmp/evil-out.json", "a/../../evil.json", "..\\evil.json", "C:evil.json"]
)
def test_a_path_that_leads_out_refuses_the_archive(
    tmp_path: Path, published: dict[str, bytes], name: str, suffix: str
) -> None:
    before = set(tmp_path.parent.glob("*"))
    with pytest.raises(UserError, match=r"leads out of the folder .* Nothing was unpacked"):
        run(tmp_path, pack(tmp_path / f"m{suffix}", {**published, name: b"{}"}))
    assert not list(tmp_path.rglob("evil*")) and not Path("/tmp/evil-out.json").exists()
    assert set(tmp_path.parent.glob("*")) == before and not (tmp_path / "models").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_refuse_the_archive(tmp_path: Path, published: dict[str, bytes], kind: bytes) -> None:
    path = pack(tmp_path / "m.tar", published)
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("LICENSE")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(UserError, match="'LICENSE' is a link or a device"):
        run(tmp_path, path)
    assert not (tmp_path / "models").exists()


def test_a_link_in_a_zip_refuses_it(tmp_path: Path, published: dict[str, bytes]) -> None:
    path = pack(tmp_path / "m.zip", published)
    with zipfile.ZipFile(path, "a") as out:
        info = zipfile.ZipInfo("LICENSE")
        info.create_system, info.external_attr = 3, 0o120777 << 16
        out.writestr(info, "/etc/passwd")
    with pytest.raises(UserError, match="'LICENSE' is a link or a device"):
        run(tmp_path, path)


def test_other_archives_are_refused_and_leave_nothing(tmp_path: Path, published: dict[str, bytes]) -> None:
    two = {f"{home}/{name}": content for home in "ab" for name, content in published.items()}
    other = published | {"config.json": b'{"model_type": "gpt2"}'}
    lacking = {name: content for name, content in published.items() if name != "model.safetensors"}
    cut = pack(tmp_path / "cut.tar.gz", published, "w:gz")
    cut.write_bytes(cut.read_bytes()[:-20_000])
    bomb = published | {"model.safetensors": bytes(100_000_000)}
    cases = {
        "expected one folder with a config.json in it, found several: a, b": pack(tmp_path / "two.zip", two),
        "found none": pack(tmp_path / "none.zip", {"a.txt": b"x"}),
        r"other\.zip/config\.json: model_type is 'gpt2'": pack(tmp_path / "other.zip", other),
        "no weights": pack(tmp_path / "lacking.tar", lacking),
        r"damaged or cut off .*Copy or download it again": cut,
        "which no model of its size does": pack(tmp_path / "bomb.zip", bomb),
    }
    limit = archives.ALWAYS
    try:
        archives.ALWAYS = 50_000_000
        for message, path in cases.items():
            with pytest.raises(UserError, match=message):
                run(tmp_path, path)
            assert not list((tmp_path / "models").glob("*")), path
    finally:
        archives.ALWAYS = limit


def test_a_damaged_member_is_noticed_by_its_checksum(tmp_path: Path, published: dict[str, bytes]) -> None:
    path = tmp_path / "m.zip"
    with zipfile.ZipFile(path, "w") as out:  # stored: a changed byte stays readable
        for name, content in published.items():
            out.writestr(name, content)
    whole = path.read_bytes()
    at = whole.index(published["model.safetensors"][-64:])
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(UserError, match=r"damaged or cut off .*CRC"):
        run(tmp_path, path)
    assert not list((tmp_path / "models").glob("*"))


def test_two_files_of_one_name_refuse_it(tmp_path: Path, published: dict[str, bytes]) -> None:
    path = pack(tmp_path / "m.tar", published)
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("./config.json")
        info.size = 2
        tar.addfile(info, io.BytesIO(json.dumps({}).encode()))
    with pytest.raises(UserError, match="two files of one name"):
        run(tmp_path, path)
