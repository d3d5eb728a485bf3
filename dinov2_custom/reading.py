"""Choose how a dataset's images of more than 8 bits are read (value range and page), for all processes.

They come from the run's configuration if it sets them, and are measured otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, read_write

from dinov2_custom import distributed
from dinov2_custom.configs.load import read_config
from dinov2_custom.data.datasets import ExtendedVisionDataset
from dinov2_custom.data.depth import Reading
from dinov2_custom.data.intensity import ADVICE, Looker, Measured, measure
from dinov2_custom.errors import ConfigError

AUTO = "auto"
KEY = "data.intensity"


def choose_reading(dataset: Any, given: Reading | None = None, seed: int = 0) -> Reading:
    """Set ``dataset.reading`` and return it: ``given``, with a range measured on ``dataset`` if it has none.

    The main process reads a sample and logs the effect of the range, whether given or measured. All processes must call
    it.
    """
    given = given or Reading()
    found = distributed.broadcast_object(_measured(dataset, given, seed) if distributed.is_main_process() else None)
    dataset.reading = given if given.intensity else given._replace(intensity=found.intensity)
    return dataset.reading


def reading_of(cfg: DictConfig) -> Reading:
    """Return the reading that a configuration describes; a range not measured yet is None."""
    return Reading(as_range(cfg.data.intensity), cfg.data.page)


def as_range(intensity: Any) -> tuple[float, float] | None:
    """Return ``data.intensity`` as a pair of numbers; None for "auto"."""
    return None if intensity == AUTO else (float(intensity[0]), float(intensity[1]))


def to_facts(reading: Reading | None) -> dict[str, Any]:
    """Return the facts stored in an export, under the key names of ``data``; defaults are omitted."""
    if reading is None:
        return {}
    facts = {"intensity": None if reading.intensity is None else list(reading.intensity), "page": reading.page}
    return {name: fact for name, fact in facts.items() if fact}


def from_facts(facts: Mapping[str, Any]) -> Reading:
    """Return the reading from the result of :func:`to_facts`.

    Raises:
        TypeError, ValueError, LookupError: values that it does not produce.
    """
    return Reading(as_range(facts.get("intensity", AUTO)), int(facts.get("page", 0)))


def describe(reading: Reading) -> list[str]:
    """Return the settings that are not the defaults, one per line."""
    lines = [f"page: {reading.page} of images with several (data.page)"] if reading.page else []
    if reading.intensity is not None:
        low, high = reading.intensity
        lines.append(f"intensity: {low:g} to {high:g} become 0 to 255 in images of more than 8 bits ({KEY})")
    return lines


def _measured(dataset: Any, given: Reading, seed: int) -> Measured:
    own = getattr(type(dataset), "get_image_data", None)
    if own in (None, ExtendedVisionDataset.get_image_data):  # a user's class that provides no bytes
        return Measured(None, 0, 0)
    found = measure(len(dataset), Looker(dataset, given.page), seed, intensity=given.intensity)
    found.log()
    return found


def choose_for_training(cfg: DictConfig, dataset: Any, resumed: Path | None) -> DictConfig:
    """Set ``dataset.reading`` and return ``cfg`` with the range in ``data.intensity``.

    Args:
        resumed: directory of the resumed run, whose range, if any, is kept and never measured again.

    Raises:
        ConfigError: its configuration cannot be read.
    """
    if resumed is None:
        reading = choose_reading(dataset, reading_of(cfg), cfg.train.seed)
    else:
        path = resumed / "config.yaml"
        earlier = _range_in(path) if cfg.data.intensity == AUTO and path.exists() else None
        reading = dataset.reading = reading_of(cfg) if earlier is None else Reading(earlier, cfg.data.page)
    cfg = cfg.copy()
    with read_write(cfg):
        cfg.data.intensity = AUTO if reading.intensity is None else list(reading.intensity)
    return cfg


def _range_in(path: Path) -> tuple[float, float] | None:
    """Return the range in a run's configuration; None for "auto", i.e. without images of more than 8 bits."""
    advice = f"restore the file, or give the range of its start, {ADVICE} ([0, 255] where all images have 8 bits)"
    data = read_config(path, advice).get("data")
    intensity = data.get("intensity") if isinstance(data, dict) else None
    try:
        return as_range(intensity)
    except (TypeError, ValueError, LookupError) as e:
        raise ConfigError(f"{KEY}: expected two numbers or {AUTO} in {path}, got {intensity!r:.80}; {advice}") from e
