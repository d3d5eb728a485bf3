"""Train a good, an exploding, a collapsed and a worsening run on photographs, for the pictures of docs/learning.md.

The photographs are tiles that scikit-image ships, the recipe is ``configs/quickstart.yaml``, shortened, with kNN on
held-out tiles by ``evaluation.online``.
``python -m benchmarks.four_runs`` writes docs/images/learning_<kind>.png. Needs the extra ``quickstart``.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

from PIL import Image

from dinov2_custom.cli import train_parser
from dinov2_custom.plots.history import PANELS, draw_history
from dinov2_custom.plots.metrics_file import read_run
from dinov2_custom.quickstart.photos import Tiling, cut_photos
from dinov2_custom.train.train import main as train
from dinov2_custom.utils.run_folder import find_weights

ROOT = Path(__file__).parents[1]
COMMON = ["crops.local_crops_number=2", "train.batch_size_per_gpu=16", "optim.epochs=1.6", "optim.base_lr=0.012"]
COMMON += ["evaluation.online.every=20", "evaluation.online.images=256"]
KINDS = {
    "good": [],
    "exploding": ["optim.base_lr=0.36"],
    "collapsed": ["dino.head_n_prototypes=1024", "teacher.warmup_teacher_temp=0.5", "teacher.teacher_temp=0.5"],
    "worse": ["student.pretrained_weights={good}", "optim.base_lr=0.12", "optim.epochs=1.2"],
}
BY_TITLE = {panel.title: panel for panel in PANELS}
SHOWN = [
    BY_TITLE[title]
    for title in (
        "Total loss",
        "kNN accuracy",
        "RankMe of the evaluation",
        "Similarity to the start",
        "Teacher's assignments",
        "Gradient norm before clipping",
    )
]


def main() -> None:
    """Train and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", default="", help="keeps runs; finished ones are not trained again")
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    args = parser.parse_args()
    work = Path(args.work_dir or tempfile.mkdtemp())
    cut_photos(work / "tiles", Tiling(train=40, held_out=15))
    for kind in args.kinds:
        out = work / kind
        opts = [f"train.dataset_path={work / 'tiles' / 'train'}", *COMMON]
        for key, part in (("knn_train", "train"), ("knn_val", "held_out")):
            opts.append(f"evaluation.online.{key}=LabelledFolder:root={work / 'tiles' / part}")
        opts += [opt.format(good=find_weights(str(work / "good"))) if "{" in opt else opt for opt in KINDS[kind]]
        recipe = str(ROOT / "configs/quickstart.yaml")
        code = train(train_parser().parse_args(["--config-file", recipe, "--output-dir", str(out), *opts]))
        if code:
            raise SystemExit(code)
        draw(out, ROOT / "docs/images" / f"learning_{kind}.png")


def draw(run: Path, path: Path) -> None:
    """Save the panels of ``SHOWN`` with few colours, which keeps the file small."""
    figure = draw_history([read_run(run, run.name)], SHOWN)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    Image.open(buffer).convert("RGB").quantize(64).save(path, optimize=True)
    print(path)


if __name__ == "__main__":
    main()
