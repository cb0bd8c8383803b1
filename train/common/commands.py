"""Commands that are printed for a person to paste into a shell: quoted, with the folders that are not the usual ones.

They are spelt as the person started the program: by make, by compose, or by a plain run of the image. COMMANDS_AS in the
environment says which; the image and compose.yaml set it.
"""

import os
import re
import shlex
from collections.abc import Sequence

FORMS = {"make": "make", "compose": "docker compose run --rm", "docker": "docker run … IMAGE"}
CONTAINER = {  # what a container sees of the host, by how it was started
    "compose": "It sees ./data as data/, and no other folder: put the file there, or DATA_DIR=FOLDER before the command.",
    "docker": 'It sees what is mounted: -v "FOLDER:/workspace/data", and data=data/NAME.',
}
VERBS = "model|fetch|quantize|doctor|plan|data|train|export|infer|serve|studio|compare|report|verify|demo"  # targets of make that others have
USUAL = {"models": "models", "runs": "runs"}  # folders that a command need not name


def make(target: str, args: Sequence[str] = (), /, **keys: object) -> str:
    """`make TARGET KEY=value …`, each value quoted for the shell; empty values and the usual folders are left out.

    Args:
        args: key=value words without a key of make's own, for ARGS=.
    """
    given = {key: str(value) for key, value in keys.items() if str(value) != USUAL.get(key, "")}
    words = [f"{key.upper()}={_quote(value)}" for key, value in given.items()]
    return spelt(" ".join(["make", target, *words, *([f"ARGS={_quote_args(args)}"] if args else [])]))


def container_sees() -> str:
    """What this container sees of the host; empty outside one, and where make mounts what is named."""
    return CONTAINER.get(os.environ.get("COMMANDS_AS", ""), "")


def spelt(text: str) -> str:
    """`text`, with each `make VERB …` in it as the person would type it; ARGS="a=1 b=2" is a=1 b=2 without make."""
    form = FORMS.get(os.environ.get("COMMANDS_AS", "make"), "make")
    if form == "make":
        return text
    text = re.sub(rf"\bmake (?=(?:{VERBS})\b)", f"{form} ", text)
    return re.sub(r"\bARGS=(?:\"([^\"]*)\"|'([^']*)')", lambda match: match[1] or match[2] or "", text)


def _quote(value: str) -> str:
    return value if re.fullmatch("[\\w@%+=:,./…-]*", value) else shlex.quote(value)  # \w: Chinese needs no quotes


def _quote_args(args: Sequence[str]) -> str:
    """Words for ARGS=, which the shell splits once more."""
    text = " ".join(shlex.quote(word) for word in args)
    return shlex.quote(text) if re.search(r'["$`\\!]', text) else f'"{text}"'
