"""compose.yaml, service by service, against the verb table; and where the server is published. What an engine makes of it
is tests/image/test_compose.py's and tests/image/test_serve.py's.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docker.test_compose import ROOT, WORK, containers, run
from tests.support.standin import checkout, log
from train.__main__ import VERBS


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return checkout(tmp_path / "checkout")


class Loader(yaml.SafeLoader):
    """YAML with compose's !override."""


Loader.add_constructor("!override", lambda loader, node: [str(item.value) for item in node.value])
Loader.add_constructor("!reset", lambda loader, node: None)


def services() -> dict[str, dict[str, Any]]:
    return yaml.load((ROOT / "compose.yaml").read_text(), Loader)["services"]


def test_every_verb_is_a_service_and_every_service_a_verb() -> None:
    assert set(services()) - {"on-cpu", "on-gpu"} == set(VERBS)
    for name, service in services().items():
        if not name.startswith("on-"):
            assert service["entrypoint"] == ["/usr/bin/tini", "--", "/usr/local/bin/entrypoint.sh", name]
            assert service["profiles"] == [name], "`docker compose up` alone starts none"


@pytest.mark.parametrize("name", sorted(VERBS))
def test_a_service_gets_what_its_verb_needs_and_no_more(name: str) -> None:
    """The verb table against compose.yaml: folders it writes to, a GPU, a network."""
    service, verb = services()[name], VERBS[name]
    template = "on-cpu" if verb.gpu == "-" else "on-${ACCELERATOR:-gpu}"
    assert service["extends"] == {"service": template}
    assert service.get("network_mode") == ("bridge" if verb.network == "yes" else None)  # the template has none
    mounts: Any = [*services()["on-cpu"]["volumes"], *service.get("volumes", [])]
    writable = {
        mount["target"]: not mount.get("read_only") for mount in mounts
    }  # a later one takes an earlier one's place
    for folder in ("data", "models", "runs"):
        assert writable[f"{WORK}/{folder}"] is (getattr(verb, folder) in ("write", "may-write")), folder


def test_servers_are_published_on_loopback_alone_and_their_networks_lead_nowhere() -> None:
    usual = {"serve": 8000, "studio": 8080}
    assert [name for name, service in services().items() if "ports" in service] == list(usual)
    assert [name for name, service in services().items() if "networks" in service] == list(usual)
    networks = yaml.load((ROOT / "compose.yaml").read_text(), Loader)["networks"]
    assert set(networks) == set(usual)
    for name, number in usual.items():
        port = f"${{{name.upper()}_PORT:-{number}}}"
        address = f"${{{name.upper()}_HOST:-127.0.0.1}}"
        assert services()[name]["ports"] == [{"target": port, "published": port, "host_ip": address}]
        assert services()[name]["networks"] == [name]
        assert set(networks[name]["driver_opts"].values()) == {"false"}
        published = f"{name.upper()}_PUBLISHED_ON"
        assert services()[name]["environment"][published] == address
        assert [one for one, service in services().items() if published in service.get("environment", {})] == [name]
        assert published not in (ROOT / "docker/Dockerfile").read_text()


def test_the_templates_have_no_network_and_only_one_a_gpu() -> None:
    cpu, gpu = services()["on-cpu"], services()["on-gpu"]
    assert cpu["network_mode"] == "none" and "deploy" not in cpu
    assert gpu["extends"] == {"service": "on-cpu"} and "network_mode" not in gpu and "volumes" not in gpu
    assert "driver" in str(gpu["deploy"])


def test_the_default_image_is_of_this_version() -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert version and f"qwen-finetune:{version[1]}-cu118" in str(services()["on-cpu"]["image"])


def test_memory_and_tmp_have_settings() -> None:
    text = (ROOT / "compose.yaml").read_text()
    assert "mem_limit: ${MEM_LIMIT:-0}" in text and "size=${TMP_SIZE:-50%}" in text


# --- make serve, in the container


def test_the_server_listens_where_it_is_published(project: Path) -> None:
    run(project, "serve", "model=x", "port=9000")
    assert "--service-ports" in str(log(project))
    assert containers(project)[-1]["words"] == ["serve", "model=x", "port=9000"]
    run(project, "serve", "model=x", SERVE_PORT="9100")
    assert containers(project)[-1]["words"] == ["serve", "model=x", "port=9100"]
    run(project, "data", "data=data/x")
    assert "--service-ports" not in str(log(project))


def test_the_studio_listens_where_it_is_published(project: Path) -> None:
    run(project, "studio")
    assert "--service-ports" in str(log(project))
    assert containers(project)[-1]["words"] == ["studio", "port=8080"]
    run(project, "studio", STUDIO_PORT="8100")
    assert containers(project)[-1]["words"] == ["studio", "port=8100"]


def test_the_address_that_is_typed_is_the_one_of_this_host(project: Path) -> None:
    """In the container it would be one of the container's own."""
    run(project, "serve", "host=192.168.1.2", "model=x", "port=9000", API_KEY="a key of tests")
    assert containers(project)[-1]["words"] == ["serve", "model=x", "port=9000"]
    assert containers(project)[-1]["SERVE_HOST"] == "192.168.1.2"
    run(project, "serve", "host=localhost")
    assert containers(project)[-1]["SERVE_HOST"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("engine", "words", "key", "warned"),
    [
        ("26.1.5+dfsg1", (), "", True),
        ("27.5.1", ("host=127.0.0.1",), "", True),
        ("28.0.0", (), "", False),
        ("29.1", (), "", False),
        ("26.1.5", (), "a key of tests", False),
        ("26.1.5", ("host=0.0.0.0",), "", False),
    ],
)
def test_an_engine_that_lets_neighbours_in_is_warned_of(
    project: Path, engine: str, words: tuple[str, ...], key: str, warned: bool
) -> None:
    said = run(project, "serve", "model=x", *words, FAKE_ENGINE_VERSION=engine, API_KEY=key)
    assert ("can reach a port published on 127.0.0.1" in said) is warned, said
    assert "published on" not in run(project, "data", "data=data/x", FAKE_ENGINE_VERSION=engine)
