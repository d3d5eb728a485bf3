from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from dinov2_custom.errors import CheckpointError, ConfigError, DataError
from dinov2_custom.eval.args import get_knn_args_parser
from dinov2_custom.eval.knn import main
from dinov2_custom.eval.setup import (
    build_model_for_eval,
    choose_sizes,
    find_run_config,
    get_autocast_dtype,
    load_teacher_backbone,
)
from dinov2_custom.logging import remove_logging
from dinov2_custom.models import build_model_from_cfg
from dinov2_custom.teacher import is_released
from dinov2_custom.train.checkpoint import save_teacher
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from dinov2_custom.utils.config import write_config
from tests.train.batches import tiny_config

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_handlers_left():
    yield
    remove_logging("dinov2")


def make_run(folder, *overrides):
    """Write the configuration and teacher checkpoint of a training run; return both in memory."""
    cfg = tiny_config(*overrides)
    model = SSLMetaArch(cfg)
    folder.mkdir()
    write_config(cfg, str(folder))
    return cfg, model, save_teacher(model, folder, "training_9")


def make_images(root, count=6):
    generator = torch.Generator().manual_seed(0)
    for name in ("dark", "light"):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = torch.randint(0, 128, (16, 16, 3), generator=generator, dtype=torch.uint8)
            pixels += 127 if name == "light" else 0
            Image.fromarray(pixels.numpy()).save(root / name / f"{i}.png")


def parse(*arguments):
    small = ["--num-workers", "0", "--resize-size", "16", "--crop-size", "16", "--nb_knn", "3", "20"]
    return get_knn_args_parser().parse_args([*map(str, arguments), *small])


def listing(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_evaluates_a_run_without_touching_it(tmp_path):
    _, _, weights = make_run(tmp_path / "run", "student.layerscale=1.0")  # features that differ by more than rounding
    make_images(tmp_path / "images")
    before = listing(tmp_path / "run")
    images = f"LabelledFolder:root={tmp_path}/images"
    out = tmp_path / "results"
    data = ["--train-dataset", images, "--val-dataset", images]
    assert main(parse("--pretrained-weights", weights, "--output-dir", out, *data)) == 0
    assert listing(tmp_path / "run") == before
    results = [json.loads(line) for line in (out / "results_eval_knn.json").read_text().splitlines()]
    assert [key for row in results for key in row] == [
        f"('full', {k}) Top {n}" for k in (3, 11) for n in (1, 5)
    ]  # 12 images except itself
    assert results[0]["('full', 3) Top 1"] > 60


@pytest.mark.parametrize(("name", "ratio"), [("knn", 256 / 224), ("linear", 256 / 224), ("log_regression", 1.0)])
def test_images_are_seen_at_the_size_of_the_training_by_as_many_processes_as_cores(
    tmp_path, monkeypatch, caplog, name, ratio
):
    module = import_module(f"dinov2_custom.eval.{name}")
    _, _, weights = make_run(tmp_path / "run", "crops.global_crops_size=28")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(3))
    args = module.get_args_parser().parse_args(["--pretrained-weights", str(weights), "--output-dir", str(tmp_path)])
    assert (args.crop_size, args.resize_size, args.num_workers) == ("auto", "auto", "auto")
    started = {}
    run = {
        "knn": "eval_knn_with_model",
        "linear": "run_eval_linear",
        "log_regression": "eval_log_regression_with_model",
    }
    monkeypatch.setattr(module, run[name], lambda **options: started.update(options) or {})
    args.output_dir = str(tmp_path / "results")
    with caplog.at_level("INFO", "dinov2"):
        logging.getLogger("dinov2").addHandler(caplog.handler)
        assert module.main(args) == 0
    assert (args.crop_size, args.resize_size) == (28, round(28 * ratio)) and started["num_workers"] == 3
    assert f"images: shorter side {args.resize_size} px, central 28 px; data-loading processes: 3" in caplog.text


@pytest.mark.parametrize("flag", ["--num-workers", "--crop-size", "--resize-size"])
@pytest.mark.parametrize("value", ["-1", "many", "1.5"])
def test_non_numbers_are_rejected_by_the_command_line(flag, value, capsys):
    with pytest.raises(SystemExit, match="2"):
        get_knn_args_parser().parse_args([f"{flag}={value}"])
    said = capsys.readouterr().err
    assert flag in said and f"expected a whole number or auto, got '{value}'" in said


def test_sizes_that_are_given_count_and_released_weights_are_seen_at_224(caplog):
    model = SimpleNamespace(patch_size=14)
    released = REPOSITORY / "dinov2_custom" / "configs" / "eval" / "vitb14_pretrain.yaml"
    assert is_released(str(released)) and is_released("")
    assert not any(is_released(str(path)) for path in REPOSITORY.glob("configs/*.yaml"))
    args = argparse.Namespace(crop_size="auto", resize_size="auto", num_workers=0, training_crop_size=224)
    choose_sizes(args, model)
    assert (args.crop_size, args.resize_size) == (224, 256)
    given = argparse.Namespace(crop_size=98, resize_size="auto", num_workers=0, training_crop_size=224)
    with caplog.at_level("INFO", "dinov2"):
        choose_sizes(given, model)
    assert given.resize_size == 112 and "central 98 px, trained with 224 px" in caplog.text
    given.crop_size = 100
    with pytest.raises(ConfigError, match="--crop-size: expected a multiple of student.patch_size=14, got 100"):
        choose_sizes(given, model)


def test_a_run_directory_stands_for_its_newest_teacher(tmp_path, caplog):
    make_run(tmp_path / "run", "ibot.head_n_prototypes=99", "optim.freeze_last_layer_epochs=10")
    caplog.clear()
    make_images(tmp_path / "images", count=2)
    images = f"LabelledFolder:root={tmp_path}/images"
    data = ["--train-dataset", images, "--val-dataset", images]
    assert main(parse("--pretrained-weights", tmp_path / "run", "--output-dir", tmp_path / "results", *data)) == 0
    assert [record.getMessage() for record in caplog.records if record.name.endswith("configs.load")] == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="--pretrained-weights: expected a weight file or a run directory, got "):
        main(parse("--pretrained-weights", tmp_path / "empty", "--output-dir", tmp_path / "results", *data))


def test_a_dataset_that_cannot_be_opened_is_named_by_its_flag(tmp_path):
    make_run(tmp_path / "run")
    make_images(tmp_path / "images", count=2)
    given = ["--pretrained-weights", tmp_path / "run", "--output-dir", tmp_path / "results"]
    there = f"LabelledFolder:root={tmp_path}/images"
    with pytest.raises(ConfigError, match="^--train-dataset: unknown dataset 'Labelledfolder'"):
        main(parse(*given, "--train-dataset", f"Labelledfolder:root={tmp_path}/images", "--val-dataset", there))
    with pytest.raises(DataError, match=r"^--val-dataset: expected folders of images, got .*absent \(missing\)"):
        main(parse(*given, "--train-dataset", there, "--val-dataset", f"LabelledFolder:root={tmp_path}/absent"))


def test_numbers_that_are_not_positive_are_named(tmp_path):
    args = parse("--pretrained-weights", tmp_path, "--batch-size", 0)
    args.nb_knn = [3, 0]
    with pytest.raises(ConfigError, match=r"^expected positive numbers, got --nb_knn \[3, 0\], --batch-size 0$"):
        main(args)


def test_script_reports_errors_in_one_line(tmp_path):
    command = [sys.executable, "run/eval/knn.py", "--pretrained-weights", str(tmp_path / "none.pth")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env={"PYTHONPATH": str(REPOSITORY)})
    assert done.returncode == 1
    assert done.stderr.startswith("error: --pretrained-weights: expected a weight file or a run directory, got ")
    assert "Traceback" not in done.stderr


def test_no_weights_given():
    with pytest.raises(ConfigError, match="--pretrained-weights: expected a weight file"):
        main(parse())


def test_a_run_is_no_place_for_results(tmp_path):
    _, _, weights = make_run(tmp_path / "run")
    before = listing(tmp_path / "run")
    with pytest.raises(ConfigError, match="config.yaml in .*run"):
        main(parse("--pretrained-weights", weights, "--output-dir", tmp_path / "run"))
    assert listing(tmp_path / "run") == before


@pytest.mark.parametrize("name", ["knn", "linear", "log_regression"])
def test_an_evaluation_that_is_refused_leaves_nothing(tmp_path, name):
    module = import_module(f"dinov2_custom.eval.{name}")
    _, _, weights = make_run(tmp_path / "run")
    flags = ["--train-dataset", f"LabelledFolder:root={tmp_path}/absent", "--pretrained-weights", str(weights)]
    with pytest.raises(DataError, match="absent"):
        module.main(module.get_args_parser().parse_args([*flags, "--output-dir", str(tmp_path / "results" / name)]))
    assert not (tmp_path / "results").exists()


def test_dated_default_output_is_not_the_runs(tmp_path, monkeypatch):
    _, _, weights = make_run(tmp_path / "run", f"train.output_dir={tmp_path / 'run'}")
    make_images(tmp_path / "images", count=2)
    monkeypatch.chdir(tmp_path)
    images = f"LabelledFolder:root={tmp_path}/images"
    args = parse("--pretrained-weights", weights, "--train-dataset", images, "--val-dataset", images)
    assert main(args) == 0
    assert Path(args.output_dir).parent == tmp_path / "outputs"


@pytest.mark.parametrize("chunks", [0, 2])
@pytest.mark.parametrize("layout", ["teacher", "flat", "run", "wrapped"])
def test_weights_of_every_layout(tmp_path, layout, chunks):
    cfg = tiny_config("student.block_chunks=2")
    model = SSLMetaArch(cfg)
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.add_(1)  # the teacher's weights are expected
    backbone = model.teacher["backbone"].state_dict()
    file = {
        "teacher": {"teacher": model.teacher.state_dict()},
        "flat": backbone,
        "run": {"model": model.state_dict(), "iteration": 3},
        "wrapped": {"teacher": {f"module.backbone.{key}": value for key, value in backbone.items()}},
    }[layout]
    torch.save(file, tmp_path / "weights.pth")
    built = build_model_for_eval(tiny_config(f"student.block_chunks={chunks}"), str(tmp_path / "weights.pth"))
    assert not built.training and not any(p.requires_grad for p in built.parameters())
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    device = next(built.parameters()).device
    torch.testing.assert_close(built(images.to(device)).cpu(), model.teacher["backbone"].eval()(images))


@pytest.mark.parametrize(
    "overrides, counts",
    [
        (["student.num_register_tokens=2"], "1 missing, 0 unexpected and 0 of another shape"),
        (["student.arch=vit_micro"], "28 missing, 0 unexpected and"),
        (["student.patch_size=8"], "0 missing, 0 unexpected and 2 of another shape"),
        (["student.ffn_layer=swiglufused"], "16 missing, 16 unexpected and 0 of another shape"),
        (["student.layerscale=0"], "0 missing, 8 unexpected and 0 of another shape"),
    ],
)
def test_another_architecture_is_counted(tmp_path, overrides, counts):
    _, _, weights = make_run(tmp_path / "run")
    model, _ = build_model_from_cfg(tiny_config(*overrides), only_teacher=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=counts) as caught:
        load_teacher_backbone(model, str(weights))
    assert "dino_head" not in str(caught.value)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name])


def test_code_in_a_weight_file_is_not_run(tmp_path):
    torch.save({"teacher": logging.getLogger}, tmp_path / "evil.pth")
    model, _ = build_model_from_cfg(tiny_config(), only_teacher=True)
    with pytest.raises(CheckpointError):
        load_teacher_backbone(model, str(tmp_path / "evil.pth"))


@pytest.mark.parametrize(
    "name, device, expected",
    [("fp16", "cuda", torch.float16), ("fp16", "cpu", torch.float32), ("bf16", "cpu", torch.bfloat16)],
)
def test_autocast_dtype(name, device, expected):
    cfg = tiny_config(f"compute_precision.teacher.backbone.mixed_precision.param_dtype={name}")
    assert get_autocast_dtype(cfg, device) == expected


def test_a_missing_weight_file_is_reported_before_its_configuration(tmp_path):
    with pytest.raises(CheckpointError, match="expected a weight file at .*absent.pth, found nothing"):
        find_run_config(str(tmp_path / "absent.pth"))
    with pytest.raises(ConfigError, match="the configuration of https://lab/w.pth, got none"):
        find_run_config("https://user:password@lab/w.pth?token=abc")
