"""A linter for inputs that are not pinned: what a build takes from elsewhere without a hash or an exact version.

One function a kind of file, each from its text to the lines that are wrong. The trade-off: it reads lines, not
languages, so it also refuses what it cannot follow, as a download by curl whose hash is checked later; there are none
here, and a new one should be seen.
"""

import re
from typing import Any

import yaml

DIGEST = r"@sha256:[0-9a-f]{64}"
INSTALLERS = {
    "docker/setup": "--require-hashes",
    "docker/apt/install": "Dir::Etc::SourceList",
    "docker/in-image": "--require-hashes",
}  # and how theirs is pinned
FETCHES = re.compile(
    r"\b(curl|wget|npx|git clone|(?:uv )?pip3? (?:install|download)|pipx? run|npm (?:install|i|ci|exec)|"
    r"apt(?:-get)?\s+(?:-\S+\s+)*install|go install"
    r"|cargo install|gem install|docker pull(?! \"\$image\"))\b"
)


def commands(name: str, text: str) -> list[str]:
    """Shell, make and RUN: nothing is fetched but by the installers, and by them by hash or snapshot.

    The image that the user names with IMAGE= is theirs to pin.
    """
    text = re.sub(r"\\\n\s*", " ", text)  # lines that go on
    found = []
    for line in text.splitlines():
        code = re.sub(r"(^|\s)#.*", "", line)
        # Advice, no command
        code = re.sub(r"\b(?:fail|problem|say|echo) .*", lambda told: re.sub(r'"[^"]*"', "", told[0]), code)
        if not FETCHES.search(code) and '"${apt[@]}" install' not in code and '/uv" pip install' not in code:
            continue
        if (
            name not in INSTALLERS
            or (INSTALLERS[name] not in text)
            or ("pip install" in code and "--require-hashes" not in code)
        ):
            found.append(line.strip())
    return found


def dockerfile(text: str) -> list[str]:
    """FROM by digest, by the name of a stage, or by an argument; COPY --from a stage; no ADD from the network, no
    fetched frontend."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    stages = {match[1] for line in lines if (match := re.search(r"^FROM \S+ AS (\S+)", line))}
    found = [line for line in lines if line.lower().startswith("# syntax=") and not re.search(DIGEST, line)]
    for line in lines:
        source = re.match(r"FROM (?:--\S+ )*(\S+)", line) or re.match(r"COPY .*--from=(\S+)", line)
        if source and not (
            source[1] in stages or re.search(DIGEST + "$", source[1]) or source[1].startswith(("${", "scratch"))
        ):
            found.append(line)
        for mount in re.findall(r"--mount=\S*from=([^,\s]+)", line):
            found += [line] * (mount not in stages)
        if re.match(r"ADD .*(https?://|git@)", line) and "--checksum=sha256:" not in line:
            found.append(line)
        if (default := re.match(r"ARG \w+=(\S*[:/]\S*)", line)) and not re.search(DIGEST, default[1]):
            found.append(line)
    return found + commands("docker/Dockerfile", "\n".join(line for line in lines if line.startswith("RUN")))


def compose(text: str) -> list[str]:
    """An image is this project's own, of which make says which, or has a digest."""
    services: dict[str, Any] = yaml.load(text, Loader=_Loose)["services"]
    images = [(name, service.get("image")) for name, service in services.items()]
    return [
        f"{name}: {image}"
        for name, image in images
        if image and not re.search(r"^\$\{IMAGE:-qwen-finetune:|" + DIGEST + "$", image)
    ]


class _Loose(yaml.SafeLoader):
    """Compose's own tags (!reset) are no matter here."""


_Loose.add_multi_constructor("!", lambda loader, suffix, node: None)


def workflow(text: str) -> list[str]:
    """Actions by commit, machines by version, containers by digest, and commands as everywhere."""
    jobs: dict[str, Any] = yaml.safe_load(text)["jobs"]
    found = []
    for job in jobs.values():
        found += [f"runs-on: {job.get('runs-on')}"] * ("latest" in str(job.get("runs-on")))
        containers = [job.get("container"), *job.get("services", {}).values()]
        images = [c if isinstance(c, str) else c["image"] for c in containers if c]
        found += [f"image: {image}" for image in images if not re.search(DIGEST + "$", image)]
        for step in [*job.get("steps", []), job]:
            uses = step.get("uses")
            if uses and not uses.startswith("./") and not re.search(r"@[0-9a-f]{40}$|" + DIGEST + "$", uses):
                found.append(f"uses: {uses}")
            found += commands("workflow", step.get("run", ""))
    return found


def lock(text: str) -> list[str]:
    """Every requirement has one exact version or one file, and a sha256 each."""
    found = []
    for block in re.split(r"(?<!\\)\n", re.sub(r"^#.*\n?", "", text, flags=re.MULTILINE).strip()):
        line, *hashes = re.split(r" \\\n\s+--hash=", block)
        exact = re.fullmatch(r'[\w.-]+(==[\w.+]+| @ https://\S+\.whl)( ; python_version == "3\.\d+")?', line)
        if line and not (exact and hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in hashes)):
            found.append(line)
    return found
