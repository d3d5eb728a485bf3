"""Upstream's make_dataset and make_data_loader, and make_train_loader with its TrainLoader, used for training."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from .augmentations import DataAugmentationDINO
from .datasets import ImageDataset, ImageNet, ImageNet22k, LabelledFolder, SourceDataset
from .definition import DefinitionSource
from .depth import Reading
from .finish import Finisher
from .holdout import split
from .lists import ListSource
from .masking import MaskingGenerator, Masks
from .mixture import Mixture
from .parquet import ParquetSource
from .pixels import opencv, resize_kernel
from .pool import AutoWorkers, at_most_cores, open_ring, set_up_worker
from .samplers import EpochSampler, InfiniteSampler, ShardedInfiniteSampler, start_and_step
from .samples import BadImages, TrainBatches, TrainSamples, unpack
from .spec import SEVERAL, DatasetSpec, parse_dataset
from .tar_shards import TarSource

logger = logging.getLogger("dinov2")
MAX_KINDS = 8  # of files, listed in one log line
DATASETS = {"LabelledFolder": LabelledFolder, "ImageNet": ImageNet, "ImageNet22k": ImageNet22k}
SOURCES = {"Tar": TarSource, "Parquet": ParquetSource, "ImageList": ListSource, "Definition": DefinitionSource}


class SamplerType(Enum):
    """How :func:`make_data_loader` orders images; names and values are upstream's."""

    DISTRIBUTED = 0
    EPOCH = 1
    INFINITE = 2
    SHARDED_INFINITE = 3
    SHARDED_INFINITE_NEW = 4


def make_dataset(
    *,
    dataset_str: str | os.PathLike[str] | Mapping[str, Any] | Sequence[Any],
    transform: Callable | None = None,
    target_transform: Callable | None = None,
) -> Any:
    """Make the dataset described by a dataset string, a path, a mapping or a list of them (see ``data.spec``).

    Raises:
        ConfigError: if a string cannot be parsed.
        DataError: if folders or files are missing or hold no image.
    """
    make, options = _parse_dataset_str(dataset_str)
    dataset = make(transform=transform, target_transform=target_transform, **options)
    if others := getattr(dataset, "left_out", Counter)():
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in others.most_common(MAX_KINDS))
        logger.info(f"left out, not images by their names: {kinds}")
    return dataset


def _parse_dataset_str(dataset_str: Any) -> tuple[Callable, dict[str, Any]]:
    """Return the dataset's constructor and its keyword arguments except transforms; upstream's for upstream's kinds."""
    spec = parse_dataset(dataset_str)
    if spec.kind not in ("ImageNet", "ImageNet22k"):
        return partial(build, spec), {}
    options = {"root": spec.roots[0], **spec.options}
    if "split" in options:
        options["split"] = ImageNet.Split[options["split"]]
    return DATASETS[spec.kind], options


def make_data_loader(
    *,
    dataset: Any,
    batch_size: int,
    num_workers: int,
    shuffle: bool = True,
    seed: int = 0,
    sampler_type: SamplerType | None = SamplerType.INFINITE,
    sampler_size: int = -1,
    sampler_advance: int = 0,
    drop_last: bool = True,
    persistent_workers: bool = False,
    collate_fn: Callable[[list[Any]], Any] | None = None,
) -> DataLoader:
    """Make a DataLoader over ``dataset`` with one of upstream's samplers (None: torch's default order).

    ``sampler_size``: samples per epoch for EPOCH (-1: the dataset's length). ``sampler_advance``: samples that this
    rank has already consumed. Memory is pinned if CUDA is available; ``persistent_workers`` is ignored without workers.
    """
    sampler = _make_sampler(len(dataset), sampler_type, shuffle, seed, sampler_size, sampler_advance)
    return DataLoader(
        dataset,
        sampler=sampler,
        shuffle=shuffle if sampler_type is None else None,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        drop_last=drop_last,
        persistent_workers=persistent_workers and num_workers > 0,
        collate_fn=collate_fn,
        worker_init_fn=set_up_worker,
    )


def _make_sampler(
    sample_count: int, sampler_type: SamplerType | None, shuffle: bool, seed: int, size: int, advance: int
) -> Sampler | None:
    if sampler_type is None:
        return None
    if sampler_type is SamplerType.INFINITE:
        return InfiniteSampler(sample_count=sample_count, shuffle=shuffle, seed=seed, advance=advance)
    if sampler_type in (SamplerType.SHARDED_INFINITE, SamplerType.SHARDED_INFINITE_NEW):
        return ShardedInfiniteSampler(sample_count=sample_count, shuffle=shuffle, seed=seed, advance=advance)
    if advance > 0:
        raise ValueError(f"sampler_advance: expected 0 with {sampler_type}, got {advance}; use an infinite sampler")
    if sampler_type is SamplerType.EPOCH:
        size = size if size > 0 else sample_count
        return EpochSampler(size=size, sample_count=sample_count, shuffle=shuffle, seed=seed)
    if size > 0:
        raise ValueError(f"sampler_size: expected -1 with {sampler_type}, got {size}; use SamplerType.EPOCH")
    rank, world_size = start_and_step(None, None)
    return DistributedSampler(
        range(sample_count), num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed, drop_last=False
    )


def make_train_loader(
    cfg: Any,
    *,
    rank: int,
    world_size: int,
    start_iteration: int = 0,
    cores: int | None = None,
    dataset: Any = None,
    on_bad_image: Callable[[str, str], Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> TrainLoader:
    """Make the loader of a training run: dataset, hold-out, augmentation, masks and order as configured in ``cfg``.

    Every sample is a pure function of (``cfg.train.seed``, draw number). Iteration i of the job has the draws
    [i*b*W, (i+1)*b*W) for batch size b and W ranks, of which each rank takes one block of b; a smaller dataset repeats.
    Starting at ``start_iteration`` therefore resumes exactly. ``on_bad_image(path, reason)`` is called once for each
    unreadable image. ``dataset``: None creates it from ``train.dataset_path``; images of more than 8 bits are then
    scaled by their depth if ``data.intensity`` is "auto".
    ``cores``: this rank's share of the CPU cores, for ``train.num_workers`` "auto"; None: all cores it may use.

    Raises:
        ConfigError: if a dataset string cannot be parsed, or only one of the hold-out keys is set.
        DataError: if folders are missing or empty, or hold no readable image.
    """
    if dataset is None:
        dataset = make_dataset(dataset_str=cfg.train.dataset_path)
        intensity = cfg.data.intensity
        dataset.reading = Reading(None if intensity == "auto" else tuple(intensity), cfg.data.page)
    dataset, held_out = split(
        dataset,
        cfg.train.path_preserved,
        cfg.train.frac,
        output_dir=cfg.train.output_dir,
        write=rank == 0,
    )
    parts = dataset.shares()
    if len(parts) > 1:
        for name, images, share in parts:
            logger.info(f"source: {name} images={images:,} share of the draws={share:.1%}")
    augment = make_augmentation(cfg)
    samples = TrainSamples(dataset, augment, cfg.train.seed, dct_scaling=cfg.data.dct_scaling)
    samples.probe()
    builder = TrainBatches(
        samples,
        make_masks(cfg),
        batch_size=cfg.train.batch_size_per_gpu,
        rank=rank,
        world_size=world_size,
        accumulation_steps=cfg.optim.accumulation_steps,
    )
    return TrainLoader(
        builder,
        Finisher(augment.mean, augment.std, dtype),
        BadImages(len(dataset), cfg.train.max_bad_fraction, on_bad_image),
        num_workers=cfg.train.num_workers,
        cores=cores,
        colours=cfg.augmentation.device,
        start_iteration=start_iteration,
        held_out=held_out,
    )


def make_augmentation(cfg: Any) -> DataAugmentationDINO:
    """Make the augmentation configured in ``cfg``."""
    crops = cfg.crops
    return DataAugmentationDINO(
        crops.global_crops_scale,
        crops.local_crops_scale,
        crops.local_crops_number,
        global_crops_size=crops.global_crops_size,
        local_crops_size=crops.local_crops_size,
        augmentation=cfg.augmentation,
        mean=cfg.data.normalize.mean,
        std=cfg.data.normalize.std,
    )


def make_masks(cfg: Any) -> Masks:
    """Return the mask parameters configured in ``cfg``.

    A rectangle of a mask covers at most half of the patches; the rounding follows upstream's order of evaluation.
    """
    size, patch = cfg.crops.global_crops_size, cfg.student.patch_size
    grid = size // patch
    return Masks(
        ratios=tuple(cfg.ibot.mask_ratio_min_max),
        probability=cfg.ibot.mask_sample_probability,
        n_tokens=grid**2,
        generator=MaskingGenerator((grid, grid), max_num_patches=0.5 * size // patch * size // patch),
    )


def build(spec: DatasetSpec, transform: Callable | None = None, target_transform: Callable | None = None) -> Any:
    """Make the dataset described by ``spec``."""
    options = {"transform": transform, "target_transform": target_transform}
    if spec.kind == "ImageDataset":
        return ImageDataset(list(spec.roots), **options)
    if spec.kind in DATASETS:
        return DATASETS[spec.kind](root=spec.roots[0], **options, **spec.options)
    if spec.kind == "Mixture":
        weights = [part.weight for part in spec.parts]
        datasets = [build(part.spec, transform) for part in spec.parts]
        names = [part.name for part in spec.parts]
        return Mixture(datasets, names, None if None in weights else weights, target_transform)
    place = list(spec.roots) if spec.kind in SEVERAL else spec.roots[0]
    return SourceDataset(SOURCES[spec.kind](place, **spec.options), root=list(spec.roots), **options)


@dataclass(eq=False)
class TrainLoader:
    """An endless sequence of one rank's collated batches, independent of ``num_workers``.

    ``num_images``: images to train on. ``draws``: number of the job's next draw, which a resumed run passes to
    :meth:`batches`.
    ``num_workers``: number of processes; 0 loads in this process, "auto" uses as many as needed, at most ``cores``.
    ``colours``: where colours are changed, "cpu" | "device" | "auto" (the device unless it is a CPU); the pixels are
    identical.
    ``held_out``: dataset of the images that are held out of training, or None.
    """

    builder: TrainBatches
    finish: Finisher
    bad_images: BadImages
    _: KW_ONLY
    num_workers: int | str
    cores: int | None = None
    colours: str = "auto"
    start_iteration: int = 0
    held_out: Any = None

    def __post_init__(self) -> None:
        self.num_images = len(self.builder.samples.dataset)
        self.found: dict[str, Any] = {"resize": resize_kernel()}  # saved in checkpoints
        self.draws = self.start_iteration * self.builder.batch_size * self.builder.world_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.batches(self.start_iteration)

    def batches(
        self, start_iteration: int = 0, device: torch.device | str = "cpu", *, first_draw: int = 0
    ) -> Iterator[dict[str, Any]]:
        """Yield the batches from ``start_iteration`` on, counted from ``first_draw``, with crops on ``device``.

        Raises:
            DataError: if too many images cannot be read, or data-loading processes die repeatedly.
        """
        device = torch.device(device)
        batch_size, world_size = self.builder.batch_size, self.builder.world_size
        self.draws = first_draw + start_iteration * batch_size * world_size
        copier = Copier(device)
        source, auto = self._source(start_iteration, device, first_draw)
        try:
            while True:
                built = source.next_batch()
                self.bad_images.add(batch_size, built.result.bad)
                if not built.result.complete:
                    raise self.bad_images.error()
                copied = copier(partial(unpack, built.arrays, built.result.upperbound, self.finish, device))
                if copied.is_done:
                    source.release(built.slot)
                self.draws += batch_size * world_size
                start = time.perf_counter()
                yield copied.batch
                if not copied.is_done:
                    copied.wait()
                    source.release(built.slot)
                if auto is not None and auto.observe(built.seconds, time.perf_counter() - start):
                    source.grow(auto.chosen)
        finally:
            try:
                copier.wait()  # copies may still read the memory that is about to be freed
            finally:
                source.close()

    def _source(self, start_iteration: int, device: torch.device, first_draw: int) -> tuple[Any, AutoWorkers | None]:
        """Return the started batch builder and, for ``num_workers`` "auto", the object that sets their number."""
        builder = copy.copy(self.builder)
        builder.first_draw = first_draw
        builder.late_colours = self.colours == "device" or (self.colours == "auto" and device.type != "cpu")
        by = "OpenCV" if opencv() else "numpy"  # checked once here rather than in each process
        where = "on the device" if builder.late_colours else f"by {by}"
        logger.info(f"crops are resized by {resize_kernel()}, their colours changed {where}")
        pinned = device.type == "cuda"
        if self.num_workers == "auto":
            auto = AutoWorkers(builder.batch_size, self.cores)
            return open_ring(builder, auto.first, start_iteration, pinned=pinned, max_workers=auto.most), auto
        return open_ring(builder, at_most_cores(self.num_workers), start_iteration, pinned=pinned), None


class Copied:
    """A batch and the event after which its host memory may be reused."""

    def __init__(self, batch: dict[str, Any], event: torch.cuda.Event | None = None) -> None:
        self.batch, self._event = batch, event

    @property
    def is_done(self) -> bool:
        """Whether all copies have completed."""
        return self._event is None

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()
            self._event = None


class Copier:
    """Make batches on ``device``, using a separate stream if it is a CUDA device.

    A batch is thus copied while the previous step is still computing, since the host runs up to one step ahead of the
    GPU. On other devices there are no streams, and copies are synchronous.

    ``cuda``: a namespace with ``Stream``, ``Event``, ``stream`` and ``current_stream`` as in ``torch.cuda``; None uses
    no streams.
    """

    def __init__(self, device: torch.device, cuda: Any = None) -> None:
        self.device = device
        self.cuda = cuda or (torch.cuda if device.type == "cuda" else None)
        self.stream = self.cuda.Stream(device) if self.cuda else None

    def __call__(self, make: Callable[[], dict[str, Any]]) -> Copied:
        """Return ``make()``; the current stream, not the host, waits for its copies and kernels."""
        if self.stream is None:
            return Copied(make())
        with self.cuda.stream(self.stream):
            batch = make()
            event = self.cuda.Event(blocking=True)  # otherwise waiting would keep a core busy
            event.record(self.stream)
        user = self.cuda.current_stream(self.device)
        user.wait_event(event)
        for value in batch.values():
            if isinstance(value, torch.Tensor) and value.device.type == self.device.type:
                value.record_stream(user)  # do not reuse its memory before the consuming stream is done
        return Copied(batch, event)

    def wait(self) -> None:
        """Wait for everything that was started here."""
        if self.stream is not None:
            self.stream.synchronize()
