"""Store features in parts while they are computed and join them into one file; a kill loses at most one part.

A part is one file with the features of ``PART_BATCHES`` batches of consecutive images, renamed into place.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinov2_custom.errors import ConfigError, DataError
from dinov2_custom.files import atomic_write, parse_json_object, write_text

PART_BATCHES = 32
DESCRIPTION, ROWS, BAD = "embed.json", "rows.jsonl", "bad_images.jsonl"


class Store:
    """The output folder of one run.

    Args:
        description: everything that the features depend on, and the path ``weights`` for information; a folder with a
            different description is rejected.
        fresh: remove the files of another run.

    Raises:
        ConfigError: if the folder holds other features, or foreign files with our names.
    """

    def __init__(self, folder: Path, description: dict[str, Any], *, fresh: bool = False) -> None:
        self.folder, self.description = folder, description
        self.parts = folder / "parts"
        path = folder / DESCRIPTION
        files = (ROWS, BAD, "features.npy", "features.parquet")
        others = [name for name in (*files, self.parts.name) if (folder / name).exists()]
        if others and not path.is_file():  # also with `fresh`: only our own files are removed
            raise ConfigError(
                f"--output-dir: expected only files of this command in {folder}, got {', '.join(others)} of unknown "
                "origin; choose another folder"
            )
        if fresh:
            shutil.rmtree(self.parts, ignore_errors=True)
            for name in (*files, DESCRIPTION):
                (folder / name).unlink(missing_ok=True)
        if path.is_file():
            try:
                earlier = parse_json_object(path.read_text(encoding="utf-8"))
            except ValueError as e:
                raise ConfigError(
                    f"--output-dir: expected to read {path}, got {e}; choose another folder, or --overwrite"
                ) from e
            other = [
                f"{k}: {earlier.get(k)!r}, now {v!r}"
                for k, v in description.items()
                if k != "weights" and earlier.get(k) != v
            ]
            if other:
                raise ConfigError(
                    f"--output-dir: expected the same features as those in {folder}, got others:\n  "
                    + "\n  ".join(other)
                    + "\nchoose another folder, or --overwrite"
                )
        folder.mkdir(parents=True, exist_ok=True)
        # every process writes the description
        write_text(path, json.dumps(description, indent=2) + "\n", exclusive=True)
        self.parts.mkdir(exist_ok=True)

    @property
    def result_name(self) -> str:
        return f"features.{self.description['format']}"

    def is_complete(self) -> bool:
        """Return whether the result exists."""
        return (self.folder / self.result_name).is_file()

    def missing_parts(self) -> list[tuple[int, range]]:
        """Return (number, images) of every missing part, in order."""
        size = PART_BATCHES * self.description["batch_size"]
        images = self.description["images"]
        parts = [range(start, min(start + size, images)) for start in range(0, images, size)]
        return [(number, part) for number, part in enumerate(parts) if not self._path(number).is_file()]

    def save_part(self, number: int, features: np.ndarray, indices: Sequence[int], bad: dict[int, str]) -> None:
        """Save the features (n, D) of the images ``indices``, and the reasons for the unreadable ones."""
        path = self._path(number)
        with atomic_write(path, "wb", fsync=True) as file:
            np.savez(
                file,
                features=features.astype(self.description["save_dtype"]),
                indices=np.asarray(indices, dtype=np.int64),
                bad=np.asarray(list(bad), dtype=np.int64),
                reasons=np.asarray(list(bad.values()), dtype=str),
            )

    def finish(self, name: Any, label: Any) -> tuple[int, int]:
        """Join the parts and return the numbers of rows and bad images; ``name(i)`` and ``label(i)`` describe an image.

        Raises:
            DataError: if there is no readable image.
        """
        indices, bad = [], {}
        for part in self._all_parts():
            indices += part["indices"].tolist()
            bad |= dict(zip(part["bad"].tolist(), part["reasons"].tolist(), strict=True))
        if not indices:
            raise DataError(
                f"expected readable images, got {len(bad)} unreadable ones; the first: {next(iter(bad.values()), '')}"
            )
        rows = [{"path": name(i)} | ({} if label is None else {"label": label(i)}) for i in indices]
        write = _write_parquet if self.description["format"] == "parquet" else _write_npy
        lines = [json.dumps({"path": name(i), "reason": reason}) + "\n" for i, reason in bad.items()]
        with atomic_write(self.folder / self.result_name, "wb") as file:  # written last, it marks completion
            write(Path(file.name), (part["features"] for part in self._all_parts()), rows, len(rows))
            if self.description["format"] == "npy":
                write_text(self.folder / ROWS, "".join(json.dumps(row) + "\n" for row in rows))
            if lines:
                write_text(self.folder / BAD, "".join(lines))
        shutil.rmtree(self.parts)
        return len(rows), len(bad)

    def _path(self, number: int) -> Path:
        return self.parts / f"{number:06}.npz"

    def _all_parts(self) -> Iterator[Any]:
        for path in sorted(self.parts.glob("*.npz")):
            with np.load(path) as part:
                yield part


def _write_npy(path: Path, blocks: Iterator[np.ndarray], rows: list[dict], count: int) -> None:
    """Stream the blocks into one array (count, D) on disk, without holding it in memory."""
    target, start = None, 0
    for block in blocks:
        if target is None:
            shape = (count, block.shape[1])
            target = np.lib.format.open_memmap(path, mode="w+", dtype=block.dtype, shape=shape)
        target[start : start + len(block)] = block
        start += len(block)
    target.flush()


def _write_parquet(path: Path, blocks: Iterator[np.ndarray], rows: list[dict], count: int) -> None:
    """Write the columns path, label (if there are labels) and features, with one row group per part."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer, start = None, 0
    for block in blocks:
        chosen = rows[start : start + len(block)]
        start += len(block)
        columns = {key: pa.array([_text(row[key]) for row in chosen], pa.string()) for key in rows[0]}
        columns["features"] = pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), block.shape[1])
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema)
        if len(table):
            writer.write_table(table)
    writer.close()


def _text(path: str) -> str:
    """Return a path as valid Unicode; undecodable bytes become question marks."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
