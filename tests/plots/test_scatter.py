from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dinov2_custom.plots.features import principal_components
from dinov2_custom.plots.scatter import folder_labels, plot_scatter


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


@pytest.mark.parametrize(
    "paths, labels",
    [
        (["/d/a/1.png", "/d/a/x/2.png", "/d/b/3.png"], ["a", "a", "b"]),
        (["/d/a/1.png", "/d/a/2.png"], None),
        (["/d/a/1.png", "/d/2.png"], None),
        ([f"/d/{i}/1.png" for i in range(101)], None),
    ],
)
def test_folders_are_classes_where_that_makes_sense(paths, labels):
    assert folder_labels(paths) == labels


@pytest.mark.parametrize("labels", [None, ["a", "b"] * 10, [str(i) for i in range(20)] * 1, ["only"] * 20])
def test_figure(labels, tmp_path):
    features = np.random.default_rng(0).normal(size=(20, 5))
    picture = np.asarray(Image.open(plot_scatter(features, labels, tmp_path / "s.png", "title")).convert("RGB"))
    coloured = np.ptp(picture.astype(int), axis=2) > 60
    assert coloured.any() == (labels is not None and len(set(labels)) > 1)
