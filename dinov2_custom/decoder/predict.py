"""Apply a trained decoder to a folder of images: COCO JSON of objects or PNG masks of classes, and pictures."""

from __future__ import annotations

import argparse
import colorsys
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from dinov2_custom import cli
from dinov2_custom.configs.paths import check_output_dir
from dinov2_custom.data.decode import FORMATS
from dinov2_custom.decoder import bridge
from dinov2_custom.decoder.bridge import Decoder, Facts
from dinov2_custom.decoder.images import read_image, to_input
from dinov2_custom.decoder.inference import predict
from dinov2_custom.errors import DataError, UnreadableImageError
from dinov2_custom.files import atomic_write
from dinov2_custom.teacher import device_of_choice

_OPACITY = 0.45


def main(args: argparse.Namespace) -> int:
    """Run the command line parsed by ``cli.decoder_predict_parser``; return the exit code.

    Raises:
        CheckpointError: there is no trained decoder.
        DataError: the folder has no readable image.
    """
    decoder = bridge.load(args.decoder)
    source = Path(args.images).expanduser()
    out = Path(args.output_dir or Path("outputs/predict") / source.resolve().name).expanduser()
    check_output_dir(out, "--output-dir")
    paths = images_in(source)
    device = device_of_choice(args.device)
    decoder = decoder._replace(model=decoder.model.to(device))
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": name} for number, name in enumerate(decoder.facts.classes)],
    }
    for start in range(0, len(paths), args.batch_size):
        for path, image, found in _batch(decoder, paths[start : start + args.batch_size], device):
            name, number = path.relative_to(source), len(content["images"])
            content["images"].append(
                {"id": number, "file_name": str(name), "width": image.width, "height": image.height}
            )
            if decoder.facts.task == "semantic":
                mask = out / "masks" / name.with_suffix(".png")
                mask.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(found).save(mask)
            else:
                found = [one for one in found if one["score"] >= args.threshold]
                content["annotations"] += [
                    _annotation(one, len(content["annotations"]) + k, number) for k, one in enumerate(found)
                ]
            if number < args.num_pictures:
                picture = out / "pictures" / name.with_suffix(".png")
                picture.parent.mkdir(parents=True, exist_ok=True)
                draw(image, found, decoder.facts).save(picture)
    if not content["images"]:
        raise DataError(f"expected readable images in {source}, got {len(paths)} that are not")
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / "predictions.json") as file:
        file.write(json.dumps(content) + "\n")
    print(out / "predictions.json")
    return 0


def images_in(folder: Path) -> list[Path]:
    """Return the image files of ``folder`` and its subfolders, in order.

    Raises:
        DataError: there are none.
    """
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings)
    if not paths:
        raise DataError(f"expected a folder of images, got none in {folder}")
    return paths


def _batch(decoder: Decoder, paths: list[Path], device: torch.device) -> list[tuple[Path, Image.Image, Any]]:
    """Return (path, image, predictions); unreadable images are reported and left out."""
    images = {}
    for path in paths:
        try:
            images[path] = read_image(path, decoder.facts)
        except UnreadableImageError as e:
            print(f"bad image: {e}", file=sys.stderr)
    if not images:
        return []
    pixels = torch.stack([to_input(image, decoder.facts) for image in images.values()]).to(device)
    found = predict(decoder.model, pixels, [image.size for image in images.values()], decoder.facts)
    return [(path, image, one) for (path, image), one in zip(images.items(), found, strict=True)]


def _annotation(one: dict[str, Any], number: int, image: int) -> dict[str, Any]:
    from pycocotools.mask import area

    size = float(area(one["segmentation"])) if "segmentation" in one else one["bbox"][2] * one["bbox"][3]
    return {"id": number + 1, "image_id": image, "iscrowd": 0, "area": size, **one}


def colours(count: int) -> list[tuple[int, int, int]]:
    """Return ``count`` colours of equal distance in hue."""
    return [tuple(round(255 * c) for c in colorsys.hsv_to_rgb(k / max(count, 1), 0.8, 1.0)) for k in range(count)]


def draw(image: Image.Image, found: Any, facts: Facts) -> Image.Image:
    """Return a copy of ``image`` with the objects or classes that were found, coloured by class."""
    palette = colours(len(facts.classes))
    if facts.task == "semantic":
        layer = Image.fromarray(np.array(palette, np.uint8)[found])
        return Image.blend(image, layer, _OPACITY)
    picture = image.copy()
    for one in found:
        if "segmentation" in one:
            from pycocotools.mask import decode

            mask = Image.fromarray(decode(one["segmentation"]) * round(255 * _OPACITY))
            picture.paste(palette[one["category_id"]], (0, 0), mask)
    pen = ImageDraw.Draw(picture)
    for one in found:
        x, y, width, height = one["bbox"]
        colour = palette[one["category_id"]]
        pen.rectangle((x, y, x + width, y + height), outline=colour, width=max(1, max(image.size) // 300))
        pen.text((x + 2, y + 1), f"{facts.classes[one['category_id']]} {one['score']:.2f}", fill=colour)
    return picture


if __name__ == "__main__":
    cli.main("decode-predict")
