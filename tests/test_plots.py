from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_custom.errors import DataError
from dinov2_custom.plots import (
    average_neighbours,
    pca_colours,
    pca_colours_on_one_scale,
    plot_loss_curve,
    plot_rows,
    read_metrics,
    window_feature_map,
)
from dinov2_custom.plots.features import principal_components


class Centre(torch.nn.Module):
    """A network whose feature is the middle pixel of a window."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, windows):
        return windows[:, :, windows.shape[-2] // 2, windows.shape[-1] // 2]


def test_plane_has_the_largest_variances():
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    points = rng.normal(size=(500, 6)) * [10, 5, 0.1, 0.1, 0.1, 0.1]
    (plane,), shares = principal_components([(points @ rotation + 3).astype(np.float32)], 2)
    assert abs(np.corrcoef(plane[:, 0], points[:, 0])[0, 1]) > 0.99
    assert abs(np.corrcoef(plane[:, 1], points[:, 1])[0, 1]) > 0.99
    assert shares == pytest.approx([0.8, 0.2], abs=0.05)
    (again,), _ = principal_components([-(-(points @ rotation + 3)).astype(np.float32)], 2)
    np.testing.assert_allclose(plane, again)


@pytest.mark.parametrize("window, step", [(8, 1), (8, 4), (7, 5)])
def test_window_feature_map_has_the_window_around_each_point(window, step):
    image = torch.rand(3, 24, 37, generator=torch.Generator().manual_seed(0))
    got = window_feature_map(Centre(), image, window, step, batch_size=5)
    np.testing.assert_array_equal(got, image[:, ::step, ::step].permute(1, 2, 0).numpy())


def test_components_on_one_scale_are_grey_where_they_hardly_vary():
    generator = np.random.default_rng(0)
    maps = [generator.normal(size=(30, 20, 8)) * [9, 6, 3, 0.1, 0.1, 0.1, 0.1, 0.1] for _ in range(2)]
    (first, second), shares = pca_colours_on_one_scale(maps, 2)
    assert [one.shape for one in first] == [(30, 20, 3)] * 2 and shares[0] > 0.99 > 0.01 > shares[1] > 0
    spread = np.std(np.concatenate([one.reshape(-1, 3) for one in first]).astype(float), axis=0)
    assert np.all(np.diff(spread) < -10) and 50 < spread[0] < 70
    assert max(np.abs(one.astype(int) - 128).max() for one in second) < 8


def test_average_neighbours_is_a_mean_over_a_square():
    features = np.random.default_rng(0).normal(size=(6, 5, 2))
    got = average_neighbours(features, 1)
    assert got.shape == features.shape
    np.testing.assert_allclose(got[2, 3], features[1:4, 2:5].mean(axis=(0, 1)))
    corner = features[[0, 0, 1, 0, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0, 1, 1, 1]].mean(axis=0)
    np.testing.assert_allclose(got[0, 0], corner)


def test_pca_finds_the_planes_that_vary():
    generator = np.random.default_rng(0)
    maps = [generator.normal(size=(9, 7, 6)) * [9, 0.1, 3, 0.1, 1, 0.1] for _ in range(2)]
    colours = pca_colours(maps)
    assert [one.shape for one in colours] == [(9, 7, 3)] * 2 and colours[0].dtype == np.uint8
    for channel, plane in enumerate((0, 2, 4)):
        together = np.corrcoef(colours[1][..., channel].ravel(), maps[1][..., plane].ravel())[0, 1]
        assert abs(together) > 0.9


def rows_of_metrics(count=5):
    return [
        {"iteration": 10 * i, "dino_local_crops_loss": 5.0 - i, "dino_global_crops_loss": 0.5, "koleo_loss": 0.1}
        for i in range(count)
    ]


def test_loss_curve_and_rows_are_pictures(tmp_path):
    curve = plot_loss_curve(rows_of_metrics(), tmp_path / "loss.png", num_prototypes=256)
    pictures = [np.full((30, 40, 3), 200, np.uint8), np.full((30, 60, 3), 90, np.uint8)]
    grid = plot_rows({"a": pictures, "b": pictures}, tmp_path / "rows.png", "title")
    for path in (curve, grid):
        with Image.open(path) as image:
            assert min(image.size) > 200
            assert len(image.convert("RGB").getcolors(1 << 24)) > 5


def test_read_metrics_takes_the_last_of_repeated_rows_and_drops_torn_ones(tmp_path):
    file = tmp_path / "training_metrics.json"
    lines = [json.dumps(row) for row in rows_of_metrics(3)]
    file.write_text("\n".join([*lines, json.dumps({"iteration": 10, "dino_global_crops_loss": math.pi}), '{"iter']))
    rows = read_metrics(file)
    assert [row["iteration"] for row in rows] == [0, 10, 20]
    assert rows[1]["dino_global_crops_loss"] == math.pi


@pytest.mark.parametrize("text", [None, "", "{torn"])
def test_read_metrics_without_rows(tmp_path, text):
    if text is not None:
        (tmp_path / "m.json").write_text(text)
    with pytest.raises(DataError, match="m.json"):
        read_metrics(tmp_path / "m.json")
