"""Report whether one backbone is better than another: the difference of scores, with an interval over images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dinov2_custom import distributed
from dinov2_custom.decoder import bridge
from dinov2_custom.decoder.bridge import Facts
from dinov2_custom.decoder.evaluate import predict_split, to_coco
from dinov2_custom.decoder.instances import Split, semantic_mask
from dinov2_custom.decoder.measures import confusion, paired_interval
from dinov2_custom.files import write_text

REPORT_FILE = "comparison.json"
_NAMES = {"detection": ("AP50", "bbox"), "instance": ("AP50 of masks", "segm"), "semantic": ("mIoU", "semantic")}


def report(folder: Path, other: Path, split: Split, num_labelled: int) -> dict[str, Any]:
    """Compare the best decoders in two folders on ``split``; write and return the report with its ``sentence``.

    The interval is that of a paired bootstrap: images are drawn with replacement, the same for both.
    """
    predictions = []
    for place in (folder, other):
        decoder = bridge.load(place)
        device = distributed.get_device()
        found, _ = predict_split(decoder._replace(model=decoder.model.to(device)), split, 8, device, alone=True)
        predictions.append(_scorable(decoder.facts, split, found))
    label, kind = _NAMES[decoder.facts.task]
    change, low, high = paired_interval(split, *predictions, kind, seed=0)
    sentence = (
        f"{label} {_signed(change)}, 95 % interval {_signed(low)} to {_signed(high)}, {num_labelled} labelled images"
    )
    content = {"sentence": sentence, "difference": change, "low": low, "high": high, "images": len(split.images)}
    write_text(folder / REPORT_FILE, json.dumps(content, indent=2) + "\n")
    return content


def _scorable(facts: Facts, split: Split, predictions: list[Any]) -> list[Any]:
    """Return what ``paired_interval`` takes."""
    if facts.task != "semantic":
        return to_coco(predictions)
    num_classes = len(facts.classes)
    return [
        confusion(found, semantic_mask(image, num_classes), num_classes)
        for image, found in zip(split.images, predictions, strict=True)
    ]


def _signed(value: float) -> str:
    """Return ``+.07`` for 0.07."""
    return f"{value:+.2f}".replace("0.", ".", 1)
