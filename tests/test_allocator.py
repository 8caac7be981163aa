"""The allocator's settings, seen from outside: what a process keeps after it has freed a large block."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FREES_A_BLOCK = """
import ctypes, psutil, sys
from resgrid.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
before = psutil.Process().memory_info().rss
block = libc.malloc(200_000_000)
ctypes.memset(block, 1, 200_000_000)
libc.free(block)
print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this system's C library is not glibc")
def test_freed_memory_is_kept_where_it_would_have_been_handed_back():
    kept, handed_back = (
        int(
            subprocess.run([sys.executable, "-c", FREES_A_BLOCK, how], capture_output=True, check=True).stdout
        )
        for how in ("keep", "default")
    )
    assert kept > 190_000_000
    assert handed_back < 10_000_000
