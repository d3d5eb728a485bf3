import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_custom.decoder.bridge import Facts
from dinov2_custom.decoder.images import Images, View, boxes_in, classes_in, collate, masks_in
from dinov2_custom.decoder.instances import IGNORE
from dinov2_custom.reading import Reading
from tests.decoder.scenes import SIDE, make_split

NORMALIZE = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


def facts(task):
    return Facts(task, "", ("a", "b", "c"), 96, NORMALIZE, Reading())


@pytest.mark.parametrize("view", [View(0, 0, SIDE, SIDE), View(8, 4, 32, 32, True), View(-12, -6, 72, 72, True)])
def test_boxes_masks_and_pixels_move_together(view, tmp_path):
    image = make_split(tmp_path / "a", 1).images[0]
    target = masks_in(image, view, (SIDE, SIDE), facts("instance"))
    assert len(target["boxes"]) == len(target["masks"]) == len(target["class_labels"]) > 0
    for box, mask in zip(target["boxes"], target["masks"], strict=True):  # the mask of these instances is their box
        rows, columns = torch.nonzero(mask, as_tuple=True)
        got = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 96
        x, y, w, h = box
        assert torch.allclose(got, torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2]), atol=0.03)


def test_crowds_and_what_is_out_of_view_are_left_out(tmp_path):
    split = make_split(tmp_path / "a", 3)
    whole = View(0, 0, SIDE, SIDE)
    none = boxes_in(split.images[1], whole, (SIDE, SIDE), facts("detection"))
    assert none["boxes"].shape == (0, 4) and none["class_labels"].dtype == torch.int64
    assert len(boxes_in(split.images[2], whole, (SIDE, SIDE), facts("detection"))["boxes"]) == 0
    outside = View(2 * SIDE, 0, SIDE, SIDE)
    assert len(boxes_in(split.images[0], outside, (SIDE, SIDE), facts("detection"))["boxes"]) == 0


def test_pixels_beyond_the_image_have_no_class(tmp_path):
    image = make_split(tmp_path / "a", 1, semantic=True).images[0]
    target = classes_in(image, View(-SIDE, 0, 2 * SIDE, SIDE), (SIDE, SIDE), facts("semantic"))
    assert (target[:, :48] == IGNORE).all() and set(target[:, 48:].unique().tolist()) <= {0, 1, 2}


def test_the_augmentation_depends_on_seed_epoch_and_image_alone(tiny, tmp_path):
    split = make_split(tmp_path / "a", 4)
    first, second = (Images(split, facts("detection"), tiny()) for _ in range(2))
    second[3]  # other draws in between
    assert torch.equal(first[0]["pixel_values"], second[0]["pixel_values"])
    second.set_epoch(1)
    assert not torch.equal(first[0]["pixel_values"], second[0]["pixel_values"])
    plain = Images(split, facts("detection"))
    assert torch.equal(plain[0]["pixel_values"], plain[0]["pixel_values"])
    assert collate([plain[0], plain[1]])["pixel_values"].shape == (2, 3, 96, 96)


def test_pixels_are_normalised_as_in_pretraining(tmp_path):
    split = make_split(tmp_path / "a", 1)
    Image.fromarray(np.full((SIDE, SIDE, 3), 255, np.uint8)).save(split.images[0].path)
    assert torch.allclose(Images(split, facts("detection"))[0]["pixel_values"], torch.tensor(2.0))
