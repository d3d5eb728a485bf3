"""Evaluations in two real processes (gloo) give the results of one process, and only the first writes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.eval.test_setup import make_run
from tests.processes import launch


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run's weights, and images of 3 overlapping classes; 27 and 21 are not divisible by 2 processes."""
    folder = tmp_path_factory.mktemp("two_processes")
    _, _, weights = make_run(folder / "run", "student.layerscale=1.0")
    overlapping_classes(folder / "train", count=9, seed=0)
    overlapping_classes(folder / "val", count=7, seed=1)
    return folder, ["--pretrained-weights", str(weights), *datasets(folder)]


def overlapping_classes(root, count, seed):
    generator = np.random.default_rng(seed)
    for index, name in enumerate("abc"):
        (root / name).mkdir(parents=True)
        for i in range(count):
            level = generator.normal(90 + 40 * index, 25)
            pixels = generator.normal(level, 20, (16, 16, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")


def datasets(folder):
    return [f"--{part}-dataset=LabelledFolder:root={folder}/{part}" for part in ("train", "val")]


def test_knn(run):
    folder, data = run
    small = ["--num-workers=0", "--resize-size=16", "--crop-size=16", "--batch-size=4", "--nb_knn", "1", "3"]
    limited = ["--n-per-class-list", "-1", "2", "--n-tries", "2"]
    launch(1, "run/eval/knn.py", *data, "--output-dir", str(folder / "knn1"), *small, *limited)
    launch(2, "run/eval/knn.py", *data, "--output-dir", str(folder / "knn2"), *small, *limited)
    results = [(folder / f"knn{n}" / "results_eval_knn.json").read_text().splitlines() for n in (1, 2)]
    assert results[0] == results[1]
    assert len(results[0]) == 8 and 40 < json.loads(results[0][0])["('full', 1) Top 1"] < 100
    assert (folder / "knn2" / "logs" / "log.txt.rank1").is_file()


def test_linear(run):
    """Two processes with 3 images per step equal one with 6: the same draws, rates and steps."""
    folder, data = run
    small = ["--num-workers=0", "--resize-size=16", "--crop-size=16", "--epochs=2", "--epoch-length=5"]
    small += ["--learning-rates", "0.1", "1.0"]
    launch(1, "run/eval/linear.py", *data, "--output-dir", str(folder / "linear1"), *small, "--batch-size=6")
    launch(2, "run/eval/linear.py", *data, "--output-dir", str(folder / "linear2"), *small, "--batch-size=3")
    results = [(folder / f"linear{n}" / "results_eval_linear.json").read_text() for n in (1, 2)]
    assert results[0] == results[1] and "best_classifier" in results[0]
    models = [torch.load(folder / f"linear{n}" / "model_final.pth", weights_only=True)["model"] for n in (1, 2)]
    for name, tensor in models[0].items():
        torch.testing.assert_close(models[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_log_regression(run):
    folder, data = run
    small = ["--num-workers=0", "--resize-size=16", "--crop-size=16", "--max-train-iters=30"]
    launch(1, "run/eval/log_regression.py", *data, "--output-dir", str(folder / "lr1"), *small)
    launch(2, "run/eval/log_regression.py", *data, "--output-dir", str(folder / "lr2"), *small)
    results = [(folder / f"lr{n}" / "results_eval_log_regression.json").read_text() for n in (1, 2)]
    assert results[0] == results[1] and len(results[0].splitlines()) == 3
