"""Triton where it is installed, and None where it is not: the kernels' files import it from here."""

import os

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without Triton runs the plain definitions
    triton = tl = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
