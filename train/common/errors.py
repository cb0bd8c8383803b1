"""Error messages for the user: mistakes that the user can correct, and failures of the machine with their remedy.

The machine's errors are recognised by name: importing torch for its exception class would make every `--help` seconds
slower.
"""

import errno
from collections.abc import Sequence


class UserError(Exception):
    """A mistake that the user can correct. The message says what is wrong, where, and the remedy.

    It is printed without a traceback; the exit status is 2.
    """


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
WRONG_PATH = {
    errno.ENAMETOOLONG: "Give a shorter name.",
    errno.EISDIR: "Give a file, or another name.",
    errno.ENOTDIR: "A part of this path is a file: give another one.",
    errno.ELOOP: "This link leads to itself: give another path.",
    errno.EEXIST: "Move it away, or give another name.",
}
LESS_MEMORY = {  # verb -> what to do when memory runs out
    "train": "The run resumes from its last checkpoint with batch=1 and a larger accumulation=, with checkpointing=on "
    "or offload, or with embedding=host. A smaller length= or another base needs another RUN=. What fits a card: make "
    "plan.",
}


def explain(error: BaseException, verb: str) -> str | None:
    """The message for a machine without memory or disk space, or a place that is not writable; None for other errors.

    Args:
        verb: the command that failed, as in train/verbs.txt.
    """
    number = error.errno if isinstance(error, OSError) else None
    where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    if _is_out_of_memory(error):
        remedy = LESS_MEMORY.get(verb, "Close other programs that use this memory, or take a smaller base.")
        return f"out of memory: {_first_line(error)}\n{remedy}"
    if number in DISK_FULL or "No space left on device" in str(error):
        return (
            f"{where}the disk is full. Free some space, or give another folder; then run the same command again. "
            "Finished files are intact."
        )
    if number in WRONG_PATH and isinstance(error, OSError) and error.filename:
        name = str(error.filename)
        return f"{name[:80]}{'…' * (len(name) > 80)}: {error.strerror}. {WRONG_PATH[number]}"
    if number == errno.EIO:
        return f"{where}the disk or device failed to answer (input/output error). Check it, then run the command again."
    if "Connection closed by peer" in str(error):  # gloo's words
        return "another process of this run has ended, and its message says why. The same command continues."
    if number in NOT_WRITABLE and isinstance(error, OSError):
        return f"{where}{error.strerror}. Make it writable for this user, or give another folder (runs=, models=)."
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    """torch.OutOfMemoryError (by name), Python's MemoryError, or the RuntimeError of torch's CPU allocator."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"OutOfMemoryError", "MemoryError"}) or "DefaultCPUAllocator: can't allocate" in str(error)


def _first_line(error: BaseException) -> str:
    """`CUDA out of memory. Tried to allocate 2.00 GiB.`, without the advice that follows it."""
    line = str(error).partition("\n")[0]
    return line.partition(" GPU ")[0] or type(error).__name__


def first_few(names: Sequence[str], limit: int = 5) -> str:
    """The names for a sentence: at most `limit` of them, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
