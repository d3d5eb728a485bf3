"""Data for a checkout: unlabeled folders, bad images, samples without target, resuming."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from dinov2_custom.data import collate
from dinov2_custom.data.loaders import make_dataset
from dinov2_custom.data.spec import KINDS
from dinov2_custom.errors import DataError, command
from dinov2_custom.utils.rng import seed_for

logger = logging.getLogger("dinov2")
_UPSTREAM = ("ImageNet", "ImageNet22k")
_MAX_TRIES = 100


def with_unlabeled(original: Callable) -> Callable:
    """Return a ``make_dataset`` that handles this project's names, paths and lists, and else calls ``original``."""

    @functools.wraps(original)
    def extended(
        *, dataset_str: Any, transform: Callable | None = None, target_transform: Callable | None = None
    ) -> Any:
        if not _is_ours(dataset_str):
            return original(dataset_str=dataset_str, transform=transform, target_transform=target_transform)
        dataset = make_dataset(dataset_str=dataset_str, transform=transform, target_transform=target_transform)
        logger.info(f"dataset: {dataset_str} images={len(dataset):,}")
        return dataset

    return extended


def _is_ours(dataset: Any) -> bool:
    if not isinstance(dataset, str):
        return True
    name = dataset.partition(":")[0]
    return name not in _UPSTREAM and (name in KINDS or "/" in name or name.startswith((".", "~")))


def with_skipping(original: Callable) -> Callable:
    """Return a ``make_dataset`` whose training datasets (those with a ``target_transform``) skip unreadable images."""

    @functools.wraps(original)
    def skipping(
        *, dataset_str: Any, transform: Callable | None = None, target_transform: Callable | None = None
    ) -> Any:
        dataset = original(dataset_str=dataset_str, transform=transform, target_transform=target_transform)
        return dataset if target_transform is None else SkipBadImages(dataset)

    return skipping


class SkipBadImages(Dataset):
    """``dataset``, with unreadable images replaced by the next readable one, and logged once per process.

    Attributes:
        bad: index -> reason, for each unreadable image that this process encountered.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.bad: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":  # during unpickling
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, index: int) -> Any:
        """Return the sample ``index``, or of the first readable image after it.

        Raises:
            DataError: a hundred unreadable images in a row.
        """
        for step in range(min(_MAX_TRIES, len(self))):
            place = (index + step) % len(self)
            if place in self.bad:
                continue
            try:
                return self.dataset[place]
            except Exception as e:  # upstream's datasets raise RuntimeError for any cause
                self.bad[place] = f"{e} ({e.__cause__})" if e.__cause__ else str(e)
                name = self.dataset.name(place) if hasattr(self.dataset, "name") else f"image {place}"
                logger.warning(f"bad image skipped, {len(self.bad)} in this process: {name}: {self.bad[place]}")
        raise DataError(
            f"expected readable images, got {min(_MAX_TRIES, len(self))} unreadable ones from number {index} on, the "
            f"last: {next(reversed(self.bad.values()))}; look at the data with {command('run/data/verify.py')}"
        )


def collate_data_and_cast(
    samples_list: Sequence[Any],
    mask_ratio_tuple: Sequence[float],
    mask_probability: float,
    dtype: torch.dtype,
    n_tokens: int | None = None,
    mask_generator: Callable | None = None,
) -> dict[str, Any]:
    """Collate as ``data.collate`` does, with a mask generator of upstream's signature, which makes its own draws."""
    return collate.collate_data_and_cast(
        samples_list, mask_ratio_tuple, mask_probability, dtype, n_tokens, lambda count, rng: mask_generator(count)
    )


def with_exact_resume(original: Callable) -> Callable:
    """Return a ``make_data_loader`` for a training loop that passes ``seed=<first iteration>`` and no advance.

    The image order then has the fixed seed 0, and samples that this rank has consumed are skipped. Workers of a
    resumed run draw crops and masks from their own seeds.
    """

    @functools.wraps(original)
    def resuming(*, dataset: Any, batch_size: int, seed: int = 0, **options: Any) -> Any:
        sampler = getattr(options.get("sampler_type"), "name", "")
        if not sampler.startswith("SHARDED_INFINITE") or options.get("sampler_advance") or not seed:
            return original(dataset=dataset, batch_size=batch_size, seed=seed, **options)
        options["sampler_advance"] = seed * batch_size
        loader = original(dataset=dataset, batch_size=batch_size, seed=0, **options)
        # the process's seed differs between ranks
        loader.generator = torch.Generator().manual_seed(seed_for(torch.initial_seed(), "resumed", seed))
        logger.info(
            f"order of images: continues at iteration {seed}, {options['sampler_advance']:,} images per rank skipped"
        )
        return loader

    return resuming
