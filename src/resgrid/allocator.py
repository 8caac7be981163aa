"""glibc's allocator, set to keep freed memory rather than to hand it back to the system.

By default it maps every large block anew and unmaps it when freed, so the activations of each operation are
pages that the kernel has to clear again. How much that costs depends on the machine: see
benchmarks/results.md.
"""

from __future__ import annotations

import ctypes
import platform

# Of malloc.h; see mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
LARGE = 2**31 - 1  # bytes


def keep_freed_memory() -> bool:
    """Call it before the first tensor; whether it was done: nothing happens without glibc."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((M_MMAP_MAX, 0), (M_MMAP_THRESHOLD, LARGE), (M_TRIM_THRESHOLD, LARGE))
    done = [mallopt(ctypes.c_int(name), ctypes.c_int(value)) for name, value in settings]
    return all(done)
