"""Let a CPU run keep the memory it frees: a step asks for the same large tensors again and again.

glibc gives large blocks back to the kernel when they are freed, which fills each page with zeros when it is asked for
the next time. In a step that takes as long as a third of the computation. Read :func:`keep_freed_memory` first.
"""

from __future__ import annotations

import ctypes

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 64 * 2**20


def keep_freed_memory() -> bool:
    """Tell this process's allocator not to return memory to the system; return whether it is one that can be told.

    Only glibc's can: not that of macOS, Windows or musl, where nothing changes. The peak stays about what it was; what
    was needed once stays with the process until it ends.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    options = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return all([mallopt(option, value) == 1 for option, value in options])
