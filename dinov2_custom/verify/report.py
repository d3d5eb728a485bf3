"""Write the results as bad_images.jsonl, clean.txt and summary.json, and format them as text."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinov2_custom.data.intensity import Measured
from dinov2_custom.data.listing import PassedOver
from dinov2_custom.errors import install
from dinov2_custom.files import atomic_write, write_text

from .results import BAD, SOUND, Results

SIDES = (32, 64, 128, 224, 384, 512, 1024, 2048, 4096)
TOP = 10


def write_report(
    results: Results,
    folder: Path,
    dataset: str,
    passed_over: Sequence[PassedOver] = (),
    left_out: Mapping[str, int] | None = None,
    measured: Measured | None = None,
) -> dict[str, Any]:
    """Write the three files into ``folder`` and return the summary. Equal results give identical bytes.

    ``passed_over``: folders and files of the dataset that could not be listed completely, so that some of their images
    were not checked. ``left_out``: number of non-image files by extension. ``measured``: the range of values in images
    of more than 8 bits.
    """
    with atomic_write(folder / "bad_images.jsonl", fsync=True) as file:
        for i in np.flatnonzero(results.status == BAD).tolist():
            file.write(json.dumps({"path": absolute(results.name(i)), "reason": results.reasons[i]}) + "\n")
    unlisted = 0
    with atomic_write(folder / "clean.txt", fsync=True) as file:
        for i in np.flatnonzero(results.status == SOUND).tolist():
            path = absolute(results.name(i))
            if "\n" in path or "\r" in path:
                unlisted += 1
            else:
                file.write(path + "\n")
    summary = summarize(results, dataset) | {"sound_but_not_listable": unlisted}
    summary["left_out"] = dict(left_out or {})
    summary["passed_over"] = [{"path": absolute(path), "reason": reason} for path, reason in sorted(passed_over)]
    if measured is not None and measured.intensity is not None:
        keys = ("intensity", "deep", "clipped", "levels", "levels_an_image")
        found = {key: getattr(measured, key) for key in keys} | {"intensity": list(measured.intensity)}
        summary["intensity"] = found | {"text": measured.describe()[0], "warnings": measured.warnings()}
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n", fsync=True)
    return summary


def absolute(name: str) -> str:
    """Return the absolute path of an image named by its path, and any other name unchanged."""
    if os.path.isabs(name):
        return name
    return os.path.abspath(name) if os.path.exists(name) or os.path.exists(name.split("!", 1)[0]) else name


def summarize(results: Results, dataset: str) -> dict[str, Any]:
    """Return counts and histograms; formats, modes and sizes refer to the sound images."""
    sound = results.status == SOUND
    kinds = np.bincount(results.kind[sound], minlength=len(results.kinds)).tolist()
    formats, modes, checkers, notes = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for (format, mode, by, note), count in zip(results.kinds, kinds, strict=True):
        if count:
            formats[format] += count
            modes[mode] += count
            checkers[by] += count if format == "JPEG" else 0
            notes[note] += count if note else 0
    sizes = results.sizes[sound]
    exact, counts = np.unique(sizes, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:TOP]
    folders = Counter(os.path.dirname(results.name(i)) or "." for i in results.reasons)
    return {
        "dataset": dataset,
        "images": len(results.status),
        "sound": int(sound.sum()),
        "bad": int((results.status == BAD).sum()),
        "reasons": _sorted(Counter(reason.split(":")[0] for reason in results.reasons.values())),
        "worst_folders": dict(list(_sorted(folders).items())[:TOP]),
        "formats": _sorted(formats),
        "modes": _sorted(modes),
        "pages": _sorted(+notes),
        "jpeg_checked_by": _sorted(+checkers),
        "short_side": _histogram(sizes.min(axis=1) if len(sizes) else np.empty(0)),
        "sizes": {f"{exact[k][0]}x{exact[k][1]}": int(counts[k]) for k in order.tolist()},
        "megapixels_mean": round(float(sizes.prod(axis=1, dtype=np.int64).mean() / 1e6), 3) if len(sizes) else 0.0,
    }


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _histogram(sides: np.ndarray) -> dict[str, int]:
    """Return the number of images by their shorter side in pixels."""
    places = np.bincount(np.searchsorted(SIDES, sides, side="right"), minlength=len(SIDES) + 1).tolist()
    names = [f"<{SIDES[0]}", *(f"{a}-{b - 1}" for a, b in zip(SIDES, SIDES[1:], strict=False)), f">={SIDES[-1]}"]
    return {name: count for name, count in zip(names, places, strict=True) if count}


def as_text(summary: dict[str, Any]) -> str:
    """Return the summary as readable text."""
    lines = [f"images: {summary['images']:,}, sound: {summary['sound']:,}, bad: {summary['bad']:,}"]
    if those := summary["passed_over"]:
        lines.append(f"skipped, so images in them were not checked: {len(those):,} folders or files")
        lines += [f"  {one['path']} ({one['reason']})" for one in those[:TOP]]
        lines += [f"  and {len(those) - TOP:,} more, see summary.json"] if len(those) > TOP else []
    for title, key in (("reasons", "reasons"), ("bad images by folder", "worst_folders"), ("formats", "formats"),
                       ("modes", "modes"), ("pages", "pages"),
                       ("left out, not images by their names", "left_out")):  # fmt: skip
        if summary[key]:
            lines.append(f"{title}: " + ", ".join(f"{name} {count:,}" for name, count in summary[key].items()))
    if "intensity" in summary:
        lines += [summary["intensity"]["text"], *(f"warning: {text}" for text in summary["intensity"]["warnings"])]
    if summary["short_side"]:
        lines.append("shorter side, pixels:")
        most = max(summary["short_side"].values())
        for name, count in summary["short_side"].items():
            lines.append(f"  {name:>10} {count:>10,} {'#' * -(-40 * count // most)}")
        lines.append("most frequent sizes: " + ", ".join(f"{s} ({n:,})" for s, n in list(summary["sizes"].items())[:5]))
    if summary["jpeg_checked_by"].get("pillow"):
        lines.append(
            f"JPEG was checked with Pillow, which misses much silent damage: {install('simplejpeg')}, run again"
        )
    return "\n".join(lines)
