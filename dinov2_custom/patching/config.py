"""Patches of a checkout's configuration: output directory, epoch length, saving of the teacher."""

from __future__ import annotations

import argparse
import functools
import logging
from collections.abc import Callable
from typing import Any

from omegaconf import OmegaConf

from dinov2_custom.errors import ConfigError

logger = logging.getLogger("dinov2")
_FLAGS = ("--output-dir", "--output_dir")


def with_output_dir(original: Callable) -> Callable:
    """Return a ``get_cfg_from_args`` that honours ``train.output_dir`` and a ``--output-dir`` after the overrides."""

    @functools.wraps(original)
    def honouring(args: Any) -> Any:
        take_output_dir(args)
        return original(args)

    return honouring


def with_submit_dir(original: Callable) -> Callable:
    """Return a ``submit_jobs`` that honours the same settings."""

    @functools.wraps(original)
    def honouring(task_class: Any, args: Any, *rest: Any, **options: Any) -> Any:
        take_output_dir(args)
        return original(task_class, args, *rest, **options)

    return honouring


def take_output_dir(args: argparse.Namespace) -> None:
    """Set ``args.output_dir`` from flags among ``args.opts``, else from ``train.output_dir``, unless it is set.

    Evaluations keep to their flag: they are given the configuration of a training run, into which they must not
    write.

    Raises:
        ConfigError: ``--output-dir`` as the last argument.
    """
    args.opts = list(args.opts or [])
    for place in [i for i, word in enumerate(args.opts) if word.partition("=")[0] in _FLAGS][::-1]:
        _, equals, value = args.opts.pop(place).partition("=")
        if not equals and place == len(args.opts):
            raise ConfigError("--output-dir: expected a folder after it, got nothing")
        args.output_dir = value if equals else args.opts.pop(place)
    if args.output_dir or hasattr(args, "pretrained_weights"):
        return
    given = OmegaConf.from_cli(args.opts)
    if getattr(args, "config_file", ""):
        given = OmegaConf.merge(OmegaConf.load(args.config_file), given)
    folder = OmegaConf.select(given, "train.output_dir", default="")
    args.output_dir = "" if folder in (None, ".") else str(folder)


def with_epoch_length(original: Callable, count: Callable[[Any], int], world_size: Callable[[], int]) -> Callable:
    """Return an ``apply_scaling_rules_to_cfg`` that replaces ``OFFICIAL_EPOCH_LENGTH: auto`` by a number.

    ``auto`` is one pass over the data: images / global batch, rounded up.

    Args:
        count: returns the number of images of a dataset string.

    Raises:
        ConfigError: (from the returned function) the warm-up is longer than the run, or epochs are fractional.
    """

    @functools.wraps(original)
    def computing(cfg: Any) -> Any:
        cfg = original(cfg) or cfg
        if cfg.train.get("OFFICIAL_EPOCH_LENGTH") is None:  # a fork that defines epochs differently
            return cfg
        batch = cfg.train.batch_size_per_gpu * world_size()
        if cfg.train.OFFICIAL_EPOCH_LENGTH == "auto":
            images = count(cfg.train.dataset_path)
            cfg.train.OFFICIAL_EPOCH_LENGTH = -(-images // batch)
            logger.info(f"epoch: {images:,} images, {cfg.train.OFFICIAL_EPOCH_LENGTH} iterations of {batch} images")
        _check_epochs(cfg)
        return cfg

    return computing


def _check_epochs(cfg: Any) -> None:
    values = {"train.OFFICIAL_EPOCH_LENGTH": cfg.train.OFFICIAL_EPOCH_LENGTH}
    names = [name for name in ("epochs", "warmup_epochs", "freeze_last_layer_epochs") if name in cfg.optim]
    values |= {f"optim.{name}": cfg.optim[name] for name in names}
    wrong = [
        f"{key}: expected a whole number, got {value!r}" for key, value in values.items() if type(value) is not int
    ]
    if not wrong and {"epochs", "warmup_epochs"} <= {*names} and cfg.optim.warmup_epochs > cfg.optim.epochs:
        wrong = [
            f"optim.warmup_epochs: expected at most optim.epochs={cfg.optim.epochs}, got {cfg.optim.warmup_epochs}; "
            "shorten the warm-up or train longer"
        ]
    if wrong:
        raise ConfigError("\n".join(wrong))


def with_last_teacher(original: Callable) -> Callable:
    """Return an ``apply_scaling_rules_to_cfg`` after which the last iteration of a short run also saves a teacher."""

    @functools.wraps(original)
    def shortening(cfg: Any) -> Any:
        cfg = original(cfg) or cfg
        length, epochs = cfg.train.get("OFFICIAL_EPOCH_LENGTH"), cfg.optim.get("epochs")
        period = cfg.evaluation.get("eval_period_iterations") or 0
        total = epochs * length if isinstance(length, int) and isinstance(epochs, int) else 0
        if 0 < total < period:
            cfg.evaluation.eval_period_iterations = total
            logger.info(f"evaluation.eval_period_iterations: {total}, the length of the run, not {period}")
        return cfg

    return shortening
