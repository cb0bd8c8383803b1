"""Texts by number in a temporary file, of which 8 bytes each are in memory."""

import os
import tempfile
from array import array


class TextStore:
    """Add texts one after another, and take any of them."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `close`, or with the last reference
        self._ends = array("q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, text: str) -> int:
        """Keep `text`; returns its number."""
        self._ends.append(self._ends[-1] + self._file.write(text.encode("utf-8", "surrogatepass")))
        return len(self) - 1

    def __getitem__(self, number: int) -> str:
        """
        Raises:
            IndexError: there is no such text.
        """
        if number < 0:
            raise IndexError(number)
        start, end = self._ends[number], self._ends[number + 1]
        self._file.flush()
        return os.pread(self._file.fileno(), end - start, start).decode("utf-8", "surrogatepass")

    def close(self) -> None:
        """Remove the file."""
        self._file.close()
