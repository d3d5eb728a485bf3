"""Show features as colours: of windows of a whole photograph, with one basis for several images, in rows of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from dinov2_custom.plots.figure import new_figure


@torch.inference_mode()
def window_feature_map(
    network: nn.Module, image: torch.Tensor, window: int, step: int, batch_size: int = 256
) -> np.ndarray:
    """Return the feature of the window around every ``step``-th pixel of a whole photograph.

    Args:
        network: maps windows (B, 3, ``window``, ``window``) to features (B, D).
        image: (3, H, W) normalised, larger than half a window; its border is continued by reflection.

    Returns:
        float32 (ceil(H / step), ceil(W / step), D).
    """
    device = next(network.parameters()).device
    before, after = window // 2, (window - 1) // 2
    padded = F.pad(image[None], (before, after, before, after), mode="reflect")[0]
    windows = padded.unfold(1, window, step).unfold(2, window, step)  # views, copied a batch at a time
    rows, columns = windows.shape[1:3]
    corners = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    features = []
    for chosen in corners.split(batch_size):
        batch = windows[:, chosen[:, 0], chosen[:, 1]].transpose(0, 1)
        features.append(network(batch.to(device)).float().cpu())
    return torch.cat(features).reshape(rows, columns, -1).numpy()


def average_neighbours(features: np.ndarray, radius: int) -> np.ndarray:
    """Average each cell of a map (h, w, D) over the cells at most ``radius`` away, repeating the border."""
    padded = np.pad(features, ((radius, radius), (radius, radius), (0, 0)), mode="edge")
    sides = (2 * radius + 1, 2 * radius + 1)
    return np.lib.stride_tricks.sliding_window_view(padded, sides, axis=(0, 1)).mean(axis=(3, 4))


def pca_colours(maps: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Map feature maps (h, w, D) to uint8 colours (h, w, 3) by their first three principal components.

    All maps share one basis, so equal colours mean similar features across images. Each component is scaled so that its
    1st and 99th percentiles become black and full colour.
    """
    projected, _ = principal_components(maps, 3)
    low, high = np.percentile(np.concatenate([one.reshape(-1, 3) for one in projected]), [1, 99], axis=0)
    scaled = [(one - low) / np.maximum(high - low, 1e-12) for one in projected]
    return [(one.clip(0, 1) * 255).round().astype(np.uint8) for one in scaled]


def pca_colours_on_one_scale(maps: Sequence[np.ndarray], number: int) -> tuple[list[list[np.ndarray]], np.ndarray]:
    """Map feature maps (h, w, D) to uint8 colours (h, w, 3), once by each of ``number`` triples of components.

    All components have the scale of the first, whose standard deviation is a quarter of the range of a colour, so
    components that hardly vary are grey.

    Returns:
        The pictures by triple, and the share of the variance of each triple.
    """
    projected, shares = principal_components(maps, 3 * number)
    scale = 4 * np.concatenate([one[..., 0].ravel() for one in projected]).std()
    colours = [((one / max(scale, 1e-12) + 0.5).clip(0, 1) * 255).round().astype(np.uint8) for one in projected]
    triples = [[one[..., k : k + 3] for one in colours] for k in range(0, 3 * number, 3)]
    return triples, shares.reshape(-1, 3).sum(axis=1)


def principal_components(maps: Sequence[np.ndarray], number: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Return maps (..., ``number``) of the principal components of all ``maps`` (..., D) together, of mean 0.

    A component's sign is fixed by its largest weight. The second result is each component's share of the variance.
    """
    flat = np.concatenate([one.reshape(-1, one.shape[-1]) for one in maps]).astype(np.float64)
    mean = flat.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(flat - mean, rowvar=False))
    basis = vectors[:, ::-1][:, :number]
    basis = basis * np.sign(basis[np.abs(basis).argmax(axis=0), np.arange(number)])
    return [(one - mean) @ basis for one in maps], values[::-1][:number] / max(values.sum(), 1e-12)


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
