"""Bytes that atheris invents, guided by which lines of the reader they reach: the same must hold as in the tests.

    python -m venv /tmp/fuzz && /tmp/fuzz/bin/pip install atheris        # Python 3.11; it is not locked
    PYTHONPATH=.:.venv/lib/python3.11/site-packages nice /tmp/fuzz/bin/python tests/faults/fuzz_data_atheris.py \\
        -max_total_time=600 -max_len=2000 /tmp/fuzz/corpus

The corpus begins with every kind of damage of tests/data/damaged_files.py. A failure ends the campaign, and atheris
writes the bytes to a file `crash-…`.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["train.data"]):
    from train.data.files import file_kinds
    from train.data.mending import repair  # noqa: F401  # instrumented

from tests.data.damaged_files import DAMAGE
from tests.data.mending.test_repair_properties import Damaged, check
from train.data.rows.data_row import DataFile

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-data-", dir="/dev/shm"))


def one(raw: bytes) -> None:
    path = FOLDER / "data.json"
    path.write_bytes(raw)
    if file_kinds.kind_of(DataFile.of(path)) == "json":
        check(Damaged(raw, [], "", False), FOLDER)


def main() -> None:
    corpus = Path(sys.argv[-1])
    corpus.mkdir(parents=True, exist_ok=True)
    for number, damage in enumerate(DAMAGE.values()):
        (corpus / f"kind-{number}").write_bytes(damage.bytes)
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
