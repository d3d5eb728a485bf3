"""The range of a run's deep images is fixed at its first start, wherever the run or its teacher reads images later."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from dinov2_custom.cli import embed_parser as embed_args
from dinov2_custom.cli import features_parser
from dinov2_custom.embed.main import main as embed
from dinov2_custom.errors import ConfigError
from dinov2_custom.eval import knn, linear, log_regression
from dinov2_custom.logging import remove_logging
from dinov2_custom.plots import look
from dinov2_custom.reading import choose_for_training
from dinov2_custom.train import get_args_parser, main
from tests.export.backbones import make_teacher
from tests.train.batches import TINY, tiny_config

FP32 = [
    f"compute_precision.{model}.{part}.mixed_precision.param_dtype=fp32"
    for model in ("student", "teacher")
    for part in ("backbone", "dino_head", "ibot_head")
]
RUN = (*TINY, *FP32, "train.num_workers=0", "train.OFFICIAL_EPOCH_LENGTH=2", "optim.warmup_epochs=0")


@pytest.fixture(autouse=True)
def close_logs():
    yield
    remove_logging("dinov2")


def write(folder, low, high):
    rng = np.random.default_rng(0)
    for i in range(8):
        path = folder / f"class_{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(low, high, (40, 30), dtype=np.uint16)).save(path)


def train(images, out, *options):
    arguments = [f"train.dataset_path={images}", *RUN, "--output-dir", str(out), *options]
    assert main(get_args_parser().parse_args(arguments)) == 0
    return OmegaConf.load(out / "config.yaml").data.intensity


def test_a_run_and_what_comes_after_it(tmp_path, monkeypatch):
    images, out = tmp_path / "images", tmp_path / "out"
    write(images, 100, 400)
    low, high = train(images, out, "optim.epochs=1")
    assert 100 <= low < 103 and 396 < high <= 400
    log = (out / "logs" / "log.txt").read_text()
    assert f"intensity: {low:g} to {high:g} become 0 to 255" in log and "of their values clipped" in log
    assert OmegaConf.load(out / "config.yaml").data.page == 0

    write(images, 30_000, 60_000)  # which would give a different range
    assert train(images, out, "optim.epochs=2", "checkpointing.period=1") == [low, high]
    changed = [line for line in (out / "logs" / "log.txt").read_text().splitlines() if "other settings" in line]
    assert len(changed) == 1 and "intensity" not in changed[0]

    (images / "class_0" / "0.png").rename(images / "class_0" / "new.png")
    train(images, out, "optim.epochs=2.5")
    (images / "class_0" / "new.png").unlink()
    train(images, out, "optim.epochs=3")
    log = (out / "logs" / "log.txt").read_text()
    assert log.count("images found: as many, but different ones") == log.count("images found: 8 -> 7, so that") == 1
    features = tmp_path / "features"
    arguments = [str(out), str(images), "--output-dir", str(features), "--num-workers", "0", "--device", "cpu"]
    assert embed(embed_args().parse_args(arguments)) == 0
    assert json.loads((features / "embed.json").read_text())["intensity"] == [low, high]

    folder = f"LabelledFolder:root={images}"
    flags = [f"--train-dataset={folder}", f"--val-dataset={folder}", "--crop-size=16"]
    flags += [f"--pretrained-weights={next(out.glob('eval/*/teacher_checkpoint.pth'))}"]
    for module, name in ((knn, "open_pair"), (log_regression, "open_pair"), (linear, "make_eval_data_loader")):
        opened, original = [], getattr(module, name)

        def spy(*args, original=original, opened=opened, **options):
            opened.append(original(*args, **options))
            raise KeyboardInterrupt

        monkeypatch.setattr(module, name, spy)
        with pytest.raises(KeyboardInterrupt):
            module.main(module.get_args_parser().parse_args([*flags, f"--output-dir={tmp_path / module.__name__}"]))
        datasets = opened[0] if name == "open_pair" else [opened[0].dataset]
        assert [dataset.reading.intensity for dataset in datasets] == [(low, high)] * len(datasets)

    assert train(images, out, "optim.epochs=1", "--no-resume")[0] >= 30_000
    assert train(images, tmp_path / "own", "optim.epochs=1", "data.intensity=[0, 500.5]") == [0, 500.5]


@pytest.mark.parametrize("content", [
    b"train: [1\n  data: }", b"\xff\xfe\x00garbage", b"- a list", b"text", b"", b"data: {intensity: wide}", b"a: ${"
])  # fmt: skip
def test_a_resume_beside_a_garbled_configuration_is_one_error(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{tmp_path}/config.yaml.*data.intensity=\[low, high\]"):
        choose_for_training(tiny_config(), SimpleNamespace(), tmp_path)
    given = choose_for_training(tiny_config("data.intensity=[0, 300]"), SimpleNamespace(), tmp_path)
    assert given.data.intensity == [0, 300]


def test_pictures_of_features_are_of_the_same_range(tmp_path, monkeypatch):
    write(tmp_path / "images", 100, 400)
    seen = []
    monkeypatch.setattr(look, "draw_pictures", lambda teacher, dataset, *args: seen.append(dataset.reading) or [])
    torch.save(make_teacher("registers").backbone.state_dict(), tmp_path / "weights.pth")
    arguments = [str(tmp_path / "weights.pth"), str(tmp_path / "images"), "--output-dir", str(tmp_path / "o")]
    look.main(features_parser().parse_args([*arguments, "--num-points", "0"]))
    assert 100 <= seen[0].intensity[0] < 103  # measured: released weights have no range
