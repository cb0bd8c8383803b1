"""python -m train VERB [key=value …]: the verb table, and the only reader of argv.

python -m train needs VERB [key=value …], for docker/run: the paths that the command needs (train/commands/needs.py).
"""

import importlib
import logging
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from train.common import commands, cores, terminal
from train.common.errors import UserError, explain
from train.common.leaving import leave
from train.config.options import build, describe, pairs
from train.config.recipe import current_names


@dataclass(frozen=True)
class Verb:
    """A row of train/verbs.txt, whose header explains the words."""

    data: str
    models: str
    runs: str
    gpu: str
    network: str
    text: str


def _read_verbs() -> dict[str, Verb]:
    lines = Path(__file__).with_name("verbs.txt").read_text(encoding="utf-8").strip().split("\n")
    rows = [line.split(maxsplit=6) for line in lines if not line.startswith("#")]
    return {verb: Verb(*columns) for verb, *columns in rows}


VERBS = _read_verbs()
USAGE = "usage: python -m train VERB [key=value ...]      python -m train VERB --help\n\n"


def usage() -> str:
    return USAGE + "\n".join(f"  {name:10} {verb.text}" for name, verb in VERBS.items())


def run(verb: str, words: list[str]) -> None:
    """Read `words` as the verb's options and run it; `--help` prints them instead."""
    if verb not in VERBS:
        raise UserError(f"unknown verb {verb!r}.\n{usage()}")
    module = importlib.import_module(f"train.commands.{verb}")
    if {"-h", "--help", "help"} & set(words):
        print(commands.spelt(f"{module.__doc__}\n\n{describe(module.Options)}"))
        return
    parse = getattr(module, "parse", lambda values: build(module.Options, values))
    try:
        words = [terminal.readable_word(word) for word in words]
    except ValueError as error:
        raise UserError(str(error)) from None
    values, notes = current_names(pairs(words))
    for note in notes:
        print(note, file=sys.stderr)
    module.run(parse(values))


def needs(words: list[str]) -> None:
    """Write what VERB with these words needs (see commands/needs.py); for `train` also the base to fetch first."""
    if not words or words[0] not in VERBS:
        raise UserError(f"needs of which verb? {usage()}")
    name, verb = words[0], VERBS[words[0]]
    module = importlib.import_module("train.commands.needs")
    records = module.paths(name, verb, words[1:])
    if verb.network == "base" and (base := importlib.import_module(f"train.commands.{name}").wanted_base(words[1:])):
        records.append(("fetch", base))
    module.write(records)


def quiet() -> None:
    """Hide what pinned packages print about themselves at import; warnings about the user's own work still show."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # about torch's pytree, renamed
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # "compiled without GPU support", on every CPU machine


def main(argv: list[str]) -> int:
    """Run one command; returns the exit status. A reader that closes the pipe, as `head` does, ends it quietly."""
    terminal.set_up()
    cores.limit_threads()
    quiet()
    try:
        try:
            return _status(argv)
        finally:
            if sys.stdout:  # None if it was closed before the start
                sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as error:
        if not terminal.is_closed_pipe(error):
            raise
        terminal.discard_output()
        if argv[:1] in (["train"], ["demo"]):  # work was under way
            print("stopped: the reader of the output has closed it. The same command continues.", file=sys.stderr)
        return terminal.CLOSED_PIPE


def _status(argv: list[str]) -> int:
    """Run one command and report its errors; returns the exit status."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    try:
        needs(argv[1:]) if argv[0] == "needs" else run(argv[0], argv[1:])
    except UserError as error:
        print(f"error: {commands.spelt(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if (message := explain(error, argv[0])) is None:
            raise
        print(f"error: {commands.spelt(message)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
