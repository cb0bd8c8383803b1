"""The end of a process: what was promised for the end is done, and nothing waits for Python to free every object."""

import subprocess
import sys

BEGIN = """
import atexit, ctypes, sys, threading
from train.common.leaving import leave
class Late:
    def __del__(self): print("freed", flush=True)
late = Late()
atexit.register(print, "at exit")
"""


def ended(script: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-c", BEGIN + script], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_the_end_comes_at_once_with_its_status_and_all_output() -> None:
    script = "ctypes.CDLL(None).printf(b'from C\\n'); sys.stdout.write('no line end'); leave(3)"
    status, output, errors = ended(script)
    assert (status, errors) == (3, "")
    assert "freed" not in output
    assert sorted(output.replace("no line end", "no line end\n").split("\n")) == [
        "",
        "at exit",
        "from C",
        "no line end",
    ]


def test_it_waits_for_a_thread_that_has_work_to_finish() -> None:
    work = "import time; time.sleep(0.5); print('done', flush=True)"
    status, output, _ = ended(f"threading.Thread(target=lambda: exec({work!r})).start(); leave(0)")
    assert status == 0
    assert output.index("done") < output.index("at exit")


def test_what_ends_in_c_ends_as_python_does() -> None:
    status, output, _ = ended("sys.modules['mpi4py.MPI'] = sys; leave(5)")
    assert (status, output) == (5, "at exit\nfreed\n")


def test_it_does_not_wait_for_one_that_works_for_ever() -> None:
    status, output, _ = ended("threading.Thread(target=threading.Event().wait, daemon=True).start(); leave(1)")
    assert (status, output) == (1, "at exit\n")


def test_a_reader_that_is_gone_is_no_error() -> None:
    script = f"{BEGIN}\nimport os; os.close(1); leave(4)"
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 4


def test_ctrl_c_at_the_end_changes_no_status() -> None:
    script = "import os, signal; atexit.register(os.kill, os.getpid(), signal.SIGINT); leave(6)"
    status, output, errors = ended(script)
    assert (status, output, errors) == (6, "at exit\n", "")
