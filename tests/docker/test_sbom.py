"""docker/sbom.py, inventory.py and differences.py: a small image as a folder, its two documents, and every way of not being it
that is seen from inside. From outside: test_verify.py."""

import base64
import copy
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from referencing import Registry, Resource

from docker import inventory, sbom
from docker.sbom import Package, base_reference, folder_of, pinned, provenance, sources
from docker.sbom import sbom as bill_of

ROOT = Path(__file__).resolve().parents[2]
LOCK = """# === section: bootstrap ===
uv==0.13.9 \\
    --hash=sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa

# === section: build ===
wheel==0.48.0 \\
    --hash=sha256:abababababababababababababababababababababababababababababababab

# === section: common ===
numpy==1.26.4 \\
    --hash=sha256:adadadadadadadadadadadadadadadadadadadadadadadadadadadadadadadad \\
    --hash=sha256:acacacacacacacacacacacacacacacacacacacacacacacacacacacacacacacac
old==1.0 ; python_version == "3.10" \\
    --hash=sha256:aeaeaeaeaeaeaeaeaeaeaeaeaeaeaeaeaeaeaeaeaeaeaeaeaeaeaeaeaeaeaeae
old==2.0 ; python_version == "3.11" \\
    --hash=sha256:afafafafafafafafafafafafafafafafafafafafafafafafafafafafafafafaf

# === section: torch-cu118 ===
torch @ https://download.pytorch.org/whl/cu118/torch-2.7.1%2Bcu118-cp310-cp310-manylinux_2_28_x86_64.whl ; python_version == "3.10" \\
    --hash=sha256:b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0

# === section: source ===
deepspeed==0.16.9 \\
    --hash=sha256:b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1

# === section: test ===
pytest==9.2.0 \\
    --hash=sha256:b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2
"""
DOCKERFILE = "FROM ubuntu:22.04@sha256:11 AS ubuntu\nFROM ubuntu AS cuda12.8\nFROM ${BASE_IMAGE:-cuda${CUDA}} AS base\n"
INSPECTED = {
    "Id": "sha256:" + "1" * 64,
    "RootFS": {"Layers": ["sha256:" + "2" * 64, "sha256:" + "3" * 64]},
    "Config": {"User": "1000:1000", "Env": ["PATH=/opt/venv/bin"], "Cmd": None},
}


# --- a checkout, and an image of it as a folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    put(root / "docker/Dockerfile", DOCKERFILE)
    put(root / "docker/Dockerfile.dockerignore", "*\n!env.lock\n!train\n!docker/entrypoint.sh\n**/__pycache__\n")
    put(root / "docker/entrypoint.sh", "#!/bin/sh\n")
    put(root / "env.lock", LOCK)
    put(root / "train/loop.py", "pass\n")
    put(root / "train/__pycache__/loop.pyc", "made")
    put(root / "README.md", "not in the image\n")
    return root


@pytest.fixture
def image(tmp_path: Path, checkout: Path) -> Path:
    root = tmp_path / "image"
    site = root / "opt/venv/lib/python3.10/site-packages"
    versions = {"wheel": "0.48.0", "numpy": "1.26.4", "old": "1.0", "torch": "2.7.1+cu118", "DeepSpeed": "0.16.9"}
    for name, version in versions.items():
        install(site, name, version)
    for inside, outside in sources(checkout).items():
        put(root / inside.lstrip("/"), outside.read_text())
    about = {"version": "0.1.0", "commit": "c" * 40, "cuda": "11.8", "torch": "cu118", "base": "cuda12.8"}
    about |= {"source_date_epoch": 1, "lock_sha256": hashlib.sha256(LOCK.encode()).hexdigest()}  # type: ignore[dict-item]
    put(root / "app/image.json", json.dumps(about))
    put(root / "etc/os-release", 'NAME="Ubuntu"\nID=ubuntu\nVERSION_ID="22.04"\n')
    put(root / "opt/apt.list", "gcc=4:11.2.0-1\ntini=0.19.0-1\n")
    return root


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o644)


def install(site: Path, name: str, version: str) -> None:
    """A package of one module, as an installer leaves it."""
    text = f"name = {name!r}\n"
    value = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
    about = f"{name}-{version}.dist-info"
    put(site / f"{name}.py", text)
    put(site / about / "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    put(site / about / "INSTALLER", "uv")
    put(site / about / "RECORD", f"{name}.py,sha256={value},{len(text)}\n{about}/METADATA,,\n{about}/RECORD,,\n")


def look(image: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """inventory.py's answer about the folder; dpkg and Python are those of the image."""
    monkeypatch.setattr(inventory, "debian", lambda: ["gcc=4:11.2.0-1", "tini=0.19.0-1"])
    return inventory.inventory(image) | {"python": "3.10"}


Documents = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]


@pytest.fixture
def documents(checkout: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> Documents:
    found = look(image, monkeypatch)
    bill = bill_of(pinned(LOCK, "cu118", "3.10"), found)
    return found, bill, provenance(checkout, found, INSPECTED, sbom.render(bill))


def test_the_image_is_what_its_documents_say(documents: Documents) -> None:
    found, bill, origin = documents
    assert sbom.check(found, INSPECTED, bill, origin, LOCK) == []


# --- the lock and the sources


def test_what_an_image_has_of_the_lock() -> None:
    found = pinned(LOCK, "cu118", "3.10")
    assert [(p.name, p.version) for p in found] == [
        ("deepspeed", "0.16.9"),
        ("numpy", "1.26.4"),
        ("old", "1.0"),
        ("torch", "2.7.1+cu118"),
        ("wheel", "0.48.0"),
    ]
    assert found[1] == Package("numpy", "1.26.4", "", ("ac" * 32, "ad" * 32))
    assert found[3].url.startswith("https://download.pytorch.org/whl/cu118/")
    assert [p.version for p in pinned(LOCK, "cu118", "3.11") if p.name == "old"] == ["2.0"]
    with pytest.raises(SystemExit, match="torch-rocm"):
        pinned(LOCK, "rocm", "3.10")


@pytest.mark.parametrize("flavour", ["cu118", "cu128", "registry"])
@pytest.mark.parametrize("python", ["3.10", "3.11"])
def test_the_real_lock(flavour: str, python: str) -> None:
    found = pinned((ROOT / "env.lock").read_text(), flavour, python)
    names = [package.name for package in found]
    assert len(names) == len(set(names)) > 90
    assert {"torch", "triton", "deepspeed", "auto-gptq", "peft", "mpi4py"} <= set(names)
    assert not {"pytest", "ruff", "uv"} & set(names)
    assert all(package.hashes and all(len(value) == 64 for value in package.hashes) for package in found)


def test_the_sources_are_those_that_the_build_may_see(checkout: Path) -> None:
    assert sorted(sources(checkout)) == ["/app/env.lock", "/app/train/loop.py", "/usr/local/bin/entrypoint.sh"]
    assert "/app/train/__main__.py" in sources(ROOT)


def test_the_base_of_a_stage_and_one_by_name() -> None:
    assert base_reference(DOCKERFILE, "cuda12.8") == "ubuntu:22.04@sha256:11"
    assert base_reference(DOCKERFILE, "local/mine:1") == "local/mine:1"
    real = (ROOT / "docker/Dockerfile").read_text()
    assert all("@sha256:" in base_reference(real, stage) for stage in ("cuda11.8", "cuda12.8", "ubuntu"))


# --- the documents


def validator(name: str) -> jsonschema.Draft7Validator:
    """CycloneDX's own schema, as its library ships it; only its files are read."""
    spec = importlib.util.find_spec("cyclonedx")
    assert spec
    assert spec.origin
    schemas = Path(spec.origin).parent / "schema/_res"
    resources = [Resource.from_contents(json.loads(path.read_text())) for path in schemas.glob("*.schema.json")]
    registry: Registry[Any] = Registry().with_resources(
        [(resource.id() or "", resource) for resource in resources]
        + [
            (path.name.replace(".SNAPSHOT", ""), Resource.from_contents(json.loads(path.read_text())))
            for path in schemas.glob("*.schema.json")
        ]
    )
    return jsonschema.Draft7Validator(json.loads((schemas / name).read_text()), registry=registry)


def test_the_sbom_is_cyclonedx(documents: Documents) -> None:
    check = validator("bom-1.6.SNAPSHOT.schema.json")
    check.validate(documents[1])
    broken = copy.deepcopy(documents[1])
    broken["components"][0]["type"] = "thing"
    with pytest.raises(jsonschema.ValidationError):
        check.validate(broken)


def test_what_the_sbom_says(documents: Documents) -> None:
    by_ref = {component["bom-ref"]: component for component in documents[1]["components"]}
    torch = by_ref["pkg:pypi/torch@2.7.1%2Bcu118"]
    assert torch["externalReferences"][0]["hashes"] == [{"alg": "SHA-256", "content": "b0" * 32}]
    assert [p["value"] for p in by_ref["pkg:pypi/numpy@1.26.4"]["properties"]] == ["ac" * 32, "ad" * 32]
    assert by_ref["pkg:deb/ubuntu/gcc@4%3A11.2.0-1?distro=ubuntu-22.04"]["version"] == "4:11.2.0-1"
    assert len(by_ref) == 7
    assert list(by_ref) == sorted(by_ref)
    assert documents[1]["dependencies"][0]["dependsOn"] == sorted(by_ref)


def test_what_the_provenance_says(documents: Documents) -> None:
    build = documents[2]["predicate"]["buildDefinition"]
    uris = {d["uri"]: d.get("digest") for d in build["resolvedDependencies"]}
    assert uris["docker-image:ubuntu:22.04"] == {"sha256": "11"}
    assert uris["git"] == {"gitCommit": "c" * 40}
    assert uris["file:train/loop.py"] == {"sha256": hashlib.sha256(b"pass\n").hexdigest()}
    moved = INSPECTED | {"Id": "sha256:" + "7" * 64}
    assert documents[2]["subject"][0]["digest"] == {"layersAndSettings": sbom.identity(moved)}


def test_both_are_the_same_bytes_whenever_they_are_written(
    documents: Documents, checkout: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another clock, another order of what was found, another checkout: no byte differs; and they hold no time but the snapshot's."""
    _, bill, origin = documents
    for path in [*checkout.rglob("*"), *image.rglob("*")]:
        os.utime(path, (1, 1))
    elsewhere = checkout.rename(checkout.with_name("another name"))
    again = look(image, monkeypatch)
    again = {key: dict(reversed(value.items())) if isinstance(value, dict) else value for key, value in again.items()}
    again_bill = bill_of(list(reversed(pinned(LOCK, "cu118", "3.10"))), again | {"apt": again["apt"][::-1]})
    assert sbom.render(again_bill) == sbom.render(bill)
    assert sbom.render(provenance(elsewhere, again, INSPECTED, sbom.render(again_bill))) == sbom.render(origin)
    assert b"timestamp" not in sbom.render(bill) + sbom.render(origin)


def test_another_content_has_another_serial_number(documents: Documents) -> None:
    found, bill, _ = documents
    other = bill_of(pinned(LOCK.replace("0.48.0", "0.48.1"), "cu118", "3.10"), found)
    assert other["serialNumber"] != bill["serialNumber"]


# --- every difference is named


def no_package(image: Path) -> None:
    for path in image.glob("opt/venv/lib/python3.10/site-packages/numpy*"):
        if path.is_file():
            path.unlink()
        else:
            for file in path.iterdir():
                file.unlink()
            path.rmdir()


SITE = "opt/venv/lib/python3.10/site-packages"
ALTERATIONS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a package is gone": (no_package, "package numpy 1.26.4: in env.lock, not in the image"),
    "a package more": (lambda image: install(image / SITE, "evil", "1.0"), "package evil 1.0: in the image, not in env.lock"),
    "a package's file changed": (lambda image: put(image / SITE / "torch.py", "import evil\n"), "torch.py: not as its package brought it"),
    "a package's file is gone": (lambda image: (image / SITE / "torch.py").unlink(), "torch.py: missing"),
    "a file of no package": (lambda image: put(image / SITE / "sitecustomize.py", ""), "sitecustomize.py: of no package"),
    "a path file": (lambda image: put(image / SITE / "evil.pth", "import os"), "evil.pth: of no package"),
    "apt's list is another": (lambda image: put(image / "opt/apt.list", "gcc=4:11.2.0-1\n"), "apt package tini 0.19.0-1: in the image, not in /opt/apt.list"),
    "a source changed": (lambda image: put(image / "app/train/loop.py", "fail\n"), "file /app/train/loop.py:"),
    "a source more": (lambda image: put(image / "app/train/evil.py", ""), "file /app/train/evil.py"),
    "a source is gone": (lambda image: (image / "app/train/loop.py").unlink(), "file /app/train/loop.py"),
    "the entry point changed": (lambda image: put(image / "usr/local/bin/entrypoint.sh", "#!/bin/bash\n"), "file /usr/local/bin/entrypoint.sh:"),
    "a command more": (lambda image: put(image / "usr/local/bin/python", "#!/bin/bash\n"), "file /usr/local/bin/python"),
    "open to all": (lambda image: (image / "app/train/loop.py").chmod(0o666), "file /app/train/loop.py: may be written by others"),
}  # fmt: skip


@pytest.mark.parametrize("name", ALTERATIONS)
def test_an_altered_image(name: str, documents: Documents, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alter, said = ALTERATIONS[name]
    alter(image)
    found = look(image, monkeypatch)
    wrong = sbom.check(found, INSPECTED, documents[1], documents[2], LOCK)
    assert any(said in line for line in wrong), wrong
    assert len(wrong) <= 2  # it names what differs, and nothing else


def test_another_base_layer_settings_or_sbom(documents: Documents) -> None:
    found, bill, origin = documents
    other = copy.deepcopy(INSPECTED)
    other["RootFS"]["Layers"][1] = "sha256:" + "9" * 64  # type: ignore[index]
    other["Config"]["User"] = "0"  # type: ignore[index]
    wrong = sbom.check(found, other, bill, origin, LOCK)
    assert [line.split(":")[0].split(" " + "9" * 64)[0] for line in wrong] == ["digest layer 1", "digest settings"]
    longer = copy.deepcopy(INSPECTED)
    longer["RootFS"]["Layers"].append("sha256:" + "4" * 64)  # type: ignore[index]
    assert "layer 2" in sbom.check(found, longer, bill, origin, LOCK)[0]
    forged = copy.deepcopy(bill)
    forged["metadata"]["component"]["version"] = "9"
    assert [line.split(":")[0] for line in sbom.check(found, INSPECTED, forged, origin, LOCK)] == [
        "digest sbom.cdx.json"
    ]


def test_another_lock_and_other_settings_of_the_build(documents: Documents) -> None:
    found, bill, origin = documents
    moved = LOCK.replace("0.48.0", "0.49.0")
    wrong = sbom.check(found, INSPECTED, bill, origin, moved)
    assert wrong == [
        "package wheel: 0.48.0 in the image, 0.49.0 in env.lock",
        "env.lock: the image was made from another one than this checkout's",
    ]
    other = found | {"image": found["image"] | {"version": "0.2.0"}}
    assert sbom.check(other, INSPECTED, bill, origin, LOCK) == [
        "image.json: version: 0.2.0 in the image, 0.1.0 in the provenance"
    ]


def test_an_engine_that_stores_it_otherwise_makes_no_difference(documents: Documents) -> None:
    found, bill, origin = documents
    assert sbom.check(found, INSPECTED | {"Id": "sha256:" + "7" * 64}, bill, origin, LOCK) == []


# --- the commands, with a stand-in for docker


@pytest.fixture
def engine(tmp_path: Path, documents: Documents, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / "inspected.json").write_text(json.dumps([INSPECTED]))
    (tmp_path / "found.json").write_text(json.dumps(documents[0]))
    docker = tmp_path / "bin/docker"
    docker.write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/log\ncase "$*" in\n"image inspect gone:1") echo "No such image" >&2; exit 1 ;;\n'
        f'"image inspect"*) cat {tmp_path}/inspected.json ;;\nrun*) cat >/dev/null; cat {tmp_path}/found.json ;;\nesac\n'
    )
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(sbom, "ROOT", checkout)
    put(checkout / "docker/inventory.py", (ROOT / "docker/inventory.py").read_text())
    return tmp_path


def test_written_twice_they_are_the_same_bytes(
    engine: Path, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sbom.main(["write", "qwen-finetune:0.1.0-cu118"]) == 0
    folder = checkout / ".image/qwen-finetune-0.1.0-cu118"
    assert sorted(path.name for path in folder.iterdir()) == ["provenance.json", "sbom.cdx.json"]
    before = [path.read_bytes() for path in sorted(folder.iterdir())]
    assert sbom.main(["write", "qwen-finetune:0.1.0-cu118"]) == 0
    assert [path.read_bytes() for path in sorted(folder.iterdir())] == before
    assert "sbom.cdx.json: 7 components" in capsys.readouterr().out
    assert "--network none --read-only --cap-drop ALL" in (engine / "log").read_text()


def test_an_image_of_other_sources_gets_no_documents(
    engine: Path, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(checkout / "train/loop.py", "changed since\n")
    assert sbom.main(["write", "i:1"]) == 1
    assert "i:1: file /app/train/loop.py: " in capsys.readouterr().err
    assert not (checkout / ".image").exists()


def test_no_image_no_engine(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="No such image"):
        sbom.main(["write", "gone:1"])
    monkeypatch.setenv("PATH", str(engine))
    with pytest.raises(SystemExit, match="no docker here"):
        sbom.main(["write", "i:1"])
    assert sbom.main(["sign", "i:1"]) == 2


def test_it_runs_on_a_bare_python() -> None:
    """make image calls it with whatever python3 the host has: no package is needed."""
    done = subprocess.run([sys.executable, "-I", "-S", ROOT / "docker/sbom.py"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "sbom.py write IMAGE" in done.stderr


def test_the_folder_of_an_image() -> None:
    assert folder_of("ghcr.io/me/qwen-finetune:0.1.0-cu118@sha256:ab").name == "qwen-finetune-0.1.0-cu118"
