"""DatasetSpec -> dataset: the table of kinds. Read :func:`build`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dinov2_custom.errors import ConfigError

from .datasets import ImageDataset, ImageNet, ImageNet22k, LabelledFolder, SourceDataset
from .lists import ListSource
from .mixture import Mixture
from .parquet import ParquetSource
from .sources import Source
from .spec import DatasetSpec
from .tar_shards import TarSource

DATASETS = {"LabelledFolder": LabelledFolder, "ImageNet": ImageNet, "ImageNet22k": ImageNet22k}


def build(spec: DatasetSpec, transform: Callable | None = None, target_transform: Callable | None = None) -> Any:
    """Make the dataset that ``spec`` describes.

    Raises:
        DataError: what it names is missing, broken or holds no image.
    """
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
    return SourceDataset(make_source(spec), root=list(spec.roots), **options)


def make_source(spec: DatasetSpec) -> Source:
    """Make the source of a kind that is not a dataset class of its own."""
    if spec.kind == "Tar":
        return TarSource(list(spec.roots))
    if spec.kind == "Parquet":
        return ParquetSource(list(spec.roots), **spec.options)
    if spec.kind == "ImageList":
        return ListSource(spec.roots[0], **spec.options)
    raise ConfigError(f"train.dataset_path: unknown kind of dataset {spec.kind!r}")
