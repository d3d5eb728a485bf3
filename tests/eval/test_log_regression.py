from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dinov2_custom.errors import ConfigError, DataError
from dinov2_custom.eval import log_regression_solvers
from dinov2_custom.eval.args import get_log_regression_args_parser
from dinov2_custom.eval.log_regression import (
    LogRegModule,
    dtype_of_choice,
    eval_log_regression,
    main,
    sweep_C_values,
    train_for_C,
)
from dinov2_custom.eval.log_regression_solvers import SOLVERS, fit, mean_objective
from dinov2_custom.eval.metrics import MetricType
from dinov2_custom.logging import remove_logging
from tests.eval.test_setup import make_run
from tests.eval.test_two_processes import overlapping_classes


@pytest.fixture(autouse=True)
def no_handlers_left():
    yield
    remove_logging("dinov2")


def problem(count=400, dim=12, classes=5, seed=0, noise=2.0):
    """Return overlapping clusters with very different scales per dimension, as features have."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % classes
    features = centres[labels] + noise * torch.randn(count, dim, generator=generator)
    return (features * torch.logspace(-1, 1, dim)).double(), labels


@pytest.mark.parametrize("chunk", [1 << 26, 100])
def test_objective_and_gradient_are_autograds(monkeypatch, chunk):
    monkeypatch.setattr(log_regression_solvers, "_CHUNK_ELEMENTS", chunk)
    features, labels = problem(count=70)
    weight = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    total = 0.3 * F.cross_entropy(features @ weight.T + bias, labels, reduction="sum") + weight.square().sum() / 2
    total.backward()
    got = mean_objective(features, labels, weight.detach(), bias.detach(), C=0.3)
    for one, expected in zip(got, (total.detach(), weight.grad, bias.grad), strict=True):
        torch.testing.assert_close(one * 0.3 * 70, expected)


@pytest.mark.parametrize("C", [1e-4, 1.0, 1e3])
def test_both_solvers_find_the_same_minimum(C):
    features, labels = problem()
    probabilities = []
    for solver in SOLVERS:
        weight, bias = fit(features, labels, C, 1000, 5, solver=solver)
        probabilities.append(torch.softmax(features @ weight.T + bias, dim=1))
        _, *gradient = mean_objective(features, labels, weight, bias, C)
        assert max(float(part.abs().max()) for part in gradient) < 1e-5
    torch.testing.assert_close(*probabilities, rtol=0, atol=2e-3)


def test_two_classes_and_a_class_without_samples():
    features, labels = problem(classes=2)
    pair = [fit(features, labels * 2, 1e-4, 1000, 3, solver=solver) for solver in SOLVERS]  # class 1 of 0..2 has none
    predicted = [torch.softmax(features @ weight.T + bias, dim=1) for weight, bias in pair]
    torch.testing.assert_close(*predicted, rtol=0, atol=2e-3)
    assert not predicted[0][:, 1].any() and not predicted[1][:, 1].any()
    assert 0.1 < float(predicted[0].std()) < 0.45
    with pytest.raises(DataError, match="at least two classes, got 1"):
        fit(features, labels * 0, 1.0, 10, 2)


def test_a_start_saves_iterations_and_changes_nothing(caplog):
    features, labels = problem()
    with caplog.at_level("DEBUG", logger="dinov2"):
        near = fit(features, labels, 1.0, 1000, 5)
        cold = fit(features, labels, 1.8, 1000, 5)
        warm = fit(features, labels, 1.8, 1000, 5, start=near)
    first, second = (int(record.message.rpartition("=")[2]) for record in caplog.records[-2:])
    assert second < first
    torch.testing.assert_close(warm[0] - warm[0].mean(0), cold[0] - cold[0].mean(0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", [MetricType.MEAN_ACCURACY, MetricType.MEAN_PER_CLASS_ACCURACY])
def test_sweeps_of_both_solvers_agree_to_a_fifth_of_a_percent(kind):
    train, test = problem(count=300), problem(count=2000, seed=1)
    found = [
        sweep_C_values(
            train_features=train[0],
            train_labels=train[1],
            test_data_loader=[test],
            metric_type=kind,
            num_classes=5,
            solver=solver,
        )
        for solver in ("torch", "sklearn")
    ]
    (ours, _), (theirs, _) = found
    assert abs(float(ours["top-1"]) - float(theirs["top-1"])) <= 0.002
    assert 0.3 < float(ours["top-1"]) < 0.95  # otherwise the comparison shows nothing
    for C in (1e-3, 1.0, 100.0):
        models = [
            train_for_C(C=C, max_iter=1000, train_features=train[0], train_labels=train[1], solver=solver)
            for solver in ("torch", "sklearn")
        ]
        hits = [(m(*test)["preds"].argmax(1) == test[1]).double().mean().item() for m in models]
        assert abs(hits[0] - hits[1]) <= 0.002


def test_float32_is_enough_for_the_same_accuracy():
    train, test = problem(count=300), problem(count=2000, seed=1)
    hits = []
    for dtype in (torch.float32, torch.float64):
        model = LogRegModule(1.0, dtype=dtype)
        model.fit(*train)
        hits.append((model(*test)["preds"].argmax(1) == test[1]).double().mean().item())
    assert abs(hits[0] - hits[1]) <= 0.002
    with pytest.raises(ConfigError, match="--solver: expected one of torch, sklearn, got cuml"):
        LogRegModule(1.0, solver="cuml").fit(*train)


class Pixels(torch.nn.Module):
    def forward(self, images):
        return images.flatten(1)


class Points(torch.utils.data.Dataset):
    def __init__(self, features, labels):
        self.features, self.labels = features.float()[:, None, None], labels

    def __getitem__(self, index):
        return self.features[index], int(self.labels[index])

    def __len__(self):
        return len(self.labels)


def test_where_the_strength_is_chosen(monkeypatch):
    """Use a tenth of the training images, another dataset, or the validation set without a second fit."""
    from dinov2_custom.eval import log_regression

    sizes = []
    sweep, last = log_regression.sweep_C_values, log_regression.train_and_evaluate

    def counted_sweep(**options):
        sizes.append((len(options["train_features"]), sum(len(x) for x, _ in options["test_data_loader"])))
        return {"top-1": torch.tensor(0.25), "top-5": torch.tensor(1.0)}, 0.5

    def counted_last(**options):
        sizes.append((len(options["train_features"]), options["C"]))
        return last(**options)

    monkeypatch.setattr(log_regression, "sweep_C_values", counted_sweep)
    monkeypatch.setattr(log_regression, "train_and_evaluate", counted_last)
    assert sweep is not counted_sweep
    datasets = {"train_dataset": Points(*problem(95)), "val_dataset": Points(*problem(40, seed=1))}
    shared = {"model": Pixels(), "metric_type": MetricType.MEAN_ACCURACY, "batch_size": 7, "num_workers": 0}
    held_out = eval_log_regression(**datasets, **shared, finetune_dataset=None)
    other = eval_log_regression(**datasets, **shared, finetune_dataset=Points(*problem(15, seed=2)))
    on_val = eval_log_regression(**datasets, **shared, finetune_dataset=None, finetune_on_val=True)
    assert sizes == [(86, 9), (95, 0.5), (95, 15), (110, 0.5), (95, 40)]
    assert on_val == {"best_C": 0.5, "top-1": 25.0, "top-5": 100.0}
    assert 20 < held_out["top-1"] <= 100 and set(other) == {"best_C", "top-1", "top-5"}


def evaluate(folder, weights, out, *more):
    command = ["--pretrained-weights", weights, "--output-dir", out, "--num-workers", 0, "--max-train-iters", 50]
    command += [f"--{part}-dataset=LabelledFolder:root={folder}/{part}" for part in ("train", "val")]
    command += ["--crop-size", 16, "--resize-size", 16, *more]
    return main(get_log_regression_args_parser().parse_args([str(part) for part in command]))


def test_command(tmp_path):
    _, _, weights = make_run(tmp_path / "run", "student.layerscale=1.0")
    overlapping_classes(tmp_path / "train", count=12, seed=0)
    overlapping_classes(tmp_path / "val", count=7, seed=1)
    for solver in ("torch", "sklearn"):
        assert evaluate(tmp_path, weights, tmp_path / solver, "--solver", solver) == 0
        lines = (tmp_path / solver / "results_eval_log_regression.json").read_text().splitlines()
        results = {key: value for line in lines for key, value in json.loads(line).items()}
        assert set(results) == {"best_C", "top-1", "top-5"} and results["top-5"] == 100
        assert 40 < results["top-1"] <= 100
        assert np.isclose(np.log10(results["best_C"]) % 0.25, [0, 0.25], atol=1e-6).any()
    with pytest.raises(ConfigError, match="--train-features-device: .* got .tpu"):
        evaluate(tmp_path, weights, tmp_path / "none", "--train-features-device", "tpu")
    with pytest.raises(ConfigError, match="expected at least 10 images"):
        overlapping_classes(tmp_path / "few", count=3, seed=2)
        evaluate(tmp_path, weights, tmp_path / "none", f"--train-dataset=LabelledFolder:root={tmp_path}/few")


def test_a_missing_solver_is_reported_before_any_computation(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    args = get_log_regression_args_parser().parse_args(["--solver", "sklearn"])
    with pytest.raises(ConfigError, match="--solver sklearn: expected the package scikit-learn"):
        main(args)


def test_a_float32_fit_stuck_off_the_minimum_continues_in_float64(monkeypatch, caplog):
    features, labels = problem()
    features = features.float() + 300  # so that float32 has few significant digits
    wanted = fit(features.double(), labels, 10.0, 1000, 5)
    with caplog.at_level("INFO", logger="dinov2"):
        got = fit(features, labels, 10.0, 1000, 5)
    probabilities = [torch.softmax(features.double() @ w.double().T + b.double(), dim=1) for w, b in (wanted, got)]
    torch.testing.assert_close(*probabilities, rtol=0, atol=1e-3)
    monkeypatch.setattr(log_regression_solvers, "_MOST_IN_FLOAT32", 0.0)
    with caplog.at_level("INFO", logger="dinov2"):
        checked = fit(features, labels, 10.0, 1000, 5)
    assert "continuing in float64" in caplog.text and checked[0].dtype == torch.float32


def test_number_type_of_the_fit():
    cpu = torch.device("cpu")
    assert dtype_of_choice("auto", cpu) == torch.float64 and dtype_of_choice("float32", cpu) == torch.float32
    assert dtype_of_choice("auto", torch.device("mps")) == torch.float32  # which has no float64
    with pytest.raises(ConfigError, match="--train-dtype"):
        dtype_of_choice("float33", cpu)
