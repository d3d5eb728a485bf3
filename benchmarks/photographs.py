"""Photographs for benchmarks: those shipped with scikit-image and scikit-learn, cropped and resized.

The sources are small; larger sizes are upscaled, with added film grain so that file sizes are realistic (about 2 bits
per pixel at quality 90).
"""

from __future__ import annotations

import functools
import importlib.util
import io
from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.pictures import picture

SHIPPED = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "ihc.png", "hubble_deep_field.jpg",
           "motorcycle_left.png", "motorcycle_right.png", "retina.jpg")  # fmt: skip
SIZES = {
    "500x375": (500, 375, "JPEG", 32),
    "1024x768": (1024, 768, "JPEG", 16),
    "4000x3000": (4000, 3000, "JPEG", 4),
    "360x363 PNG": (360, 363, "PNG", 32),
}


@functools.cache
def sources() -> list[Image.Image]:
    """Return the shipped photographs; without those packages, synthetic images with structure at every scale."""
    found = {name: importlib.util.find_spec(name) for name in ("skimage", "sklearn")}
    skimage, sklearn = (Path(spec.origin).parent if spec else Path("/nowhere") for spec in found.values())
    paths = [skimage / "data" / name for name in SHIPPED] + sorted((sklearn / "datasets/images").glob("*.jpg"))
    shipped = [Image.open(path).convert("RGB") for path in paths if path.exists()]
    return shipped or [picture(1024, 768, seed) for seed in range(8)]


def encoded(width: int, height: int, kind: str, number: int) -> list[bytes]:
    """Return ``number`` different files of this size and kind."""
    return [_encode(_photograph(i, width, height), kind) for i in range(number)]


def _photograph(i: int, width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(i)
    source = sources()[i % len(sources())]
    share = rng.uniform(0.7, 1.0)
    w = share * min(source.width, source.height * width / height)
    h = w * height / width
    left, top = rng.uniform(0, source.width - w), rng.uniform(0, source.height - h)
    image = source.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
    grain = rng.normal(0, 4, (height, width, 1)) + rng.normal(0, 1.5, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))


def _encode(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return buffer.getvalue()
