"""Measure one intensity range for all images of more than 8 bits in a dataset, on a sample of them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dinov2_custom.errors import DataError
from dinov2_custom.utils.rng import random_for

from .decode import image_errors, open_page, page_note, values_of
from .depth import Deep, is_deep, scaled
from .sources import read_image

logger = logging.getLogger("dinov2")
FILES = 64  # in the sample
VALUES = 1 << 14  # sampled from one image
PERCENTILES = (0.1, 99.9)
FEW_LEVELS, MUCH_CLIPPED = 64, 0.02
LEAST_OTHERS = 8  # distinct values that must remain when one is treated as nodata
MOST_LEFT_OUT = 16
ADVICE = "data.intensity=[low, high]"


class Measured(NamedTuple):
    """Results of measuring the sample.

    intensity: values mapped to 0 and 255, or None if no image has more than 8 bits. clipped: fraction of the values
    outside that range. levels, levels_an_image: how many of the 256 levels all images and the median image use. notes:
    number of images for each note on the page.
    """

    intensity: tuple[float, float] | None
    images: int
    deep: int
    clipped: float = 0.0
    levels: int = 0
    levels_an_image: int = 0
    notes: Counter[str] = Counter()

    def describe(self) -> list[str]:
        """Return the results as lines of text."""
        lines = []
        if self.intensity is not None:
            low, high = self.intensity
            lines.append(
                f"intensity: values from {low:g} to {high:g} become 0..255 in images of more than 8 bits "
                f"({ADVICE} sets it): {self.deep} of {self.images} looked at, {self.clipped:.2%} of their values "
                f"clipped, {self.levels} levels used, {self.levels_an_image} in the median image"
            )
        return lines + [f"{what}: {count} of {self.images} images looked at" for what, count in self.notes.items()]

    def warnings(self) -> list[str]:
        """Return a warning for each property that makes good features unlikely."""
        if self.intensity is None:
            return []
        low, high = self.intensity
        found = []
        if self.clipped > MUCH_CLIPPED:
            found.append(
                f"{self.clipped:.1%} of the values in images of more than 8 bits lie outside {low:g}..{high:g}: "
                f"expected at most {MUCH_CLIPPED:.0%}; set {ADVICE}, unless the model was trained so"
            )
        if self.levels_an_image >= FEW_LEVELS:
            return found
        return [
            *found,
            f"the median image of more than 8 bits uses {self.levels_an_image} of 256 levels: expected {FEW_LEVELS}; "
            f"its own values span less than {low:g}..{high:g}, the range of all images: narrow that with {ADVICE}, "
            "or train on images of similar brightness",
        ]

    def log(self) -> None:
        """Log the results and the warnings."""
        for line in self.describe():
            logger.info(line)
        for line in self.warnings():
            logger.warning(line)


def measure(
    count: int,
    values_of_image: Callable[[int], tuple[Deep | None, str]],
    seed: int = 0,
    *,
    intensity: tuple[float, float] | None = None,
) -> Measured:
    """Measure the range on ``FILES`` images spread over a dataset of ``count`` images, drawn with ``seed``.

    ``values_of_image(i)``: see :class:`Looker`; images for which it raises DataError or OSError are skipped.
    ``intensity``: a fixed range, which is then not measured.
    """
    strata = min(FILES, count)
    rng = random_for(seed, "intensity", count)
    parts: list[np.ndarray] = []
    looked, notes = 0, Counter[str]()
    for stratum in range(strata):
        first, end = stratum * count // strata, (stratum + 1) * count // strata
        index, draws = rng.randrange(first, end), rng.getrandbits(63)
        try:
            deep, note = values_of_image(index)
        except (DataError, OSError):
            continue
        looked += 1
        notes.update([note] if note else [])
        values = None if deep is None else deep.valid()
        if values is not None and len(values):
            if len(values) > VALUES:
                values = values[np.random.default_rng(draws).integers(len(values), size=VALUES)]
            parts.append(values.astype(np.float64))
    if not parts:
        return Measured(None, looked, 0, notes=notes)
    pooled = without_nodata(np.concatenate(parts))
    intensity = intensity or range_of(pooled)
    levels = [np.unique(scaled(part, *intensity)) for part in parts]
    return Measured(
        intensity,
        looked,
        len(parts),
        float(((pooled < intensity[0]) | (pooled > intensity[1])).mean()),
        len(np.unique(np.concatenate(levels))),
        int(np.median([len(own) for own in levels])),
        notes,
    )


def without_nodata(values: np.ndarray) -> np.ndarray:
    """Return the finite ``values`` sorted, without those that mark missing data.

    The smallest or largest value is treated as such a marker (-9999, -3.4e38, zeros around the image) if its distance
    from the next value exceeds the range of all others.
    """
    values = np.sort(values)
    for _ in range(MOST_LEFT_OUT):
        above, below = values[values > values[0]], values[values < values[-1]]
        if len(above) and _is_apart(above, above[0] - values[0]):
            values = above
        elif len(below) and _is_apart(below, values[-1] - below[-1]):
            values = below
        else:
            break
    return values


def range_of(values: np.ndarray) -> tuple[float, float]:
    """Return the percentiles of sorted ``values``, the lower one below the higher one."""
    low, high = np.percentile(values, PERCENTILES)
    if low == high:  # almost all values, or all of them, are equal
        low, high = values[0], values[-1]
    return (float(low), float(high)) if high > low else (float(low), float(low) + 1)


def _is_apart(rest: np.ndarray, gap: float) -> bool:
    """Return whether a value ``gap`` away from the sorted values ``rest`` is an outlier."""
    low, high = np.percentile(rest, PERCENTILES)
    return gap > high - low and len(np.unique(rest)) >= LEAST_OTHERS


class Looker:
    """Return (values of image i of ``dataset``, or None if it has 8 bits; note on its page, or "")."""

    def __init__(self, dataset: Any, page: int = 0):
        self.dataset, self.page = dataset, page

    def __call__(self, i: int) -> tuple[Deep | None, str]:
        """Return the values of image ``i`` and the note on its page.

        Raises:
            DataError: if the image cannot be read.
        """
        data = read_image(self.dataset, i)
        if not isinstance(data, bytes):  # a user-defined dataset with its own decoder
            return None, ""
        with image_errors(data, self.dataset.name(i)):
            image = open_page(data, self.page)
            if isinstance(image, Deep):
                return image if image.values.dtype.itemsize > 1 else None, ""
            note = page_note(image)
            return values_of(image, data, self.page) if is_deep(image) else None, note
