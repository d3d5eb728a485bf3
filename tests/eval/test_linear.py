"""The linear evaluation on small images and a small network: its files, its arithmetic, resuming after a stop."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dinov2_custom.data.transforms import make_classification_train_transform
from dinov2_custom.errors import CheckpointError, ConfigError, DataError
from dinov2_custom.eval.args import get_linear_args_parser
from dinov2_custom.eval.datasets import draws_for_training, open_labelled
from dinov2_custom.eval.linear import LinearClassifier, _pad, main
from dinov2_custom.eval.setup import build_model_for_eval
from dinov2_custom.eval.utils import ModelWithIntermediateLayers
from dinov2_custom.logging import remove_logging
from dinov2_custom.utils.rng import generator_for
from tests.eval.test_setup import make_run
from tests.eval.test_two_processes import overlapping_classes

RATES = ("0.01", "1e-7", "2e-7")  # the last two have one name upstream


@pytest.fixture(autouse=True)
def no_handlers_left():
    yield
    remove_logging("dinov2")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("linear")
    cfg, _, weights = make_run(folder / "run", "student.layerscale=1.0")
    overlapping_classes(folder / "train", count=9, seed=0)
    overlapping_classes(folder / "val", count=7, seed=1)
    return folder, cfg, weights


def evaluate(run, out, *more, epochs=3):
    folder, _, weights = run
    command = ["--pretrained-weights", weights, "--output-dir", out, "--epochs", epochs, "--epoch-length", 4]
    command += [f"--{part}-dataset=LabelledFolder:root={folder}/{part}" for part in ("train", "val")]
    command += ["--batch-size", 6, "--num-workers", 0, "--crop-size", 16, "--resize-size", 16]
    command += ["--eval-period-iterations", 8, "--save-checkpoint-frequency", 2, "--learning-rates", *RATES]
    return main(get_linear_args_parser().parse_args([str(part) for part in [*command, *more]]))


def models(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def blocks_of(path):
    """Return [(iteration, {key: value})] of a results file."""
    blocks = path.read_text().split("\n\n")
    assert blocks.pop() == ""
    found = []
    for lines in (block.splitlines() for block in blocks):
        assert lines[0].startswith("iter: ")
        rows = [json.loads(line) for line in lines[1:]]
        found.append((int(lines[0][6:]), {key: value for row in rows for key, value in row.items()}))
    return found


def test_files_have_upstreams_names_and_form(run, tmp_path):
    assert evaluate(run, tmp_path) == 0
    assert {path.name for path in tmp_path.glob("*.pth")} == {
        "running_checkpoint_linear_eval.pth",
        "model_0000007.pth",
        "model_final.pth",
    }
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    results = blocks_of(tmp_path / "results_eval_linear.json")
    assert [iteration for iteration, _ in results] == [7, 12]
    for _, content in results:
        assert set(content) == {"best_classifier"} and set(content["best_classifier"]) == {"name", "accuracy"}
        assert 0 < content["best_classifier"]["accuracy"] <= 1
    names = {key.split(".")[1] for key in models(tmp_path)}
    assert len(names) == 12 and results[-1][1]["best_classifier"]["name"] in names
    assert "classifier_4_blocks_avgpool_True_lr_0_00023" in names


def test_training_is_sgd_with_momentum_and_a_cosine(run, tmp_path):
    """Train one of the twelve classifiers separately with an explicit loop."""
    folder, cfg, weights = run
    evaluate(run, tmp_path)
    dataset = open_labelled("", f"LabelledFolder:root={folder}/train")
    batches = iter(draws_for_training(dataset, make_classification_train_transform(crop_size=16), 0, 6, num_workers=0))
    features = ModelWithIntermediateLayers(build_model_for_eval(cfg, str(weights)), 4)
    name = "classifiers_dict.classifier_1_blocks_avgpool_True_lr_0_00023.linear"
    got = models(tmp_path)
    start = torch.load(tmp_path / "model_0000007.pth", weights_only=True)["model"]
    assert not torch.equal(start[f"{name}.weight"], got[f"{name}.weight"])
    evaluate(run, tmp_path / "still", "--learning-rates", "0.01", "1e-30", epochs=3)
    still = models(tmp_path / "still")
    rate = 0.01 * 6 / 256
    one = LinearClassifier(2 * 64, 1, True, 3, generator=generator_for(0, "linear", 1, True, rate))
    weight, bias = one.linear.weight.detach().clone(), one.linear.bias.detach().clone()
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for iteration in range(12):
        images, labels = next(batches)
        patches, cls = features(images)[-1]
        x = torch.cat([cls, patches.mean(1)], dim=1).clone()
        probabilities = F.softmax(x @ weight.T + bias, dim=1)
        residual = (probabilities - F.one_hot(labels, 3)) / len(x)
        gradients = [residual.T @ x, residual.sum(0)]
        lr = rate * (1 + np.cos(np.pi * iteration / 12)) / 2
        for parameter, speed, gradient in zip((weight, bias), velocity, gradients, strict=True):
            speed.mul_(0.9).add_(gradient)
            parameter.sub_(lr * speed)
    torch.testing.assert_close(got[f"{name}.weight"], weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got[f"{name}.bias"], bias, rtol=1e-4, atol=1e-7)
    assert torch.equal(still[f"{name}.weight"], got[f"{name}.weight"])  # the other classifiers have no influence


def test_a_stopped_evaluation_resumes_bitwise(run, tmp_path):
    evaluate(run, tmp_path / "whole")
    evaluate(run, tmp_path / "parts")
    for name in ("model_final.pth", "running_checkpoint_linear_eval.pth"):  # as if killed after iteration 8
        (tmp_path / "parts" / name).unlink()
    (tmp_path / "parts" / "last_checkpoint").write_text("model_0000007.pth")
    evaluate(run, tmp_path / "parts")
    whole, parts = models(tmp_path / "whole"), models(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert (
        blocks_of(tmp_path / "parts" / "results_eval_linear.json")[-1]
        == blocks_of(tmp_path / "whole" / "results_eval_linear.json")[-1]
    )


def test_a_finished_evaluation_only_scores_again(run, tmp_path):
    evaluate(run, tmp_path)
    before = (tmp_path / "model_final.pth").stat().st_mtime_ns
    evaluate(run, tmp_path)
    assert (tmp_path / "model_final.pth").stat().st_mtime_ns == before
    results = blocks_of(tmp_path / "results_eval_linear.json")
    assert [iteration for iteration, _ in results] == [7, 12, 12] and results[1] == results[2]
    evaluate(run, tmp_path, "--no-resume")
    assert len(blocks_of(tmp_path / "results_eval_linear.json")) == 5


def test_another_evaluations_files_are_not_resumed(run, tmp_path):
    evaluate(run, tmp_path)
    with pytest.raises(CheckpointError, match="of other classifiers.*\n.*\n.*\n.*\n.*\n.*--no-resume"):
        evaluate(run, tmp_path, "--learning-rates", "0.02")


def test_other_datasets_and_their_class_numbers(run, tmp_path):
    folder, *_ = run
    overlapping_classes(tmp_path / "test", count=4, seed=2)
    for path in (tmp_path / "test" / "a").iterdir():
        path.unlink()
    (tmp_path / "test" / "a").rmdir()  # b and c alone: class 0 and 1 of this folder, 1 and 2 in training
    np.save(tmp_path / "mapping.npy", np.array([1, 2]))
    test, val = f"LabelledFolder:root={tmp_path}/test", f"LabelledFolder:root={folder}/val"
    evaluate(run, tmp_path / "out", "--test-datasets", test, val, test, "--test-class-mapping-fpaths", "None", "None",
             tmp_path / "mapping.npy", "--test-metric-types", *["mean_per_class_accuracy"] * 3)  # fmt: skip
    *_, best, by_name, same, by_mapping = blocks_of(tmp_path / "out" / "results_eval_linear.json")
    assert best[0] == by_name[0] == 12
    names = {content["best_classifier"]["name"] for _, content in (best, by_name, same, by_mapping)}
    assert len(names) == 1
    assert best[1]["best_classifier"]["accuracy"] == pytest.approx(same[1]["best_classifier"]["accuracy"])
    assert by_mapping[1]["best_classifier"]["accuracy"] >= by_name[1]["best_classifier"]["accuracy"]
    with pytest.raises(ConfigError, match="got 2, 1 --test-metric-types, 2 --test-class-mapping-fpaths"):
        evaluate(run, tmp_path / "out", "--test-datasets", test, val, "--test-metric-types", "mean_accuracy")


def test_mistakes_are_reported_before_training(run, tmp_path):
    folder, *_ = run
    with pytest.raises(ConfigError, match="--train-dataset: expected images with labels"):
        evaluate(run, tmp_path, f"--train-dataset={folder}/train")
    overlapping_classes(tmp_path / "other", count=1, seed=0)
    (tmp_path / "other" / "c").rename(tmp_path / "other" / "d")
    with pytest.raises(DataError, match="--val-dataset: expected the class folders .*: d;"):
        evaluate(run, tmp_path, f"--val-dataset=LabelledFolder:root={tmp_path}/other")
    with pytest.raises(ConfigError, match="--val-class-mapping-fpath: expected an .npy file"):
        evaluate(run, tmp_path, "--val-class-mapping-fpath", tmp_path / "none.npy")
    with pytest.raises(ConfigError, match="expected positive numbers, got .*--epoch-length 0"):
        evaluate(run, tmp_path, "--epoch-length", 0)
    with pytest.raises(ConfigError, match="--crop-size: expected a multiple of"):
        evaluate(run, tmp_path, "--crop-size", 18)


def test_several_true_labels_are_padded():
    assert _pad([[3, 5], 7, []]).tolist() == [[3, 5], [7, -1], [-1, -1]]
