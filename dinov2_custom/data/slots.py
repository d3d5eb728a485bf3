"""Memory that several processes share: numbered slots, each with the same named arrays, and one word a process.

Anonymous where the system has memfd (Linux), so that neither the size of /dev/shm nor a killed process matters; else a
file in the temporary folder, removed from it as soon as it is open. Not in here: who fills which slot (``pool``). Read
:meth:`Slots.arrays` first.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Mapping
from multiprocessing import reduction
from typing import Any, NamedTuple

import numpy as np

from dinov2_custom.errors import DataError

logger = logging.getLogger("dinov2")
PAGE = mmap.ALLOCATIONGRANULARITY
ALIGNMENT = 64


class Field(NamedTuple):
    """One array of a slot."""

    shape: tuple[int, ...]
    dtype: Any = np.uint8


def allocate(fields: Mapping[str, Field]) -> dict[str, np.ndarray]:
    """Return one slot in this process's own memory."""
    return {name: np.zeros(field.shape, field.dtype) for name, field in fields.items()}


class Slots:
    """``number`` slots of ``fields`` and ``num_words`` int64 words, in memory that child processes share.

    Given to a child as an argument of its process, by any start method.

    Raises:
        DataError: there is no room for them.
    """

    def __init__(self, fields: Mapping[str, Field], number: int, num_words: int = 0):
        self.fields = dict(fields)
        self.number = number
        self.num_words = num_words
        self.slot_size = _round_up(sum(_size(field) for field in self.fields.values()), PAGE)
        self.start = _round_up(8 * num_words, PAGE)
        self._fd = _open(self.start + number * self.slot_size)
        self._map()

    def _map(self) -> None:
        self._memory = mmap.mmap(self._fd, max(PAGE, self.start + self.number * self.slot_size))
        self._bytes = np.frombuffer(self._memory, np.uint8)

    @property
    def words(self) -> np.ndarray:
        """The int64 words, zero at first."""
        return self._bytes[: 8 * self.num_words].view(np.int64)

    def bytes_of(self, i: int) -> np.ndarray:
        """Return all bytes of slot ``i``: whole pages."""
        return self._bytes[self.start + i * self.slot_size :][: self.slot_size]

    def arrays(self, i: int) -> dict[str, np.ndarray]:
        """Return the arrays of slot ``i``: views, the same memory in every process."""
        place, arrays = self.start + i * self.slot_size, {}
        for name, field in self.fields.items():
            count = math.prod(field.shape) * np.dtype(field.dtype).itemsize
            arrays[name] = self._bytes[place : place + count].view(field.dtype).reshape(field.shape)
            place += _size(field)
        return arrays

    def close(self) -> None:
        """Let go of the memory; it is freed with the last array that looks at it, in every process."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd, self._bytes, self._memory = -1, None, None

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in ("_memory", "_bytes")}
        state["_fd"] = reduction.DupFd(self._fd)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fd = state["_fd"].detach()
        self._map()


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


def _size(field: Field) -> int:
    return _round_up(math.prod(field.shape) * np.dtype(field.dtype).itemsize, ALIGNMENT)


def _open(size: int) -> int:
    """Return a file descriptor of ``size`` bytes of zeros that has no name."""
    size = max(size, PAGE)
    if hasattr(os, "memfd_create"):
        try:
            fd = os.memfd_create("dinov2_batches")
        except OSError:
            pass
        else:
            os.ftruncate(fd, size)
            return fd
    return _open_file(size)


def _open_file(size: int) -> int:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if size > 0.95 * free:
        raise DataError(
            f"expected {size / 2**20:,.0f} MiB for batches in {folder}, got {free / 2**20:,.0f} MiB free; set TMPDIR "
            "to a folder with room, or lower train.num_workers or train.batch_size_per_gpu"
        )
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, not a bus error later
        else:
            os.truncate(file.fileno(), size)
        fd = os.dup(file.fileno())
    logger.info(f"batches travel through a file in {folder} ({size / 2**20:,.0f} MiB): no anonymous shared memory here")
    return fd
