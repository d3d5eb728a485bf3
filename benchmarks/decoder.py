"""Does pretraining pay? A detector from a backbone of our own run against one from random weights.

    python benchmarks/decoder.py --seeds 0,1,2 --output-dir outputs/decoder

Scenes of textured shapes that overlap (112 pixels) are generated: --unlabelled ones for pretraining a small ViT with
run/train/train.py, --labelled ones for the detectors, and 200 for validation. Prints a line for each
seed, and the mean and spread of the gain.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from dinov2_custom.utils.rng import seed_for

REPOSITORY = Path(__file__).resolve().parents[1]
SIDE, CLASSES = 112, ("disc", "square", "diamond")
VALIDATION = 200


def scene(generator: np.random.Generator) -> tuple[np.ndarray, list[tuple[int, list[int]]]]:
    """Return the pixels (SIDE, SIDE, 3) and (class, box) of each shape; later shapes cover earlier ones."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    pixels = texture(generator, rows, columns)
    found = []
    for _ in range(generator.integers(2, 6)):
        side, kind = int(generator.integers(18, 44)), int(generator.integers(len(CLASSES)))
        x, y = (int(v) for v in generator.integers(0, SIDE - side, 2))
        across, down = (np.abs(v + 0.5 - start - side / 2) for v, start in ((columns, x), (rows, y)))
        inside = (across**2 + down**2 < side**2 / 4, np.maximum(across, down) < side / 2, across + down < side / 2)
        pixels = np.where(inside[kind][..., None], texture(generator, rows, columns), pixels)
        found.append((kind, [x, y, side, side]))
    return (pixels + generator.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8), found


def texture(generator: np.random.Generator, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return stripes of two colours, random in direction and width."""
    angle, period = generator.uniform(0, np.pi), generator.uniform(4, 16)
    wave = np.sin((rows * np.sin(angle) + columns * np.cos(angle)) * 2 * np.pi / period)[..., None]
    first, second = generator.uniform(20, 235, (2, 3))
    return (first + second) / 2 + wave * (first - second) / 2


def write_scenes(folder: Path, count: int, seed: int) -> Path:
    """Write ``count`` scenes and their COCO JSON; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed_for(seed, "scenes", folder.name))
    images, annotations = [], []
    for number in range(count):
        pixels, found = scene(generator)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": SIDE, "height": SIDE})
        for kind, box in found:
            one = {"id": len(annotations) + 1, "image_id": number, "category_id": kind + 1, "bbox": box}
            annotations.append(one | {"area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)]
    path = folder / "labels.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def run(*words: object) -> None:
    subprocess.run([sys.executable, *map(str, words)], cwd=REPOSITORY, check=True, stdout=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0])
    parser.add_argument("--unlabelled", type=int, default=4000)
    parser.add_argument("--labelled", type=int, default=100)
    parser.add_argument("--pretrain-epochs", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=50, help="of the detectors")
    parser.add_argument("--config-file", default="configs/small.yaml", help="recipe of pretraining")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/decoder"))
    args = parser.parse_args()
    gains = []
    for seed in args.seeds:
        out = args.output_dir.absolute() / f"seed{seed}"
        write_scenes(out / "unlabelled", args.unlabelled, seed)
        train = write_scenes(out / "labelled", args.labelled, seed)
        val = write_scenes(out / "validation", VALIDATION, seed)
        flags = ["--config-file", args.config_file, "--output-dir", out / "pretrained", "--cpu"]
        keys = [
            f"train.dataset_path={out / 'unlabelled'}",
            f"train.seed={seed}",
            f"optim.epochs={args.pretrain_epochs}",
        ]
        run("run/train/train.py", *flags, *keys)
        flags = ["--backbone", out / "pretrained", "--task", "detection", "--train", train, "--val", val, "--cpu"]
        keys = [f"seed={seed}", f"epochs={args.epochs}", "batch=16", "lr=1e-3", "width=64", "queries=20", "groups=3"]
        keys += [f"image_size={SIDE}", "num_workers=0"]
        run("run/decoder/train.py", *flags, "--output-dir", out / "detector", "--compare-to", "random", *keys)
        report = json.loads((out / "detector" / "comparison.json").read_text())
        print(f"seed {seed}: {report['sentence']}", flush=True)
        gains.append(report["difference"])
    print(f"gain in AP50: mean {np.mean(gains):+.3f}, from {min(gains):+.3f} to {max(gains):+.3f}, {len(gains)} seeds")


if __name__ == "__main__":
    main()
