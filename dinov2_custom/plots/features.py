"""Show patch features as colours: of a whole photograph, with one basis for several images, in rows of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from dinov2_custom.errors import ConfigError
from dinov2_custom.plots.figure import new_figure


@torch.inference_mode()
def patch_feature_map(
    backbone: nn.Module, image: torch.Tensor, window: int, step: int, batch_size: int = 256
) -> np.ndarray:
    """Return patch features of a whole photograph, computed in overlapping windows.

    The backbone processes ``window`` x ``window`` pixels every ``step`` pixels, and each cell of the map is the mean
    over the patches that cover it. Patches thus have the same scale and amount of context as in training.

    Args:
        image: (3, H, W) normalised; the remainder at the right and bottom that no whole step reaches is ignored.
        step: a multiple or a divisor of the patch size, in pixels.

    Returns:
        float32 (h, w, D); a cell is min(``step``, patch size) pixels wide.

    Raises:
        ConfigError: if the image is smaller than a window, or the step does not fit the patch size.
    """
    patch = backbone.patch_size
    cell = min(step, patch)
    if patch % cell or step % cell or window % patch or window % step or min(image.shape[1:]) < window:
        raise ConfigError(
            "patch_feature_map: expected an image of at least the window, a window of whole patches and steps, a step "
            f"that divides the patch or is a multiple of it, got image {tuple(image.shape[1:])}, window {window}, "
            f"patch {patch}, step {step}"
        )
    device = next(backbone.parameters()).device
    rows, columns = ((side - window) // step + 1 for side in image.shape[1:])
    reach, grid, cells_a_step = window // cell, window // patch, step // cell
    shape = [(n - 1) * cells_a_step + reach for n in (rows, columns)]
    total, count = torch.zeros(*shape, backbone.embed_dim), torch.zeros(*shape, 1)
    corners = [(row, column) for row in range(rows) for column in range(columns)]
    for start in range(0, len(corners), batch_size):
        chosen = corners[start : start + batch_size]
        windows = [image[:, r * step : r * step + window, c * step : c * step + window] for r, c in chosen]
        features = backbone(torch.stack(windows).to(device), is_training=True)["x_norm_patchtokens"].float().cpu()
        features = features.reshape(len(chosen), grid, grid, -1)
        features = features.repeat_interleave(patch // cell, dim=1).repeat_interleave(patch // cell, dim=2)
        for (r, c), feature in zip(chosen, features, strict=True):
            top, left = r * cells_a_step, c * cells_a_step
            total[top : top + reach, left : left + reach] += feature
            count[top : top + reach, left : left + reach] += 1
    return (total / count).numpy()


def average_neighbours(features: np.ndarray, radius: int) -> np.ndarray:
    """Average each cell of a map (h, w, D) over the cells at most ``radius`` away, repeating the border.

    Features of single small patches mostly encode edges and their orientation; a neighbourhood represents texture.
    """
    padded = np.pad(features, ((radius, radius), (radius, radius), (0, 0)), mode="edge")
    sides = (2 * radius + 1, 2 * radius + 1)
    return np.lib.stride_tricks.sliding_window_view(padded, sides, axis=(0, 1)).mean(axis=(3, 4))


def pca_colours(maps: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Map feature maps (h, w, D) to uint8 colours (h, w, 3) by their first three principal components.

    All maps share one basis, so equal colours mean similar features across images. Each component is scaled so that its
    1st and 99th percentiles become black and full colour; its sign is fixed by its largest weight.
    """
    flat = np.concatenate([one.reshape(-1, one.shape[-1]) for one in maps]).astype(np.float64)
    mean = flat.mean(axis=0)
    _, vectors = np.linalg.eigh(np.cov(flat - mean, rowvar=False))
    basis = vectors[:, ::-1][:, :3]
    basis = basis * np.sign(basis[np.abs(basis).argmax(axis=0), np.arange(3)])
    low, high = np.percentile((flat - mean) @ basis, [1, 99], axis=0)
    scaled = [((one - mean) @ basis - low) / np.maximum(high - low, 1e-12) for one in maps]
    return [(one.clip(0, 1) * 255).round().astype(np.uint8) for one in scaled]


def plot_rows(rows: dict[str, Sequence[np.ndarray]], path: str | Path, title: str, height: int = 150) -> Path:
    """Save a figure with one row of images (uint8 (h, w, 3)) per label, each ``height`` pixels high.

    The images in a column have the aspect ratio of the first row.
    """
    first = next(iter(rows.values()))
    widths = [picture.shape[1] / picture.shape[0] for picture in first]
    inches = height / 100
    size = (inches * sum(widths) + 1.2, inches * len(rows) + 0.6)
    figure = new_figure(figsize=size)
    axes = figure.subplots(len(rows), len(first), squeeze=False, width_ratios=widths)
    for line, (label, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture, width in zip(line, pictures, widths, strict=True):
            shape = (round(2 * height * width), 2 * height)
            axis.imshow(np.asarray(Image.fromarray(picture).resize(shape, Image.Resampling.BICUBIC)))
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path)
    return Path(path)
