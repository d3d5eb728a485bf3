"""Create three plots from a checkpoint and a folder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_custom.cli import features_parser
from dinov2_custom.errors import ConfigError, DataError
from dinov2_custom.models.vision_transformer import vit_micro
from dinov2_custom.plots import look
from dinov2_custom.plots.look import class_attention, folder_labels, overlay, plot_scatter
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


@pytest.mark.parametrize("registers, chunks", [(0, 0), (3, 2)])
def test_weights_give_the_blocks_own_output(registers, chunks):
    options = {"num_register_tokens": registers, "block_chunks": chunks, "init_values": 1.0}
    backbone = vit_micro(patch_size=8, img_size=32, **options).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(0)
    for value in backbone.parameters():
        value.add_(torch.randn(value.shape, generator=generator) * 0.1)
    images = torch.randn(2, 3, 24, 40, generator=generator)
    weights = class_attention(backbone, images)
    assert weights.shape == (2, 2, 3, 5) and (weights > 0).all() and (weights.sum(dim=(2, 3)) < 1).all()

    seen = {}
    last = backbone.all_blocks()[-1]
    last.norm1.register_forward_hook(lambda module, args, out: seen.update(normed=out))
    last.attn.proj.register_forward_pre_hook(lambda module, args: seen.update(mixed=args[0]))
    backbone.forward_features(images)
    normed = seen["normed"].reshape(2, -1, 128)
    value = last.attn.qkv(normed)[..., 256:].view(2, -1, 2, 64)
    first_patch = 1 + registers
    # values that are zero outside the patches leave the patches' share of the class token's output
    from_patches = torch.einsum("bhn,bnhd->bhd", weights.flatten(2), value[:, first_patch:])
    scores = last.attn.qkv(normed).view(2, -1, 3, 2, 64)
    rest = torch.einsum("bhd,bnhd->bhn", scores[:, 0, 0], scores[:, :, 1]).mul(64**-0.5).softmax(-1)[..., :first_patch]
    from_others = torch.einsum("bhn,bnhd->bhd", rest, value[:, :first_patch])
    mixed = seen["mixed"].reshape(2, -1, 128)[:, 0].view(2, 2, 64)
    torch.testing.assert_close(from_patches + from_others, mixed, rtol=1e-4, atol=1e-5)


def test_overlay_is_brightest_where_the_weight_is():
    picture = np.full((40, 60, 3), 128, np.uint8)
    weights = np.zeros((4, 6))
    weights[1, 4] = 1
    drawn = overlay(picture, weights)
    assert drawn.shape == picture.shape and drawn.dtype == np.uint8
    row, column = np.unravel_index(drawn.sum(axis=2).argmax(), (40, 60))
    assert row // 10 == 1 and column // 10 == 4
    assert overlay(picture, np.ones((4, 6))).std(axis=(0, 1)).max() == 0


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
