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
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from dinov2_custom import cli
from dinov2_custom.configs.paths import check_output_dir
from dinov2_custom.data.decode import FORMATS
from dinov2_custom.decoder import bridge
from dinov2_custom.decoder.bridge import Decoder, Facts
from dinov2_custom.decoder.images import read_image, to_input
from dinov2_custom.decoder.inference import predict
from dinov2_custom.decoder.labels import BACKGROUND
from dinov2_custom.errors import DataError, UnreadableImageError
from dinov2_custom.files import write_text
from dinov2_custom.teacher import device_of_choice

_OPACITY = 0.45
_LEAST_SIDE = 448  # pixels of the longer side of a picture


def main(args: argparse.Namespace) -> int:
    """Run the command line parsed by ``cli.decoder_predict_parser``; return the exit code."""
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
        raise DataError(
            f"expected readable images in {source}, got {len(paths)} unreadable ones; see the reasons above"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "predictions.json", json.dumps(content) + "\n")
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
        raise DataError(f"expected images in {folder}, got none; check the path")
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
    """Return a picture of ``image`` with the objects or classes in ``found``, coloured by class.

    ``found`` is one element of what ``inference.predict`` returns; objects without a ``score``, such as labels, are
    drawn without one. A small image is enlarged by a whole number so that the text is legible. The class
    ``background`` is not painted. Classes of pixels are named in a legend below the image.
    """
    factor = -(-_LEAST_SIDE // max(image.size))
    picture = image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    painted = [number for number, name in enumerate(facts.classes) if name != BACKGROUND]
    palette, line = dict(zip(painted, colours(len(painted)), strict=True)), max(2, max(picture.size) // 250)
    font = ImageFont.load_default(max(14, max(picture.size) // 24))
    if facts.task == "semantic":
        present = [number for number in painted if (found == number).any()]
        for number in present:
            _paint(picture, found == number, palette[number], line)
        return _with_legend(picture, [(facts.classes[number], palette[number]) for number in present], font)
    found = sorted(found, key=lambda one: one.get("score", 1))  # the surest on top
    for one in found:
        if "segmentation" in one:
            from pycocotools.mask import decode

            _paint(picture, decode(one["segmentation"]), palette[one["category_id"]], line)
    pen = ImageDraw.Draw(picture)
    for one in found:
        x, y, width, height = (factor * value for value in one["bbox"])
        right, bottom = x + width, y + height  # the dark rim separates a box from an image of the same colour
        pen.rectangle((x - 1, y - 1, right + 1, bottom + 1), outline="black", width=line + 2)
        pen.rectangle((x, y, right, bottom), outline=palette[one["category_id"]], width=line)
    for one in found:
        score = f" {one['score']:.2f}" if "score" in one else ""
        x, y = (factor * value for value in one["bbox"][:2])
        _label(pen, (x, y), f"{facts.classes[one['category_id']]}{score}", palette[one["category_id"]], font)
    return picture


def _paint(picture: Image.Image, mask: np.ndarray, colour: tuple[int, int, int], line: int) -> None:
    """Tint the pixels of ``mask`` (height, width of the original image) and draw its border."""
    inside = Image.fromarray(np.asarray(mask, np.uint8) * 255).resize(picture.size, Image.Resampling.NEAREST)
    border = ImageChops.subtract(inside, inside.filter(ImageFilter.MinFilter(2 * line + 1)))
    picture.paste(colour, (0, 0), inside.point(lambda value: round(_OPACITY * value)))
    picture.paste(colour, (0, 0), border)


def _label(pen: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, colour: tuple, font: Any) -> None:
    """Write on a filled rectangle above ``corner``, moved as far as it needs to be inside the picture."""
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = right - left + 6, bottom - top + 6
    x = max(0, min(corner[0], pen.im.size[0] - width))
    y = max(0, corner[1] - height)
    pen.rectangle((x, y, x + width, y + height), fill=colour)
    pen.text((x + 3 - left, y + 3 - top), text, fill=_readable_on(colour), font=font)


def _with_legend(picture: Image.Image, entries: list[tuple[str, tuple[int, int, int]]], font: Any) -> Image.Image:
    """Return ``picture`` above a white strip with the names of the classes; as many lines as they need."""
    height, places, x, y = round(1.6 * font.size), [], 0, 0
    for name, _ in entries:
        width = height + round(font.getlength(name)) + font.size // 2
        if x and x + width > picture.width:
            x, y = 0, y + height
        places.append((x, y))
        x += width
    out = Image.new("RGB", (picture.width, picture.height + y + height), "white")
    out.paste(picture, (0, 0))
    pen = ImageDraw.Draw(out)
    for (name, colour), (x, y) in zip(entries, places, strict=True):
        middle = picture.height + y + height / 2
        pen.rectangle((x + height * 0.25, middle - height * 0.3, x + height * 0.85, middle + height * 0.3), fill=colour)
        pen.text((x + height, middle), name, fill="black", font=font, anchor="lm")
    return out


def _readable_on(colour: tuple[int, int, int]) -> str:
    """Return black or white, whichever has the higher contrast with ``colour`` (luminance of Rec. 601)."""
    return "black" if np.dot(colour, (0.299, 0.587, 0.114)) > 128 else "white"


if __name__ == "__main__":
    cli.main("decode-predict")
