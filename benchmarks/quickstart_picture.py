"""Draw docs/images/quickstart.webp from a finished quickstart: the nearest neighbours of held-out tiles.

Only of the photographs that scikit-image documents as in the public domain, or under CC0, so that the picture may be
part of this repository. ``python -m benchmarks.quickstart_picture outputs/quickstart`` after ``make quickstart``.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from PIL import Image

from dinov2_custom.plots.metrics_file import METRICS_FILE, read_metrics
from dinov2_custom.quickstart.measure import measure_run
from dinov2_custom.quickstart.pictures import draw_neighbours, find_neighbours

ROOT = Path(__file__).parents[1]
FREE = (
    "astronaut",
    "brick",
    "camera",
    "cat",
    "coffee",
    "galaxies",
    "grass",
    "gravel",
    "handwriting",
    "retina",
    "rocket",
)
WIDTH = 1200


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("quickstart", type=Path, help="output directory of a quickstart with seed 0")
    args = parser.parse_args()
    run = args.quickstart / "seed_0"
    with tempfile.TemporaryDirectory() as folder:
        for part in ("train", "held_out"):
            for name in FREE:
                shutil.copytree(args.quickstart / "tiles" / part / name, Path(folder, part, name))
        measured = measure_run(run, Path(folder), read_metrics(run / METRICS_FILE)[-1])
        found = find_neighbours(measured.networks, measured.train, measured.held_out)
        with Image.open(draw_neighbours(found, Path(folder, "neighbours.png"))) as image:
            small = image.convert("RGB").resize(
                (WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.LANCZOS
            )
            small.save(ROOT / "docs/images/quickstart.webp", quality=80, method=6)


if __name__ == "__main__":
    main()
