"""Does pretraining help? Decoders from a backbone of our own run against the same decoders from random weights.

``python -m benchmarks.decoder --seeds 1 2 3 --write`` generates, for each seed, grey scenes of overlapping blobs whose
texture is their class, pretrains a small ViT on 4,000 of them without labels (configs/small.yaml, 350 iterations), and
trains decoders on 100 labelled others (run/decoder/train.py with --compare-to random); those for boxes on sparse scenes
of the same generator, with a dark background. They are scored on 200 further scenes, which choose nothing. ``--only``
selects decoders, ``--pictures docs/images`` draws what those of the first seed find. The same command resumes: finished
runs are not repeated. Writes results/decoder.md. Needs the extra ``decoder``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from benchmarks.machine import add_write_option, describe, finish, table
from dinov2_custom import cli
from dinov2_custom.decoder import bridge
from dinov2_custom.decoder import train as decoder_training
from dinov2_custom.decoder.evaluate import predict_split, score
from dinov2_custom.decoder.images import read_image
from dinov2_custom.decoder.instances import semantic_mask
from dinov2_custom.decoder.labels import read_split
from dinov2_custom.decoder.predict import draw
from dinov2_custom.train import get_args_parser
from dinov2_custom.train import main as pretrain
from dinov2_custom.utils.rng import seed_for
from tests.data.textures import FAMILIES

ROOT = Path(__file__).parents[1]
SIDE = 112
CLASSES = {"stripes": "grating", "cells": "cells", "clouds": "clouds", "grain": "grain"}
COMMON_SHARE = 0.8  # of the blobs of a scene have its class
PARTS = {"train": 100, "val": 30, "test": 200}
SPARSE = {"blobs": (1, 4), "overlap": 0.1, "background": (10, 50)}
DONE = "result.json"
THRESHOLD = 0.3  # of drawn boxes, as by default in run/decoder/predict.py
PRETRAINING = (
    "train.max_steps=350",
    "crops.global_crops_scale=[0.25,0.7]",
    "crops.local_crops_scale=[0.05,0.2]",
    "evaluation.online.every=0",
    "train.num_workers=0",
)
COMMON = ("batch=10", "width=64", f"image_size={SIDE}", "num_workers=0")  # and 12 epochs, the default
BOXES = ("queries=10", "groups=10", "decoder_layers=2", "dropout=0", "loss.classes=3", "warmup_steps=20", "frozen=true")


class Kind(NamedTuple):
    """A pair of trainings: the task, what is trained, the keys beside the common ones, and what scenes differ in."""

    task: str
    trained: str
    keys: tuple[str, ...]
    scenes: dict[str, Any] = {}


KINDS = {
    "classes_frozen": Kind("semantic", "linear layer, frozen", ("lr=1e-2", "head=linear", "frozen=true")),
    "classes": Kind("semantic", "UperNet, fine-tuned", ("lr=1e-3",)),
    "boxes_short": Kind("detection", "RF-DETR, frozen, 12 epochs", ("lr=1e-3", *BOXES), SPARSE),
    "boxes": Kind("detection", "RF-DETR, frozen, 30 epochs", ("lr=1e-3", "epochs=30", *BOXES), SPARSE),
}
METRICS = {"detection": ("AP50", "ap50"), "semantic": ("mIoU", "miou")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("outputs/decoder"), help="scenes and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--unlabelled", type=int, default=4000, help="scenes for pretraining")
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="draw labels and predictions of the first seed")
    add_write_option(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in args.only}
    minutes = []
    for seed in args.seeds:
        folder = args.work.absolute() / f"seed{seed}"
        seconds = pretrained(folder, seed, args.unlabelled)
        minutes.append(seconds / 60)
        print(f"seed {seed}: pretrained in {seconds / 60:.1f} CPU minutes", flush=True)
        for name in args.only:
            found[name].append(compared(name, folder, seed))
            print(f"seed {seed}: {KINDS[name].trained}: {found[name][-1]}", flush=True)
    if args.pictures:
        for name in args.only:
            draw_rows(name, args.work.absolute() / f"seed{args.seeds[0]}", args.pictures / f"decoder_{name}.jpg")
    finish(page(args.seeds, found, args.unlabelled, minutes), "decoder", args.write)


# scenes


def scene(
    generator: np.random.Generator,
    blobs: tuple[int, int] = (6, 12),
    overlap: float = 0.3,
    background: tuple[int, int] = (90, 200),
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Return the grey pixels (SIDE, SIDE) and, for each blob, its class and outline (points, 2).

    Most blobs of a scene are of one class and similar in the scale, direction and contrast of their texture, as the
    cells of one preparation. Outlines, brightness and sizes are independent of the class. Smaller blobs cover larger
    ones; of up to ``blobs`` drawn ones, those are left out that would lie on others with more than ``overlap`` of
    their area.
    """
    pixels = np.full((SIDE, SIDE), generator.uniform(*background))
    found, covered = [], np.zeros((SIDE, SIDE), bool)
    common, style = int(generator.integers(len(CLASSES))), generator.uniform((5, 0, 60), (12, 2 * np.pi, 160))
    for radius in np.sort(generator.uniform(13, 24, generator.integers(blobs[0], blobs[1] + 1)))[::-1]:
        outline = blob(generator, radius)
        image = Image.new("1", (SIDE, SIDE))
        ImageDraw.Draw(image).polygon([tuple(point) for point in outline], fill=1)
        inside = np.asarray(image)
        if (inside & covered).sum() > overlap * inside.sum():
            continue
        covered |= inside
        category = common if generator.random() < COMMON_SHARE else int(generator.integers(len(CLASSES)))
        rows, columns = np.nonzero(inside)
        box = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        period, angle, contrast = style * generator.normal(1, 0.08, 3)
        side = max(np.ptp(rows), np.ptp(columns)) + 1
        values = texture(generator, list(CLASSES.values())[category], side, period, angle)
        height, width = inside[box].shape
        values = (values - values.min()) / max(np.ptp(values), 1e-9) - 0.5
        pixels[box][inside[box]] = generator.uniform(70, 185) + contrast * values[:height, :width][inside[box]]
        found.append((category, outline))
    return (pixels + generator.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8), found


def blob(generator: np.random.Generator, radius: float) -> np.ndarray:
    """Return the outline (24, 2) of a deformed ellipse inside the scene."""
    angles = np.arange(24) * 2 * np.pi / 24
    lengths = 1 + sum(generator.uniform(0, 0.12) * np.cos(k * angles + generator.uniform(0, 6.3)) for k in (2, 3, 4))
    points = radius * lengths[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    low, high = -points.min(0), SIDE - 1 - points.max(0)
    return (points + generator.uniform(low, high)).round(1)


def texture(generator: np.random.Generator, family: str, side: int, period: float, angle: float) -> np.ndarray:
    """Return values (side, side) of a texture at a random position."""
    rows, columns = np.mgrid[:side, :side] + generator.uniform(0, 100, (2, 1, 1))
    x = (np.cos(angle) * columns + np.sin(angle) * rows) / period
    y = (np.cos(angle) * rows - np.sin(angle) * columns) / period
    return FAMILIES[family](generator, x, y).astype(np.float64)


def write_scenes(folder: Path, count: int, seed: int, **differing: Any) -> Path:
    """Write ``count`` scenes and their COCO JSON, unless it is there; return its path.

    Args:
        differing: arguments of :func:`scene`.
    """
    path = folder / "labels.json"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed_for(seed, "scenes", folder.name))
    images, annotations = [], []
    for number in range(count):
        pixels, found = scene(generator, **differing)
        Image.fromarray(pixels).save(folder / f"{number:04d}.png")
        images.append({"id": number, "file_name": f"{number:04d}.png", "width": SIDE, "height": SIDE})
        for category, outline in found:
            (left, top), (right, bottom) = outline.min(0), outline.max(0)
            one = {"id": len(annotations) + 1, "image_id": number, "category_id": category, "iscrowd": 0}
            one |= {"bbox": [left, top, right - left, bottom - top], "segmentation": [outline.ravel().tolist()]}
            x, y = outline.T
            annotations.append(one | {"area": abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2})
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


# runs


def pretrained(folder: Path, seed: int, unlabelled: int) -> float:
    """Pretrain the backbone in ``folder``/pretrained, unless that is done; return the CPU seconds."""
    run = folder / "pretrained"
    if not (run / DONE).is_file():
        scenes = write_scenes(folder / "unlabelled", unlabelled, seed).parent
        keys = [f"train.dataset_path={scenes}", f"train.seed={seed}", *PRETRAINING]
        flags = ["--config-file", str(ROOT / "configs" / "small.yaml"), "--output-dir", str(run)]
        began = time.process_time()
        if code := pretrain(get_args_parser().parse_args([*flags, *keys])):
            raise SystemExit(code)
        (run / DONE).write_text(json.dumps({"seconds": time.process_time() - began}))
    return json.loads((run / DONE).read_text())["seconds"]


def compared(name: str, folder: Path, seed: int) -> dict[str, Any]:
    """Return the test scores of decoders from pretrained and from random weights; train them, unless that is done."""
    kind, run = KINDS[name], folder / name
    if (run / DONE).is_file():
        return json.loads((run / DONE).read_text())
    labels = {
        part: write_scenes(scenes_of(kind, folder, part), count, seed, **kind.scenes) for part, count in PARTS.items()
    }
    flags = ["--backbone", str(folder / "pretrained"), "--task", kind.task, "--output-dir", str(run)]
    flags += ["--train", str(labels["train"]), "--val", str(labels["val"]), "--compare-to", "random"]
    decoder_training.main(cli.decoder_train_parser().parse_args([*flags, f"seed={seed}", *COMMON, *kind.keys]))
    result: dict[str, Any] = {}
    test = None
    for key, place in (("pretrained", run), ("random", run / "compared_to")):
        decoder = bridge.load(place)
        test = test or read_split(str(labels["test"]), kind.task, part="val", classes=decoder.facts.classes)
        result[key] = score(decoder, test, 50, torch.device("cpu"))[METRICS[kind.task][1]]
    result["sentence"] = decoder_training.report(run, run / "compared_to", test, PARTS["train"])["sentence"]
    (run / DONE).write_text(json.dumps(result))
    return result


def scenes_of(kind: Kind, folder: Path, part: str) -> Path:
    """Return the folder of the labelled scenes of ``part``."""
    return folder / (f"sparse_{part}" if kind.scenes else part)


# report


def draw_rows(name: str, folder: Path, path: Path) -> None:
    """Draw three test scenes with labels, and what the decoders from pretrained and from random weights find."""
    rows, labels_file = [], scenes_of(KINDS[name], folder, "test") / "labels.json"
    for place in (folder / name, folder / name / "compared_to"):
        decoder = bridge.load(place)
        facts = decoder.facts
        test = read_split(str(labels_file), facts.task, part="val", classes=facts.classes)
        test = test._replace(images=test.images[:3])
        found, _ = predict_split(decoder, test, 3, torch.device("cpu"))
        if facts.task == "semantic":
            labels = [semantic_mask(image, len(facts.classes)) for image in test.images]
        else:
            labels = [[{"category_id": one.category, "bbox": one.box} for one in i.instances] for i in test.images]
            found = [[one for one in objects if one["score"] >= THRESHOLD] for objects in found]
        rows += [("labels", labels)] if not rows else []
        rows.append(("pretrained backbone" if place.name == name else "random backbone", found))
    images = [read_image(image.path, facts) for image in test.images]
    drawn = [[draw(image, one, facts) for image, one in zip(images, found, strict=True)] for _, found in rows]
    width, gap = drawn[0][0].width, 12
    heights = [max(picture.height for picture in row) + 40 for row in drawn]
    sheet = Image.new("RGB", (3 * (width + gap) - gap, sum(heights)), "white")
    for number, ((title, _), row) in enumerate(zip(rows, drawn, strict=True)):
        top = sum(heights[:number])
        ImageDraw.Draw(sheet).text((4, top + 8), title, fill="black", font=ImageFont.load_default(22))
        for column, picture in enumerate(row):
            sheet.paste(picture, (column * (width + gap), top + 38))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=60)


def page(seeds: list[int], found: dict[str, list[dict[str, Any]]], unlabelled: int, minutes: list[float]) -> str:
    header = ["decoder", "measure", *(f"seed {seed}: random, pretrained" for seed in seeds), "gain"]
    header += ["smallest, largest", "standard deviation"]
    return (
        "# Decoders from pretrained and from random backbones\n\n"
        f"{describe('benchmarks.decoder')}\n"
        f"Generated scenes of {SIDE} x {SIDE} pixels, others for each seed: {unlabelled:,} without labels, "
        f"{PARTS['train']} labelled, {PARTS['val']} that choose the best epoch, {PARTS['test']} for these scores. "
        "RF-DETR: labelled scenes with one to four blobs on a dark background. "
        f"Pretraining took {np.mean(minutes):.1f} CPU minutes. *gain*: pretrained minus random, mean over seeds.\n\n"
        f"{table(header, [summary(KINDS[name], results) for name, results in found.items()])}\n"
        "The report of `--compare-to random` for each pair, on the test scenes:\n\n"
        + "\n".join(
            f"* {KINDS[name].trained}, seed {seed}: {result['sentence']}"
            for name, results in found.items()
            for seed, result in zip(seeds, results, strict=True)
        )
        + "\n"
    )


def summary(kind: Kind, results: list[dict[str, Any]]) -> list[str]:
    """Return one line of the table."""
    gains = [result["pretrained"] - result["random"] for result in results]
    return [
        kind.trained,
        METRICS[kind.task][0],
        *(f"{result['random']:.3f}, {result['pretrained']:.3f}" for result in results),
        f"{np.mean(gains):+.3f}",
        f"{min(gains):+.3f}, {max(gains):+.3f}",
        f"{np.std(gains, ddof=1):.3f}" if len(gains) > 1 else "",
    ]


if __name__ == "__main__":
    main()
