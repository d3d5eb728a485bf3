"""Visualise a trained backbone: patch features, attention maps, and images as points."""

from __future__ import annotations

import argparse
import colorsys
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov2_custom import cli
from dinov2_custom.configs.paths import check_output_dir
from dinov2_custom.data.loaders import make_dataset
from dinov2_custom.data.transforms import Compose, MaybeToTensor, Normalize, make_central_crop_transform
from dinov2_custom.errors import ConfigError, DataError, command, shortage
from dinov2_custom.logging.progress import track
from dinov2_custom.models.vision_transformer import DinoVisionTransformer
from dinov2_custom.plots.features import pca_colours, plot_rows, principal_components
from dinov2_custom.plots.figure import new_figure
from dinov2_custom.reading import choose_reading
from dinov2_custom.teacher import Teacher, device_of_choice, load_teacher
from dinov2_custom.utils.paths import without_credentials
from dinov2_custom.utils.run_folder import default_output

_BATCH = 32
_LOW, _HIGH = np.array([26, 16, 64]), np.array([255, 236, 120])  # of attention: dark blue to yellow
MAX_LEGEND, MAX_FOLDERS = 20, 100


def main(args: argparse.Namespace) -> int:
    """Draw the plots requested by ``args`` (``cli.features_parser``); return the exit code."""
    if args.num_images < 1 or args.heads < 0 or args.num_points < 0 or args.image_size < 0:
        raise ConfigError(
            "expected --num-images of at least 1 and no negative numbers, got "
            f"--num-images {args.num_images} --heads {args.heads} --num-points {args.num_points} "
            f"--image-size {args.image_size}"
        )
    teacher = load_teacher(args.checkpoint, args.config_file, args.opts, args.allow_unknown_keys)
    teacher.backbone.to(device_of_choice(args.device))
    folder = Path(args.output_dir).expanduser() if args.output_dir else default_output("features", args.checkpoint)
    check_output_dir(folder, "--output-dir")
    dataset = make_dataset(dataset_str=args.dataset)
    choose_reading(dataset, teacher.reading)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw_pictures(teacher, dataset, folder, args.num_images, args.image_size, args.heads)
    if args.num_points:
        pictures.append(draw_points(teacher, dataset, folder, args.num_points))
    for path in pictures:
        print(path)
    return 0


def draw_pictures(teacher: Teacher, dataset: Any, folder: Path, count: int, size: int, heads: int) -> list[Path]:
    """Save pca.png and attention.png of ``count`` images spread over the dataset.

    Args:
        size: shorter side in pixels; 0 for the size used in training.
        heads: number of heads shown individually.
    """
    backbone = teacher.backbone
    device = next(backbone.parameters()).device
    as_input = Compose([MaybeToTensor(), Normalize(**teacher.normalize)])
    shown, maps, attentions = [], [], []
    for _, image in readable(dataset, spread(len(dataset), count)):
        image = to_whole_patches(image, size or teacher.image_size, backbone.patch_size)
        pixels = as_input(image)[None].to(device)
        with torch.inference_mode():
            patches = backbone.forward_features(pixels)["x_norm_patchtokens"][0].float().cpu()
        rows, columns = (side // backbone.patch_size for side in pixels.shape[-2:])
        maps.append(patches.reshape(rows, columns, -1).numpy())
        attentions.append(class_attention(backbone, pixels)[0].cpu().numpy())
        shown.append(np.asarray(image))
    if not shown:
        raise DataError(
            f"expected readable images, got none of {min(count, len(dataset))}; check the dataset "
            f"with {command('run/data/verify.py')}"
        )
    file = Path(without_credentials(teacher.weights))
    title = f"{file.parent.name}/{file.name}"
    parts = {"image": shown, "PCA of patches": pca_colours(maps)}
    views = {"mean of heads": [one.mean(axis=0) for one in attentions]}
    heads = min(heads, backbone.num_heads) if backbone.num_heads > 1 else 0  # a single head equals the mean
    views |= {f"head {h + 1}": [one[h] for one in attentions] for h in range(heads)}
    drawn = {name: [overlay(*pair) for pair in zip(shown, weights, strict=True)] for name, weights in views.items()}
    return [
        plot_rows(parts, folder / "pca.png", title),
        plot_rows(
            {"image": shown, **drawn}, folder / "attention.png", f"attention of the class token, last block, {title}"
        ),
    ]


def draw_points(teacher: Teacher, dataset: Any, folder: Path, count: int) -> Path:
    """Save scatter.png with the class-token features of up to ``count`` images spread over the dataset."""
    side = teacher.image_size
    transform = make_central_crop_transform(side, **teacher.normalize)
    device = next(teacher.backbone.parameters()).device
    indices, features, batch = [], [], []
    chosen = spread(len(dataset), count)
    for index, image in track(readable(dataset, chosen), "points", total=len(chosen), unit="image"):
        indices.append(index)
        batch.append(transform(image))
        if len(batch) == _BATCH:
            features.append(_class_features(teacher, batch, device))
            batch = []
    if batch:
        features.append(_class_features(teacher, batch, device))
    if len(indices) < 3:
        raise DataError(f"--num-points: expected at least 3 readable images for scatter.png, got {len(indices)}; use 0")
    labels = labels_of(dataset, indices)
    title = f"{len(indices)} images" + (f", {len(set(labels))} classes" if labels else "")
    return plot_scatter(np.concatenate(features), labels, folder / "scatter.png", title)


@torch.inference_mode()
def _class_features(teacher: Teacher, images: list[torch.Tensor], device: torch.device) -> np.ndarray:
    return teacher.backbone(torch.stack(images).to(device)).float().cpu().numpy()


def spread(length: int, count: int) -> list[int]:
    """Return up to ``count`` distinct, evenly spaced integers below ``length``."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(int)).tolist()


def readable(dataset: Any, indices: list[int]) -> Iterator[tuple[int, Image.Image]]:
    """Yield (number, RGB image) of the readable images; print the unreadable ones."""
    for index in indices:
        try:
            image, _ = dataset[index]
        except (DataError, OSError) as e:
            if error := shortage(e, dataset.name(index)):
                raise error from e
            print(f"bad image skipped: {e}", file=sys.stderr)
            continue
        yield index, image


def labels_of(dataset: Any, indices: list[int]) -> list[str] | None:
    """Return the class of each image from the dataset or else its folder, or None if there are no classes."""
    if hasattr(dataset, "get_targets"):
        targets, classes = dataset.get_targets(), getattr(dataset, "classes", None)
        return [str(classes[targets[i]] if classes else targets[i]) for i in indices]
    return folder_labels([dataset.name(i) for i in indices])


def to_whole_patches(image: Image.Image, size: int, patch: int) -> Image.Image:
    """Resize so that both sides are multiples of ``patch``, the shorter about ``size``, with a ratio of at most 4."""
    scale = size / min(image.size)
    sides = [min(max(round(side * scale / patch), 1), 4 * max(size // patch, 1)) * patch for side in image.size]
    return image.resize(tuple(sides), Image.Resampling.BICUBIC)


@torch.inference_mode()
def class_attention(backbone: DinoVisionTransformer, images: Tensor) -> Tensor:
    """Return the class token's attention to each patch in the last block, float32 (B, heads, rows, columns).

    The attention to itself and to registers is excluded, so the sum over patches is below 1.

    Args:
        images: (B, C, H, W) normalised, sides multiples of the patch size.
    """
    *blocks, last = backbone.all_blocks()
    tokens = backbone.prepare_tokens_with_masks(images)
    for block in blocks:
        tokens = block(tokens)
    batch, length, dim = tokens.shape
    heads = last.attn.num_heads
    qkv = last.attn.qkv(last.norm1(tokens)).float().view(batch, length, 3, heads, dim // heads)
    query, key = qkv[:, 0, 0], qkv[:, :, 1]
    weights = (torch.einsum("bhd,bnhd->bhn", query, key) * last.attn.scale).softmax(dim=-1)
    rows, columns = (side // backbone.patch_size for side in images.shape[-2:])
    return weights[..., 1 + backbone.num_register_tokens :].reshape(batch, heads, rows, columns)


def overlay(picture: np.ndarray, weights: np.ndarray, share: float = 0.65) -> np.ndarray:
    """Colour ``picture`` (uint8 (h, w, 3)) by ``weights`` (rows, columns), from least to most: uint8 (h, w, 3)."""
    scaled = (weights - weights.min()) / max(float(np.ptp(weights)), 1e-12)
    height, width = picture.shape[:2]
    mask = Image.fromarray((scaled * 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    strength = np.asarray(mask, dtype=np.float32)[..., None] / 255
    colours = _LOW + (_HIGH - _LOW) * strength
    return ((1 - share) * picture + share * colours).clip(0, 255).astype(np.uint8)


def folder_labels(paths: Sequence[str]) -> list[str] | None:
    """Return each path's folder below the common folder, or None if these folders are no classes."""
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    firsts = [os.path.relpath(path, common).split(os.sep) for path in paths]
    names = {parts[0] for parts in firsts}
    if any(len(parts) < 2 for parts in firsts) or not 2 <= len(names) <= MAX_FOLDERS:
        return None
    return [parts[0] for parts in firsts]


def plot_scatter(features: np.ndarray, labels: Sequence[str] | None, path: str | Path, title: str) -> Path:
    """Save a scatter plot of ``features`` (N, D) with one colour per class and, for up to 20 classes, a legend."""
    (points,), shares = principal_components([features], 2)
    figure = new_figure(figsize=(8, 6))
    axis = figure.subplots()
    names = sorted(set(labels or [""]))
    for number, name in enumerate(names):
        chosen = np.array([label == name for label in labels]) if labels else slice(None)
        # evenly spaced hues; a single class is dark grey
        colour = colorsys.hls_to_rgb(number / len(names), 0.45, 0.75) if len(names) > 1 else "0.25"
        axis.scatter(*points[chosen].T, s=14, alpha=0.7, linewidths=0, color=colour, label=name)
    axis.set(
        xlabel=f"first component ({shares[0]:.0%} of the variance)", ylabel=f"second ({shares[1]:.0%})", title=title
    )
    if 1 < len(names) <= MAX_LEGEND:
        axis.legend(fontsize=8, markerscale=1.5, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path)
    return Path(path)


if __name__ == "__main__":
    cli.main("features")
