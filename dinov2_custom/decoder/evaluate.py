"""Score a trained decoder on labelled images: COCO's AP, or mIoU."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinov2_custom import cli, distributed
from dinov2_custom.decoder import bridge
from dinov2_custom.decoder.bridge import Decoder
from dinov2_custom.decoder.images import Images, collate
from dinov2_custom.decoder.inference import predict
from dinov2_custom.decoder.instances import Split, semantic_mask
from dinov2_custom.decoder.labels import read_split
from dinov2_custom.decoder.losses import count
from dinov2_custom.decoder.measures import coco_scores, confusion, mean_iou
from dinov2_custom.files import write_text
from dinov2_custom.teacher import device_of_choice

KINDS = {"detection": "bbox", "instance": "segm"}


def main(args: argparse.Namespace) -> int:
    """Run the command line parsed by ``cli.decoder_eval_parser``; return the exit code."""
    decoder = bridge.load(args.decoder)
    split = read_split(args.data, decoder.facts.task, part=args.part, classes=decoder.facts.classes)
    device = device_of_choice(args.device)
    scores = score(decoder._replace(model=decoder.model.to(device)), split, args.batch_size, device)
    folder = Path(args.output_dir or args.decoder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "scores.json", json.dumps(scores, indent=2) + "\n")
    print(table(scores, split.classes))
    print(folder / "scores.json", file=sys.stderr)
    return 0


def score(
    decoder: Decoder, split: Split, batch_size: int, device: torch.device, sum_of_losses: Callable | None = None
) -> dict[str, Any]:
    """Return the scores of ``split``, computed by all processes together, and with ``sum_of_losses`` its ``loss``.

    The model returns to the mode that it was in.

    Args:
        sum_of_losses: maps the model and a batch to the sum over its objects or labelled pixels; ``loss`` is the mean
            over those of all images.
    """
    predictions, loss = predict_split(decoder, split, batch_size, device, sum_of_losses)
    scores = measure(decoder.facts.task, decoder.facts.classes, split, predictions)
    return scores if loss is None else scores | {"loss": loss}


def predict_split(
    decoder: Decoder,
    split: Split,
    batch_size: int,
    device: torch.device,
    sum_of_losses: Callable | None = None,
    alone: bool = False,
) -> tuple[list[Any], float | None]:
    """Return the predictions of each image of ``split``, and the mean loss.

    The images are divided among the processes, unless this one is ``alone`` in calling the function.
    """
    model, data = decoder.model, Images(split, decoder.facts)
    was_training = model.training
    model.eval()
    rank, size = (0, 1) if alone else (distributed.get_global_rank(), distributed.get_global_size())
    mine = range(rank, len(data), size)
    found, total, number = {}, 0.0, 0
    for start in range(0, len(mine), batch_size):
        numbers = mine[start : start + batch_size]
        batch = collate([data[number] for number in numbers])
        pixels = batch["pixel_values"].to(device)
        sizes = [(split.images[number].width, split.images[number].height) for number in numbers]
        found |= dict(zip(numbers, predict(model, pixels, sizes, decoder.facts), strict=True))
        if sum_of_losses is not None:
            labels = batch["labels"]
            number += count(labels)
            if isinstance(labels, list):
                labels = [{name: value.to(device) for name, value in one.items()} for one in labels]
            else:
                labels = labels.to(device)
            with torch.no_grad():
                total += float(sum_of_losses(model, {"pixel_values": pixels, "labels": labels}))
    model.train(was_training)
    everyone = [(found, total, number)] if alone else distributed.gather_objects((found, total, number))
    found = {at: one for theirs, _, _ in everyone for at, one in theirs.items()}
    loss = sum(theirs for _, theirs, _ in everyone) / max(sum(theirs for _, _, theirs in everyone), 1)
    return [found[at] for at in range(len(data))], None if sum_of_losses is None else loss


def measure(task: str, classes: tuple[str, ...], split: Split, predictions: list[Any]) -> dict[str, Any]:
    """Return AP of boxes or masks, or IoU of semantic segmentation, of the predictions of each image."""
    if task == "semantic":
        total = np.zeros((len(classes), len(classes)), np.int64)
        for image, predicted in zip(split.images, predictions, strict=True):
            total += confusion(predicted, semantic_mask(image, len(classes)), len(classes))
        return mean_iou(total)
    return coco_scores(split, to_coco(predictions), KINDS[task])


def to_coco(predictions: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return one list of COCO results; ``image_id`` is the number of the image."""
    return [{"image_id": number, **one} for number, found in enumerate(predictions) for one in found]


def headline(task: str, scores: dict[str, Any]) -> tuple[str, float]:
    """Return the name and value of the score by which epochs are compared; 0 without ground truth."""
    name = "miou" if task == "semantic" else "ap"
    return name, scores[name] or 0.0


def table(scores: dict[str, Any], classes: Sequence[str]) -> str:
    """Return the scores as lines of text, those of each class last; a dash where there is no ground truth."""
    rows = [(name, value) for name, value in scores.items() if name != "per_class"]
    rows += [(f"  {name}", value) for name, value in zip(classes, scores["per_class"], strict=True)]
    return "\n".join(f"{name:32} {'-' if value is None else f'{value:.4f}':>8}" for name, value in rows)


if __name__ == "__main__":
    cli.main("decode-eval")
