"""`docker compose up serve` with a real engine: caged, published on loopback alone, and ended in order; and two checkouts
of one host side by side."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.image.cage import Project, check_cage, check_end, check_inside
from tests.image.conftest import House

pytestmark = pytest.mark.image


@pytest.fixture
def projects(house: House, tmp_path: Path) -> Iterator[tuple[Project, Project]]:
    """Two clones of one name, as two people of a host have them."""
    words = ("serve", "/health", "model=base")
    pair = Project(tmp_path / "one/qwen", house, *words), Project(tmp_path / "two/qwen", house, *words)
    yield pair
    for project in pair:
        project.remove()


def test_served_in_the_cage_and_ended_in_order(projects: tuple[Project, Project]) -> None:
    project = projects[0]
    name = project.up()
    check_cage(json.loads(project.say("docker", "inspect", name))[0], project.port, set())
    check_inside(project, name)
    assert json.loads(project.ask("/v1/models"))["data"][0]["id"] == "base"
    check_end(project, name)
    assert project.say("docker", "logs", name).splitlines()[-1] == "stopped"
    project.say("docker", "rm", name)


def test_two_checkouts_do_not_stop_each_other(projects: tuple[Project, Project]) -> None:
    """Of one folder's name: by that name alone compose would take them for one project."""
    one, two = projects
    first, second = one.up(), two.up()
    assert one.running() == [first] and two.running() == [second]
    one.compose("down", "--remove-orphans")
    assert one.running() == [] and two.running() == [second]
    assert two.ask("/health")
    one.up()
    assert two.running() == [second] and two.ask("/health")


def test_others_reach_it_only_with_a_key(projects: tuple[Project, Project]) -> None:
    project = projects[0]
    project.env["SERVE_HOST"] = "0.0.0.0"
    words = ["run", "--rm", "--service-ports", "serve", "model=base", f"port={project.port}"]
    assert "API_KEY=" in project.compose(*words, status=2)
    assert "SERVE_HOST=192.0.2.7" in project.compose(*words, "host=192.0.2.7", status=2)
