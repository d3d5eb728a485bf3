"""Upstream's documented workflow, command by command, with only the paths changed, on a tiny ImageNet.

Prepare the dataset, train, evaluate the teacher by kNN, logistic regression and linear classifiers, evaluate a released
backbone by its URL, load it with torch.hub. Overrides at the end of the training command make the network small.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_custom.hub import backbones
from tests import processes
from tests.hub.served import serve
from tests.test_alias import site  # noqa: F401 - a fixture

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = (
    "student.arch=vit_nano student.patch_size=8 student.block_chunks=0 student.layerscale=1.0 "
    "crops.global_crops_size=32 crops.local_crops_size=16 crops.local_crops_number=2 dino.head_n_prototypes=64 "
    "train.batch_size_per_gpu=8 train.num_workers=1 train.OFFICIAL_EPOCH_LENGTH=5 optim.epochs=1 "
    "optim.warmup_epochs=0 optim.freeze_last_layer_epochs=0 teacher.warmup_teacher_temp_epochs=1"
).split()
SMALL_IMAGES = ["--resize-size", "32", "--crop-size", "32"]
PREPARE = """
import sys
from dinov2.data.datasets import ImageNet
for split in (ImageNet.Split.TRAIN, ImageNet.Split.VAL):
    dataset = ImageNet(split=split, root=sys.argv[1], extra=sys.argv[2])
    dataset.dump_extra()
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home directory, where downloads go."""
    return tmp_path_factory.mktemp("home")


def run(home, *command, expected=0):
    environment = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HOME": str(home)}
    done = processes.run(*map(str, command), environment=environment)
    assert done.returncode == expected, done.stdout + done.stderr
    return done


def write_imagenet(root):
    """Upstream's layout with three classes of different brightness: 12 training and 4 validation images each."""
    generator = np.random.default_rng(0)
    number = 0
    for index, wnid in enumerate(("n01440764", "n01443537", "n01484850")):
        for split, count in (("train", 12), ("val", 4)):
            (root / split / wnid).mkdir(parents=True)
            for i in range(count):
                number += 1
                level = generator.normal(60 + 65 * index, 15, (1, 1, 3))
                pixels = generator.normal(level, 20, (40, 36, 3)).clip(0, 255).astype(np.uint8)
                name = f"{wnid}_{i}" if split == "train" else f"ILSVRC2012_val_{number:08d}"
                Image.fromarray(pixels).save(root / split / wnid / f"{name}.JPEG")
    (root / "labels.txt").write_text("n01440764,tench\nn01443537,goldfish\nn01484850,great white shark\n")


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """(folder, dataset strings of both splits with their tables), prepared as upstream's README does."""
    folder = tmp_path_factory.mktemp("imagenet")
    write_imagenet(folder / "root")
    return folder, [f"ImageNet:split={split}:root={folder}/root:extra={folder}/extra" for split in ("TRAIN", "VAL")]


def test_prepare(imagenet, site):  # noqa: F811
    folder, _ = imagenet
    command = [sys.executable, "-B", "-c", PREPARE, str(folder / "root"), str(folder / "extra")]
    environment = {"PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=site, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    made = sorted(path.name for path in (folder / "extra").iterdir())
    kinds = ("class-ids", "class-names", "entries")
    assert made == [f"{kind}-{split}.npy" for kind in kinds for split in ("TRAIN", "VAL")]
    assert np.load(folder / "extra" / "class-names-VAL.npy").tolist() == ["tench", "goldfish", "great white shark"]


@pytest.fixture(scope="module")
def trained(imagenet, home):
    """The run directory of upstream's training command. A flag after the overrides is accepted too."""
    folder, (train, _) = imagenet
    command = ["run/train/train.py", "--config-file", "dinov2_custom/configs/train/vitl16_short.yaml"]
    done = run(home, *command, f"train.dataset_path={train}", *TINY, "--output-dir", folder / "out", "--eval", "unused")
    assert "--eval is accepted for compatibility with upstream and ignored" in done.stderr
    return folder / "out"


def test_train_leaves_upstreams_files(trained):
    teacher = torch.load(trained / "eval" / "training_4" / "teacher_checkpoint.pth", weights_only=True)["teacher"]
    assert {name.split(".")[0] for name in teacher} == {"backbone", "dino_head"}
    for name in ("config.yaml", "logs/log.txt", "last_checkpoint"):
        assert (trained / name).is_file()
    assert (trained / "last_checkpoint").read_text().strip().startswith("model_final")
    rows = [json.loads(line) for line in (trained / "training_metrics.json").read_text().splitlines()]
    keys = "iteration iter_time data_time lr wd mom last_layer_lr current_batch_size total_loss".split()
    assert list(rows[-1])[:9] == keys and rows[-1]["iteration"] == 4


def evaluation(home, trained, imagenet, name, *more):
    """Run upstream's command for an evaluation; return its output directory, inside the run, as in upstream."""
    _, (train, val) = imagenet
    out = trained / "eval" / "training_4" / name
    run(
        home,
        f"run/eval/{name}.py",
        *("--config-file", trained / "config.yaml"),
        *("--pretrained-weights", trained / "eval" / "training_4" / "teacher_checkpoint.pth"),
        *("--output-dir", out, "--train-dataset", train, "--val-dataset", val, "--num-workers", "0"),
        *SMALL_IMAGES,
        *more,
    )
    return out


def test_knn(home, trained, imagenet):
    assert_knn_results(evaluation(home, trained, imagenet, "knn", "--nb_knn", "3", "10"))


def assert_knn_results(out):
    """Check the file in ``out`` of an evaluation with 3 and 10 neighbours: its keys, and the range of its values."""
    results = {}
    for line in (out / "results_eval_knn.json").read_text().splitlines():
        results |= json.loads(line)
    assert list(results) == [f"('full', {k}) Top {n}" for k in (3, 10) for n in (1, 5)]
    assert results["('full', 3) Top 5"] == 100 and 40 < results["('full', 3) Top 1"] <= 100


def test_log_regression(home, trained, imagenet):
    out = evaluation(home, trained, imagenet, "log_regression", "--max-train-iters", "20")
    assert "best C=" in (out / "logs" / "log.txt").read_text()


def test_linear(home, trained, imagenet):
    out = evaluation(home, trained, imagenet, "linear", "--epochs", "2", "--epoch-length", "6", "--batch-size", "8")
    text = (out / "results_eval_linear.json").read_text()
    assert text.startswith('iter: 12\n{"best_classifier": {"name": "classifier_') and text.endswith("\n\n")
    names = {"model_final.pth", "running_checkpoint_linear_eval.pth"}
    assert {path.name for path in out.glob("*.pth")} == names


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A file in Meta's layout; random weights."""
    folder = tmp_path_factory.mktemp("released")
    torch.manual_seed(0)
    torch.save(backbones.dinov2_vits14(pretrained=False).state_dict(), folder / "dinov2_vits14_pretrain.pth")
    return folder


def test_a_released_backbone_by_its_url(home, released, imagenet, tmp_path):
    _, (train, val) = imagenet
    with serve(released) as (url, asked):
        run(
            home,
            *("-m", "dinov2_custom.eval.knn", "--config-file", "dinov2_custom/configs/eval/vits14_pretrain.yaml"),
            *("--pretrained-weights", f"{url}/dinov2_vits14_pretrain.pth", "--output-dir", tmp_path / "out"),
            *("--train-dataset", train, "--val-dataset", val, "--num-workers", "0", "--nb_knn", "3"),
            *("--opts", "student.drop_path_rate=0.0", "--resize-size", "64", "--crop-size", "56"),
        )
    assert asked == ["/dinov2_vits14_pretrain.pth"]
    assert len((tmp_path / "out" / "results_eval_knn.json").read_text().splitlines()) == 2


def test_hub_load(home, released):
    code = (
        "import sys, torch; torch.set_grad_enabled(False); "
        "model = torch.hub.load(sys.argv[1], 'dinov2_vits14', source='local', weights=sys.argv[2]).eval(); "
        "features = model(torch.ones(1, 3, 56, 56)); print(tuple(features.shape), features.sum().item())"
    )
    weights = released / "dinov2_vits14_pretrain.pth"
    shape, total = run(home, "-c", code, REPOSITORY, weights).stdout.rsplit(maxsplit=1)
    model = backbones.dinov2_vits14(weights=weights).eval()
    with torch.no_grad():
        expected = model(torch.ones(1, 3, 56, 56))
    assert shape == "(1, 384)" and float(total) == pytest.approx(expected.sum().item(), rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("module", ["train.train", "eval.knn", "eval.linear", "eval.log_regression"])
def test_commands_as_modules(home, module):
    shown = run(home, "-m", f"dinov2_custom.{module}", "--help").stdout
    assert "--config-file" in shown and "--output-dir" in shown
