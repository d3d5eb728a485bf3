"""Build a frozen teacher on its device from the flags of an evaluation. Upstream's names.

Nothing is written into the training run that the weights come from.
"""

from __future__ import annotations

import argparse
import functools
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import nn

from dinov2_custom import distributed
from dinov2_custom.configs.load import load_run_config
from dinov2_custom.configs.paths import check_output_dir
from dinov2_custom.data.pool import workers_of_choice
from dinov2_custom.errors import CheckpointError, ConfigError
from dinov2_custom.eval.args import get_args_parser as get_args_parser  # upstream has it here
from dinov2_custom.logging import open_log, setup_logging
from dinov2_custom.models import build_model_from_cfg
from dinov2_custom.reading import reading_of
from dinov2_custom.teacher import RELEASED_CROP_SIZE, is_released, load_teacher_backbone
from dinov2_custom.utils.dtype import resolve_dtype
from dinov2_custom.utils.paths import without_credentials
from dinov2_custom.utils.run_folder import find_weights, run_config_near
from dinov2_custom.utils.weights import is_url

logger = logging.getLogger("dinov2")
_RUN_FILES = ("config.yaml", "training_metrics.json", "last_checkpoint")
_LINEAR_FILES = ("running_checkpoint_linear_eval.pth", "results_eval_linear.json")  # has a last_checkpoint too


def setup_and_build_model(args: argparse.Namespace, *, hold_log: bool = False) -> tuple[nn.Module, torch.dtype]:
    """Return (teacher backbone on its device in evaluation mode, dtype to compute in).

    Starts ranks and logs, creates the output directory and sets ``args.output_dir`` to it; ``args.normalize``
    is set to the ``{"mean": ..., "std": ...}`` that the model was trained with, ``args.training_crop_size`` the crop
    size in pixels, ``args.reading`` the reading of images of more than 8 bits.

    Args:
        args: parsed by :func:`get_args_parser`; flags that upstream does not have may be missing.
        hold_log: for this package's programs: no process group in a single process, and the caller creates the output
            directory with :func:`dinov2_custom.logging.open_log`, below the last user-fixable error.

    Raises:
        ConfigError: no weights, no configuration, or the output directory belongs to a training run.
        CheckpointError: the weights are unreadable or of another architecture.
    """
    if not args.pretrained_weights:
        raise ConfigError(
            "--pretrained-weights: expected a weight file, got nothing; give a run's "
            "eval/training_<iteration>/teacher_checkpoint.pth"
        )
    distributed.enable(alone=not hold_log)
    weights = _weights_of(args.pretrained_weights)
    config_file = args.config_file or str(find_run_config(weights))
    cfg = load_run_config(
        config_file,
        ["train.output_dir=", *(args.opts or [])],
        output_dir=args.output_dir,
        allow_unknown_keys=getattr(args, "allow_unknown_keys", False),
        require_dataset=False,
        training=False,
    )
    args.normalize = {key: tuple(cfg.data.normalize[key]) for key in ("mean", "std")}
    args.training_crop_size = RELEASED_CROP_SIZE if is_released(config_file) else cfg.crops.global_crops_size
    args.reading = reading_of(cfg)
    args.output_dir = distributed.broadcast_object(cfg.train.output_dir)
    check_not_a_run(args.output_dir)
    check_output_dir(args.output_dir)
    setup_logging(args.output_dir, name="dinov2", level=logging.INFO, hold=True)
    logger.info(f"config: {config_file}")
    model = build_model_for_eval(cfg, weights)
    if not hold_log:
        open_log("dinov2")
    return model, get_autocast_dtype(cfg, next(model.parameters()).device)


def evaluation(main: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Decorate the main function of an evaluation: it runs between :func:`distributed.enable` and ``disable``."""

    @functools.wraps(main)
    def decorated(args: argparse.Namespace) -> int:
        with distributed.enabled():
            return main(args)

    return decorated


def _weights_of(given: str) -> str:
    try:
        return find_weights(given)
    except CheckpointError as e:
        raise CheckpointError(f"--pretrained-weights: {e}") from e


def find_run_config(weights: str) -> Path:
    """Return the config.yaml of the run directory that contains ``weights`` (up to three folders above the file).

    Raises:
        ConfigError: there is no such configuration.
        CheckpointError: the weight file does not exist either.
    """
    found = run_config_near(weights)
    if found is not None:
        return found
    if not is_url(weights) and not Path(weights).expanduser().exists():
        raise CheckpointError(
            f"--pretrained-weights: expected a weight file at {weights}, found nothing; check the path"
        )
    raise ConfigError(
        f"--config-file: expected the configuration of {without_credentials(weights)}, got none, and there is no "
        "config.yaml in the three folders above it; give the run's config.yaml with --config-file"
    )


def check_not_a_run(folder: str) -> None:
    """Raise if ``folder`` is a training run, which results must not be written to.

    Raises:
        ConfigError: ``folder`` holds a run.
    """
    found = [name for name in _RUN_FILES if (Path(folder) / name).exists()]
    if found == ["last_checkpoint"] and any((Path(folder) / name).exists() for name in _LINEAR_FILES):
        return
    if found:
        raise ConfigError(
            f"--output-dir: expected a folder without a training run, got {', '.join(found)} in {folder}; "
            "choose another, or leave it out for ./outputs/<date>_<time>"
        )


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raise if a named flag of ``args``, a number or a list of numbers, is not positive.

    Raises:
        ConfigError: names the invalid flags.
    """
    values = {name: getattr(args, name) for name in names if getattr(args, name) != "auto"}
    wrong = [
        f"--{name if name == 'nb_knn' else name.replace('_', '-')} {value}"
        for name, value in values.items()
        if not all(number > 0 for number in (value if isinstance(value, list | tuple) else [value]))
    ]
    if wrong:
        raise ConfigError(f"expected positive numbers, got {', '.join(wrong)}")


def choose_sizes(args: argparse.Namespace, model: nn.Module, resize_ratio: float = 256 / 224) -> None:
    """Replace "auto" in ``args``: the training's crop size, ``resize_ratio`` times that for the side, all cores.

    Raises:
        ConfigError: the crop is not a multiple of the patch size.
    """
    if args.crop_size == "auto":
        args.crop_size = args.training_crop_size
    if args.crop_size % model.patch_size:
        raise ConfigError(
            f"--crop-size: expected a multiple of student.patch_size={model.patch_size}, got {args.crop_size}"
        )
    if args.resize_size == "auto":
        args.resize_size = round(args.crop_size * resize_ratio)
    args.num_workers = workers_of_choice(args.num_workers, distributed.share_of_cores())
    trained = "" if args.crop_size == args.training_crop_size else f", trained with {args.training_crop_size} px"
    logger.info(
        f"images: shorter side {args.resize_size} px, central {args.crop_size} px{trained}; "
        f"data-loading processes: {args.num_workers}"
    )


def get_autocast_dtype(config: DictConfig, device: str | torch.device | None = None) -> torch.dtype:
    """Return the dtype that the teacher's backbone computes in; fp16 becomes fp32 on a CPU.

    Args:
        device: None for the default device of an evaluation.
    """
    device = torch.device(device or distributed.get_device())
    name = config.compute_precision.teacher.backbone.mixed_precision.param_dtype
    dtype = resolve_dtype(name, device)
    return torch.float32 if device.type == "cpu" and dtype == torch.float16 else dtype


def build_model_for_eval(config: DictConfig, pretrained_weights: str) -> nn.Module:
    """Build the teacher that ``config`` describes, load ``pretrained_weights`` and freeze it, on a GPU if available."""
    model, _ = build_model_from_cfg(config, only_teacher=True)
    load_teacher_backbone(model, pretrained_weights)
    model.requires_grad_(False)
    return model.eval().to(distributed.get_device())
