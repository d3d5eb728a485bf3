"""Set up a run from parsed arguments: configuration, ranks, seeds, logs. Upstream's names."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, read_write

from dinov2_custom import distributed
from dinov2_custom.configs.load import load_run_config, scaled_lr, to_yaml
from dinov2_custom.configs.paths import check_output_dir
from dinov2_custom.errors import ConfigError
from dinov2_custom.files import write_text
from dinov2_custom.logging import setup_logging
from dinov2_custom.utils.utils import fix_random_seeds, get_sha

logger = logging.getLogger("dinov2")


def setup(args: argparse.Namespace) -> DictConfig:
    """Prepare everything a run needs before its model, and return its configuration, which may be changed.

    This sets up ranks (a process group even in a single process), configuration, output directory (created, also set as
    ``args.output_dir``), log files, seeds, ``config.yaml``.

    Args:
        args: ``config_file``, ``opts`` (``key=value`` strings), ``output_dir``; optional ``allow_unknown_keys``.

    Raises:
        ConfigError: all mistakes in the configuration, or an output directory that cannot be written.
        LaunchError: see :func:`dinov2_custom.distributed.enable`.
    """
    distributed.enable(alone=True)
    cfg = get_cfg_from_args(args)
    check_output_dir(cfg.train.output_dir)
    os.makedirs(cfg.train.output_dir, exist_ok=True)
    default_setup(args, seed=cfg.train.seed)
    write_config(cfg, cfg.train.output_dir)
    return cfg


def get_cfg_from_args(args: argparse.Namespace, warn: Callable[[str], None] | None = None) -> DictConfig:
    """Load the configuration that ``args`` describe, with the learning rate for this number of processes.

    It may be changed and extended, like upstream's. All processes get the main one's output directory, which is set
    as ``args.output_dir`` too. ``warn`` is called with each warning; default: a logger.
    """
    cfg = load_cfg_from_args(args, warn)
    args.output_dir = distributed.broadcast_object(cfg.train.output_dir)
    return cfg if cfg.train.output_dir == args.output_dir else load_cfg_from_args(args, lambda text: None)


def load_cfg_from_args(args: argparse.Namespace, warn: Callable[[str], None] | None = None) -> DictConfig:
    """Load the configuration that ``args`` describe, without collectives, so also before a process group exists."""
    cfg = load_run_config(
        args.config_file,
        args.opts or [],
        args.output_dir,
        allow_unknown_keys=getattr(args, "allow_unknown_keys", False),
        world_size=distributed.get_global_size(),
        warn=warn,
    )
    OmegaConf.set_readonly(cfg, False)
    OmegaConf.set_struct(cfg, False)
    return cfg


def default_setup(args: argparse.Namespace, seed: int | None = None) -> None:
    """Start ranks and log files in ``args.output_dir``, seed the global generators with ``seed`` + rank, log ``args``.

    Args:
        seed: None for ``args.seed`` if it exists, else 0.
    """
    distributed.enable(alone=True)
    setup_logging(args.output_dir, level=logging.INFO)
    seed = getattr(args, "seed", 0) if seed is None else seed
    fix_random_seeds(seed + distributed.get_global_rank())
    if distributed.is_main_process():
        logger.info(f"git: {get_sha()}")
    logger.info("arguments: " + " ".join(f"{name}={value}" for name, value in sorted(vars(args).items())))


def apply_scaling_rules_to_cfg(cfg: DictConfig) -> DictConfig:
    """Set ``cfg.optim.lr`` to base_lr * sqrt(global batch / 1024), in place, and return ``cfg``.

    The result of :func:`get_cfg_from_args` has it already.

    Raises:
        ConfigError: unknown ``optim.scaling_rule``.
    """
    rule = cfg.optim.scaling_rule
    if rule != "sqrt_wrt_1024":
        raise ConfigError(f"optim.scaling_rule: expected sqrt_wrt_1024, the only rule, got {rule!r}; leave it out")
    keys = ("optim.base_lr", "train.batch_size_per_gpu", "optim.accumulation_steps")
    values = {key: OmegaConf.select(cfg, key, default=1) for key in keys}
    with read_write(cfg):
        cfg.optim.lr = scaled_lr(values, distributed.get_global_size())
    return cfg


def write_config(cfg: DictConfig, output_dir: str | os.PathLike, name: str = "config.yaml") -> str:
    """Write ``cfg`` to ``output_dir/name`` and return that path. Atomic; only the main process writes."""
    path = Path(output_dir) / name
    if distributed.is_main_process():
        write_text(path, to_yaml(cfg))
    return str(path)
