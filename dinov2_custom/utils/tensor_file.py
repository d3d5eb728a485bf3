"""Named tensors in one file, in the safetensors format: a JSON header, then raw bytes. Nothing in it can run.

A tensor may be a run of rows of a larger one; where the run lies is said in the header's metadata, which other readers
of the format ignore. Not here: several files that belong together (``checkpoint_folder``). Read :func:`write_pieces`
and :class:`TensorFile` first.

Source: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import itertools
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinov2_custom.errors import CheckpointError
from dinov2_custom.files import flush, parse_json_object

CHUNK = 2**24
_MAX_HEADER = 10**8
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Piece(NamedTuple):
    """Rows [start, start + len(tensor)) of a tensor of ``shape``; a tensor without dimensions is one piece."""

    tensor: Tensor
    start: int
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, tensor: Tensor) -> Piece:
        return cls(tensor, 0, tuple(tensor.shape))


class Written(NamedTuple):
    """What was written: its size and its CRC-32."""

    num_bytes: int
    crc32: int


def write_pieces(path: Path, pieces: Mapping[str, Piece]) -> Written:
    """Write ``pieces`` to ``path`` and flush them to the disk.

    Raises:
        OSError: it cannot be written.
    """
    header: dict[str, Any] = {}
    place = 0
    for name, piece in pieces.items():
        end = place + piece.tensor.numel() * piece.tensor.element_size()
        shape = list(piece.tensor.shape)
        header[name] = {"dtype": _NAMES[piece.tensor.dtype], "shape": shape, "data_offsets": [place, end]}
        place = end
    rows = {name: [p.start, *p.shape] for name, p in pieces.items() if p.shape != tuple(p.tensor.shape)}
    header["__metadata__"] = {"rows": json.dumps(rows)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    crc, size = 0, 0
    # a generator: of tensors on a device, one at a time is in host memory
    on_host = (_as_bytes(piece.tensor.cpu()) for piece in pieces.values())
    with open(path, "wb") as file:
        for data in itertools.chain((len(text).to_bytes(8, "little"), text), on_host):
            file.write(data)
            crc, size = zlib.crc32(data, crc), size + len(data)
            del data  # before the next one is copied
        flush(file.fileno())
    return Written(size, crc)


def checksum(path: Path) -> Written:
    """Return size and CRC-32 of a file."""
    crc, size = 0, 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return Written(size, crc)


class Entry(NamedTuple):
    """Where a piece lies: byte ``offset`` in the file, its own ``shape``, its first row and the ``whole`` shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    start: int
    whole: tuple[int, ...]


class TensorFile:
    """Read pieces of ``path``. ``entries``: name -> :class:`Entry`.

    Raises:
        CheckpointError: no such file, or a header that says what cannot be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= min(_MAX_HEADER, size - 8):
                    raise ValueError(f"a header of {length} bytes in a file of {size}")
                header = parse_json_object(file.read(length))
            rows = parse_json_object(header.pop("__metadata__", {}).get("rows", "{}"))
            self.entries = {name: _entry(fields, rows.get(name), 8 + length, size) for name, fields in header.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise CheckpointError(f"expected a file of tensors at {path}, could not read it: {e}") from e

    def read_into(self, out: Tensor, name: str, first: int) -> None:
        """Fill ``out``, contiguous on the CPU, with rows of the piece ``name`` from its own row ``first`` on.

        Raises:
            CheckpointError: it cannot be read.
        """
        entry = self.entries[name]
        row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        target, done = _as_bytes(out), 0
        try:
            with open(self.path, "rb") as file:
                file.seek(entry.offset + first * row_bytes)
                while done < len(target) and (read := file.readinto(target[done : done + CHUNK])):
                    done += read
        except OSError as e:
            raise CheckpointError(f"expected to read {name} from {self.path}, got {e.strerror or e}") from e
        if done < len(target):
            raise CheckpointError(f"expected {len(target)} bytes of {name} in {self.path}, got {done}")


def _entry(fields: Mapping[str, Any], rows: list[int] | None, data: int, size: int) -> Entry:
    shape, (begin, end) = tuple(map(_natural, fields["shape"])), map(_natural, fields["data_offsets"])
    dtype = _DTYPES[fields["dtype"]]
    if end - begin != math.prod(shape) * dtype.itemsize or data + end > size:
        raise ValueError(f"{end - begin} bytes for the shape {shape} in {dtype}, up to byte {data + end} of {size}")
    start, *whole = map(_natural, rows or (0, *shape))
    whole = tuple(whole)
    if whole[1:] != shape[1:] or len(whole) != len(shape) or (shape and start + shape[0] > whole[0]):
        raise ValueError(f"rows {start} to {start + shape[0]} of the shape {whole}")
    return Entry(dtype, shape, data + begin, start, whole)


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a whole number, got {value!r}")
    return value


def _as_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a CPU tensor (a copy of it where it is not contiguous)."""
    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if len(flat) else memoryview(b"")
