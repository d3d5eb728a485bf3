"""Small labelled scenes: squares and discs on noise."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

from dinov2_custom.decoder.instances import Instance, LabelledImage, Split

SIDE = 48
CLASSES = ("square", "disc")


def make_split(folder, count, seed=0, semantic=False):
    """Write ``count`` scenes and return them; the second image has no object, the third a crowd."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    images = []
    for number in range(count):
        pixels = generator.integers(60, 110, (SIDE, SIDE, 3))
        mask, instances = np.zeros((SIDE, SIDE), np.uint8), []
        for _ in range(0 if number == 1 else 2):
            side, kind = int(generator.integers(12, 20)), int(generator.integers(0, 2))
            x, y = (int(v) for v in generator.integers(0, SIDE - side, 2))
            rows, columns = np.mgrid[:side, :side] + 0.5 - side / 2
            shape = np.ones((side, side), bool) if kind == 0 else rows**2 + columns**2 < side**2 / 4
            pixels[y : y + side, x : x + side][shape] = generator.integers(140, 255, 3)
            mask[y : y + side, x : x + side][shape] = kind + 1
            polygon = [[x, y, x + side, y, x + side, y + side, x, y + side]]
            instances.append(Instance(kind, (x, y, side, side), polygon, float(side**2), number == 2))
        path, labels = folder / f"{number}.png", folder / f"{number}_mask.png"
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        Image.fromarray(mask).save(labels)
        images.append(
            LabelledImage(path, SIDE, SIDE, () if semantic else tuple(instances), labels if semantic else None)
        )
    return Split(("ground", *CLASSES) if semantic else CLASSES, tuple(images))


def write_coco(split, path):
    """Write ``split`` as COCO JSON beside its images."""
    images = [
        {"id": n, "file_name": image.path.name, "width": SIDE, "height": SIDE} for n, image in enumerate(split.images)
    ]
    annotations = [
        {"image_id": n, "category_id": one.category + 1, "bbox": one.box, "area": one.area, "iscrowd": 0}
        for n, image in enumerate(split.images)
        for one in image.instances
    ]
    annotations = [{"id": k + 1} | one for k, one in enumerate(annotations)]
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(split.classes)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path
