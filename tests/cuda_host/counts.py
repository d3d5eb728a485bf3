"""Read the counters of the preloaded stand-in from inside the process: copies, launches, host waits.

Without the stand-in, :func:`is_loaded` is False and nothing else works.
"""

from __future__ import annotations

import ctypes
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

_LIBRARY = ctypes.CDLL(None)
_LISTENER = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


def is_loaded() -> bool:
    return hasattr(_LIBRARY, "cuda_host_counts")


def counts() -> Counter[str]:
    """Return all counters: ``sync NAME``, ``copy A to B`` and its bytes, ``launches``, ``kernel NAME`` and others."""
    size = 1 << 20
    text = ctypes.create_string_buffer(size)
    assert _LIBRARY.cuda_host_counts(text, ctypes.c_size_t(size)) < size
    rows = (line.split(" ", 1) for line in text.value.decode().splitlines())
    return Counter({name: int(number) for number, name in rows})


def syncs(found: Counter[str]) -> int:
    """Return how often the host waited for the device."""
    return sum(number for name, number in found.items() if name.startswith("sync "))


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Yield a counter that is filled with the block's counts at its end."""
    before, found = counts(), Counter()
    yield found
    found.update(counts() - before)


@contextmanager
def sync_stacks() -> Iterator[list[str]]:
    """Yield a list that collects ``WHAT`` and the Python stack of each host wait inside the block."""
    stacks: list[str] = []
    listener = _LISTENER(lambda what: stacks.append(f"{what.decode()}\n{''.join(traceback.format_stack()[-8:-1])}"))
    _LIBRARY.cuda_host_listen(listener)
    try:
        yield stacks
    finally:
        _LIBRARY.cuda_host_listen(None)
