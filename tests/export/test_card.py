"""The card of an export, as the Hub's own library reads it, and what it says about runs, metrics and licences."""

from __future__ import annotations

import json

import pytest
import torch

from dinov2_custom.cli import export_parser
from dinov2_custom.export.card import licence_of, write_card
from dinov2_custom.export.main import main
from dinov2_custom.export.portable import portable
from dinov2_custom.teacher import load_teacher
from tests.eval.test_setup import make_run
from tests.export.backbones import make_teacher

ROWS = [
    {"iteration": 4, "total_loss": 9.0, "dino_global_crops_loss": 2.0, "epoch": 1.25}
    | {"eval_knn": 0.5, "start_knn": 0.25, "pixels_knn": 0.125, "eval_rankme": 7.5},
    {"iteration": 9, "total_loss": 8.5, "dino_global_crops_loss": 1.5, "epoch": 2.5},
    {"iteration": 19, "total_loss": 7.0, "dino_global_crops_loss": 1.0, "epoch": 5.0},  # after the exported weights
]


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "cells"
    make_run(folder, "student.pretrained_weights=/w/dinov2_vits14_reg4_pretrain.pth")
    (folder / "training_metrics.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "model_final").mkdir()
    (folder / "model_final" / "checkpoint.json").write_text(
        json.dumps({"iteration": 19, "draws": 160, "data": {"images": 64, "digest": ""}})
    )
    (folder / "last_checkpoint").write_text("model_final")
    (folder / "logs").mkdir()
    (folder / "logs" / "log.txt").write_text("I1 1 dinov2 train.py:1] command: train.py --output-dir cells\n")
    return folder


def test_what_is_known_of_a_run_is_on_the_card_that_the_hub_reads(run, tmp_path):
    hub = pytest.importorskip("huggingface_hub", reason="NO CARD CHECK: the extra 'export' is not installed")
    pytest.importorskip("matplotlib", reason="NO CARD CHECK: the extra 'plots' is not installed")
    out = tmp_path / "export"
    for extra in ([], ["--overwrite"]):
        assert main(export_parser().parse_args([str(run), "--to", "timm", "--output", str(out), *extra])) == 0
    card = hub.ModelCard.load(out / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "timm")
    assert card.data.pipeline_tag == "image-feature-extraction" and "dinov2" in card.data.tags
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.text.splitlines()]
    assert ["images", "64"] in cells and ["passes over the images", "2.5"] in cells and ["iterations", "10"] in cells
    assert ["last loss", "8.5"] in cells and "At iteration 4:" in card.text
    assert ["kNN accuracy", "0.5", "0.25", "0.125"] in cells and ["RankMe", "7.5", "", ""] in cells
    assert "train.py --output-dir cells" in card.text and "(curves.png)" in card.text
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_without_epoch_and_metrics_the_passes_come_from_the_checkpoint(run, tmp_path):
    (run / "training_metrics.json").write_text(json.dumps({"iteration": 9, "total_loss": 8.5}) + "\n")
    teacher = load_teacher(str(run))
    path = tmp_path / "model.pth"
    path.write_bytes(b"")
    text = write_card(portable(teacher), teacher, "torch", path).read_text()
    assert "| passes over the images | 1.25 |" in text and "## Metrics" not in text
    (run / "training_metrics.json").unlink()  # a run whose weights are all that is left of it
    (run / "last_checkpoint").unlink()
    assert "| images | unknown |" in write_card(portable(teacher), teacher, "torch", path).read_text()


def test_weights_without_a_run_say_so(tmp_path):
    teacher = make_teacher()._replace(weights=str(tmp_path / "dinov2_vits14_pretrain.pth"))
    path = tmp_path / "model.onnx"
    path.write_bytes(b"")
    text = write_card(portable(teacher), teacher, "onnx", path).read_text()
    assert "license: apache-2.0" in text and "there is no run directory" in text
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.md"]


def test_a_configuration_given_by_hand_is_not_taken_for_the_training(run, tmp_path):
    weights = tmp_path / "elsewhere" / "weights.pth"
    weights.parent.mkdir()
    torch.save(torch.load(run / "eval" / "training_9" / "teacher_checkpoint.pth", weights_only=True), weights)
    teacher = load_teacher(str(weights), str(run / "config.yaml"))
    path = tmp_path / "model.pth"
    path.write_bytes(b"")
    text = write_card(portable(teacher), teacher, "torch", path).read_text()
    assert "license: unknown" in text and "there is no run directory" in text


@pytest.mark.parametrize(
    ("start", "weights", "trained", "licence", "words"),
    [
        ("", "out/teacher_checkpoint.pth", True, "unknown", "none is set"),
        ("facebook/dinov2-small", "out/teacher_checkpoint.pth", True, "apache-2.0", "Apache-2.0"),
        ("https://me:hunter2@host/dinov2_vitg14_pretrain.pth?k=1", "t.pth", True, "apache-2.0", "Apache-2.0"),
        ("https://me:hunter2@host/other.pth", "t.pth", True, "unknown", "`https://host/other.pth`"),
        ("", "other.pth", False, "unknown", "those of `other.pth`"),
    ],
)
def test_licence(start, weights, trained, licence, words):
    found, sentence = licence_of(start, weights, trained)
    assert found == licence and words in sentence and "hunter2" not in sentence
