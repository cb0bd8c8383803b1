"""A stand-in for `docker` that writes down what it is told, and a checkout with docker/'s scripts around it."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FILES = (
    "docker/run docker/common.sh docker/bundle pyproject.toml env.lock compose.yaml Makefile README.md train/verbs.txt "
    "train/recipes/qlora.yaml"
)
DOCKER = """#!@PYTHON@ -IS
import json, os, sys
words = sys.argv[1:]
here = os.path.dirname(os.path.abspath(__file__))
with open(f"{here}/log", "a") as log:
    seen = {k: os.environ.get(k) for k in ("USER_ID", "ACCELERATOR", "IMAGE", "IMAGE_DIGEST", "GPUS", "SERVE_HOST")}
    print(json.dumps({"words": words, "env": seen}), file=log)
def loaded():
    return json.load(open(f"{here}/loaded")) if os.path.exists(f"{here}/loaded") else {}
def note(images):
    json.dump(images, open(f"{here}/loaded", "w"))
def save(image):  # as OCI has it: a config, a layer, the manifest of both, and what names it
    import hashlib, io, tarfile  # here, because most calls need none of them
    hashed = lambda data: hashlib.sha256(data).hexdigest()
    config, layer = b"{}", ("layer of " + image).encode()
    parts = [{"digest": "sha256:" + hashed(data), "size": len(data)} for data in (config, layer)]
    manifest = json.dumps({"schemaVersion": 2, "config": parts[0], "layers": parts[1:]}).encode()
    index = {"manifests": [{"digest": "sha256:" + hashed(manifest), "annotations": {"config.digest": "sha256:1"}}]}
    files = {f"blobs/sha256/{hashed(data)}": data for data in (config, layer, manifest)}
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as tar:
        for name, data in {**files, "index.json": json.dumps(index).encode()}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
def load():
    import tarfile
    with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as tar:
        files = {entry.name: tar.extractfile(entry).read() for entry in tar if entry.isfile()}
    index, old = (json.loads(files[name]) for name in ("index.json", "manifest.json"))
    names = [one["annotations"]["io.containerd.image.name"] for one in index["manifests"]]
    assert ["docker.io/library/" + tag for one in old for tag in one["RepoTags"]] == names
    assert {old[0]["Config"], *old[0]["Layers"]} < set(files)
    digests = [one["digest"].split(":")[1] for one in index["manifests"]]
    note({**loaded(), **dict(zip([name.split("/")[-1] for name in names], digests))})
if words[0] in ("version", "pull") and os.environ.get("FAKE_ENGINE"):
    sys.exit(os.environ["FAKE_ENGINE"])
elif words[0] == "version":
    print(os.environ.get("FAKE_ENGINE_VERSION", "28.0"))
elif words[:2] == ["image", "inspect"] and "RootFS" in str(words):
    print("one image, wherever it is")
elif words[:2] == ["image", "inspect"] and "image.version" in str(words):
    print(os.environ.get("FAKE_VERSION", ""))
elif words[:2] == ["image", "inspect"] and words[-1] in loaded():
    print("sha256:" + loaded()[words[-1]])
elif words[:2] == ["image", "inspect"]:
    images = os.environ.get("FAKE_IMAGES", "").split() or os.path.exists("built") and words[-1:]
    if not images or words[-1] not in images:
        sys.exit(1)
    print("1000000" if "{{.Size}}" in words else "sha256:" + words[-1])
elif "needs" in words:
    seen = [word.split(":")[0] for flag, word in zip(words, words[1:]) if flag == "-v"]
    os.environ["VISIBLE"] = ":".join([*map(os.path.abspath, ("data", "models", "runs")), *seen])
    os.environ["PYTHONPATH"] = "@ROOT@"
    os.execv("@PYTHON@", ["@PYTHON@", "-m", "tests.support.standin", *words[words.index("needs"):]])
elif "model" in words and os.environ.get("FAKE_MODEL"):
    sys.exit(int(os.environ["FAKE_MODEL"]))
elif words[0] == "save":
    save(words[1])
elif words[0] == "load":
    load()
elif words[0] == "tag":
    note({**loaded(), words[2]: loaded()[words[1]]})
elif words[:2] == ["image", "rm"]:
    note({name: digest for name, digest in loaded().items() if name != words[2]})
elif words[0] == "kill":
    open(f"{here}/killed", "w").close()
elif words[0] == "inspect":
    sys.exit(1)
elif "slow=1" in words:
    open(f"{here}/started", "w").close()
    import time
    while not os.path.exists(f"{here}/killed"):
        time.sleep(0.05)
    sys.exit(75)
"""


def answer(words: list[str]) -> None:
    """`needs` of the real program, which sees of the test's folder only data/, models/, runs/ and what is mounted."""
    import train.commands.needs  # noqa: F401 - before the hook, which would look at every file of every package
    from train.__main__ import main

    fence, stat = str(Path.cwd().parent), os.stat
    visible = os.environ["VISIBLE"].split(":")

    def look(path: Any) -> None:
        real = os.path.realpath(path) if isinstance(path, str | os.PathLike) else ""
        if real.startswith(f"{fence}/") and not any(f"{real}/".startswith(f"{seen}/") for seen in visible):
            raise FileNotFoundError(2, "not mounted", str(path))

    def look_and_stat(path: Any, **how: Any) -> os.stat_result:
        look(path)
        return stat(path, **how)

    os.stat = look_and_stat
    sys.addaudithook(lambda event, arguments: look(arguments[0]) if event == "open" else None)
    sys.exit(main(words))


def script(path: Path, text: str) -> None:
    path.write_text(text.replace("@PYTHON@", sys.executable).replace("@ROOT@", str(ROOT)))
    path.chmod(0o755)


def checkout(project: Path) -> Path:
    """docker/'s scripts, the stand-in first on PATH, no GPU, a host that is fit unless FAKE_HOST says what is wrong
    with it."""
    for name in ("docker", "train/recipes", "data/samples", "models", "runs", "bin"):
        (project / name).mkdir(parents=True)
    for name in FILES.split():
        shutil.copy(ROOT / name, project / name)
    (project / "data/models.lock").touch()
    script(project / "bin/docker", DOCKER)
    script(project / "bin/nvidia-smi", "#!/bin/sh\nexit 9\n")
    script(project / "docker/host", '#!/bin/sh\n[ -z "$FAKE_HOST" ] || { echo "error: $FAKE_HOST" >&2; exit 2; }\n')
    script(project / "docker/build", "#!/bin/sh\ntouch built\n")
    return project


def environment(project: Path, **variables: str) -> dict[str, str]:
    """This process's, without the settings that would decide for the scripts, and with an image."""
    hidden = {"IMAGE", "ACCELERATOR", "CUDA", "TORCH", "GPUS", "DATA_DIR", "MODELS_DIR", "RUNS_DIR"}
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    image = {"FAKE_IMAGES": "qwen-finetune:0.1.0-cu118", "RUNTIME": "docker"}
    return {**kept, "PATH": f"{project}/bin:{os.environ['PATH']}", **image, **variables}


def log(project: Path) -> list[dict[str, Any]]:
    """What docker was told, call by call: words, and env."""
    path = project / "bin/log"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    answer(sys.argv[1:])
