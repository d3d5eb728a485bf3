"""Keep freed memory in a CPU run, as each step allocates the same large tensors again.

glibc returns large blocks to the kernel when they are freed, and the kernel zeroes each page on the next allocation.
That takes as long as a third of a step's computation.
"""

from __future__ import annotations

import ctypes

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 64 * 2**20


def keep_freed_memory() -> bool:
    """Stop this process's allocator from returning memory to the system; return whether that is supported.

    Only glibc supports it; on macOS, Windows and musl nothing changes. The peak stays about the same; memory allocated
    once stays with the process until it ends.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    options = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return all([mallopt(option, value) == 1 for option, value in options])
