"""Check a dataset and rewrite it without bad images, optionally shrinking, converting or tiling the others.

If it is killed and started again, it resumes after the last finished shard. The result is identical to the byte for any
number of processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from dinov2_custom import cli
from dinov2_custom.data.decode import find_simplejpeg, formats
from dinov2_custom.data.depth import Deep, Reading
from dinov2_custom.data.intensity import Looker, measure
from dinov2_custom.data.sources import MAX_IMAGE_BYTES, read_image
from dinov2_custom.errors import ConfigError, DataError, missing, shortage
from dinov2_custom.files import atomic_write, parse_json_object, write_text
from dinov2_custom.logging import setup_logging, track
from dinov2_custom.verify.check import check_image
from dinov2_custom.verify.folder import own_folder
from dinov2_custom.verify.main import TIME_LIMIT_S, open_dataset
from dinov2_custom.verify.pool import Death, run_pool
from dinov2_custom.verify.report import absolute
from dinov2_custom.world import num_cores

from .change import Options, Output, Prepared, prepare_image
from .names import Names
from .parts import PartWriter
from .tiles import DecodedBands, TiffBands, find_tifffile, read_tiles, write_tiles

logger = logging.getLogger("dinov2")
MARKER = "prepare.json"
SPOOL = ".spool_"
WINDOW = 16  # images in progress per process


class Preparer:
    """Prepare image i of a dataset; runs in the worker processes."""

    def __init__(self, dataset: Any, options: Options, spool: Path):
        self.dataset, self.options, self.spool = dataset, options, spool
        self.names = Names.of(dataset)

    def __call__(self, i: int) -> Prepared:
        try:
            return self._prepare(i)
        except MemoryError as e:
            raise shortage(e, self.dataset.name(i)) from e

    def _prepare(self, i: int) -> Prepared:
        name = self.dataset.name(i)
        try:
            num_bytes = os.stat(name).st_size
        except (OSError, ValueError):
            num_bytes = 0
        try:
            if num_bytes > MAX_IMAGE_BYTES or (self.options.tile and num_bytes and _too_large(header(name))):
                return self._tile_file(i, name, num_bytes)
            data = read_image(self.dataset, i)
        except DataError as e:
            return Prepared("bad", reason=f"unreadable: {e}", num_bytes=num_bytes)
        seen = header(io.BytesIO(data)) if self.options.tile else (0, 0, "")
        if seen[0] * seen[1] <= self.options.tile_above * 1e6:
            return prepare_image(data, self.names(name), self.options, find_simplejpeg())
        return self._tile(i, name, data, seen)

    def _tile_file(self, i: int, name: str, num_bytes: int) -> Prepared:
        """Tile a file without reading all of it."""
        if not self.options.tile:
            return Prepared("bad", reason=f"too large: {num_bytes:,} bytes; give --tile", num_bytes=num_bytes)
        try:
            return self._write(i, name, TiffBands(name, name, self.options.reading), num_bytes)
        except DataError as e:
            return Prepared("bad", reason=_reason(e), num_bytes=num_bytes)

    def _tile(self, i: int, name: str, data: bytes, seen: tuple[int, int, str]) -> Prepared:
        """Tile a huge image: within Pillow's limit check and decode it in full, above it read it part by part."""
        try:
            if _too_large(seen):
                return self._write(i, name, TiffBands(io.BytesIO(data), name, self.options.reading), len(data))
            found = check_image(data, find_simplejpeg())
            if found.reason:
                return Prepared("bad", reason=found.reason, num_bytes=len(data))
            return self._write(i, name, DecodedBands(data, name, found.format, self.options.reading), len(data))
        except DataError as e:
            return Prepared("bad", reason=_reason(e), num_bytes=len(data))

    def _write(self, i: int, name: str, bands: Any, num_bytes: int) -> Prepared:
        spool = self.spool / f"{i}.tar"
        try:
            write_tiles(bands, self.names(name), self.options, spool)
        finally:
            bands.close()
        return Prepared("tiled", num_bytes=num_bytes, spool=str(spool))


class TileLooker(Looker):
    """A :class:`Looker` that also accepts images above Pillow's limit."""

    def __call__(self, i: int) -> tuple[Deep | None, str]:
        name = self.dataset.name(i)
        file: str | io.BytesIO = name if os.path.isfile(name) else io.BytesIO(read_image(self.dataset, i))
        if not _too_large(header(file)):
            return super().__call__(i)
        bands = TiffBands(file, name, Reading(None, self.page))
        try:
            deep = bands.sample()
            return deep if deep.values.dtype.itemsize > 1 else None, bands.note
        finally:
            bands.close()


def with_range(options: Options, dataset: Any, folder: Path) -> Options:
    """Return ``options`` with a range: their own, or that of the run started in ``folder``, or a measured one."""
    begun = _task_begun(folder)
    if begun is not None:
        intensity = options.intensity or begun.get("intensity")
        return dataclasses.replace(options, intensity=intensity and tuple(intensity))
    found = measure(len(dataset), TileLooker(dataset, options.page), intensity=options.intensity)
    found.log()
    return dataclasses.replace(options, intensity=options.intensity or found.intensity)


def header(source: str | io.BytesIO) -> tuple[int, int, str]:
    """Return (width, height, Pillow's format) of an image file from its header; (0, 0, "") if it has none."""
    limit = Image.MAX_IMAGE_PIXELS
    try:
        Image.MAX_IMAGE_PIXELS = None  # in a separate process, and restored below
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(source, formats=formats()) as image:
                return *image.size, image.format or ""
    except Exception:  # not an image; the check reports why
        return 0, 0, ""
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _reason(e: DataError) -> str:
    text = str(e)
    return text if text.startswith("damaged") else f"too large: {text}"


def _too_large(seen: tuple[int, int, str]) -> bool:
    """Return whether Pillow rejects an image of that size."""
    return Image.MAX_IMAGE_PIXELS is not None and seen[0] * seen[1] > 2 * Image.MAX_IMAGE_PIXELS


def prepare(dataset: Any, folder: Path, options: Options, *, shard_size: int, workers: int = 0) -> dict[str, Any]:
    """Write ``dataset`` into ``folder`` according to ``options``; the caller must have locked ``folder``.

    Args:
        dataset: has ``len``, ``name(i)`` and ``read(i)``.
        shard_size: size of a tar file in bytes; 0 writes to a plain folder, ``folder/images``.
        workers: number of processes; 0 for one per core.

    Returns:
        the content of summary.json.

    Raises:
        ConfigError: if ``folder`` was started with another dataset or other options.
        DataError: if there is no sound image.
    """
    workers = workers or num_cores()
    _check_same_task(folder, {**task_of(dataset, options), "shard_size": shard_size})
    writer = PartWriter(folder, shard_size)
    for left in folder.glob(f"{SPOOL}*"):
        shutil.rmtree(left, ignore_errors=True)
    # a unique name, because processes of a killed run may still be writing
    spool = Path(tempfile.mkdtemp(prefix=SPOOL, dir=folder))
    first, skip = writer.position
    logger.info(f"prepare: images={len(dataset)} prepared_before={first} workers={workers} output={folder}")
    if options.tile and find_tifffile() is None:
        logger.warning(f"{missing('tifffile', 'slides')}; those above Pillow's limit will be left out")
    pool = run_pool(
        Preparer(dataset, options, spool),
        range(first, len(dataset)),
        workers=workers,
        chunk=2,
        ordered=True,
        window=WINDOW * workers,
        time_limit_s=6 * TIME_LIMIT_S,
    )
    for i, result in track(pool, "prepare", total=len(dataset) - first, unit="images"):
        prepared = Prepared("bad", reason=f"decoder died: {result.reason}") if isinstance(result, Death) else result
        _write(writer, i, dataset.name(i), prepared, skip if i == first else 0)
    writer.finish()
    shutil.rmtree(spool)
    return _finish(writer, folder)


def _write(writer: PartWriter, i: int, name: str, prepared: Prepared, skip: int) -> None:
    """Write the outputs of image ``i``, starting at number ``skip``."""
    row = {"i": i, "source": absolute(name), "action": prepared.action}
    first_row = row | {"source_bytes": prepared.num_bytes}
    if prepared.action == "bad":
        writer.note(first_row | {"reason": prepared.reason})
        logger.debug(f"left out: {name} ({prepared.reason})")
    spool = Path(prepared.spool) if prepared.spool else None
    outputs: Iterable[Output] = prepared.outputs if spool is None else read_tiles(spool)
    for k, output in enumerate(outputs):
        if k >= skip:
            writer.add(i, k, output, row if k else first_row)
    writer.image_done(i)
    if spool is not None:
        spool.unlink()


def task_of(dataset: Any, options: Options) -> dict[str, Any]:
    """Return everything that must be equal for a run to resume another."""
    digest = hashlib.blake2b(digest_size=16)
    for i in range(len(dataset)):
        digest.update(dataset.name(i).encode("utf-8", "surrogateescape") + b"\0")
    return {"images": len(dataset), "names": digest.hexdigest(), **dataclasses.asdict(options)}


def _task_begun(folder: Path) -> dict[str, Any] | None:
    """Return the task with which ``folder`` was started, or None for a new folder."""
    text = (folder / MARKER).read_text()
    try:
        return parse_json_object(text) if text.strip() else None
    except ValueError as e:
        raise ConfigError(f"expected to read {folder / MARKER}, got {e}; choose an empty folder") from e


def _check_same_task(folder: Path, task: dict[str, Any]) -> None:
    before, task = _task_begun(folder), json.loads(json.dumps(task))
    if before is not None:
        other = [f"{key}: {before.get(key)}, now {task[key]}" for key in task if before.get(key) != task[key]]
        if other:
            raise ConfigError(
                f"--output-dir: expected the dataset and options that {folder} was started with, got other ones "
                f"({'; '.join(other)}); choose an empty folder"
            )
    write_text(folder / MARKER, json.dumps(task) + "\n", fsync=True)


def _finish(writer: PartWriter, folder: Path) -> dict[str, Any]:
    """Write index.jsonl, bad_images.jsonl and summary.json from the lists of all parts."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    with (
        atomic_write(folder / "index.jsonl", fsync=True) as index,
        atomic_write(folder / "bad_images.jsonl", fsync=True) as bad,
    ):
        for row in writer.rows():
            counts["bytes_read"] += row.get("source_bytes", 0)
            counts[row["action"]] += "source_bytes" in row
            if row["action"] == "bad":
                reasons[row["reason"].split(":")[0]] += 1
                bad.write(json.dumps({"path": row["source"], "reason": row["reason"]}) + "\n")
            else:
                counts["files"] += 1
                counts["bytes_written"] += row["bytes"]
                index.write(json.dumps(row) + "\n")
    keys = ("kept", "changed", "tiled", "bad", "files", "bytes_read", "bytes_written")
    summary = {key: counts[key] for key in keys} | {"reasons": dict(sorted(reasons.items()))}
    summary["shards"] = len(list(folder.glob("shard-*.tar")))
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n", fsync=True)
    if not counts["files"]:
        raise DataError(f"expected sound images, got none; the reasons are in {folder / 'bad_images.jsonl'}")
    return summary


def as_text(summary: dict[str, Any], folder: Path) -> str:
    """Return the summary as readable text."""
    lines = [
        f"kept as they are: {summary['kept']:,}, changed: {summary['changed']:,}, tiled: {summary['tiled']:,}, "
        f"left out: {summary['bad']:,}",
        f"files written: {summary['files']:,}, {summary['bytes_read'] / 1e6:,.1f} MB -> "
        f"{summary['bytes_written'] / 1e6:,.1f} MB",
    ]
    if summary["reasons"]:
        lines.append(
            "left out because: " + ", ".join(f"{kind} {count:,}" for kind, count in summary["reasons"].items())
        )
        lines.append(f"list of them: {folder / 'bad_images.jsonl'}")
    if summary["shards"]:
        lines.append(f"shards: {summary['shards']}, to train on: train.dataset_path=Tar:path={folder.absolute()}")
    else:
        lines.append(f"to train on: train.dataset_path={(folder / 'images').absolute()}")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> int:
    """Run the parsed command line; return the exit code."""
    setup_logging(name="dinov2", level=logging.INFO)
    if args.intensity and args.intensity[0] >= args.intensity[1]:
        raise ConfigError(f"--intensity: expected the smaller value first, got {args.intensity}")
    intensity = tuple(args.intensity) if args.intensity else None
    options = Options(args.short_side, args.format, args.quality, args.tile, args.tile_above, intensity, args.page)
    try:
        dataset = open_dataset(args.dataset)
        with own_folder(args.output_dir, MARKER) as folder:
            setup_logging(folder, name="dinov2", level=logging.INFO)
            options = with_range(options, dataset, folder)
            summary = prepare(dataset, folder, options, shard_size=args.shard_size, workers=args.workers)
    except KeyboardInterrupt:
        print("interrupted; run the same command to resume", file=sys.stderr)
        return 130
    print(as_text(summary, folder))
    return 0


if __name__ == "__main__":
    cli.main("prepare")
