"""What a person is meant to read when something goes wrong: our own refusals, and the machine's in our words.

Knows the machine's errors by name only: importing torch to recognise its exception would cost every `--help` seconds.
"""

import errno


class UserError(Exception):
    """Something the user can mend: says what is wrong, where, and the remedy. Shown without a traceback; exit status
    2.
    """


FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
LESS_MEMORY = {
    "train": "With batch=1 and a larger accumulation=, checkpointing=on or offload, or embedding=host the run goes on from its last "
    "checkpoint. A smaller length= or another base wants another RUN=. What fits a card: make plan.",
}


def explain(error: BaseException, verb: str) -> str | None:
    """What a machine out of memory, out of disk or not permitting a write means, and the remedy; None for any other error."""
    number = error.errno if isinstance(error, OSError) else None
    where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    if _is_memory(error):
        remedy = LESS_MEMORY.get(verb, "Close other programs on it, or take a smaller base.")
        return f"out of memory: {_first_line(error)}\n{remedy}"
    if number in FULL or "No space left on device" in str(error):
        return f"{where}the disk is full. Free some space, or give another folder; the same command goes on. What was whole stays whole."
    if number in FORBIDDEN and isinstance(error, OSError):
        return f"{where}{error.strerror}. Make it writable for this user, or give another folder (runs=, models=)."
    return None


def _is_memory(error: BaseException) -> bool:
    """torch.OutOfMemoryError (by name), Python's MemoryError, or the RuntimeError of torch's CPU allocator."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"OutOfMemoryError", "MemoryError"}) or "DefaultCPUAllocator: can't allocate" in str(error)


def _first_line(error: BaseException) -> str:
    """`CUDA out of memory. Tried to allocate 2.00 GiB.`, without the advice that follows it."""
    line = str(error).partition("\n")[0]
    return line.partition(" GPU ")[0] or type(error).__name__
