"""Create three plots from a checkpoint and a folder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_custom.cli import features_parser
from dinov2_custom.errors import ConfigError, DataError
from dinov2_custom.plots import look
from tests.eval.test_setup import make_images, make_run
from tests.export.backbones import make_teacher
from tests.processes import run


def draw(*arguments):
    return look.main(features_parser().parse_args([*map(str, arguments), "--device", "cpu"]))


@pytest.fixture
def weights(tmp_path):
    torch.save(make_teacher("registers").backbone.state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_three_pictures_of_a_run(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "cells")
    make_images(tmp_path / "images")
    (tmp_path / "images" / "dark" / "0.png").write_bytes(b"broken")
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(
        look, "plot_scatter", lambda features, labels, path, title: seen.append((features, labels)) or path
    )
    assert draw("cells", "images", "--num-images", 4, "--image-size", 24) == 0
    said = capsys.readouterr()
    assert said.out.split() == [f"outputs/features/cells/{name}.png" for name in ("pca", "attention", "scatter")]
    assert "bad image skipped: " in said.err and "0.png" in said.err
    for name in ("pca", "attention"):
        assert np.asarray(Image.open(f"outputs/features/cells/{name}.png").convert("L")).std() > 20
    ((features, labels),) = seen
    assert features.shape == (11, 64) and labels == ["dark"] * 5 + ["light"] * 6


def test_classes_of_a_labelled_folder(weights, tmp_path, monkeypatch):
    make_images(tmp_path / "images")
    seen = []
    monkeypatch.setattr(
        look, "plot_scatter", lambda features, labels, path, title: seen.append((labels, title)) or path
    )
    draw(weights, f"LabelledFolder:root={tmp_path}/images", "--output-dir", tmp_path / "out", "--num-points", 5)
    assert seen == [(["dark", "dark", "light", "light", "light"], "5 images, 2 classes")]
    draw(weights, f"LabelledFolder:root={tmp_path}/images", "--output-dir", tmp_path / "out", "--num-points", 0)
    assert len(seen) == 1


@pytest.mark.parametrize("size, expected", [((100, 50), (48, 24)), ((50, 60), (24, 32)), ((1000, 10), (96, 24))])
def test_sides_are_whole_patches(size, expected):
    assert look.to_whole_patches(Image.new("RGB", size), 24, 8).size == expected


def test_spread():
    assert look.spread(10, 4) == [0, 3, 6, 9] and look.spread(3, 9) == [0, 1, 2] and look.spread(7, 1) == [0]


def test_mistakes(weights, tmp_path):
    make_images(tmp_path / "images", count=1)
    with pytest.raises(ConfigError, match="expected --num-images of at least 1"):
        draw(weights, tmp_path / "images", "--num-images", 0)
    with pytest.raises(ConfigError, match="which is a file -> choose another with --output-dir$"):
        draw(weights, tmp_path / "images", "--output-dir", weights)
    with pytest.raises(DataError, match="--num-points: expected at least 3 readable images for scatter.png, got 2"):
        draw(weights, tmp_path / "images", "--output-dir", tmp_path / "out")
    for path in (tmp_path / "images").rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match="expected readable images, got none of 2"):
        draw(weights, tmp_path / "images", "--output-dir", tmp_path / "out")


def test_script(weights, tmp_path):
    make_images(tmp_path / "images")
    command = ["run/plots/features.py", str(weights), str(tmp_path / "images")]
    done = run(*command, "--output-dir", str(tmp_path / "out"), "--num-images", "2")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"pca.png", "attention.png", "scatter.png"}
