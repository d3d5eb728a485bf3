"""The scenes of benchmarks/decoder.py carry labels for every task, and its page counts all seeds."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks.decoder import CLASSES, KINDS, SIDE, SPARSE, summary, write_scenes
from dinov2_custom.decoder.instances import semantic_mask
from dinov2_custom.decoder.labels import read_split


def test_scenes_are_labelled_for_every_task_and_the_same_every_time(tmp_path):
    pytest.importorskip("pycocotools", reason="needs pycocotools")
    paths = [write_scenes(tmp_path / name / "train", 6, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    one, two, other = ([file.read_bytes() for file in sorted(path.parent.glob("*.png"))] for path in paths)
    assert one == two and not set(one) & set(other)
    splits = {task: read_split(str(paths[0]), task, part="train") for task in ("detection", "instance", "semantic")}
    assert splits["detection"].classes == tuple(CLASSES) and splits["semantic"].classes == (*CLASSES, "background")
    assert sum(len(image.instances) for image in splits["instance"].images) == len(
        json.loads(paths[0].read_text())["annotations"]
    )
    for image in splits["semantic"].images:
        mask = semantic_mask(image, len(CLASSES) + 1)
        assert mask.shape == (SIDE, SIDE) and {one.category for one in image.instances} <= set(np.unique(mask))


def test_scenes_for_boxes_have_few_blobs_on_a_dark_background(tmp_path):
    path = write_scenes(tmp_path / "sparse_train", 6, 1, **SPARSE)
    for image in read_split(str(path), "detection").images:
        assert 1 <= len(image.instances) <= SPARSE["blobs"][1]
        pixels, outside = np.asarray(Image.open(image.path)), np.ones((SIDE, SIDE), bool)
        for x, y, width, height in (one.box for one in image.instances):
            outside[int(y) : int(y + height) + 2, int(x) : int(x + width) + 2] = False
        assert np.median(pixels[outside]) <= SPARSE["background"][1] < pixels.max()


def test_a_row_shows_each_seed_and_the_spread_of_the_gain():
    results = [{"pretrained": p, "random": 0.2} for p in (0.5, 0.3, 0.4)]
    row = summary(KINDS["boxes"], results)
    assert row[2:5] == ["0.200, 0.500", "0.200, 0.300", "0.200, 0.400"]
    assert row[5:] == ["+0.200", "+0.100, +0.300", "0.100"]
