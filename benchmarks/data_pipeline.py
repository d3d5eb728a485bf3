"""Measure images/s of one core, from a file's bytes to a batch, for upstream's pipeline and ours.

Medians of CPU time; configurations alternate within one process, so ratios are stable even if absolute times drift.
``python -m benchmarks.data_pipeline [--write]``.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from PIL import Image

from benchmarks import machine, photographs, upstream_pipeline
from dinov2_custom.data import decode, pixels
from dinov2_custom.data.augmentations import DataAugmentationDINO
from dinov2_custom.data.datasets import ExtendedVisionDataset
from dinov2_custom.data.finish import Finisher
from dinov2_custom.data.masking import MaskingGenerator, Masks
from dinov2_custom.data.pool import allocate
from dinov2_custom.data.samples import TrainBatches, TrainSamples, unpack

UPSTREAM = "upstream"
TARGETS = {
    "all on the CPU": (8.5, 6.5, 8.0, 4.5),
    "colour on the device": (12.0, 8.0, 7.0, 5.0),
    "pure Pillow + torch": (3.3, 3.3, 6.5, 2.5),
}
NOTES = """
ms: CPU milliseconds an image on one core; x: times upstream's speed, the median over the rounds. Both sides decode,
cut 2 x 224 and 8 x 96 crops, jitter, blur and sample masks. Upstream ends with a normalised half-precision batch, ours
with uint8 crops in the slot that the device reads; "+ normalised" adds the float batch made on the CPU, which training
on a GPU does not. "Colour on the device" leaves jitter, grey, blur and solarize to the device, with the same pixels.
"Pure Pillow + torch" is without the extra `fast`: neither simplejpeg nor OpenCV. "DCT scaling" is
`data.dct_scaling: true`. The last table is the mask sampler alone.
"""


class InMemory(ExtendedVisionDataset):
    """A dataset of image files in memory."""

    def __init__(self, files: list[bytes]):
        super().__init__()
        self.files = files

    def get_image_data(self, index: int) -> bytes:
        return self.files[index]

    def __len__(self) -> int:
        return len(self.files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only sizes whose name contains this")
    parser.add_argument("--rounds", type=int, default=9)
    machine.add_write_option(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    upstream = upstream_pipeline.load()
    page = "# Data pipeline, one core\n\n" + machine.describe("benchmarks.data_pipeline", upstream.versions) + NOTES
    for place, (name, (*size, kind, number)) in enumerate(photographs.SIZES.items()):
        if args.only in name:
            files = photographs.encoded(*size, kind, number)
            bits = 8 * sum(map(len, files)) / len(files) / size[0] / size[1]
            page += f"\n## {name} ({number} images, {bits:.1f} bits a pixel, {args.rounds} rounds)\n\n"
            page += _table(_measure(_configurations(files, kind, upstream), args.rounds, number), place)
    page += _masks(upstream, args.rounds)
    machine.finish(page, "data_pipeline", args.write)


def _masks(upstream, rounds: int) -> str:
    """Time the mask sampler alone: 640 masks of 16 x 16 patches per round, 10 to 50 % of them masked."""
    sizes = [26 + i % 103 for i in range(640)]

    def sample(masks: Callable[[int], object], n: int) -> None:
        upstream_pipeline.seed(n)
        for size in sizes:
            masks(size)

    generators = {UPSTREAM: upstream.masks, "ours, the same masks": MaskingGenerator((16, 16), max_num_patches=128)}
    functions = {name: partial(sample, masks) for name, masks in generators.items()}
    times = _measure(functions, 3 * rounds, len(sizes))
    rows = []
    for name, found in times.items():
        ratio = statistics.median(a / b for a, b in zip(times[UPSTREAM], found, strict=True))
        rows.append([name, f"{1e3 * statistics.median(found):.1f}", f"{ratio:.2f}"])
    return "\n## One mask of 16 x 16 patches\n\n" + machine.table(["sampler", "us", "x"], rows)


def _configurations(files: list[bytes], kind: str, upstream) -> dict[str, Callable[[int], object]]:
    """Return the functions to time, each called with the round's number."""
    found: dict[str, Callable[[int], object]] = {UPSTREAM: lambda n: _run_upstream(files, upstream, n)}
    for scaling in (False, True) if kind == "JPEG" else (False,):
        more = ", DCT scaling" if scaling else ""
        found[f"all on the CPU{more}"] = _ours(files, scaling=scaling)
        found[f"colour on the device{more}"] = _ours(files, scaling=scaling, late=True)
        found[f"pure Pillow + torch{more}"] = _ours(files, scaling=scaling, pillow=True)
    found["all on the CPU + normalised"] = _ours(files, normalised=True)
    if kind == "JPEG":
        scratch = decode.Scratch()
        found["bare decode (simplejpeg)"] = lambda n: [decode.decode_array(file, scratch=scratch) for file in files]
    found["bare decode (Pillow)"] = lambda n: [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    return found


def _run_upstream(files: list[bytes], upstream, n: int) -> object:
    upstream_pipeline.seed(n)
    samples = [(upstream.augment(Image.open(io.BytesIO(file)).convert("RGB")), ()) for file in files]
    return upstream.collate(samples)


def _ours(files: list[bytes], *, scaling=False, late=False, pillow=False, normalised=False) -> Callable[[int], object]:
    augment = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 8)
    samples = TrainSamples(InMemory(files), augment, seed=0, dct_scaling=scaling)
    masks = Masks((0.1, 0.5), 0.5, 256, MaskingGenerator((16, 16), max_num_patches=128))
    batches = TrainBatches(samples, masks, batch_size=len(files), late_colours=late)
    arrays, finish = allocate(batches.fields), Finisher(augment.mean, augment.std)
    real = decode.find_simplejpeg, pixels.opencv

    def run(n: int) -> object:
        if pillow:
            decode.find_simplejpeg = pixels.opencv = lambda: None
        try:
            report = batches.build(n, arrays)
        finally:
            decode.find_simplejpeg, pixels.opencv = real
        return unpack(arrays, report.upperbound, finish, "cpu") if normalised else report

    return run


def _measure(functions: dict[str, Callable[[int], object]], rounds: int, images: int) -> dict[str, list[float]]:
    """Return CPU milliseconds per image, one value per round, alternating functions; round 0 is a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for n in range(rounds + 1):
        for name, function in functions.items():
            start = time.process_time()
            function(n)
            if n:
                times[name].append((time.process_time() - start) * 1e3 / images)
    return times


def _table(times: dict[str, list[float]], place: int) -> str:
    rows = []
    for name, found in times.items():
        ratio = statistics.median(a / b for a, b in zip(times[UPSTREAM], found, strict=True))
        target = next((goals[place] for start, goals in TARGETS.items() if name == start), None)
        ms = statistics.median(found)
        wanted = "" if target is None else f">= {target:g}"
        rows.append([name, f"{ms:.2f}", f"{1000 / ms:.0f}", f"{ratio:.2f}", wanted])
    return machine.table(["configuration", "ms", "images/s", "x", "wanted"], rows)


if __name__ == "__main__":
    main()
