"""Train ``configs/small.yaml`` on small datasets; compare kNN before and after training, and on raw pixels.

``python -m benchmarks.small --write`` uses the quickstart's tiles of photographs, generated textures
(``tests/data/textures.py``) and, if Debian's package ``dataset-fashion-mnist`` is installed, 3,000 of its images;
``--folder NAME=PATH`` adds your own data, one folder per class. The same command resumes an interrupted benchmark: runs
with a ``result.json`` are not repeated. Writes results/small.md. Needs the extra ``quickstart``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks.machine import add_write_option, core_seconds, describe, finish, table
from dinov2_custom.configs.load import load_run_config
from dinov2_custom.data.datasets import LabelledFolder
from dinov2_custom.data.transforms import make_classification_eval_transform
from dinov2_custom.eval.knn import eval_knn_features
from dinov2_custom.eval.utils import extract_features
from dinov2_custom.plots import dino_loss, read_metrics
from dinov2_custom.quickstart.measure import describe_collapse
from dinov2_custom.quickstart.photos import cut_photos
from dinov2_custom.train.health import rankme
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from dinov2_custom.utils.run_folder import find_weights
from dinov2_custom.utils.weights import read_weights
from tests.data.textures import make_textures

ROOT = Path(__file__).parents[1]
NEIGHBOURS = 5
PIXELS = 32  # side in pixels of the thumbnails used as raw-pixel features
GAIN = 0.10
FASHION = Path("/usr/share/datasets/fashion-mnist")
FASHION_PER_CLASS = 300


class LabelledSet(NamedTuple):
    """Image folders, one folder per class: ``train`` for training; ``held_out``, if any, for classification."""

    name: str
    train: Path
    seeds: list[int]
    held_out: Path | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", default=str(ROOT / "configs" / "small.yaml"))
    parser.add_argument("--work", type=Path, default=Path("outputs/small"), help="runs and generated images")
    parser.add_argument("--folder", action="append", default=[], metavar="NAME=PATH", help="with every seed")
    parser.add_argument("--other", action="append", default=[], metavar="NAME=PATH", help="with the first seed alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add_write_option(parser)
    args, overrides = parser.parse_known_args()
    rows = []
    for one in labelled_sets(args):
        plain, centred = pixel_accuracies(one)
        for seed in one.seeds:
            result = measured(one, args.work.absolute() / f"{one.name}_{seed}", seed, args.config_file, overrides)
            rows.append(row(one.name, seed, plain, centred, result))
            print(*rows[-1], flush=True)
    header = ["images", "seed", "pixels", "centred", "untrained", "trained", "gain", "RankMe before", "after"]
    header += ["entropies: of an image", "of all", "ln K", "CPU minutes", "minutes", "reached"]
    page = (
        "# configs/small.yaml on small sets\n\n"
        f"{describe('benchmarks.small')}\n"
        f"Accuracy of k = {NEIGHBOURS} nearest neighbours by cosine, leave one out; the tiles of photographs that were "
        "held out are classified by those that were trained on. *pixels*: the image reduced to "
        f"{PIXELS} x {PIXELS}, *centred*: without the mean image. *reached*: {GAIN} above the untrained network, "
        "above the pixels, and no collapse. Entropies in nats, at the last iteration. *CPU minutes* are those of "
        "the training command; *minutes* also depend on what else the machine did.\n\n"
        f"{table(header, rows)}"
    )
    finish(page, "small", args.write)


def labelled_sets(args: argparse.Namespace) -> list[LabelledSet]:
    """Create missing datasets; return all of them, those trained with every seed first."""
    tiles, textures, fashion = (args.work.absolute() / name for name in ("tiles", "textures", "fashion_mnist"))
    cut_photos(tiles)
    if not textures.exists():
        make_textures(textures)
    given = [LabelledSet(name, Path(path), args.seeds) for name, _, path in (f.partition("=") for f in args.folder)]
    given.append(LabelledSet("tiles of photographs", tiles / "train", args.seeds, tiles / "held_out"))
    given.append(LabelledSet("textures", textures, args.seeds))
    once = args.seeds[:1]
    given += [LabelledSet(name, Path(path), once) for name, _, path in (f.partition("=") for f in args.other)]
    if FASHION.exists():
        if not fashion.exists():
            unpack_fashion(fashion)
        given.append(LabelledSet("fashion-mnist", fashion, once))
    return given


def unpack_fashion(folder: Path) -> None:
    """Write the first ``FASHION_PER_CLASS`` training images of each class of Fashion-MNIST as PNG."""
    with gzip.open(FASHION / "train-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(FASHION / "train-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
        for index in np.flatnonzero(labels == label)[:FASHION_PER_CLASS]:
            Image.fromarray(images[index]).save(folder / str(label) / f"{index:05d}.png")


def measured(one: LabelledSet, run: Path, seed: int, config_file: str, overrides: list[str]) -> dict:
    """Return the run's figures, from ``result.json`` if it exists, else after training."""
    done = run / "result.json"
    if done.is_file():
        return json.loads(done.read_text())
    options = [f"train.dataset_path={one.train}", f"train.seed={seed}", *overrides]
    command = [sys.executable, "run/train/train.py", "--config-file", config_file, "--output-dir", str(run), *options]
    started, before = time.monotonic(), core_seconds()
    subprocess.run(command, check=True, cwd=ROOT)
    seconds = {"core_seconds": core_seconds() - before, "seconds": time.monotonic() - started}
    result = {**seconds, **measure(one, run)}
    done.write_text(json.dumps(result, indent=1))
    return result


def measure(one: LabelledSet, run: Path) -> dict:
    """Compare the run's network before training and its newest teacher, at the size of a global crop."""
    cfg = load_run_config(str(run / "config.yaml"))
    untrained, trained = SSLMetaArch(cfg), SSLMetaArch(cfg)
    trained.teacher.load_state_dict(read_weights(find_weights(str(run)))["teacher"])
    last = read_metrics(run / "training_metrics.json")[-1]
    entropies = {name: last[name] for name in ("teacher_entropy", "prototype_entropy")}
    result = {**entropies, "num_prototypes": cfg.dino.head_n_prototypes}
    result["collapse"] = describe_collapse(dino_loss(last), **result)
    size = cfg.crops.global_crops_size
    transform = make_classification_eval_transform(
        resize_size=size * 256 // 224, crop_size=size, **cfg.data.normalize
    )  # as in run/embed.py
    for name, model in (("untrained", untrained), ("trained", trained)):
        backbone = model.teacher["backbone"].eval()
        result[name], result[f"rankme_{name}"] = accuracy_and_rank(backbone, one, transform)
    return result


def pixel_accuracies(one: LabelledSet) -> list[float]:
    """Return the accuracies of plain pixels in 0..1 and of pixels without the mean image."""

    def reduced(image: Image.Image) -> Tensor:
        small = image.convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.BOX)
        return torch.from_numpy(np.array(small)).flatten() / 255

    return [accuracy_and_rank(nn.Identity(), one, reduced, centred)[0] for centred in (False, True)]


def accuracy_and_rank(model: nn.Module, one: LabelledSet, transform, centred: bool = False) -> tuple[float, float]:
    """Return the kNN accuracy of ``model``'s features, and the RankMe of the training features.

    Computed in float64, as an untrained network's features are nearly the same for all images.
    """
    folders = [folder for folder in (one.train, one.held_out) if folder]
    found = [extract_features(model, LabelledFolder(str(f), transform=transform), 64, 0) for f in folders]
    mean = found[0][0].double().mean(0) if centred else 0
    scaled = [(F.normalize(features.double() - mean, dim=1), labels) for features, labels in found]
    # without a held-out set, each image is classified by all others
    own = None if one.held_out else torch.arange(len(found[0][0]))
    (scores,) = eval_knn_features(*scaled[0], *scaled[-1], nb_knn=[NEIGHBOURS], exclude=own).values()
    return float(scores["top-1"]), rankme(found[0][0])


def row(name: str, seed: int, plain: float, centred: float, result: dict) -> list[object]:
    """Return one line of the table."""
    gain = result["trained"] - result["untrained"]
    reached = gain >= GAIN and result["trained"] > plain and not result["collapse"]
    accuracies = (plain, centred, result["untrained"], result["trained"])
    return [
        name,
        seed,
        *(f"{value:.3f}" for value in accuracies),
        f"{gain:+.3f}",
        *(f"{result[key]:.1f}" for key in ("rankme_untrained", "rankme_trained")),
        *(f"{result[key]:.2f}" for key in ("teacher_entropy", "prototype_entropy")),
        f"{np.log(result['num_prototypes']):.2f}",
        *(f"{result[key] / 60:.1f}" for key in ("core_seconds", "seconds")),
        "yes" if reached else result["collapse"] or "no",
    ]


if __name__ == "__main__":
    main()
