"""docker/run on the container's side, with a stand-in for `docker` that writes down what it is told: which image, which mounts, whose
user, which first. What an engine makes of it is tests/image/test_compose.py's.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.support.standin import checkout, environment, log, script

ROOT = Path(__file__).resolve().parents[2]
WORK = "/workspace"  # where the container works


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return checkout(tmp_path / "checkout")


def _heedful() -> None:
    """As in a terminal, whoever runs the tests: a shell cannot trap what was ignored when it began (nohup, a job in the background)."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def start(project: Path, *words: str, **variables: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        ["docker/run", *words],
        cwd=project,
        env=environment(project, **variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_heedful,
    )


def run(project: Path, *words: str, status: int = 0, **variables: str) -> str:
    """What docker/run says on the standard error."""
    (project / "bin/log").unlink(missing_ok=True)
    process = start(project, *words, **variables)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status, said
    return said


def containers(project: Path) -> list[dict[str, list[str]]]:
    """Each `docker compose run` that does not only ask: service and words as `words`, `mounts`, its environment."""
    found = []
    for entry in (e for e in log(project) if e["words"][:2] == ["compose", "run"] and "needs" not in e["words"]):
        words, mounts = entry["words"][2:], []
        while words[0].startswith("-"):
            flag = words.pop(0)
            value = words.pop(0) if flag in ("-v", "--name", "--entrypoint") else ""
            mounts += [value] if flag == "-v" else []
        found.append({"words": words, "mounts": mounts, **entry["env"]})
    return found


def mounts(project: Path, *words: str) -> list[str]:
    run(project, *words)
    return containers(project)[-1]["mounts"]


def asked(project: Path) -> list[list[str]]:
    """The words of each container that was asked what the command needs."""
    words = [entry["words"] for entry in log(project)]
    return [one[one.index("needs") + 1 :] for one in words if "needs" in one]


# --- the first line, the image, the GPU


def test_the_first_line_says_where_it_runs(project: Path) -> None:
    first = run(project, "train", "data=data/x").splitlines()[0]
    assert first.startswith(
        "train in the container qwen-finetune:0.1.0-cu118, on the CPU: nvidia-smi does not answer here"
    )
    assert "RUNTIME=local" in first
    assert containers(project)[-1] | {"mounts": []} == {
        "words": ["train", "data=data/x"],
        "mounts": [],
        "USER_ID": str(os.getuid()),
        "ACCELERATOR": "cpu",
        "IMAGE": "qwen-finetune:0.1.0-cu118",
        "IMAGE_DIGEST": "sha256:qwen-finetune:0.1.0-cu118",
        "GPUS": None,
        "SERVE_HOST": None,
    }


def test_words_arrive_as_they_were_typed(project: Path) -> None:
    odd = ['prompt=it\'s 你好\n$HOME `id` "#"', "system=", "--help"]
    run(project, "infer", *odd)
    assert containers(project)[-1]["words"] == ["infer", *odd]


def test_a_gpu_is_reserved_where_a_driver_answers_and_the_host_is_fit(project: Path) -> None:
    script(project / "bin/nvidia-smi", "#!/bin/sh\nexit 0\n")
    assert "on the GPU" in run(project, "train", "data=x").splitlines()[0]
    assert containers(project)[-1]["ACCELERATOR"] == "gpu"
    assert "as requested" in run(project, "train", "data=x", ACCELERATOR="cpu").splitlines()[0]
    assert containers(project)[-1]["ACCELERATOR"] == "cpu"
    # Make exports what was typed; the program itself counts the cards
    run(project, "train", "data=x", "gpus=2", GPUS="2")
    assert containers(project)[-1]["ACCELERATOR"] == "gpu" and containers(project)[-1]["GPUS"] is None
    assert "expected gpu, cpu" in run(project, "train", "data=x", ACCELERATOR="tpu", status=2)


def test_an_unfit_host_is_told_before_a_container_starts(project: Path) -> None:
    """But for the verbs that need no GPU, and for doctor, which says the rest of what is wrong."""
    asked = {"ACCELERATOR": "gpu", "FAKE_HOST": "driver too old"}
    assert "error: driver too old" in run(project, "train", "data=x", status=2, **asked)
    assert containers(project) == []
    run(project, "data", "data=x", **asked)
    assert "driver too old" in run(project, "doctor", **asked)
    assert containers(project)[-1]["ACCELERATOR"] == "cpu"


@pytest.mark.parametrize(
    ("answer", "remedy"),
    [
        ("echo no devices were found; exit 6", "ACCELERATOR=cpu"),
        ("echo 440.33.01, 3.7", "a newer driver"),
        ("echo 570.86.10, 12.0", "make image CUDA=12.8"),
        ("echo 570.86.10, 9.0", "nvidia-container-toolkit"),
    ],
)
def test_what_an_unfit_host_lacks_is_told_within_ten_seconds(project: Path, answer: str, remedy: str) -> None:
    """The real docker/host, before an image is built: no card, a driver too old, a card too new for CUDA 11.8, no container toolkit."""
    shutil.copy(ROOT / "docker/host", project / "docker/host")
    script(project / "bin/nvidia-smi", f"#!/bin/sh\n{answer}\n")
    began = time.monotonic()
    said = run(project, "train", "data=x", status=2, ACCELERATOR="gpu", FAKE_IMAGES="")
    assert time.monotonic() - began < 10
    assert remedy in said.partition("Remedy: ")[2]
    assert containers(project) == [] and not (project / "built").exists()


def test_a_missing_image_is_built_first(project: Path) -> None:
    said = run(project, "infer", FAKE_IMAGES="")
    assert "make image" in said and (project / "built").exists()
    (project / "built").unlink()
    script(project / "docker/build", "#!/bin/sh\nexit 1\n")
    assert "RUNTIME=local" in run(project, "infer", FAKE_IMAGES="", status=2)
    assert containers(project) == []


def test_the_image_of_env_is_used_and_built_again_when_the_program_changed(project: Path) -> None:
    source = subprocess.run(
        ["bash", "-c", ". docker/common.sh; source_hash"], cwd=project, capture_output=True, text=True, check=True
    ).stdout.strip()
    (project / ".env").write_text(f"IMAGE=my:tag\nSOURCE={source}\nCUDA=12.8\n")
    run(project, "infer", FAKE_IMAGES="my:tag")
    assert containers(project)[-1]["IMAGE"] == "my:tag" and not (project / "built").exists()
    (project / "docker/README.md").write_text("a page that is not in the image")
    assert "has changed" not in run(project, "infer", FAKE_IMAGES="my:tag") and not (project / "built").exists()
    (project / "train/new.py").touch()
    assert "has changed" in run(project, "infer", FAKE_IMAGES="my:tag") and (project / "built").exists()
    (project / "built").unlink()
    run(project, "infer", FAKE_IMAGES="other", IMAGE="other")  # named by its user: not ours to build
    assert containers(project)[-1]["IMAGE"] == "other" and not (project / "built").exists()
    run(project, "infer", CUDA="11.8")  # nor is .env's image the one for another CUDA
    assert containers(project)[-1]["IMAGE"] == "qwen-finetune:0.1.0-cu118"


# --- the base, before training


def test_train_lets_model_fetch_what_is_missing(project: Path) -> None:
    """With its own mounts: the folder of models is writable for it alone. Not for data that is not there."""
    (project / "data/x").write_text("{}")
    run(project, "train", "data=data/x", "models=m", "model=Qwen/X")
    fetched, trained = containers(project)
    assert fetched["words"] == ["model", "models=m", "model=Qwen/X"]
    assert fetched["mounts"] == [f"{project}/m:{WORK}/m:rw"]
    assert trained["words"] == ["train", "data=data/x", "models=m", "model=Qwen/X"]
    assert trained["mounts"] == [f"{project}/m:{WORK}/m:ro"]
    (project / "m/X").mkdir()
    (project / "m/X/config.json").write_text("{}")
    for words in (["data=data/x", "models=m", "model=Qwen/X"], ["data=data/none"]):
        run(project, "train", *words)
        assert [one["words"][0] for one in containers(project)] == ["train"]


def test_what_cannot_be_fetched_is_not_trained_on(project: Path) -> None:
    (project / "data/x").write_text("{}")
    run(project, "train", "data=data/x", "model=Qwen/X", FAKE_MODEL="3", status=3)
    assert [one["words"][0] for one in containers(project)] == ["model"]


# --- what is mounted


def test_what_compose_mounts_is_not_mounted_twice(project: Path) -> None:
    (project / "data/x.jsonl").touch()
    assert mounts(project, "train", "data=data/x.jsonl", "model=models/none", "run=r", "recipe=qlora") == []


def test_files_elsewhere_are_mounted_where_they_were_typed(project: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "else where, 数据"
    (elsewhere / "base").mkdir(parents=True)
    for name in ("a.jsonl", "my.yaml", "b.jsonl"):
        (elsewhere / name).touch()
    (project / "mine.jsonl").touch()
    there = str(elsewhere)
    assert mounts(project, "data", f"data={there}/a.jsonl") == [f"{there}/a.jsonl:{there}/a.jsonl:ro"]
    assert mounts(project, "data", "data=mine.jsonl") == [f"{project}/mine.jsonl:{WORK}/mine.jsonl:ro"]
    typed = f"../{elsewhere.name}/a.jsonl"  # from the container's folder, .. is /
    assert mounts(project, "data", f"data={typed}") == [f"{there}/a.jsonl:/{elsewhere.name}/a.jsonl:ro"]
    (elsewhere / "base/config.json").write_text("{}")
    found = mounts(project, "train", f"data={there}/a.jsonl", f"model={there}/base", f"recipe={there}/my.yaml")
    assert found == [f"{there}/{name}:{there}/{name}:ro" for name in ("base", "my.yaml", "a.jsonl")]


def test_the_data_of_a_recipes_stages(project: Path, tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).touch()
    (project / "my.yaml").write_text(
        f"stages:\n  - data: {tmp_path}/a.jsonl # voice\n  - epochs: 1\n    data: {tmp_path}/b.jsonl\n"
    )
    expected = [
        f"{project}/my.yaml:{WORK}/my.yaml:ro",
        *(f"{tmp_path}/{n}:{tmp_path}/{n}:ro" for n in ("a.jsonl", "b.jsonl")),
    ]
    assert mounts(project, "train", "recipe=my.yaml") == expected
    assert mounts(project, "plan", "recipe=my.yaml") == expected
    assert len(asked(project)) == 3  # what the words name, what the recipe names, nothing new


def test_several_files_with_commas(project: Path, tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "c,d.jsonl"):
        (tmp_path / name).touch()
    both = mounts(project, "train", f"data={tmp_path}/a.jsonl,data/x,{tmp_path}/b.jsonl")
    assert both == [f"{tmp_path}/{name}:{tmp_path}/{name}:ro" for name in ("a.jsonl", "b.jsonl")]
    assert len(mounts(project, "train", f"data={tmp_path}/c,d.jsonl")) == 1


def test_folders_to_write_to_are_made_and_mounted_writable(project: Path, tmp_path: Path) -> None:
    big = tmp_path / "big"
    assert mounts(project, "train", "data=x", f"runs={big}/runs") == [f"{big}/runs:{big}/runs:rw"]
    assert mounts(project, "model", "model=Qwen/X", f"models={big}/models") == [f"{big}/models:{big}/models:rw"]
    assert mounts(project, "infer", f"runs={big}/runs", f"models={big}/none") == [f"{big}/runs:{big}/runs:ro"]
    assert not (big / "none").exists()
    assert mounts(project, "export", "run=r", f"out={big}/merged") == [f"{big}:{big}:rw"]
    assert mounts(project, "data", "data=x", "out=data/new.jsonl") == [f"{project}/data:{WORK}/data:rw"]
    assert mounts(project, "quantize", "model=m", "out=other-name") == []


def test_a_run_is_shown_what_it_was_made_of(project: Path, tmp_path: Path) -> None:
    """Its data and its base may lie elsewhere, and export, compare and infer ask for them."""
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "base").mkdir()
    (project / "runs/r").mkdir()
    inputs = {"data": {"path": f"{tmp_path}/a.jsonl"}, "base": {"name": f"{tmp_path}/base"}}
    (project / "runs/r/inputs.json").write_text(json.dumps(inputs, indent=2, sort_keys=True))
    expected = [f"{tmp_path}/{name}:{tmp_path}/{name}:ro" for name in ("base", "a.jsonl")]
    assert mounts(project, "export", "run=r") == expected
    (project / "runs/r/run.json").write_text("{}")
    assert mounts(project, "infer") == expected
    assert mounts(project, "data", "data=x") == []  # names no run
    shutil.move(project / "runs", tmp_path / "elsewhere")
    (project / "runs").mkdir()
    there = [f"{tmp_path}/elsewhere:{tmp_path}/elsewhere:ro", *expected]
    assert mounts(project, "infer", f"runs={tmp_path}/elsewhere") == there
    assert len(asked(project)) == 3


def test_nothing_is_mounted_twice(project: Path, tmp_path: Path) -> None:
    """A run that goes on names its data again; data that is read and written in one folder is writable."""
    (tmp_path / "a.jsonl").touch()
    (project / "runs/r").mkdir()
    inputs = {"data": {"path": f"{tmp_path}/a.jsonl"}, "base": {"name": "base"}}
    (project / "runs/r/inputs.json").write_text(json.dumps(inputs, indent=2, sort_keys=True))
    assert mounts(project, "train", f"data={tmp_path}/a.jsonl", "run=r") == [
        f"{tmp_path}/a.jsonl:{tmp_path}/a.jsonl:ro"
    ]
    there = tmp_path / "there"
    there.mkdir()
    assert mounts(project, "data", f"data={there}", f"out={there}/new.jsonl") == [f"{there}:{there}:rw"]


def test_links_out_of_data_and_models_lead_somewhere(project: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (project / "models/base").symlink_to("../../base")
    assert mounts(project, "train", "data=x", "model=base") == [f"{tmp_path}/base:{WORK}/models/base:ro"]


NAMES = ["two\nlines.jsonl", 'it\'s "$HOME" `id` \\.jsonl', "-v.jsonl", "二 —.jsonl", "end\n", "#1.jsonl"]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_file(project: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert mounts(project, "data", f"data={tmp_path}/{name}") == [f"{tmp_path}/{name}:{tmp_path}/{name}:ro"]


def test_any_name_of_a_file_in_a_recipe(project: Path, tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / name).touch()
    stages = [{"data": f"{tmp_path}/{name}"} for name in NAMES]
    (project / "data/my.yaml").write_text(yaml.safe_dump({"stages": stages}))
    expected = {f"{tmp_path}/{name}:{tmp_path}/{name}:ro" for name in NAMES}
    assert set(mounts(project, "train", "recipe=data/my.yaml")) == expected


def test_one_container_is_asked_where_everything_lies_in_its_folders(project: Path) -> None:
    run(project, "infer", "run=r", "prompt=read /etc", "--x")
    assert asked(project) == [["infer", "run=r", "prompt=read /etc", "--x"]]


def test_an_unknown_verb_is_refused_before_an_image_is_built(project: Path) -> None:
    said = run(project, "trian", FAKE_IMAGES="", status=2)
    assert "unknown verb trian" in said and "train" in said and not (project / "built").exists()


def test_the_shell_has_the_mounts_of_train_and_its_own_words(project: Path) -> None:
    run(project, "shell", "-c", "model=/x")
    assert asked(project) == [["train"]]
    assert containers(project)[-1]["words"] == ["train", "-c", "model=/x"]


@pytest.mark.parametrize("path", ["/etc/hostname", "/usr/lib", "/tmp", "/"])
def test_nothing_of_the_containers_own_is_covered(project: Path, path: str) -> None:
    assert "Copy it to data/ or models/" in run(project, "data", f"data={path}", status=2)
    assert containers(project) == []


def test_a_path_with_a_colon_is_refused(project: Path, tmp_path: Path) -> None:
    (tmp_path / "a:b.jsonl").touch()
    assert "colon" in run(project, "data", f"data={tmp_path}/a:b.jsonl", status=2)


# --- signals


@pytest.mark.parametrize(
    ("sent", "passed"), [(signal.SIGTERM, "TERM"), (signal.SIGINT, "INT"), (signal.SIGHUP, "TERM")]
)
def test_a_signal_reaches_the_program_and_its_status_is_ours(project: Path, sent: int, passed: str) -> None:
    process = start(project, "train", "data=x", "slow=1")
    for _ in range(200):
        if (project / "bin/started").exists():
            break
        time.sleep(0.05)
    process.send_signal(sent)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 75, said
    kill = next(entry["words"] for entry in log(project) if entry["words"][0] == "kill")
    assert kill[:3] == ["kill", "--signal", passed] and kill[3] == f"qwen-train-{process.pid}"


# --- what a person mistypes, or an engine does


def begun(project: Path, name: str = "container") -> None:
    (project / "runs/mine").mkdir()
    (project / "runs/mine/.runtime").write_text(name)


def test_a_run_of_the_container_is_not_continued_elsewhere_unasked(project: Path) -> None:
    script(project / "docker/setup", "#!/bin/sh\n")
    away = {"FAKE_ENGINE": "permission denied while trying to connect", "RUNTIME": "auto", "PY": "true"}
    begun(project)
    said = run(project, "train", "data=data/x", "run=mine", status=2, **away)
    assert "was begun in the container" in said and "permission denied" in said and "RUNTIME=local" in said
    assert "docker (sudo usermod" not in run(
        project, "train", "data=data/x", "run=mine", **{**away, "RUNTIME": "local"}
    )
    assert "train in .venv" in run(project, "train", "data=data/x", "run=other", **away)
    (project / "runs/mine/run.json").touch()
    assert "train in .venv" in run(project, "train", "data=data/x", "run=mine", **away)
    (project / "runs/mine/run.json").unlink()
    (project / "runs/mine/.runtime").write_text("local")
    assert "train in .venv" in run(project, "train", "data=data/x", "run=mine", **away)


def test_a_mistyped_data_dir_is_not_made(project: Path) -> None:
    assert "no such folder" in run(project, "data", "data=x", status=2, DATA_DIR="dtaa")
    assert not (project / "dtaa").exists()


def test_an_image_of_another_version_is_said(project: Path) -> None:
    assert "is of version 0.9.0, this checkout of 0.1.0" in run(project, "data", "data=x", FAKE_VERSION="0.9.0")
    assert "of version" not in run(project, "data", "data=x", FAKE_VERSION="0.1.0")


@pytest.mark.parametrize("answer", ["[name=seccomp,profile=default name=rootless]", "true"], ids=["docker", "podman"])
def test_under_a_rootless_engine_the_container_is_its_root(project: Path, answer: str) -> None:
    """Podman answers the second question, Docker the first."""
    asks = "Host.Security.Rootless" if answer == "true" else "SecurityOptions"
    docker = project / "bin/docker"
    engine = f'if words[0] == "info" and "{asks}" in str(words):\n    print("{answer}")\nelif words[0] == "version":'
    docker.write_text(docker.read_text().replace('elif words[0] == "version":', engine.replace("if", "elif", 1)))
    run(project, "data", "data=data/x")
    assert containers(project)[-1]["USER_ID"] == "0"


def test_selinux_gets_its_label_where_it_is_on(project: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("{}")
    assert mounts(project, "data", f"data={tmp_path}/mine.jsonl") == [f"{tmp_path}/mine.jsonl:{tmp_path}/mine.jsonl:ro"]
    script(project / "bin/getenforce", "#!/bin/sh\necho Enforcing\n")
    assert mounts(project, "data", f"data={tmp_path}/mine.jsonl")[0].endswith("mine.jsonl:ro,z")
    assert "selinux: z" in (ROOT / "compose.yaml").read_text()
