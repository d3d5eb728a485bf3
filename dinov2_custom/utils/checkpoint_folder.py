"""A training checkpoint on disk: a folder of tensor files and, written last, ``checkpoint.json``.

The marker names the files with their sizes and checksums and holds all that is no tensor. A folder without it, or whose
files do not fit it, is no checkpoint. Only JSON and raw numbers are read, never a pickle. Not here: which checkpoint is
the newest, writing (``train.checkpoint``). Read :class:`StoredState` first.
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2_custom.errors import CheckpointError
from dinov2_custom.files import flush, parse_json_object
from dinov2_custom.utils.run_folder import MARKER
from dinov2_custom.utils.tensor_file import TensorFile, Written, checksum

FORMAT = 3
_WITHOUT_CHECKSUM = 2  # written before markers had a checksum of their own
_CHECKSUM = re.compile(r',\n "crc32": (\d{1,10})\n}\s*\Z')
_INT64 = 2**63
_SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}  # of torch.amp.GradScaler
_FILE = re.compile(r"rank_\d{5}\.safetensors")


def file_of_rank(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def write_marker(folder: Path, files: dict[str, Written], values: dict[str, Any]) -> None:
    """Declare ``folder`` complete. A torn marker lacks its checksum, so it is written in place and never renamed.

    The last entry, ``crc32``, is the checksum of the file's text without it.

    Raises:
        OSError: it cannot be written.
    """
    marker = {"format": FORMAT, **values, "files": {name: written._asdict() for name, written in files.items()}}
    text = json.dumps(marker, indent=1)
    with open(folder / MARKER, "w") as file:
        file.write(text.removesuffix("\n}") + f',\n "crc32": {zlib.crc32(text.encode())}\n}}')
        file.flush()
        flush(file.fileno())
    flush_folder(folder)


def flush_folder(folder: Path) -> None:
    """Ask for the names in ``folder`` to be on the disk, where the system can be asked."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def read_marker(folder: Path) -> dict[str, Any]:
    """Return what the marker in ``folder`` holds.

    Raises:
        CheckpointError: none, or one that is not as it was written: another checksum, or values that cannot be.
    """
    path = folder / MARKER
    try:
        text = path.read_text(encoding="utf-8")
        values = parse_json_object(text, finite=False)  # a run may keep numbers that are not; those below have to be
        written = values.pop("crc32", None)
        if values.get("format") not in (FORMAT, _WITHOUT_CHECKSUM):
            raise CheckpointError(
                f"expected a checkpoint of format {FORMAT} at {folder}, got {values.get('format')!r:.50}; read it with "
                "the version that wrote it"
            )
        if written is not None or values["format"] != _WITHOUT_CHECKSUM:
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
    """Look at the values of a checkpoint that a run goes on from; keys that are not known here may hold anything.

    Raises:
        ValueError: one of a type or outside a range that no run writes.
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
    if not isinstance(values.get("wandb_run_id"), str | None):
        raise ValueError(f"expected text as wandb_run_id, got {values['wandb_run_id']!r:.100}")


def _is_number(value: Any) -> bool:
    """Return whether ``value`` is what a window of a series has: a number, or the text of one that is not finite."""
    return type(value) is float or (type(value) is int and abs(value) < _INT64) or value in ("nan", "inf", "-inf")


def check_whole(values: Mapping[str, Any], name: str, least: int, below: int) -> None:
    """Check that ``values[name]`` is a whole number of [least, below).

    Raises:
        ValueError: it is not.
    """
    value = values.get(name)
    if type(value) is not int or not least <= value < below:
        raise ValueError(f"expected a whole number from {least} on as {name}, got {value!r:.100}")


class StoredState:
    """Read the checkpoint in ``folder``.

    ``values``: what the marker holds. ``shapes``: of each whole tensor by name, ``dtypes`` likewise.

    Raises:
        CheckpointError: no marker, one that is damaged, or files that do not fit it or each other.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.values = read_marker(self.folder)
        self.written = {name: Written(**fields) for name, fields in self.values.pop("files").items()}
        self.files = [self._open(name) for name in self.written]
        pieces: dict[str, list[tuple[int, TensorFile]]] = {}
        for file in self.files:
            for name, entry in file.entries.items():
                pieces.setdefault(name, []).append((entry.start, file))
        self._pieces = {name: sorted(found, key=lambda one: one[0]) for name, found in pieces.items()}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for name in self._pieces:
            self._add(name)

    def _open(self, name: str) -> TensorFile:
        path, expected = self.folder / name, self.written[name].num_bytes
        file = TensorFile(path)
        if path.stat().st_size != expected:
            raise CheckpointError(f"expected {expected} bytes in {path}, got {path.stat().st_size}")
        return file

    def _add(self, name: str) -> None:
        entries = [file.entries[name] for _, file in self._pieces[name]]
        shape, row = entries[0].whole, 0
        for entry in entries:
            if (entry.whole, entry.dtype, entry.start) != (shape, entries[0].dtype, row):
                row = -1
                break
            row += entry.shape[0] if shape else 0
        if row != (shape[0] if shape else 0) or (len(entries) > 1 and not shape):
            raise CheckpointError(f"expected all rows of {name} once, {shape}, in {self.folder}; got other ones")
        self.shapes[name], self.dtypes[name] = shape, entries[0].dtype

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Compare the checksums of every ``parts``-th file from number ``part`` on.

        Raises:
            CheckpointError: a file is not what was written.
        """
        for file in self.files[part::parts]:
            expected = self.written[file.path.name]
            try:
                got = checksum(file.path)
            except OSError as e:
                raise CheckpointError(f"expected to read {file.path}, got {e.strerror or e}") from e
            if got != expected:
                raise CheckpointError(f"expected the file that was written at {file.path}, got another checksum")

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) of ``name`` on the CPU; a tensor without dimensions whole.

        Raises:
            CheckpointError: it cannot be read.
        """
        shape = self.shapes[name]
        out = torch.empty((stop - start, *shape[1:]) if shape else (), dtype=self.dtypes[name])
        for first, file in self._pieces[name]:
            if not shape:
                file.read_into(out, name, 0)
                break
            low, high = max(start, first), min(stop, first + file.entries[name].shape[0])
            if low < high:
                file.read_into(out[low - start : high - start], name, low - first)
        return out

    def read(self, name: str) -> Tensor:
        """Return the whole tensor ``name``."""
        shape = self.shapes[name]
        return self.rows(name, 0, shape[0] if shape else 0)


def read_folder(folder: Path) -> dict[str, Any]:
    """Return {"model": {name: tensor}, ...}: weights and loss centres, and the marker's values; no optimizer.

    Raises:
        CheckpointError: no checkpoint, or a damaged one.
    """
    state = StoredState(folder)
    state.verify()
    model = {name: state.read(name) for name in state.shapes if not name.startswith("optimizer.")}
    return {**state.values, "model": model}
