"""Python's collector of garbage while a command starts: importing torch and reading data make a million objects that stay.

The collector looks at all of them again each time their number has grown by a quarter, which is a fifth of the time
before the first step. Knows nothing of what the objects are.
"""

import gc

USUAL = gc.get_threshold()
SELDOM = (100_000, 20, 20)  # objects made and not freed, before the youngest are looked at; then how often the older


def collect_seldom() -> None:
    """From now on until `collect_as_usual`: few cycles become garbage while a command starts."""
    gc.set_threshold(*SELDOM)


def leave_alone_what_exists() -> None:
    """Never again look at what exists now. For modules and data, before a model is made, which has to be freed later.

    Once in a process: what a first stage leaves behind, its model too, is for the collector.
    """
    if not gc.get_freeze_count():
        gc.freeze()


def collect_as_usual() -> None:
    """Collect as Python does by itself."""
    gc.set_threshold(*USUAL)
