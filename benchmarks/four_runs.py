"""Train a good, an exploding, a collapsed and a worsening run on photographs, for the pictures of docs/learning.md.

The photographs are tiles that scikit-image ships, the recipe is ``configs/quickstart.yaml``, shortened. Teachers saved
during the runs are evaluated afterwards, and the values added to the rows under the names of the online evaluation.
``python -m benchmarks.four_runs`` writes docs/images/learning_<kind>.png. Needs the extra ``quickstart``.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from pathlib import Path

import torch
from PIL import Image

from dinov2_custom import distributed
from dinov2_custom.cli import train_parser
from dinov2_custom.configs.load import load_run_config
from dinov2_custom.data.transforms import Normalize
from dinov2_custom.eval.knn import eval_knn_features
from dinov2_custom.eval.neighbours import NEIGHBOURS, knn_accuracy
from dinov2_custom.eval.setup import get_autocast_dtype
from dinov2_custom.eval.utils import ModelWithNormalize, extract_features
from dinov2_custom.plots.history import PANELS, draw_history
from dinov2_custom.plots.metrics_file import METRICS_FILE, read_metrics, read_run
from dinov2_custom.quickstart.measure import BATCH_SIZE, load_tiles
from dinov2_custom.quickstart.photos import Tiling, cut_photos
from dinov2_custom.train.health import rankme
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from dinov2_custom.train.train import main as train
from dinov2_custom.utils.run_folder import find_weights
from dinov2_custom.utils.weights import read_weights

ROOT = Path(__file__).parents[1]
EVERY = 20
COMMON = ["crops.local_crops_number=2", "train.batch_size_per_gpu=16", "optim.epochs=1.6", "optim.base_lr=0.012"]
COMMON += [f"evaluation.eval_period_iterations={EVERY}"]
KINDS = {
    "good": [],
    "exploding": ["optim.base_lr=0.36"],
    "collapsed": ["dino.head_n_prototypes=1024", "teacher.warmup_teacher_temp=0.5", "teacher.teacher_temp=0.5"],
    "worse": ["student.pretrained_weights={good}", "optim.base_lr=0.12", "optim.epochs=1.2"],
}
SHOWN = ("Total loss", "Teacher's assignments", "Gradient norm before clipping")
SHOWN += ("kNN accuracy", "RankMe, held-out images", "Similarity to the start")


def main() -> None:
    """Train, evaluate and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", default="", help="keeps runs; finished ones are not trained again")
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    args = parser.parse_args()
    work = Path(args.work_dir or tempfile.mkdtemp())
    cut_photos(work / "tiles", Tiling(train=40, held_out=15))
    for kind in args.kinds:
        out = work / kind
        opts = [f"train.dataset_path={work / 'tiles' / 'train'}", *COMMON]
        opts += [opt.format(good=find_weights(str(work / "good"))) if "{" in opt else opt for opt in KINDS[kind]]
        recipe = str(ROOT / "configs/quickstart.yaml")
        code = train(train_parser().parse_args(["--config-file", recipe, "--output-dir", str(out), *opts]))
        if code:
            raise SystemExit(code)
        add_evaluations(out, work / "tiles")
        draw(out, ROOT / "docs/images" / f"learning_{kind}.png")


@torch.inference_mode()
def add_evaluations(run: Path, tiles: Path) -> None:
    """Add ``eval_*`` of each saved teacher to the row of its iteration, and the values of the start and the pixels."""
    cfg = load_run_config(str(run / "config.yaml"))
    datasets = load_tiles(tiles, Normalize(**cfg.data.normalize))
    model = SSLMetaArch(cfg).to(distributed.get_device()).eval()
    backbone, dtype = model.teacher["backbone"], get_autocast_dtype(cfg, distributed.get_device())
    if cfg.student.pretrained_weights:
        model.teacher.load_state_dict(read_weights(cfg.student.pretrained_weights)["teacher"], strict=True)

    def evaluate() -> tuple[float, float, torch.Tensor]:
        normalized = ModelWithNormalize(backbone, dtype)
        features = [part for dataset in datasets for part in extract_features(normalized, dataset, BATCH_SIZE, 0)]
        (scores,) = eval_knn_features(*features, nb_knn=[NEIGHBOURS]).values()
        return float(scores["top-1"]), rankme(features[2].float()), features[2].float()

    start_knn, start_rankme, start = evaluate()
    constants = {"start_knn": start_knn, "start_rankme": start_rankme}
    pixels = ModelWithNormalize(torch.nn.Flatten(), dtype)
    constants["pixels_knn"] = knn_accuracy(pixels, *datasets, BATCH_SIZE, 0)
    rows = {row["iteration"]: row for row in read_metrics(run / METRICS_FILE)}
    for checkpoint in run.glob("eval/training_*/teacher_checkpoint.pth"):
        iteration = int(checkpoint.parent.name.split("_")[1])
        model.teacher.load_state_dict(read_weights(checkpoint)["teacher"], strict=True)
        accuracy, rank, features = evaluate()
        cosine = float(torch.nn.functional.cosine_similarity(features, start).mean())
        values = {"eval_knn": accuracy, "eval_rankme": rank, "eval_cosine_to_start": cosine}
        row = rows.setdefault(iteration, {"iteration": iteration})
        row |= values | constants
    (run / METRICS_FILE).write_text("".join(json.dumps(rows[key]) + "\n" for key in sorted(rows)))


def draw(run: Path, path: Path) -> None:
    """Save the panels of ``SHOWN`` with few colours, which keeps the file small."""
    figure = draw_history([read_run(run, run.name)], [panel for panel in PANELS if panel.title in SHOWN])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    Image.open(buffer).convert("RGB").quantize(64).save(path, optimize=True)
    print(path)


if __name__ == "__main__":
    main()
