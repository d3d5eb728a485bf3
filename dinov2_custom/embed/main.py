"""Compute the features of a dataset: load the model, compute the missing parts, and join them."""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_custom import cli, distributed
from dinov2_custom.configs.paths import check_output_dir
from dinov2_custom.data.image_batches import ImageBatches, batches
from dinov2_custom.data.loaders import make_dataset
from dinov2_custom.data.pool import workers_of_choice
from dinov2_custom.data.transforms import make_central_crop_transform
from dinov2_custom.embed.store import Store
from dinov2_custom.errors import ConfigError, optional
from dinov2_custom.logging.progress import ProgressBar
from dinov2_custom.reading import choose_reading, describe
from dinov2_custom.teacher import RELEASED_CROP_SIZE, Teacher, device_of_choice, is_released, load_teacher
from dinov2_custom.utils.dtype import has_bf16
from dinov2_custom.utils.paths import without_credentials
from dinov2_custom.utils.run_folder import default_output
from dinov2_custom.utils.transfer import to_device
from dinov2_custom.utils.weights import is_url

logger = logging.getLogger("dinov2")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(args: argparse.Namespace) -> int:
    """Run the command line parsed by ``cli.embed_parser``; return the exit code."""
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size: expected at least 1, got {args.batch_size}")
    if args.format == "parquet":
        optional("pyarrow", "--format parquet")
    with distributed.enabled():
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    teacher = load_teacher(args.checkpoint, args.config_file, args.opts, args.allow_unknown_keys)
    folder = Path(args.output_dir).expanduser() if args.output_dir else default_output("embed", args.checkpoint)
    check_output_dir(folder, "--output-dir")
    dataset = make_dataset(dataset_str=args.dataset)
    for line in describe(choose_reading(dataset, teacher.reading)):
        _say(line)
    device = device_of_choice(args.device)
    if args.precision == "auto":
        args.precision = "bf16" if device.type == "cuda" and has_bf16(device) else "fp32"
    teacher.backbone.to(device)
    sizes = image_sizes(teacher, args.image_size)
    args.num_workers = workers_of_choice(args.num_workers, distributed.share_of_cores())
    for size in sizes:
        where = folder / str(size) if len(sizes) > 1 else folder
        _embed(teacher, dataset, size, where, device, args)
    distributed.barrier()
    return 0


def image_sizes(teacher: Teacher, given: list[int]) -> list[int]:
    """Return the image sizes in pixels.

    Raises:
        ConfigError: if a size is not a multiple of the patch size.
    """
    patch = teacher.backbone.patch_size
    if not given:
        # released weights have position embeddings for 518 pixels but are used at 224; an export has those of its run
        released = is_released(teacher.config_file) and teacher.image_size > RELEASED_CROP_SIZE
        size = RELEASED_CROP_SIZE if released else teacher.image_size
        return [max(size // patch, 1) * patch]
    wrong = [str(size) for size in given if size < patch or size % patch]
    if wrong:
        raise ConfigError(f"--image-size: expected multiples of the patch size {patch}, got {', '.join(wrong)}")
    return list(dict.fromkeys(given))


def _embed(teacher: Teacher, dataset: Any, size: int, folder: Path, device: torch.device, args) -> None:
    shown = without_credentials(teacher.weights)
    description = {
        "weights": shown if is_url(teacher.weights) else str(Path(teacher.weights).absolute()),
        "weights_sha256": _digest(teacher.backbone),
        "dataset": args.dataset,
        "images": len(dataset),
        "names_sha256": _digest_of_names(dataset),
        "image_size": size,
        "mean": list(teacher.normalize["mean"]),
        "std": list(teacher.normalize["std"]),
        "intensity": list(dataset.reading.intensity or []),
        "page": dataset.reading.page,
        "features": args.features,
        "l2": args.l2,
        "precision": args.precision,
        "save_dtype": args.save_dtype,
        "format": args.format,
        "batch_size": args.batch_size,
    }
    store = _open_on_main_first(folder, description, args.overwrite)
    if store.is_complete():
        _say(f"complete already: {folder / store.result_name}")
        return
    missing = store.missing_parts()
    done = len(dataset) - sum(len(part) for _, part in missing)
    _say(f"images: {len(dataset):,} in {args.dataset}, {done:,} done before; size={size} device={device}")
    mine = missing[distributed.get_global_rank() :: distributed.get_global_size()]
    with ProgressBar(len(dataset), initial=done, description="features", unit="image") as bar:
        _make_parts(store, mine, teacher, dataset, size, device, args, bar)
    distributed.barrier()
    if distributed.is_main_process():
        labels = _labels(dataset)
        rows, bad = store.finish(dataset.name, labels)
        _say(
            f"features: {folder / store.result_name} rows={rows:,} bad images={bad}"
            + (" (bad_images.jsonl)" * bool(bad))
        )


def _make_parts(store: Store, parts, teacher: Teacher, dataset, size: int, device, args, bar: ProgressBar) -> None:
    """Compute and save each (number, images) of ``parts``."""
    transform = make_central_crop_transform(size, **teacher.normalize)
    step = args.batch_size
    groups = [part[start : start + step] for _, part in parts for start in range(0, len(part), step)]
    builder = ImageBatches(dataset, groups.__getitem__, step, (3, size, size), transform=transform, skip_bad=True)
    stream = batches(builder, args.num_workers, stop=len(groups))
    for number, part in parts:
        features, indices, bad = [], [], {}
        for _ in range(0, len(part), step):
            images, _, good, unreadable = next(stream)
            if good:
                images = to_device(images, device)
                features.append(compute(teacher.backbone, images, args.features, args.l2, args.precision))
            indices += good
            bad |= unreadable
            bar.update(len(good) + len(unreadable))
        width = teacher.backbone.embed_dim * (2 if args.features == "cls+mean" else 1)
        rows = torch.cat(features).cpu().numpy() if features else np.zeros((0, width), np.float32)
        store.save_part(number, rows, indices, bad)
        for index, reason in bad.items():
            logger.warning(f"bad image: {dataset.name(index)}: {reason}")


@torch.inference_mode()
def compute(backbone: nn.Module, images: Tensor, kind: str, l2: bool = False, precision: str = "fp32") -> Tensor:
    """Return float32 features (B, D), or (B, 2 D) for ``cls+mean``, of normalised images (B, C, S, S)."""
    with torch.autocast(images.device.type, _DTYPES[precision], enabled=precision != "fp32"):
        tokens = backbone.forward_features(images)
    parts = {"cls": tokens["x_norm_clstoken"].float(), "mean": tokens["x_norm_patchtokens"].float().mean(dim=1)}
    features = torch.cat([parts[name] for name in kind.split("+")], dim=1)
    return F.normalize(features, dim=1) if l2 else features


def _open_on_main_first(folder: Path, description: dict[str, Any], fresh: bool) -> Store:
    """Open the store on the main process, which clears and describes the folder, and then on the others."""
    store = problem = None
    if distributed.is_main_process():
        try:
            store = Store(folder, description, fresh=fresh)
        except ConfigError as e:
            problem = str(e)
    problem = distributed.broadcast_object(problem)
    if problem:
        raise ConfigError(problem)
    return store or Store(folder, description)


def _labels(dataset: Any):
    """Return a function from an image's number to its class name, or None for unlabeled images."""
    if not hasattr(dataset, "get_targets"):
        return None
    classes, targets = getattr(dataset, "classes", None), dataset.get_targets()
    return lambda index: str(classes[targets[index]] if classes else targets[index])


def _digest(backbone: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _digest_of_names(dataset: Any) -> str:
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        digest.update(f"{dataset.name(index)}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _say(text: str) -> None:
    if distributed.is_main_process():
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.main("embed")
