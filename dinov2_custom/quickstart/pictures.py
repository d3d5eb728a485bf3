"""Draw what the network has learned: the nearest neighbours of held-out tiles, and features of whole photographs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from dinov2_custom.data.datasets import LabelledFolder
from dinov2_custom.data.transforms import MaybeToTensor, Normalize, resize_side
from dinov2_custom.eval.utils import extract_features
from dinov2_custom.plots.features import average_neighbours, pca_colours_on_one_scale, plot_rows, window_feature_map
from dinov2_custom.plots.figure import new_figure
from dinov2_custom.quickstart.measure import BATCH_SIZE
from dinov2_custom.quickstart.photos import open_photo
from dinov2_custom.utils.rng import seed_for

QUERIES, NEIGHBOURS_SHOWN = 6, 5
DRAWS = 2000  # of queries, among which the most typical ones are shown
STEP, POOL_RADIUS, TRIPLES = 4, 1, 3  # of the maps of features: pixels, cells, rows for each network
RIGHT, WRONG = "#009E73", "#D55E00"  # of Okabe and Ito's palette
_TILE, _FRAME, _GAP, _MARGIN = 64, 5, 5, 26


class Neighbours(NamedTuple):
    """The nearest training tiles of held-out tiles: files, and by the name of a network which and how many are right.

    ``nearest`` has files by network and query, nearest first; right is one of the query's photograph. ``shares`` are
    the shares of right ones over all held-out tiles.
    """

    queries: list[Path]
    nearest: dict[str, list[list[Path]]]
    shares: dict[str, float]

    def count_right(self, network: str) -> int:
        pairs = zip(self.queries, self.nearest[network], strict=True)
        return sum(tile.parent.name == query.parent.name for query, tiles in pairs for tile in tiles)


@torch.inference_mode()
def find_neighbours(networks: Mapping[str, nn.Module], train: LabelledFolder, held_out: LabelledFolder) -> Neighbours:
    """Return the ``NEIGHBOURS_SHOWN`` nearest training tiles, by cosine, of typical held-out tiles.

    Args:
        networks: each maps images to features of length 1.
    """
    nearest, hits = {}, []
    for name, network in networks.items():
        (features, labels), (asked, truths) = (
            extract_features(network, part, BATCH_SIZE, 0) for part in (train, held_out)
        )
        indices = (asked @ features.T).topk(min(NEIGHBOURS_SHOWN, len(train)), dim=1).indices
        nearest[name] = indices.cpu().numpy()
        hits.append((labels[indices] == truths[:, None]).float().mean(dim=1).cpu().numpy())
    chosen = choose_typical(np.stack(hits, axis=1), held_out.get_targets(), QUERIES)
    return Neighbours(
        [Path(held_out.name(query)) for query in chosen],
        {name: [[Path(train.name(i)) for i in found[query]] for query in chosen] for name, found in nearest.items()},
        {name: float(share.mean()) for name, share in zip(networks, hits, strict=True)},
    )


def choose_typical(hits: np.ndarray, labels: np.ndarray, number: int) -> list[int]:
    """Return ``number`` rows of different labels whose mean is as close as possible to the mean of all rows.

    The result is the best of ``DRAWS`` random choices: a single one could be far better or worse than the average.

    Args:
        hits: (N, networks), share of right neighbours.
        labels: (N,)
    """
    generator = np.random.default_rng(seed_for(0, "queries"))
    rows = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    draws = []
    for _ in range(DRAWS):
        classes = generator.permutation(len(rows))[:number]
        draws.append(sorted(int(generator.choice(rows[one])) for one in classes))
    return min(draws, key=lambda draw: float(np.abs(hits[draw].mean(axis=0) - hits.mean(axis=0)).sum()))


def draw_neighbours(found: Neighbours, path: Path) -> Path:
    """Save a picture with a row for each query: the query, then its neighbours by each network.

    A neighbour of the same photograph has a green frame; one of another photograph has an orange frame and a cross.
    """
    pitch = _TILE + 2 * _FRAME + _GAP
    number = len(next(iter(found.nearest.values()))[0])
    lefts = [pitch + _MARGIN + n * (number * pitch + _MARGIN) for n in range(len(found.nearest))]
    canvas = Image.new("RGB", (lefts[-1] + number * pitch, len(found.queries) * pitch), "white")
    for row, query in enumerate(found.queries):
        _paste(canvas, query, 0, row * pitch, None)
        for left, tiles in zip(lefts, found.nearest.values(), strict=True):
            for column, tile in enumerate(tiles[row]):
                _paste(canvas, tile, left + column * pitch, row * pitch, tile.parent.name == query.parent.name)
    figure = new_figure(figsize=(canvas.width / 100, canvas.height / 100 + 0.45))
    axis = figure.add_axes((0, 0, 1, canvas.height / 100 / figure.get_figheight()))
    axis.imshow(np.asarray(canvas), interpolation="lanczos", aspect="auto")
    axis.set_axis_off()
    axis.text(2, -12, "query", fontsize=11)
    for left, (name, share) in zip(lefts, found.shares.items(), strict=True):
        right = f"{found.count_right(name)} of {number * len(found.queries)} right"
        axis.text(left, -12, f"{name}: {right} (all held-out tiles: {share:.0%})", fontsize=11)
    figure.savefig(path)
    return path


def _paste(canvas: Image.Image, file: Path, left: int, top: int, right: bool | None) -> None:
    """Paste a tile with its frame, or without one for None."""
    with Image.open(file) as image:
        tile = image.convert("RGB").resize((_TILE, _TILE), Image.Resampling.LANCZOS)
    outer = _TILE + 2 * _FRAME
    draw = ImageDraw.Draw(canvas)
    if right is not None:
        draw.rectangle((left, top, left + outer - 1, top + outer - 1), fill=RIGHT if right else WRONG)
    canvas.paste(tile, (left + _FRAME, top + _FRAME))
    if right is False:
        box = (left + outer - 20, top, left + outer - 1, top + 19)
        draw.rectangle(box, fill=WRONG)
        x0, y0, x1, y1 = box
        draw.line((x0 + 6, y0 + 6, x1 - 6, y1 - 6), fill="white", width=3)
        draw.line((x0 + 6, y1 - 6, x1 - 6, y0 + 6), fill="white", width=3)


def draw_features(
    networks: Mapping[str, nn.Module], photos: Sequence[str], tile: int, crop: int, normalize: Normalize, path: Path
) -> dict[str, float]:
    """Save a picture of whole photographs above the principal components of their features by each network.

    The networks see windows of ``crop`` pixels of the photographs, at the scale at which they see the tiles of ``tile``
    pixels in the evaluation.

    Returns:
        The share of the first three components in the variance, by network.
    """
    originals = [open_photo(name) for name in photos]
    scale = resize_side(crop) / tile
    images = []
    for photo in originals:
        small = photo.convert("L").resize([round(side * scale) for side in photo.size], Image.Resampling.LANCZOS)
        images.append(normalize(MaybeToTensor()(small.convert("RGB"))))
    rows = {"photograph": [np.asarray(photo) for photo in originals]}
    shares = {}
    for name, network in networks.items():
        maps = [window_feature_map(network, image, crop, STEP) for image in images]
        maps = [average_neighbours(one, POOL_RADIUS) for one in maps]
        colours, parts = pca_colours_on_one_scale(maps, TRIPLES)
        shares[name] = float(parts[0])
        for number, (pictures, share) in enumerate(zip(colours, parts, strict=True)):
            rows[f"{name}\n{3 * number + 1} to {3 * number + 3}: {share:.0%}"] = pictures
    plot_rows(rows, path, "", height=110)
    return shares
