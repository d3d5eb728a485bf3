"""Report whether one backbone is better than another: the difference of scores, with an interval over images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dinov2_custom import distributed
from dinov2_custom.decoder import bridge
from dinov2_custom.decoder.evaluate import measure, predict_split
from dinov2_custom.decoder.labels import Split
from dinov2_custom.decoder.measures import paired_interval
from dinov2_custom.files import atomic_write

REPORT_FILE = "comparison.json"
_NAMES = {"detection": ("AP50", "ap50"), "instance": ("AP50 of masks", "ap50"), "semantic": ("mIoU", "miou")}


def report(folder: Path, other: Path, split: Split, num_labelled: int) -> dict[str, Any]:
    """Compare the best decoders in two folders on ``split``; write and return the report with its ``sentence``.

    The interval is that of a paired bootstrap: images are drawn with replacement, the same for both.
    """
    predictions = []
    for place in (folder, other):
        decoder = bridge.load(place)
        device = distributed.get_device()
        found, _ = predict_split(decoder._replace(model=decoder.model.to(device)), split, 8, device, alone=True)
        predictions.append(found)
    facts = decoder.facts
    label, key = _NAMES[facts.task]

    def difference(numbers: Any) -> float:
        part = split._replace(images=tuple(split.images[number] for number in numbers))
        first, second = (
            measure(facts.task, facts.classes, part, [one[number] for number in numbers])[key] for one in predictions
        )
        return first - second

    change = difference(range(len(split.images)))
    low, high = paired_interval(difference, len(split.images))
    sentence = (
        f"{label} {_signed(change)}, 95 % interval {_signed(low)} to {_signed(high)}, {num_labelled} labelled images"
    )
    content = {"sentence": sentence, "difference": change, "low": low, "high": high, "images": len(split.images)}
    with atomic_write(folder / REPORT_FILE) as out:
        out.write(json.dumps(content, indent=2) + "\n")
    return content


def _signed(value: float) -> str:
    """Return ``+.07`` for 0.07."""
    return f"{value:+.2f}".replace("0.", ".", 1)
