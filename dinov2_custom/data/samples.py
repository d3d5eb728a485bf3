"""Map a draw number to pixels and crops, and an iteration to its batch, as pure functions of (seed, draws).

An unreadable image is replaced by another one, which depends only on the seed and the draw (:class:`TrainSamples`);
:class:`BadImages` counts them in the main process. A data-loading process runs :class:`TrainBatches`, the main process
:func:`unpack`.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from dinov2_custom.errors import DataError, command, shortage
from dinov2_custom.utils.rng import random_for, seed_for

from .augmentations import DataAugmentationDINO, as_pixels, shrink_box
from .collate import describe_masks
from .datasets import ExtendedVisionDataset
from .decode import Scratch, decode_array
from .draws import CropDraw
from .finish import NUM_PARAMETERS, Finisher, pack_draw
from .holdout import IndexSubset
from .listing import CHECK_PATH
from .masking import Masks, Step, masks_of_draws
from .pixels import change_colours_into, cut_crops
from .pool import Field
from .samplers import permuted_index

logger = logging.getLogger("dinov2")
MAX_REPLACEMENTS = 100
MIN_DRAWS = 100
MIN_BAD = 10  # distinct files: a few bad files may be a large share of a small dataset, but are no reason to stop
PROBES = 32

BadRecord = tuple[int, str, str]


class TrainSample(NamedTuple):
    """One image and the parameters of its crops.

    pixels: uint8 (H, W, 3), valid until the next sample, or None if no image could be read. crops: parameters of the
    crops. bad: (draw, path, reason) of every unreadable image of this draw.
    """

    draw: int
    pixels: torch.Tensor | None
    crops: list[CropDraw]
    bad: list[BadRecord]


class TrainSamples:
    """Map a draw number to a :class:`TrainSample`: the image and all random parameters of its crops.

    ``dataset[i]`` returns (PIL image or uint8 (H, W, 3), anything) or raises DataError. ``dct_scaling``: decode a JPEG
    at no larger size than its crops need.
    """

    def __init__(self, dataset: Any, augment: DataAugmentationDINO, seed: int, *, dct_scaling: bool = False):
        self.dataset = dataset
        self.augment = augment
        self.seed = seed
        self.dct_scaling = dct_scaling
        self._known_bad: dict[int, str] = {}
        self._scratch = Scratch()

    def __getitem__(self, draw: int) -> TrainSample:
        return self.find(draw)

    def find(self, draw: int, note: Callable[[int], Any] = lambda index: None) -> TrainSample:
        """Return the sample of ``draw``; call ``note(index)`` before trying to read an image."""
        bad: list[BadRecord] = []
        for attempt in range(1 + min(len(self.dataset), MAX_REPLACEMENTS)):
            index = self.image_of(draw, attempt)
            note(index)
            size: list[tuple[int, int]] = []

            def shrink(width: int, height: int, size: list = size) -> int:
                size[:] = [(width, height)]
                return self.augment.fraction(self.crops(draw, width, height))

            pixels, reason = self.load(index, shrink if self.dct_scaling else None)
            if pixels is not None:
                return self._sample(draw, pixels, size, bad)
            bad.append((draw, self.dataset.name(index), reason))
        return TrainSample(draw, None, [], bad)

    def _sample(self, draw: int, pixels: torch.Tensor, size: list[tuple[int, int]], bad: list) -> TrainSample:
        decoded = (pixels.shape[1], pixels.shape[0])
        full = size[0] if size else decoded
        crops = self.crops(draw, *full)
        if full != decoded:
            crops = [crop._replace(box=shrink_box(crop.box, full, decoded)) for crop in crops]
        return TrainSample(draw, pixels, crops, bad)

    def crops(self, draw: int, width: int, height: int) -> list[CropDraw]:
        """Return the crops of ``draw`` for an image of this size (deterministic)."""
        return self.augment.draw(width, height, random_for(self.seed, "augment", draw))

    def image_of(self, draw: int, attempt: int = 0) -> int:
        """Return the image of a draw, or its ``attempt``-th replacement (replacements cover the whole dataset)."""
        if hasattr(self.dataset, "index_of_draw"):
            return self.dataset.index_of_draw(draw, self.seed, attempt)
        size = len(self.dataset)
        if attempt == 0:
            return permuted_index(draw, size, self.seed)
        return permuted_index(attempt - 1, size, seed_for(self.seed, "replace", draw))

    def load(self, index: int, shrink: Callable[[int, int], int] | None = None) -> tuple[torch.Tensor | None, str]:
        """Return (uint8 (H, W, 3), "") or (None, reason); an image that failed once is not tried again."""
        if index in self._known_bad:
            return None, self._known_bad[index]
        try:
            return as_pixels(read_pixels(self.dataset, index, shrink, self._scratch)), ""
        except (DataError, OSError) as e:
            if error := shortage(e, self.dataset.name(index)):
                raise error from e
            self._known_bad[index] = str(e)
            return None, str(e)

    def give_up(self, index: int, reason: str) -> None:
        """Mark image ``index`` as unreadable."""
        self._known_bad[index] = reason

    def probe(self) -> None:
        """Try images spread over the dataset until one can be read.

        Raises:
            DataError: if none of (up to) ``PROBES`` images can be read.
        """
        size = len(self.dataset)
        indices = sorted({i * size // PROBES for i in range(PROBES)})
        for index in indices:
            if self.load(index)[0] is not None:
                return
        raise DataError(
            f"expected readable images, got none in {len(indices)} tried of {size}: {self._known_bad[indices[0]]}; "
            + CHECK_PATH
        )


def read_pixels(dataset: Any, index: int, shrink: Callable[[int, int], int] | None, scratch: Scratch) -> Any:
    """Return image ``index``, decoded directly from its bytes if the dataset is one of our own without transforms.

    A dataset may define ``get_pixels(index, shrink=, scratch=)`` as a faster alternative to ``dataset[index]``.
    """
    if isinstance(dataset, IndexSubset):
        return read_pixels(dataset.dataset, int(dataset.indices[index]), shrink, scratch)
    if hasattr(dataset, "get_pixels"):
        return dataset.get_pixels(index, shrink=shrink, scratch=scratch)
    if _is_plain(dataset):
        data = dataset.get_image_data(index)
        options = {"exif": dataset.exif, "reading": dataset.reading, "shrink": shrink, "scratch": scratch}
        return decode_array(data, dataset.name(index), **options)
    return dataset[index][0]


def _is_plain(dataset: Any) -> bool:
    """Return whether ``dataset[i]`` equals the decoded ``get_image_data(i)``."""
    kind = type(dataset)
    return (
        isinstance(dataset, ExtendedVisionDataset)
        and dataset.transforms is None
        and kind.__getitem__ is ExtendedVisionDataset.__getitem__
        and kind.get_sample_decoder is ExtendedVisionDataset.get_sample_decoder
    )


class BadImages:
    """Count unreadable images: report each once, and raise if there are too many.

    ``on_bad_image(path, reason)`` is called once per path; None logs a warning instead.
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
            DataError: if more than ``max_fraction`` of the draws were bad (after 100 draws, or one pass of a tiny
                dataset), from at least ten distinct files.
        """
        self.num_draws += num_draws
        self.num_bad_draws += len({draw for draw, _, _ in records})
        for _, path, reason in records:
            if path not in self.reasons:
                self.reasons[path] = reason
                self.on_bad_image(path, reason)
        enough = self.num_draws >= min(MIN_DRAWS, self.num_images)
        if enough and len(self.reasons) >= MIN_BAD and self.num_bad_draws > self.max_fraction * self.num_draws:
            raise self.error()

    def error(self) -> DataError:
        """Return an error with their number, the folder with most of them, and an example."""
        folders = Counter(os.path.dirname(path) for path in self.reasons)
        (folder, count), path = folders.most_common(1)[0], next(iter(self.reasons))
        return DataError(
            f"expected at most {self.max_fraction:.2%} unreadable images (train.max_bad_fraction), got "
            f"{self.num_bad_draws} of {self.num_draws} draws, {len(self.reasons)} different files, most of them "
            f"({count}) in {folder}; for example {with_path(path, self.reasons[path])}; repair or remove them "
            f"({command('run/data/verify.py')} lists them, and the sound ones to train on), or raise "
            "train.max_bad_fraction"
        )


def log_bad_image(path: str, reason: str) -> None:
    logger.warning(f"unreadable image replaced: {with_path(path, reason)}")


def with_path(path: str, reason: str) -> str:
    """Prefix ``reason`` with ``path`` unless it contains it already."""
    return reason if path in reason else f"{path}: {reason}"


class Report(NamedTuple):
    """Data of a built batch besides its arrays. complete: False if no image could be read for some draw."""

    complete: bool
    upperbound: int
    bad: list[BadRecord]


@dataclass(eq=False)
class TrainBatches:
    """Build any batch of one rank.

    Batch i of the whole job has the draws ``first_draw`` + [i*b*W, (i+1)*b*W), of which rank r takes the r-th block of
    b = ``batch_size``. ``accumulation_steps`` batches make one step, and masks are spread over a step.
    ``late_colours``: leave the colour changes to the device.
    """

    samples: TrainSamples
    masks: Masks
    _: KW_ONLY
    batch_size: int
    rank: int = 0
    world_size: int = 1
    accumulation_steps: int = 1
    first_draw: int = 0
    late_colours: bool = False
    _resized: list[np.ndarray] = field(default_factory=list, init=False)

    @property
    def fields(self) -> dict[str, Field]:
        """Arrays of a batch, crop-major: crops are (crops, b, 3, S, S), or (crops, b, S, S, 3) with late colours."""
        augment, b = self.samples.augment, self.batch_size
        fields = {"masks": Field((2 * b, self.masks.n_tokens), np.bool_)}
        for kind, number, size in (
            ("global", 2, augment.global_crops_size),
            ("local", augment.local_crops_number, augment.local_crops_size),
        ):
            shape = (size, size, 3) if self.late_colours else (3, size, size)
            fields[f"{kind}_crops"] = Field((number, b, *shape))
            if self.late_colours:
                fields[f"{kind}_colours"] = Field((number, b, NUM_PARAMETERS), np.float32)
        return fields

    def draws(self, iteration: int) -> range:
        """Return this rank's draws of batch ``iteration``."""
        first = self.first_draw + (iteration * self.world_size + self.rank) * self.batch_size
        return range(first, first + self.batch_size)

    def step(self, iteration: int) -> Step:
        """Return the draws of all ranks of the step that batch ``iteration`` belongs to."""
        size = self.accumulation_steps * self.world_size * self.batch_size
        return Step(self.first_draw + iteration // self.accumulation_steps * size, size)

    def name(self, index: int) -> str:
        """Return the path of image ``index``."""
        return self.samples.dataset.name(index)

    def give_up(self, index: int, reason: str) -> None:
        """Mark image ``index`` as unreadable."""
        self.samples.give_up(index, reason)

    def build(
        self, iteration: int, arrays: dict[str, np.ndarray], note: Callable[[int], Any] = lambda index: None
    ) -> Report:
        """Fill ``arrays`` (of :attr:`fields`) with batch ``iteration``; ``note``: see ``TrainSamples.find``."""
        draws = self.draws(iteration)
        bad: list[BadRecord] = []
        complete = True
        for position, draw in enumerate(draws):
            sample = self.samples.find(draw, note)
            bad += sample.bad
            if sample.pixels is None:
                complete = False
            elif complete:
                self._cut(sample, arrays, position)
        step = self.step(iteration)
        arrays["masks"][...], upperbound = masks_of_draws(self.masks, self.samples.seed, step, draws)
        return Report(complete, upperbound, bad)

    def _cut(self, sample: TrainSample, arrays: dict[str, np.ndarray], position: int) -> None:
        crops = (arrays["global_crops"][:, position], arrays["local_crops"][:, position])
        outs = [out for kind in crops for out in kind]
        if self.late_colours:
            cut_crops(outs, sample.pixels, sample.crops)
            rows = (arrays["global_colours"][:, position], arrays["local_colours"][:, position])
            for row, crop in zip((row for kind in rows for row in kind), sample.crops, strict=True):
                pack_draw(crop, row)
            return
        if not self._resized:
            self._resized = [np.empty((size, size, 3), np.uint8) for size in self.samples.augment.sizes]
        cut_crops(self._resized, sample.pixels, sample.crops)
        for out, crop, draw in zip(outs, self._resized, sample.crops, strict=True):
            change_colours_into(out, crop, draw)


def unpack(
    arrays: dict[str, np.ndarray], upperbound: int, finish: Finisher, device: torch.device | str
) -> dict[str, Any]:
    """Return the batch in ``arrays`` under upstream's names, with crops finished on ``device`` and masks on the CPU.

    The result does not refer to ``arrays`` once the device has completed the copies.
    """
    crops = {
        f"collated_{kind}_crops": finish(
            torch.from_numpy(arrays[f"{kind}_crops"]).flatten(0, 1),
            device,
            arrays[f"{kind}_colours"].reshape(-1, NUM_PARAMETERS) if f"{kind}_colours" in arrays else None,
        )
        for kind in ("global", "local")
    }
    if not len(crops["collated_local_crops"]):
        crops["collated_local_crops"] = crops["collated_global_crops"][:0]
    return {**crops, **describe_masks(torch.from_numpy(arrays["masks"].copy()), upperbound)}
