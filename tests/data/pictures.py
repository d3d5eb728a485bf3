"""Deterministic images and image folders for the tests of the data code."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return an RGB image with structure at every scale, like a photograph, and some saturated patches."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    cells = 2
    while cells < 2 * max(width, height):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += (np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC)) - 127.5) * (2 / cells) ** 0.7
        cells *= 2
    pixels = 128 + pixels * (70 / max(pixels.std(), 1e-9))
    for _ in range(3):
        top, left = rng.integers(0, height), rng.integers(0, width)
        pixels[top : top + height // 6, left : left + width // 6] = rng.choice([0, 60, 255], 3)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def planes(image: Image.Image) -> np.ndarray:
    """Return the (C, H, W) uint8 planes of a PIL image."""
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """Return the bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def deep_rgb(kind: str, values: np.ndarray) -> bytes:
    """Return a PNG or TIFF file of ``values`` (H, W, 3) with 16 bits per channel, which Pillow cannot write."""
    height, width, _ = values.shape
    if kind == "PNG":
        rows = b"".join(b"\0" + row.tobytes() for row in values.astype(">u2"))
        head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
        chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
        packed = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
        return b"\x89PNG\r\n\x1a\n" + b"".join(packed)
    data = values.astype("<u2").tobytes()
    short, long, bits = 3, 4, 8 + len(data)
    tags = [
        (256, long, 1, width),
        (257, long, 1, height),
        (258, short, 3, bits),
        (259, short, 1, 1),
        (262, short, 1, 2),
    ]
    tags += [(273, long, 1, 8), (277, short, 1, 3), (278, long, 1, height), (279, long, 1, len(data))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", bits + 6) + data + struct.pack("<HHH", 16, 16, 16) + directory


def make_folder(root: Path, names: list[str], width: int = 20, height: int = 16) -> list[str]:
    """Write a different small image for every name (by its extension) below ``root``; return the sorted paths."""
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(width, height, seed=i).save(path)
    return sorted(str(root / name) for name in names)


def train_config(dataset_path, **train) -> SimpleNamespace:
    """Return the part of a configuration used by the data code, with tiny crops."""
    defaults = dict(dataset_path=dataset_path, batch_size_per_gpu=2, num_workers=0, seed=0, max_bad_fraction=0.01)
    defaults |= dict(path_preserved="", frac=0.0, output_dir=".")
    normalize = SimpleNamespace(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    return SimpleNamespace(
        train=SimpleNamespace(**{**defaults, **train}),
        data=SimpleNamespace(intensity="auto", page=0, dct_scaling=False, normalize=normalize),
        augmentation=SimpleNamespace(device="auto"),
        optim=SimpleNamespace(accumulation_steps=1),
        crops=SimpleNamespace(
            global_crops_scale=[0.32, 1.0],
            local_crops_scale=[0.05, 0.32],
            local_crops_number=2,
            global_crops_size=16,
            local_crops_size=8,
        ),
        ibot=SimpleNamespace(mask_ratio_min_max=[0.1, 0.5], mask_sample_probability=0.5),
        student=SimpleNamespace(patch_size=4),
    )
