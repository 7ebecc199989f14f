"""Keeping memory between training steps on a CPU."""

import ctypes
import sys

# Parameters of glibc's mallopt(3), from malloc.h.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Have this process keep what it frees, for the next step to use, rather than give it back.

    By default every large tensor is mapped anew and its pages are faulted in at first touch, in
    each step again; with many experts that is as long as the arithmetic (experiments/LOG.md). The
    process then never shrinks below its largest step. Does nothing where there is no glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl has neither
        return
    mallopt(MMAP_MAX, 0)
    mallopt(TRIM_THRESHOLD, 2**31 - 1)
    mallopt(TOP_PAD, 256 << 20)
