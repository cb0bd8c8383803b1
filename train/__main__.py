"""python -m train VERB [key=value …]: the verb table, and the only reader of argv."""

import importlib
import logging
import sys
import warnings

from train.common.errors import UserError, explain
from train.config.options import build, describe, pairs

VERBS = {
    "model": "fetch and verify a base model",
    "quantize": "make an Int4 (GPTQ format) folder of a float model",
    "doctor": "what here would fail, and the remedy, before anything is loaded",
    "plan": "the memory that training takes on a card, and what fits it",
    "data": "read, check and summarise a data set",
    "train": "fine-tune; the same command again goes on where it was cut off",
    "export": "merge the adapter into float weights, verified",
    "infer": "chat, or answer one prompt",
    "compare": "the same questions before and after",
    "verify": "is a finished run still what its record says; train it again and compare",
    "demo": "all of these on this machine, from nothing",
}
USAGE = "usage: python -m train VERB [key=value ...]      python -m train VERB --help\n\n"


def usage() -> str:
    return USAGE + "\n".join(f"  {verb:10} {text}" for verb, text in VERBS.items())


def run(verb: str, words: list[str]) -> None:
    """Read `words` as the verb's options and run it; `--help` prints them instead."""
    if verb not in VERBS:
        raise UserError(f"unknown verb {verb!r}.\n{usage()}")
    module = importlib.import_module(f"train.commands.{verb}")
    if {"-h", "--help", "help"} & set(words):
        print(f"{module.__doc__}\n\n{describe(module.Options)}")
        return
    parse = getattr(module, "parse", lambda values: build(module.Options, values))
    module.run(parse(pairs(words)))


def quiet() -> None:
    """Leave out what the pinned packages say of themselves at import; a warning about the user's own work still shows."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # torch's pytree has a new name
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # "compiled without GPU support", on every CPU machine


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    quiet()
    try:
        run(argv[0], argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if (told := explain(error, argv[0])) is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
