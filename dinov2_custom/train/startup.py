"""What a run logs about itself before the first step and after the last one."""

from __future__ import annotations

import math
import platform
import shlex
import sys
from collections.abc import Collection
from pathlib import Path

import torch
from omegaconf import OmegaConf

from dinov2_custom import __version__
from dinov2_custom.errors import command
from dinov2_custom.reading import describe, reading_of
from dinov2_custom.train.course import Course
from dinov2_custom.train.gpus import describe_device
from dinov2_custom.utils.dtype import resolve_dtype
from dinov2_custom.utils.utils import get_sha

SHORT_RUN = 10_000  # iterations; a tenth of the length that upstream's values are tuned for
FEW_PROTOTYPES = 256


def describe_run(cfg, model, course: Course, num_images: int, world_size: int) -> list[str]:
    """Return the start-up block, one fact per line."""
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    dtype = str(resolve_dtype(cfg.compute_precision.student.backbone.mixed_precision.param_dtype, device))
    millions = sum(p.numel() for p in model.student.parameters()) / 1e6
    length, dataset = course.length, OmegaConf.to_container(cfg.train)["dataset_path"]  # with ${oc.env:...} unresolved
    return [
        f"command: {shlex.join(sys.argv)}",
        f"versions: dinov2_custom={__version__} torch={torch.__version__} python={platform.python_version()} "
        f"git=({get_sha()})",
        describe_device(device.type, name, torch.get_num_threads(), world_size),
        f"precision: {dtype.removeprefix('torch.')}, losses and weights in float32",
        f"model: {cfg.student.arch} patch={cfg.student.patch_size} student_parameters={millions:.2f}M",
        f"prototypes: {model.num_prototypes:,} (ln = {math.log(model.num_prototypes):.3f}), "
        f"{num_images / model.num_prototypes:.3g} images each",
        f"images: {num_images:,} found in {dataset}",
        *describe(reading_of(cfg)),
        f"batch: {cfg.train.batch_size_per_gpu} per process x {world_size} processes x {cfg.optim.accumulation_steps} "
        f"accumulated = {length.global_batch}, lr={cfg.optim.lr:.3g}",
        f"length: {course.describe(num_images)}",
        f"files: {cfg.train.output_dir} (complete configuration: config.yaml)",
    ]


def short_run_warning(cfg, course: Course, num_images: int) -> str:
    """Return a sentence on values of ``cfg`` that are meant for longer runs or more images, or "" if there are none.

    Runs from pretrained weights are exempt: these have a trained LayerScale and need no long warm-up.
    """
    if cfg.student.pretrained_weights:
        return ""
    steps = math.inf if course.limit_s else course.length.total  # unknown in advance if the run is limited by time
    is_short, layerscale, momentum = steps < SHORT_RUN, cfg.student.layerscale, cfg.teacher.momentum_teacher
    prototypes, smallest = cfg.dino.head_n_prototypes, cfg.crops.global_crops_scale[0]
    found = []
    if is_short and layerscale and layerscale < 1e-3:
        found.append(f"student.layerscale={layerscale:g} (blocks add next to nothing for thousands of steps)")
    if prototypes > max(num_images, FEW_PROTOTYPES):
        found.append(f"dino.head_n_prototypes={prototypes:,} (more than images)")
    if (behind := 1 / max(1 - momentum, 1e-9)) > steps / 5:
        found.append(f"teacher.momentum_teacher={momentum:g} (the teacher is {behind:,.0f} steps behind)")
    if is_short and smallest < 0.4:
        found.append(f"crops.global_crops_scale from {smallest:g} (two crops may have little in common)")
    if not found:
        return ""
    length = f"{num_images:,} images" if course.limit_s else f"{steps:,} iterations, {num_images:,} images"
    return (
        f"{length}: these values are meant for about 100,000 of each: {', '.join(found)}; --config-file "
        "configs/small.yaml is meant for few images and steps"
    )


def describe_end(cfg, teacher_path: Path, checkpoint_path: Path, verdicts: Collection[str] = ()) -> list[str]:
    """Return lines on what was written and what to do next; ``verdicts``: kinds that hold, of ``train/health.py``."""
    out = Path(cfg.train.output_dir)
    online = OmegaConf.to_container(cfg.evaluation.online)  # with ${oc.env:...} unresolved
    datasets = [online[f"knn_{part}"] or f"LabelledFolder:root={part.upper()}" for part in ("train", "val")]
    next_step = (
        f"next: {command('run/eval/knn.py')} --pretrained-weights {shlex.quote(str(teacher_path))} "
        f"--train-dataset {shlex.quote(datasets[0])} --val-dataset {shlex.quote(datasets[1])}"
    )
    if verdicts:
        next_step = (
            f"next: the verdict is {', '.join(verdicts)}: change what the last lines say, and train again into "
            "another --output-dir"
        )
    return [
        f"teacher weights: {teacher_path}",
        f"training state: {checkpoint_path} (to extend the run, increase its length and rerun the same command)",
        f"losses: {out / 'training_metrics.json'}",
        next_step,
    ]
