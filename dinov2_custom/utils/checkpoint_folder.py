"""A training checkpoint on disk: a folder of safetensors files and, written last, ``checkpoint.json``.

A tensor may be in several files, some of its rows in each; the files' metadata gives their position. The marker names
the files with their sizes and checksums and holds all values that are not tensors. A folder without it, or whose files
do not match it, is not a checkpoint. Only JSON and raw numbers are read, never a pickle.
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dinov2_custom.errors import CheckpointError
from dinov2_custom.files import flush, parse_json_object, utf8_path
from dinov2_custom.utils.run_folder import MARKER

FORMAT = 3
CHUNK = 2**24
_CHECKSUM = re.compile(r',\n "crc32": (\d{1,10})\n}\s*\Z')
_INT64 = 2**63
_SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}  # of torch.amp.GradScaler
_FILE = re.compile(r"rank_\d{5}\.safetensors")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # as formatted by safetensors


class Piece(NamedTuple):
    """Rows [start, start + len(tensor)) of a tensor of ``shape``; a tensor without dimensions is one piece."""

    tensor: Tensor
    start: int
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, tensor: Tensor) -> Piece:
        return cls(tensor, 0, tuple(tensor.shape))


class Written(NamedTuple):
    """A written file: its size and its CRC-32."""

    num_bytes: int
    crc32: int


def file_of_rank(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def write_pieces(path: Path, pieces: Mapping[str, Piece]) -> Written:
    """Write ``pieces`` to ``path`` and flush them to the disk; tensors on a device are copied to host memory.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {name: piece.tensor.detach().cpu().contiguous() for name, piece in pieces.items()}
    rows = {name: [p.start, *p.shape] for name, p in pieces.items() if p.shape != tuple(p.tensor.shape)}
    path.touch()
    mode = path.stat().st_mode  # from the umask; the file by safetensors that replaces it has mode 0600
    try:
        save_file(tensors, path, {"rows": json.dumps(rows)})
    except SafetensorError as e:
        found = _OS_ERROR.search(str(e))
        raise (OSError(int(found[1]), os.strerror(int(found[1]))) if found else OSError(str(e))) from e
    path.chmod(mode)
    with open(path, "rb") as file:
        flush(file.fileno())
        header = file.read(8)
        header += file.read(int.from_bytes(header, "little"))
    crc, size = zlib.crc32(header), len(header)
    with utf8_path(path) as plain:
        names = safe_open(plain, "pt").offset_keys()
    for name in names:  # from memory: the checksum of the intended content
        data = memoryview(tensors[name].reshape(-1).view(torch.uint8).numpy())
        crc, size = zlib.crc32(data, crc), size + len(data)
    return Written(size, crc)


def checksum(path: Path) -> Written:
    """Return size and CRC-32 of a file."""
    crc, size = 0, 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return Written(size, crc)


def write_marker(folder: Path, files: dict[str, Written], values: dict[str, Any]) -> None:
    """Declare ``folder`` complete. A torn marker lacks its checksum, so it is written in place.

    The last entry, ``crc32``, is the checksum of the text before it.

    Raises:
        OSError: the marker cannot be written.
    """
    marker = {"format": FORMAT, **values, "files": {name: written._asdict() for name, written in files.items()}}
    text = json.dumps(marker, indent=1)
    with open(folder / MARKER, "w") as file:
        file.write(text.removesuffix("\n}") + f',\n "crc32": {zlib.crc32(text.encode())}\n}}')
        file.flush()
        flush(file.fileno())
    flush_folder(folder)


def flush_folder(folder: Path) -> None:
    """Flush the directory entries of ``folder`` to disk, if the system supports it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def read_marker(folder: Path) -> dict[str, Any]:
    """Return the content of the marker in ``folder``.

    Raises:
        CheckpointError: no marker, a wrong checksum, or invalid values.
    """
    path = folder / MARKER
    try:
        text = path.read_text(encoding="utf-8")
        values = parse_json_object(text, finite=False)  # a run may store non-finite numbers; those below must be finite
        values.pop("crc32", None)
        if values.get("format") != FORMAT:
            raise CheckpointError(
                f"expected a checkpoint of format {FORMAT} at {folder}, got {values.get('format')!r:.50}; read it with "
                "the version that wrote it"
            )
        found = _CHECKSUM.search(text)
        if found is None or zlib.crc32(f"{text[: found.start()]}\n}}".encode()) != int(found[1]):
            raise ValueError("another checksum than when it was written")
        check_values(values)
        if not isinstance(files := values.get("files"), dict) or not files:
            raise ValueError(f"the files {files!r:.100}")
        for name, fields in files.items():
            if not _FILE.fullmatch(name) or not isinstance(fields, dict) or set(fields) != set(Written._fields):
                raise ValueError(f"the file {name!r:.100} with {fields!r:.100}")
            check_whole(fields, "num_bytes", 0, _INT64)
            check_whole(fields, "crc32", 0, 2**32)
    except FileNotFoundError as e:
        raise CheckpointError(f"expected a complete checkpoint, got a folder without {MARKER}: {folder}") from e
    except (OSError, ValueError) as e:
        raise CheckpointError(f"expected a readable {MARKER}, could not read {path}: {e}") from e
    return values


def check_values(values: Mapping[str, Any]) -> None:
    """Check the values of a checkpoint that a run resumes from; unknown keys may hold anything.

    Raises:
        ValueError: a value has a type or range that no run writes.
    """
    check_whole(values, "iteration", 0, _INT64)
    for name, least in (("number", 1), ("world_size", 1), ("draws", 0), ("skipped_steps", 0), ("has_row_of_stop", 0)):
        if values.get(name) is not None:
            check_whole(values, name, least, 2 if name == "has_row_of_stop" else _INT64)
    for name in ("scaler", "config", "course", "versions", "windows", "data"):
        if not isinstance(values.get(name), Mapping | None):
            raise ValueError(f"expected names and values as {name}, got {values[name]!r:.100}")
    if values.get("scaler") and set(values["scaler"]) != _SCALER:
        raise ValueError(f"expected {', '.join(sorted(_SCALER))} in scaler, got {list(values['scaler'])!r:.200}")
    for name in ("scaler", "course"):
        for key, value in (values.get(name) or {}).items():
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise ValueError(f"expected a number from 0 on as {name}.{key}, got {value!r:.100}")
    for name, window in (values.get("windows") or {}).items():
        if not isinstance(window, list) or not all(_is_number(number) for number in window):
            raise ValueError(f"expected numbers as windows.{name:.80}, got {window!r:.100}")
    if data := values.get("data"):
        check_whole(data, "images", 0, _INT64)
        if not isinstance(data.get("digest"), str):
            raise ValueError(f"expected text as data.digest, got {data.get('digest')!r:.100}")
    for name in ("wandb_run_id", "mlflow_run_id"):
        if not isinstance(values.get(name), str | None):
            raise ValueError(f"expected text as {name}, got {values[name]!r:.100}")


def _is_number(value: Any) -> bool:
    """Return whether ``value`` is an entry of a series' window: a number, or the string of a non-finite one."""
    return type(value) is float or (type(value) is int and abs(value) < _INT64) or value in ("nan", "inf", "-inf")


def check_whole(values: Mapping[str, Any], name: str, least: int, below: int) -> None:
    """Check that ``values[name]`` is an integer in [least, below).

    Raises:
        ValueError: otherwise.
    """
    value = values.get(name)
    if type(value) is not int or not least <= value < below:
        raise ValueError(f"expected a whole number from {least} on as {name}, got {value!r:.100}")


class Part(NamedTuple):
    """Rows [start, stop) of a tensor of shape ``whole``, in one file."""

    stored: Any  # a lazy slice of safetensors
    start: int
    stop: int
    whole: tuple[int, ...]


class StoredState:
    """Read the checkpoint in ``folder``.

    ``values``: the content of the marker. ``shapes``: shape of each whole tensor by name.

    Raises:
        CheckpointError: no marker, a damaged one, or files inconsistent with it or with each other.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.values = read_marker(self.folder)
        self.written = {name: Written(**fields) for name, fields in self.values.pop("files").items()}
        parts: dict[str, list[Part]] = {}
        for file in self.written:
            for name, part in self._open(file).items():
                parts.setdefault(name, []).append(part)
        self._parts = {name: sorted(found, key=lambda part: part.start) for name, found in parts.items()}
        self.shapes = {name: self._whole_shape(name) for name in self._parts}

    def _open(self, name: str) -> dict[str, Part]:
        path, expected = self.folder / name, self.written[name].num_bytes
        try:
            if (size := path.stat().st_size) != expected:
                raise ValueError(f"{size} bytes, expected {expected}")
            with utf8_path(path) as plain:
                file = safe_open(plain, "pt")
            rows = parse_json_object((file.metadata() or {}).get("rows", "{}"))
            return {tensor: _part(file.get_slice(tensor), rows.get(tensor)) for tensor in file.keys()}  # noqa: SIM118
        except (OSError, ValueError, TypeError, SafetensorError) as e:
            raise CheckpointError(f"expected a file of tensors at {path}, could not read it: {e}") from e

    def _whole_shape(self, name: str) -> tuple[int, ...]:
        parts = self._parts[name]
        shape = parts[0].whole
        starts = [*(part.start for part in parts), shape[0] if shape else 1]
        stops = [0, *(part.stop for part in parts)]
        kinds = {(part.whole, part.stored.get_dtype()) for part in parts}
        if starts != stops or len(kinds) > 1:
            raise CheckpointError(f"expected all rows of {name} once, {shape}, in {self.folder}; got other ones")
        return shape

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Compare the checksums of every ``parts``-th file from number ``part`` on.

        Raises:
            CheckpointError: a file differs from what was written.
        """
        for name in list(self.written)[part::parts]:
            path = self.folder / name
            try:
                got = checksum(path)
            except OSError as e:
                raise CheckpointError(f"expected to read {path}, got {e.strerror or e}") from e
            if got != self.written[name]:
                raise CheckpointError(f"expected the file that was written at {path}, got another checksum")

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return a copy of rows [start, stop) of ``name`` on the CPU; a 0-dim tensor is returned whole."""
        parts = self._parts[name]
        if not self.shapes[name]:
            return parts[0].stored[...].clone()
        overlap = [(max(start, part.start) - part.start, min(stop, part.stop) - part.start) for part in parts]
        return torch.cat([part.stored[low : max(low, high)] for part, (low, high) in zip(parts, overlap, strict=True)])

    def read(self, name: str) -> Tensor:
        """Return the whole tensor ``name``."""
        shape = self.shapes[name]
        return self.rows(name, 0, shape[0] if shape else 0)


def _part(stored: Any, rows: list[int] | None) -> Part:
    """Return the position of the rows of ``stored``; ``rows`` is the first row and the whole shape."""
    shape = tuple(stored.get_shape())
    start, *whole = rows or (0, *shape)
    stop = start + (shape[0] if shape else 1)
    are_counts = all(type(number) is int and number >= 0 for number in (start, *whole))
    if not are_counts or len(whole) != len(shape) or (*whole[1:],) != shape[1:] or stop > (whole[0] if whole else 1):
        raise ValueError(f"rows {start} to {stop} of the shape {whole}")
    return Part(stored, start, stop, tuple(whole))


def read_folder(folder: Path) -> dict[str, Any]:
    """Return {"model": {name: tensor}, ...}: weights and loss centres, and the marker's values, without the optimizer.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
    """
    state = StoredState(folder)
    state.verify()
    model = {name: state.read(name) for name in state.shapes if not name.startswith("optimizer.")}
    return {**state.values, "model": model}
