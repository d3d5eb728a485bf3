"""From a draw number to a collated batch: what a data-loading worker does, as pure functions of (seed, draw).

An image that cannot be read is replaced by another one, which one depends on the seed and the draw alone; the batch
carries the story under :data:`BAD_KEY`, and :class:`BadImages` keeps the account in the main process. Read
:meth:`TrainSamples.__getitem__` first.
"""

from __future__ import annotations

import logging
import os
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from dinov2_custom.errors import DataError
from dinov2_custom.utils.rng import random_for, seed_for

from .collate import collate_data_and_cast
from .samplers import permuted_index

logger = logging.getLogger("dinov2")
BAD_KEY = "_bad_images"
MAX_REPLACEMENTS = 100
MIN_DRAWS = 100
PROBES = 32

BadRecord = tuple[int, str, str]


class TrainSample(NamedTuple):
    """One augmented image. bad: (draw, path, reason) of every image that could not be read for it; crops None: none
    could."""

    draw: int
    crops: dict[str, Any] | None
    bad: list[BadRecord]


class TrainSamples(Dataset):
    """Map a draw number to a :class:`TrainSample`: which image, and every random number of its crops.

    ``dataset[i]`` gives (PIL image, anything) or raises DataError; ``augment(image, rng)`` the crops.
    """

    def __init__(self, dataset: Any, augment: Callable[..., dict[str, Any]], seed: int):
        self.dataset = dataset
        self.augment = augment
        self.seed = seed
        self._known_bad: dict[int, str] = {}

    def __getitem__(self, draw: int) -> TrainSample:
        bad: list[BadRecord] = []
        for attempt in range(1 + min(len(self.dataset), MAX_REPLACEMENTS)):
            index = self.image_of(draw, attempt)
            image, reason = self.load(index)
            if image is not None:
                return TrainSample(draw, self.augment(image, rng=random_for(self.seed, "augment", draw)), bad)
            bad.append((draw, self.dataset.name(index), reason))
        return TrainSample(draw, None, bad)

    def image_of(self, draw: int, attempt: int = 0) -> int:
        """Return the image of a draw, or its ``attempt``-th replacement (which go through the whole dataset)."""
        size = len(self.dataset)
        if attempt == 0:
            return permuted_index(draw, size, self.seed)
        return permuted_index(attempt - 1, size, seed_for(self.seed, "replace", draw))

    def load(self, index: int) -> tuple[Any, str]:
        """Return (image, "") or (None, why not); what could not be read once is not tried again."""
        if index in self._known_bad:
            return None, self._known_bad[index]
        try:
            return self.dataset[index][0], ""
        except (DataError, OSError) as e:
            self._known_bad[index] = str(e)
            return None, str(e)

    def probe(self) -> None:
        """Try images spread over the dataset until one can be read.

        Raises:
            DataError: none of (up to) ``PROBES`` images can.
        """
        size = len(self.dataset)
        indices = sorted({i * size // PROBES for i in range(PROBES)})
        for index in indices:
            if self.load(index)[0] is not None:
                return
        raise DataError(
            f"expected readable images, got none in {len(indices)} tried of {size}: {self._known_bad[indices[0]]}; "
            "check train.dataset_path"
        )


class TrainCollate:
    """Collate :class:`TrainSample` s; the masks of a batch are drawn from (seed, its first draw)."""

    def __init__(
        self,
        seed: int,
        mask_ratio_tuple: Sequence[float],
        mask_probability: float,
        n_tokens: int,
        mask_generator: Callable,
        dtype: torch.dtype,
    ):
        self.seed = seed
        self.options = {
            "mask_ratio_tuple": tuple(mask_ratio_tuple),
            "mask_probability": mask_probability,
            "n_tokens": n_tokens,
            "mask_generator": mask_generator,
            "dtype": dtype,
        }

    def __call__(self, samples: Sequence[TrainSample]) -> dict[str, Any]:
        """Return the batch, or only :data:`BAD_KEY` when there is a draw for which nothing could be read."""
        bad = [record for sample in samples for record in sample.bad]
        if any(sample.crops is None for sample in samples):
            return {BAD_KEY: bad}
        rng = random_for(self.seed, "masks", samples[0].draw)
        batch = collate_data_and_cast([sample.crops for sample in samples], rng=rng, **self.options)
        return {**batch, BAD_KEY: bad}


def set_up_worker(worker_id: int) -> None:
    """Keep a data-loading process to one thread, and let it outlive the signals that ask the run to save and stop.

    A signal to the whole process group (Ctrl-C, a scheduler's SIGTERM) would end the workers first, and their death the
    run before it has saved. They end with the loader, or when the main process is gone.
    """
    torch.set_num_threads(1)
    if torch.utils.data.get_worker_info() is not None:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)


class BadImages:
    """The account of images that could not be read: report each once, stop when there are too many.

    ``on_bad_image(path, reason)`` is called once a path; None logs a warning instead.
    """

    def __init__(self, num_images: int, max_fraction: float, on_bad_image: Callable[[str, str], Any] | None = None):
        self.num_images = num_images
        self.max_fraction = max_fraction
        self.on_bad_image = on_bad_image or log_bad_image
        self.num_draws = 0
        self.num_bad_draws = 0
        self.reasons: dict[str, str] = {}

    def add(self, num_draws: int, records: Sequence[BadRecord]) -> None:
        """Account for one batch.

        Raises:
            DataError: more than ``max_fraction`` of the draws were bad (after 100 draws, or a pass of a tiny dataset),
                and of more than one file: a single bad one never ends a run.
        """
        self.num_draws += num_draws
        self.num_bad_draws += len({draw for draw, _, _ in records})
        for _, path, reason in records:
            if path not in self.reasons:
                self.reasons[path] = reason
                self.on_bad_image(path, reason)
        enough = self.num_draws >= min(MIN_DRAWS, self.num_images)
        if enough and len(self.reasons) > 1 and self.num_bad_draws > self.max_fraction * self.num_draws:
            raise self.error()

    def error(self) -> DataError:
        """Say how many, where most of them are, and an example."""
        folders = Counter(os.path.dirname(path) for path in self.reasons)
        (folder, count), path = folders.most_common(1)[0], next(iter(self.reasons))
        return DataError(
            f"expected at most {self.max_fraction:.2%} unreadable images (train.max_bad_fraction), got "
            f"{self.num_bad_draws} of {self.num_draws} draws, {len(self.reasons)} different files, most of them "
            f"({count}) in {folder}; for example {path}: {self.reasons[path]}; repair or remove them, or raise "
            "train.max_bad_fraction"
        )


def log_bad_image(path: str, reason: str) -> None:
    logger.warning(f"unreadable image replaced: path={path} reason={reason}")
