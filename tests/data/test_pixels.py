"""Every pixel operation compared with Pillow for equal parameters, and OpenCV compared with numpy."""

import colorsys
import multiprocessing
import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_custom.data import pixels as ops
from dinov2_custom.data.augmentations import DataAugmentationDINO
from dinov2_custom.data.draws import CropDraw
from dinov2_custom.data.pixels import KERNELS, cut_crops
from dinov2_custom.data.pool import set_up_process
from tests.data import reference
from tests.data.pictures import picture, planes

PICTURES = [picture(64, 64, seed) for seed in range(4)] + [picture(96, 96, 9)]


def differences(ours, reference_of, parameters, pictures=PICTURES):
    """Return ours minus reference over all pictures and parameters, one flat float array."""
    found = []
    for image in pictures:
        for parameter in parameters:
            mine = np.broadcast_to(ours(planes(image), parameter), (3, *image.size[::-1]))
            assert mine.dtype == np.uint8
            found.append((mine.astype(float) - planes(reference_of(image, parameter))).ravel())
    return np.concatenate(found)


def uniform(low: float, high: float, number: int = 12) -> list[float]:
    rng = random.Random(0)
    return [rng.uniform(low, high) for _ in range(number)]


@pytest.mark.parametrize("ours, theirs, low, high, mean, most", [
    (ops.adjust_brightness, reference.brightness, 0.6, 1.4, 0.12, 1),
    (ops.adjust_brightness, reference.brightness, 0.0, 3.0, 0.25, 2),
    (ops.adjust_contrast, reference.contrast, 0.6, 1.4, 0.15, 1),
    (ops.adjust_contrast, reference.contrast, 0.0, 3.0, 0.25, 2),
    (ops.adjust_saturation, reference.saturation, 0.8, 1.2, 0.05, 1),
    (ops.adjust_saturation, reference.saturation, 0.0, 3.0, 0.25, 3),
    (ops.adjust_hue, reference.hue, -0.1, 0.1, 0.6, 9),
    (ops.adjust_hue, reference.hue, -0.5, 0.5, 0.8, 14),
    (ops.gaussian_blur, reference.gaussian_blur, 0.1, 2.0, 0.25, 2),
])  # fmt: skip
def test_operation_equals_pillow_within(ours, theirs, low, high, mean, most):
    difference = differences(ours, theirs, uniform(low, high))
    assert np.abs(difference).mean() < mean
    assert np.abs(difference).max() <= most
    assert abs(difference.mean()) < 0.2, "biased"


def test_grayscale_is_within_one_level():
    difference = differences(lambda x, _: ops.grayscale(x), lambda x, _: reference.grayscale(x), [None])
    assert np.abs(difference).max() <= 1 and np.abs(difference).mean() < 0.15
    ramp = np.tile(np.arange(256, dtype=np.uint8), (3, 2, 1))
    np.testing.assert_array_equal(ops.grayscale(ramp)[0], ramp[0])


def test_solarize_is_exact_at_any_threshold():
    assert not differences(lambda x, _: ops.solarize(x), lambda x, _: reference.solarize(x), [None]).any()
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    for threshold in (0, 1, 100, 128, 129, 255):
        expected = [i if i < threshold else 255 - i for i in range(256)]
        assert ops.solarize(levels, threshold).ravel().tolist() == expected


@pytest.mark.parametrize("name", ["adjust_brightness", "adjust_contrast", "adjust_saturation"])
def test_factor_one_changes_nothing_and_huge_factors_saturate(name):
    image = planes(PICTURES[0])
    operation = getattr(ops, name)
    np.testing.assert_array_equal(operation(image, 1.0), image)
    change = np.abs(operation(image, 500.0).astype(float) - planes(reference.JITTER[name[7:]](PICTURES[0], 500.0)))
    # a factor of 500 makes a whole number of the rounding of the grey level, and one of 128 all but as much
    assert change.mean() < (3 if name == "adjust_saturation" else 0.5)


def test_hue_of_pure_colours_and_greys():
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (90, 90, 90)}
    images = {
        name: np.full((3, 2, 2), 0, np.uint8) + np.array(c, np.uint8)[:, None, None] for name, c in colours.items()
    }
    np.testing.assert_allclose(ops.adjust_hue(images["red"], 1 / 3), images["green"], atol=10)
    np.testing.assert_allclose(ops.adjust_hue(images["red"], -1 / 3), images["blue"], atol=10)
    for shift in (-0.5, -0.07, 0.1, 0.5):
        np.testing.assert_array_equal(ops.adjust_hue(images["grey"], shift), images["grey"])
    for image in images.values():
        np.testing.assert_array_equal(ops.adjust_hue(image, 0.003), image)


@pytest.mark.parametrize("shift", [-0.4, -0.1, -0.05, 0.03, 0.08, 0.1, 0.5])
def test_hue_is_the_exact_turn_of_the_hexagon_rounded(shift):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 20), dtype=np.uint8)
    steps = int(shift * 255)
    turn = (steps - 0.5) / 255
    exact = np.empty((3, 20, 20))
    for place in np.ndindex(20, 20):
        h, s, v = colorsys.rgb_to_hsv(*(pixels[(slice(None), *place)] / 255))
        exact[(slice(None), *place)] = np.multiply(colorsys.hsv_to_rgb((h + turn) % 1, s, v), 255)
    difference = ops.adjust_hue(pixels, shift) - exact
    assert np.abs(difference).max() < 0.51 and np.abs(difference).mean() < 0.1


def test_hue_keeps_value_and_chroma():
    image = planes(PICTURES[1])
    for shift in (-0.31, -0.1, 0.05, 0.09, 0.4):
        turned = ops.adjust_hue(image, shift)
        np.testing.assert_array_equal(turned.max(0), image.max(0))
        np.testing.assert_array_equal(turned.min(0), image.min(0))


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 6, 9])
def test_blur_of_images_smaller_than_the_kernel(side):
    image = picture(side, side, 3) if side > 1 else Image.new("RGB", (1, 1), (9, 80, 200))
    blurred = ops.gaussian_blur(planes(image), 1.7)
    assert np.abs(blurred.astype(int) - planes(reference.gaussian_blur(image, 1.7)).astype(int)).max() <= 2


def test_blur_with_a_tiny_sigma_changes_nothing():
    image = planes(PICTURES[2])
    np.testing.assert_array_equal(ops.gaussian_blur(image, 0.1), image)


def test_normalize_equals_the_formula_and_repeats_grey():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    image = PICTURES[0]
    ours = ops.normalize(planes(image), mean, std)
    torch.testing.assert_close(ours, reference.normalize(image, mean, std), atol=2e-6, rtol=1e-5)
    grey = ops.normalize(ops.grayscale(planes(image)), (0, 0, 0), (1, 1, 1))
    assert grey.shape == (3, 64, 64) and torch.equal(grey[0], grey[1]) and torch.equal(grey[1], grey[2])


def test_operations_do_not_modify_their_input():
    image = planes(PICTURES[0])
    before = image.copy()
    for operation, parameter in [
        (ops.adjust_brightness, 1.3), (ops.adjust_contrast, 0.7), (ops.adjust_saturation, 1.1),
        (ops.adjust_hue, 0.1), (ops.gaussian_blur, 1.0), (ops.solarize, 128),
    ]:  # fmt: skip
        operation(image, parameter)
        np.testing.assert_array_equal(image, before)


NOTHING = CropDraw((0, 0, 1, 1), False, (), False, None, False)
STRONG = dict(
    brightness=0.9, contrast=0.9, saturation=0.9, hue=0.5, jitter_p=0.9, gray_p=0.3, solarize_p=0.5, blur_p=[0.5] * 3
)


@pytest.fixture
def cv2():
    pytest.importorskip("cv2")
    assert ops.opencv() is not None, "OpenCV is installed, and its levels differ"
    return ops.opencv()


def check_opencv(cv2, crop: np.ndarray, draw: CropDraw) -> None:
    out = np.full(crop.shape[2:] + crop.shape[:2], 7, np.uint8)
    ops.change_colours_into(out, crop.copy(), draw)
    expected = ops.change_colours(np.ascontiguousarray(crop.transpose(2, 0, 1)), draw)
    np.testing.assert_array_equal(out, np.broadcast_to(expected, out.shape), err_msg=str(draw))


@pytest.mark.parametrize("recipe", [None, STRONG], ids=["upstream", "strong"])
@pytest.mark.parametrize("size", [1, 2, 4, 9, 33, 96])
def test_opencvs_pixels_are_numpys(cv2, recipe, size):
    augment = DataAugmentationDINO((0.32, 1), (0.05, 0.32), 6, augmentation=recipe)
    for seed in range(6):
        for draw in augment.draw(70, 60, random.Random(seed)):
            check_opencv(cv2, np.array(picture(70, 60, seed).resize((size, size))), draw)


@pytest.mark.parametrize("name, values", [
    ("brightness", np.r_[np.linspace(0, 5, 41), 1.0001, 129, 300]),
    ("contrast", np.r_[np.linspace(0, 5, 41), 1.0001, 129, 300]),
    ("saturation", np.r_[np.linspace(0, 5, 41), 1.0001, 129, 300]),
    ("hue", np.linspace(-0.5, 0.5, 41)),
])  # fmt: skip
def test_opencvs_pixels_over_the_whole_range_of_a_change(cv2, name, values):
    crop = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for value in values:
        check_opencv(cv2, crop, NOTHING._replace(jitter=((name, float(value)),)))


def test_opencvs_blur_of_every_width(cv2):
    crop = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for sigma in (0.1, 0.4, 1.0, 2.0, 30.0):
        check_opencv(cv2, crop, NOTHING._replace(sigma=sigma, gray=sigma == 1.0, solarize=True))


def test_opencvs_grey_of_all_colours(cv2):
    """Includes halves, which OpenCV would round to the even level."""
    green, blue = np.meshgrid(np.arange(256), np.arange(256))
    for red in range(0, 256, 15):
        colours = np.stack([np.full_like(green, red), green, blue]).astype(np.uint8)
        grey = cv2.transform(np.ascontiguousarray(colours.transpose(1, 2, 0)), ops.LUMA)
        np.testing.assert_array_equal(grey[..., 0], ops.luma(colours))


def test_opencv_with_other_levels_is_not_used(cv2, monkeypatch, caplog):
    monkeypatch.setattr(ops, "LUMA", np.tile(np.float32([0.3, 0.59, 0.11, 0]), (3, 1)))
    ops.opencv.cache_clear()
    try:
        assert ops.opencv() is None and cv2.__version__ in caplog.text
        crop = np.array(picture(20, 20))
        check_opencv(None, crop, NOTHING._replace(gray=True))
    finally:
        ops.opencv.cache_clear()


def test_without_opencv_numpy_does_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    ops.opencv.cache_clear()
    try:
        assert ops.opencv() is None
        check_opencv(None, np.array(picture(20, 20)), NOTHING._replace(jitter=(("hue", 0.1),), sigma=1.0))
    finally:
        ops.opencv.cache_clear()


def report_threads(pipe, method: str) -> None:
    set_up_process()
    pipe.send((ops.opencv().getNumThreads(), method))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_data_loading_process_has_one_thread_of_opencv(cv2, method):
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=report_threads, args=(theirs, method))
    process.start()
    assert ours.recv() == (1, method)
    process.join()


BOXES = [((0, 0, 120, 90), 48), ((13, 7, 71, 60), 48), ((100, 70, 12, 9), 32), ((5, 5, 1, 1), 8), ((3, 2, 48, 48), 48),
         ((119, 89, 1, 1), 3), ((0, 60, 120, 1), 16), ((50, 0, 70, 64), 1), ((20, 20, 60, 60), 37)]  # fmt: skip
HIGH = [((13, 7, 40, 71), 48), ((100, 20, 9, 50), 32), ((7, 0, 50, 90), 16), ((60, 3, 1, 80), 5)]


def cut(kernel: str, image: Image.Image, places, flip: bool = False) -> list[np.ndarray]:
    outs = [np.full((size, size, 3), 7, np.uint8) for _, size in places]
    cut_crops(outs, np.array(image), [NOTHING._replace(box=box, flip=flip) for box, _ in places], kernel)
    return outs


def resize_differences(kernel: str, image: Image.Image, places, flip: bool = False) -> list[np.ndarray]:
    wanted = [np.asarray(reference.resized_crop(image, box, size, flip)).astype(int) for box, size in places]
    return [np.abs(a - b) for a, b in zip(cut(kernel, image, places, flip), wanted, strict=True)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("flip", [False, True])
def test_every_kernel_is_within_a_twentieth_of_a_level_of_pillow(kernel, flip):
    """Compare only the geometry, over the usual crops of photographs."""
    augment, means = DataAugmentationDINO((0.32, 1), (0.05, 0.32), 8), []
    for seed, size in enumerate([(500, 375), (640, 480), (375, 500)]):
        image = picture(*size, seed)
        draws = augment.draw(*size, random.Random(seed))
        places = [(draw.box, side) for draw, side in zip(draws, augment.sizes, strict=True)]
        means += [difference.mean() for difference in resize_differences(kernel, image, places, flip)]
    assert np.mean(means) < 0.05
    for difference in resize_differences(kernel, picture(120, 90, 5), BOXES + HIGH, flip):
        assert difference.mean() < 0.3 and difference.max() <= 12


@pytest.mark.parametrize("kernel", KERNELS)
def test_only_the_slot_in_a_batch_is_written(kernel):
    image = np.array(picture(120, 90, 5))
    batch = np.full((3, 2, 33, 33, 3), 7, np.uint8)
    cut_crops([batch[1, 0]], image, [NOTHING._replace(box=(5, 5, 50, 50), flip=True)], kernel)
    (expected,) = cut(kernel, Image.fromarray(image), [((5, 5, 50, 50), 33)], True)
    np.testing.assert_array_equal(batch[1, 0], expected)
    batch[1, 0] = 7
    assert (batch == 7).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_image_of_any_layout_is_taken(kernel):
    image = np.array(picture(60, 50, 2))
    (expected,) = cut(kernel, Image.fromarray(image), [((3, 4, 40, 30), 16)])
    for same in (np.asfortranarray(image), np.dstack([image, image])[..., :3], torch.from_numpy(image)):
        out = np.zeros((16, 16, 3), np.uint8)
        cut_crops([out], same, [NOTHING._replace(box=(3, 4, 40, 30))], kernel)
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("capability, kernel", [("AVX2", "torch"), ("AVX512", "torch"), ("DEFAULT", "Pillow")])
def test_the_kernel_follows_from_the_processor(monkeypatch, capability, kernel):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    used = []
    monkeypatch.setitem(KERNELS, kernel, lambda out, crop, flip: used.append(crop.shape))
    cut_crops([np.empty((4, 4, 3), np.uint8)], torch.zeros(8, 8, 3, dtype=torch.uint8), [NOTHING])
    assert used == [(1, 1, 3)]
