"""Upstream's transforms agree with torchvision on PIL images."""

import random
from enum import Enum

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_custom.data import transforms
from dinov2_custom.data.transforms import GaussianBlur, MaybeToTensor, make_normalize_transform
from tests.data import reference
from tests.data.pictures import picture


def test_constants():
    assert transforms.IMAGENET_DEFAULT_MEAN == (0.485, 0.456, 0.406)
    assert transforms.IMAGENET_DEFAULT_STD == (0.229, 0.224, 0.225)


@pytest.mark.parametrize("p, rate", [(1.0, 0.0), (0.1, 0.9), (0.5, 0.5), (0.0, 1.0)])
def test_blur_happens_with_probability_one_minus_p(p, rate):
    image, blur, rng = picture(12, 12), GaussianBlur(p=p, radius_min=0.5), random.Random(0)
    blurred = sum(blur(image, rng) is not image for _ in range(400)) / 400
    assert abs(blurred - rate) <= 0.08 and (rate not in (0.0, 1.0) or blurred == rate)


def test_blur_draws_its_radius_in_the_range():
    image = picture(40, 30)
    blurred = GaussianBlur(p=0.0, radius_min=1.5, radius_max=1.5)(image, random.Random(0))
    expected = np.asarray(reference.gaussian_blur(image, 1.5)).astype(float)
    assert np.abs(np.asarray(blurred) - expected).max() <= 2
    first, second = (GaussianBlur(p=0.0)(image, random.Random(1)) for _ in range(2))
    assert first.tobytes() == second.tobytes()


def test_maybe_to_tensor():
    image = picture(5, 4)
    tensor = MaybeToTensor()(image)
    assert tensor.shape == (3, 4, 5) and tensor.dtype == torch.float32
    np.testing.assert_allclose(tensor, np.asarray(image).transpose(2, 0, 1) / 255, atol=1e-7)
    assert MaybeToTensor()(tensor) is tensor
    assert MaybeToTensor()(image.convert("L")).shape == (1, 4, 5)
    with pytest.raises(TypeError, match="expected 8-bit pixels, got uint16"):
        MaybeToTensor()(np.zeros((4, 4), np.uint16))


def test_normalize():
    tensor = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = (tensor - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    torch.testing.assert_close(make_normalize_transform()(tensor), expected)
    torch.testing.assert_close(make_normalize_transform(mean=[0] * 3, std=[2] * 3)(tensor), tensor / 2)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (256, 259), (100, 90), (257, 1000)])
def test_eval_transform_is_resize_of_the_short_side_and_centre_crop(size):
    image = picture(*size)
    width, height = size
    scaled = (256, int(256 * height / width)) if width <= height else (int(256 * width / height), 256)
    resized = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = round((scaled[0] - 224) / 2), round((scaled[1] - 224) / 2)
    crop = resized.crop((left, top, left + 224, top + 224))
    ours = transforms.make_classification_eval_transform()(image)
    expected = reference.normalize(crop, transforms.IMAGENET_DEFAULT_MEAN, transforms.IMAGENET_DEFAULT_STD)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_eval_transform_options_and_crops_larger_than_the_image():
    transform = transforms.make_classification_eval_transform(
        resize_size=10, crop_size=14, interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1)
    )
    ours = transform(Image.new("RGB", (30, 20), (255, 255, 255)))
    assert ours.shape == (3, 14, 14)
    assert ours[0, :2].sum() == 0 and ours[0, -2:].sum() == 0 and ours[0, 2:12].min() == 1


def test_train_transform_is_random_but_reproducible():
    transform, image = transforms.make_classification_train_transform(crop_size=32), picture(60, 40)
    first, second = (transform(image, random.Random(3)) for _ in range(2))
    assert first.shape == (3, 32, 32) and torch.equal(first, second)
    state = random.getstate()
    assert not torch.equal(transform(image), transform(image))
    assert random.getstate() == state
    steps = transforms.make_classification_train_transform(hflip_prob=0.0).transforms
    assert not any(isinstance(step, transforms.RandomHorizontalFlip) for step in steps)


def test_flip_rate_and_mirror():
    image, flip, rng = picture(6, 4), transforms.RandomHorizontalFlip(0.3), random.Random(0)
    results = [flip(image, rng) for _ in range(1000)]
    assert abs(sum(r is not image for r in results) / 1000 - 0.3) < 0.06
    mirrored = next(r for r in results if r is not image)
    np.testing.assert_array_equal(np.asarray(mirrored), np.asarray(image)[:, ::-1])


def test_interpolation_names():
    class Mode(Enum):
        BICUBIC = "bicubic"

    for spelling in ("bicubic", "BICUBIC", Mode.BICUBIC, Image.Resampling.BICUBIC):
        assert transforms.as_resampling(spelling) is Image.Resampling.BICUBIC
    with pytest.raises(ValueError, match="expected one of nearest"):
        transforms.as_resampling("cubic")
