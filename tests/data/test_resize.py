"""Crops resized by each kernel: Pillow's pixels, the batch slot alone written to, one choice by timing."""

import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_custom.data import compiler, native, resize
from dinov2_custom.data.augmentations import DataAugmentationDINO, cut_draws
from dinov2_custom.data.resize import KERNELS, cut_crops
from tests.data import reference
from tests.data.pictures import picture

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, compiler.COMPILERS)), reason="needs a C compiler"
)
# no higher than wide: every version of Pillow resizes these across first
BOXES = [((0, 0, 120, 90), 48), ((13, 7, 71, 60), 48), ((100, 70, 12, 9), 32), ((5, 5, 1, 1), 8), ((3, 2, 48, 48), 48),
         ((119, 89, 1, 1), 3), ((0, 60, 120, 1), 16), ((50, 0, 70, 64), 1), ((20, 20, 60, 60), 37)]  # fmt: skip
HIGH = [((13, 7, 40, 71), 48), ((100, 20, 9, 50), 32), ((7, 0, 50, 90), 16), ((60, 3, 1, 80), 5)]


def cut(kernel: str, image: Image.Image, places, flip: bool = False) -> list[np.ndarray]:
    outs = [np.full((size, size, 3), 7, np.uint8) for _, size in places]
    cut_crops(outs, np.array(image), [box for box, _ in places], [flip] * len(places), kernel)
    return outs


def differences(kernel: str, image: Image.Image, places, flip: bool = False) -> list[np.ndarray]:
    wanted = [np.asarray(reference.resized_crop(image, box, size, flip)).astype(int) for box, size in places]
    return [np.abs(a - b) for a, b in zip(cut(kernel, image, places, flip), wanted, strict=True)]


@needs_compiler
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(120, 90), (121, 97)])
def test_compiled_pixels_are_pillows(size, flip):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    for difference, (box, _) in zip(differences("compiled", image, BOXES, flip), BOXES, strict=True):
        assert not difference.any(), box
    for place in BOXES:
        assert not differences("compiled", image, [place], flip)[0].any(), place


@needs_compiler
def test_compiled_pixels_of_random_boxes_of_all_shapes_are_within_the_rounding():
    rng, image = random.Random(0), picture(300, 280, 1)
    for _ in range(60):
        left, top, size = rng.randrange(250), rng.randrange(250), rng.choice([5, 16, 33, 96])
        box = (left, top, rng.randint(1, 300 - left), rng.randint(1, 280 - top))
        (difference,) = differences("compiled", image, [(box, size)], rng.random() < 0.5)
        assert difference.mean() < 0.3 and difference.max() <= 12, box
        assert box[3] > box[2] or not difference.any(), box


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("flip", [False, True])
def test_every_kernel_is_within_a_twentieth_of_a_level_of_pillow(kernel, flip):
    """As photographs are cut: the geometry alone, over the usual crops."""
    if kernel == "compiled" and native.crop_cutter() is None:
        pytest.skip("needs a C compiler")
    augment, means = DataAugmentationDINO((0.32, 1), (0.05, 0.32), 8), []
    for seed, size in enumerate([(500, 375), (640, 480), (375, 500)]):
        image = picture(*size, seed)
        draws = augment.draw(*size, random.Random(seed))
        places = [(draw.box, side) for draw, side in zip(draws, augment.sizes, strict=True)]
        means += [difference.mean() for difference in differences(kernel, image, places, flip)]
    assert np.mean(means) < 0.05
    for difference in differences(kernel, picture(120, 90, 5), BOXES + HIGH, flip):
        assert difference.mean() < 0.3 and difference.max() <= 12


@pytest.mark.parametrize("kernel", KERNELS)
def test_only_the_slot_in_a_batch_is_written(kernel):
    if kernel == "compiled" and native.crop_cutter() is None:
        pytest.skip("needs a C compiler")
    image = np.array(picture(120, 90, 5))
    batch = np.full((3, 2, 33, 33, 3), 7, np.uint8)
    cut_crops([batch[1, 0]], image, [(5, 5, 50, 50)], [True], kernel)
    (expected,) = cut(kernel, Image.fromarray(image), [((5, 5, 50, 50), 33)], True)
    np.testing.assert_array_equal(batch[1, 0], expected)
    batch[1, 0] = 7
    assert (batch == 7).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_image_of_any_layout_is_taken(kernel):
    if kernel == "compiled" and native.crop_cutter() is None:
        pytest.skip("needs a C compiler")
    pixels = np.array(picture(60, 50, 2))
    (expected,) = cut(kernel, Image.fromarray(pixels), [((3, 4, 40, 30), 16)])
    for same in (np.asfortranarray(pixels), np.dstack([pixels, pixels])[..., :3], torch.from_numpy(pixels)):
        out = np.zeros((16, 16, 3), np.uint8)
        cut_crops([out], same, [(3, 4, 40, 30)], [False], kernel)
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_to_cut_is_nothing(kernel):
    cut_crops([], np.zeros((2, 2, 3), np.uint8), [], [], kernel)


@pytest.fixture
def unchosen():
    resize.fastest_kernel.cache_clear()
    yield
    resize.fastest_kernel.cache_clear()


@pytest.mark.parametrize("seconds, cutter, chosen", [
    ({"compiled": 1, "Pillow": 9, "torch": 2}, True, "compiled"),
    ({"compiled": 1.4, "Pillow": 9, "torch": 1}, True, "compiled"),  # not clearly slower
    ({"compiled": 2, "Pillow": 9, "torch": 1}, True, "torch"),
    ({"Pillow": 9, "torch": 2}, False, "torch"),
    ({"Pillow": 5, "torch": 9}, False, "Pillow"),
])  # fmt: skip
def test_the_fastest_is_taken_and_said(monkeypatch, caplog, unchosen, seconds, cutter, chosen):
    monkeypatch.setattr(resize, "crop_cutter", lambda: cutter or None)
    monkeypatch.setattr(resize, "_seconds", seconds.get)
    caplog.set_level("INFO", logger="dinov2")
    assert resize.fastest_kernel() == resize.fastest_kernel() == chosen
    (record,) = caplog.records
    assert f"crops are resized by {chosen}" in record.message and all(name in record.message for name in seconds)


def test_the_default_kernel_is_the_timed_one(monkeypatch, unchosen):
    used = []
    monkeypatch.setattr(resize, "_seconds", {"compiled": 9, "Pillow": 1, "torch": 9}.get)
    monkeypatch.setitem(KERNELS, "Pillow", lambda outs, *rest: used.append(len(outs)))
    pixels = torch.zeros(8, 8, 3, dtype=torch.uint8)
    cut_draws(
        [np.empty((4, 4, 3), np.uint8)] * 2,
        pixels,
        DataAugmentationDINO((0.3, 1), (0.1, 0.3), 0).draw(8, 8, random.Random(0)),
    )
    assert used == [2]


@needs_compiler
def test_a_library_with_other_pixels_is_not_used(monkeypatch, caplog, tmp_path):
    wrong = tmp_path / "resize.c"
    wrong.write_text(native.RESIZE.read_text().replace("(i + 0.5) * scale", "(i + 0.4) * scale"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "RESIZE", wrong)
    native.crop_cutter.cache_clear()
    caplog.set_level("INFO", logger="dinov2")
    try:
        assert native.crop_cutter() is None
    finally:
        native.crop_cutter.cache_clear()
    assert "its pixels differ" in caplog.text
