"""Write outputs in atomic parts: tar shards, or batches of files in a plain folder.

A part consists of ``shard-000000.tar`` (or files below ``images/``) and ``shard-000000.jsonl``, which lists its
contents. The list is written last and marks the part as complete; a killed run resumes after the last complete part.
"""

from __future__ import annotations

import contextlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dinov2_custom.errors import DataError
from dinov2_custom.files import atomic_write, parse_json_object

from .change import Output
from .names import Taken
from .tiles import add_member

FILES_A_PART = 1000  # for a plain folder


class PartWriter:
    """Write outputs sequentially into ``folder``.

    Args:
        shard_size: size of a tar in bytes; 0 for a plain folder.

    ``position``: (image, output number) of the next output to :meth:`add`; everything before is complete.
    """

    def __init__(self, folder: Path, shard_size: int):
        self.folder, self.shard_size = folder, shard_size
        self.position = (0, 0)
        self.number = 0
        for temporary in folder.glob("shard-*.tmp"):
            temporary.unlink()
        while self._mark(self.number).exists():
            self.position = self._position(self._mark(self.number))
            self.number += 1
        self.taken = Taken(row["name"] for row in self.rows() if "name" in row)
        self._tar: tarfile.TarFile | None = None
        self._file = contextlib.ExitStack()  # closing it renames the tar
        self._rows: list[dict[str, Any]] = []
        self._size = 0
        self._next = self.position

    def _position(self, mark: Path) -> tuple[int, int]:
        match next(_lines(mark), {}).get("next"):
            case [int(image), int(output)] if min(image, output) >= 0:
                return image, output
        raise DataError(f"expected the list of a finished part, got none in {mark}; choose an empty folder")

    def _mark(self, number: int) -> Path:
        return self.folder / f"shard-{number:06d}.jsonl"

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the listed rows of all complete parts, in order."""
        for number in range(self.number):
            lines = _lines(self._mark(number))
            next(lines)
            yield from lines

    def add(self, i: int, k: int, output: Output, row: dict[str, Any]) -> None:
        """Write output ``k`` of image ``i``; add ``row`` to the list with the output's name and location."""
        self._next = (i, k)
        too_much = 0 < self._size and self.shard_size < self._size + len(output.data)
        if too_much if self.shard_size else len(self._rows) >= FILES_A_PART:
            self.finish()
        output = output._replace(name=self.taken.free(output.name))
        self._size += len(output.data)
        where = {"name": output.name, "bytes": len(output.data), "width": output.width, "height": output.height}
        if self.shard_size:
            tar = self._open()
            where |= {"shard": f"shard-{self.number:06d}.tar", "offset": add_member(tar, output)}
        else:
            path = self.folder / "images" / output.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path, "wb") as file:
                file.write(output.data)
        self._rows.append(row | where)
        self._next = (i, k + 1)

    def note(self, row: dict[str, Any]) -> None:
        """Add the row of an image without outputs to the list."""
        self._rows.append(row)

    def image_done(self, i: int) -> None:
        """Declare that image ``i`` has no more outputs."""
        self._next = (i + 1, 0)

    def _open(self) -> tarfile.TarFile:
        if self._tar is None:
            path = self.folder / f"shard-{self.number:06d}.tar"
            file = self._file.enter_context(atomic_write(path, "wb", fsync=True))
            self._tar = tarfile.open(
                fileobj=file, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape"
            )
        return self._tar

    def finish(self) -> None:
        """Complete the current part, if any."""
        if not self._rows:
            return
        if self._tar is not None:
            self._tar.close()
            self._file.close()
            self._tar = None
        with atomic_write(self._mark(self.number), fsync=True) as file:
            for row in [{"next": list(self._next)}, *self._rows]:
                file.write(json.dumps(row) + "\n")
        self.position, self.number, self._rows, self._size = self._next, self.number + 1, [], 0


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        try:
            yield from map(parse_json_object, file)
        except ValueError as e:
            raise DataError(f"expected the list of a finished part, got {e} in {path}; choose an empty folder") from e
