"""Strictly decode every image of a dataset, in parallel, and write lists of the bad and the clean images.

If it is killed and started again, it resumes where it stopped.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dinov2_custom import cli
from dinov2_custom.data.decode import find_simplejpeg
from dinov2_custom.data.intensity import Looker, measure
from dinov2_custom.data.loaders import make_dataset
from dinov2_custom.data.sources import MAX_IMAGE_BYTES, read_image
from dinov2_custom.errors import ConfigError, DataError, install, shortage
from dinov2_custom.logging import setup_logging, track
from dinov2_custom.world import num_cores

from .check import Checked, check_image, has_deep_mode, too_large
from .folder import default_folder, own_folder
from .pool import Death, run_pool
from .report import as_text, write_report
from .results import SOUND, Results, Stamp, stamp_of

logger = logging.getLogger("dinov2")
MARKER = "verify_results.jsonl"
TIME_LIMIT_S = 600.0


class Checker:
    """Read and check image i of a dataset; runs in the decoder processes."""

    def __init__(self, dataset: Any, simplejpeg: bool):
        self.dataset = dataset
        self.simplejpeg = simplejpeg

    def __call__(self, i: int) -> tuple[Checked, Stamp]:
        name = self.dataset.name(i)
        stamp = stamp_of(name)
        if stamp is not None and stamp[0] > MAX_IMAGE_BYTES and os.path.exists(name):
            return Checked(too_large(f"{stamp[0]:,} bytes")), stamp
        try:
            data = read_image(self.dataset, i)
        except DataError as e:
            return Checked(f"unreadable: {e}"), stamp
        try:
            return check_image(data, find_simplejpeg() if self.simplejpeg else None), stamp
        except MemoryError as e:
            raise shortage(e, name) from e


def open_dataset(words: Sequence[str]) -> Any:
    """Make the dataset given on a command line: folders, dataset strings, or YAML as in train.dataset_path.

    Raises:
        ConfigError: if the arguments cannot be parsed.
        DataError: if nothing exists there.
    """
    try:
        parts = [yaml.safe_load(word) if word.startswith(("[", "{")) else word for word in words]
    except yaml.YAMLError as e:
        raise ConfigError(f"dataset: expected a path, a dataset string or YAML, got {' '.join(words)} ({e})") from e
    return make_dataset(dataset_str=parts[0] if len(parts) == 1 else parts)


def verify(
    dataset: Any, folder: Path, *, workers: int = 0, label: str = "", time_limit_s: float = TIME_LIMIT_S
) -> dict:
    """Check all images of ``dataset`` and write the results into ``folder``, which the caller must have locked.

    Args:
        dataset: has ``len``, ``name(i)`` and ``read(i)``.
        workers: number of decoder processes; 0 for one per core.
        label: name of the dataset in the summary.
        time_limit_s: time limit per image in seconds.

    Returns:
        the content of summary.json.
    """
    workers = workers or num_cores()
    has_simplejpeg = find_simplejpeg() is not None
    with Results(folder / MARKER, dataset.name, len(dataset)) as results:
        before = results.take_over(has_simplejpeg)
        todo = results.todo()
        by = "simplejpeg (strict)" if has_simplejpeg else f"Pillow (misses silent damage; {install('simplejpeg')})"
        logger.info(
            f"verify: images={len(dataset)} verified_before={before} workers={workers} jpeg={by} output={folder}"
        )
        started = time.monotonic()
        pool = run_pool(Checker(dataset, has_simplejpeg), map(int, todo), workers=workers, time_limit_s=time_limit_s)
        for i, result in track(pool, "verify", total=len(todo), unit="images"):
            if isinstance(result, Death):
                kind = "too slow" if result.reason.startswith("took") else "decoder died"
                result = Checked(f"{kind}: {result.reason}"), stamp_of(dataset.name(i))
            found, stamp = result
            results.add(i, found, stamp)
            if found.reason and len(results.reasons) <= 20:
                logger.warning(f"bad image: {dataset.name(i)} ({found.reason})")
        seconds = time.monotonic() - started
        if len(todo):
            logger.info(f"verify: done in {seconds:.1f} s, {len(todo) / max(seconds, 1e-9):.0f} images/s")
        kinds = [k for k, kind in enumerate(results.kinds) if has_deep_mode(kind[1])]
        deep, look = np.flatnonzero((results.status == SOUND) & np.isin(results.kind, kinds)), Looker(dataset)
        measured = measure(len(deep), lambda k: look(int(deep[k])))
        return write_report(results, folder, label, dataset.passed_over(), dataset.left_out(), measured)


def main(args: argparse.Namespace) -> int:
    """Run the parsed command line; return the exit code."""
    setup_logging(name="dinov2", level=logging.INFO)
    try:
        dataset = open_dataset(args.dataset)
        with own_folder(args.output_dir or default_folder("verify", args.dataset), MARKER) as folder:
            setup_logging(folder, name="dinov2", level=logging.INFO)
            summary = verify(dataset, folder, workers=args.workers, label=" ".join(args.dataset))
    except KeyboardInterrupt:
        print("interrupted; run the same command to resume", file=sys.stderr)
        return 130
    print(as_text(summary))
    print(f"bad images: {folder / 'bad_images.jsonl'}\nlist to train on: {folder / 'clean.txt'}")
    return 1 if summary["bad"] or summary["passed_over"] else 0


if __name__ == "__main__":
    cli.main("verify")
