from __future__ import annotations

import json
import math
import multiprocessing
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dinov2_custom.data.datasets import LabelledFolder
from dinov2_custom.errors import ConfigError, DataError
from dinov2_custom.eval import neighbours
from dinov2_custom.eval.args import MetricType, get_knn_args_parser
from dinov2_custom.eval.datasets import Relabelled, find_same_files, open_pair
from dinov2_custom.eval.knn import KnnModule, eval_knn_features, eval_knn_with_model, main
from dinov2_custom.eval.linear import make_eval_data_loader
from dinov2_custom.eval.neighbours import KnnAccuracy
from dinov2_custom.eval.utils import ModelWithNormalize

TEMPERATURE = 0.07


def slow_scores(train, labels, query, k, max_k, num_classes, skip=None):
    """Classify one query at a time: weights are a softmax over the ``max_k`` nearest, the first ``k`` of them vote."""
    similarity = [(float(np.dot(row, query)), i) for i, row in enumerate(train) if i != skip]
    nearest = sorted(similarity, key=lambda pair: -pair[0])[:max_k]
    total = sum(math.exp(s / TEMPERATURE) for s, _ in nearest)
    scores = np.zeros(num_classes)
    for s, i in nearest[:k]:
        scores[labels[i]] += math.exp(s / TEMPERATURE) / total
    return scores


def features_of(seed, labels, dim=12):
    """Return unit vectors around one direction per class, with strong noise."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(int(labels.max()) + 1, dim, generator=torch.Generator().manual_seed(99))
    return F.normalize(centres[labels] + 1.5 * torch.randn(len(labels), dim, generator=generator), dim=1)


@pytest.mark.parametrize("ks", [(1, 5, 20), (20, 3)])
def test_scores_equal_a_slow_reference(ks):
    labels = torch.arange(60) % 7
    train, queries = features_of(0, labels), features_of(1, labels)[:25]
    scores = KnnModule(train, labels, ks, TEMPERATURE, num_classes=7)(queries)
    for k in ks:
        expected = [slow_scores(train.numpy(), labels, q, k, max(ks), 7) for q in queries.numpy()]
        torch.testing.assert_close(scores[k], torch.tensor(np.array(expected), dtype=torch.float32))


def test_accuracies_equal_a_slow_reference():
    labels = torch.arange(600) % 7
    train, queries = features_of(0, labels[:60]), features_of(1, labels)
    results = eval_knn_features(train, labels[:60], queries, labels, nb_knn=[10, 20])
    for k in (10, 20):
        scores = [slow_scores(train.numpy(), labels, q, k, 20, 7) for q in queries.numpy()]
        ranked = [np.argsort(-s, kind="stable") for s in scores]
        top1 = np.mean([r[0] == label for r, label in zip(ranked, labels.tolist(), strict=True)])
        top5 = np.mean([label in r[:5] for r, label in zip(ranked, labels.tolist(), strict=True)])
        got = results["full", k]
        assert (float(got["top-1"]), float(got["top-5"])) == (pytest.approx(top1), pytest.approx(top5, abs=0.02))
        assert 0.3 < top1 < 1.0  # otherwise the comparison shows nothing


def test_fewer_classes_than_five_and_fewer_samples_than_neighbours(caplog):
    labels = torch.tensor([0, 0, 1, 1, 1])
    features = features_of(3, labels)
    results = eval_knn_features(features, labels, features, labels, nb_knn=[3, 10, 200], n_per_class_list=[-1, 9])
    assert list(results) == [("full", 3), ("full", 5), ("9 per class", 3), ("9 per class", 5)]
    assert float(results["full", 5]["top-5"]) == 1.0
    (whole, limited) = [record.getMessage() for record in caplog.records]
    at_most = "expected at most the 5 training images, got k ="
    assert whole == f"--nb_knn, full: {at_most} 10, 200; evaluated with k = 5 instead"
    assert limited == f"--nb_knn, 9 per class: {at_most} 9; evaluated with k = 5 instead"


def leave_one_out(features, labels):
    results = eval_knn_features(features, labels, features, labels, nb_knn=[5], exclude=torch.arange(len(labels)))
    return float(results["full", 5]["top-1"])


def test_leave_one_out():
    labels = torch.arange(40) % 4
    features = features_of(5, labels)
    predicted = [
        slow_scores(features.numpy(), labels, features[i].numpy(), 5, 5, 4, skip=i).argmax() for i in range(len(labels))
    ]
    expected = np.mean(np.array(predicted) == labels.numpy())
    assert leave_one_out(features, labels) == pytest.approx(expected)
    assert 0 < expected < 1


def test_features_that_are_nearly_alike_keep_their_neighbours():
    """As for an untrained network whose LayerScale is 1e-5: float32 cosines all round to 1."""
    labels = torch.arange(200) % 5
    common = F.normalize(torch.randn(1, 64, generator=torch.Generator().manual_seed(1)), dim=1)
    inputs = (common + 1e-5 * features_of(seed, labels, dim=64) for seed in (0, 1))
    train, queries = (F.normalize(features.float(), dim=1) for features in inputs)
    exact = [F.normalize(features.double(), dim=1) for features in (train, queries)]
    nearest, indices = (exact[1] @ exact[0].T).topk(5)
    votes = torch.zeros(200, 5, dtype=torch.float64)
    votes.scatter_add_(1, labels[indices], F.softmax(nearest / TEMPERATURE, dim=1))
    scores = KnnModule(train, labels, [5], TEMPERATURE, num_classes=5)(queries)[5]
    assert (scores.argmax(dim=1) == votes.argmax(dim=1)).float().mean() > 0.95
    assert ((train @ queries.T) == 1).float().mean() > 0.1  # otherwise cosines would have sufficed
    assert leave_one_out(train, labels) > 0.5


def test_features_that_differ_are_compared_by_their_cosines(monkeypatch):
    labels = torch.arange(60) % 7
    train, queries = features_of(0, labels), features_of(1, labels)
    module = KnnModule(train, labels, [5], TEMPERATURE, num_classes=7)
    assert module.train_features.data_ptr() == train.data_ptr()  # no second copy of an ImageNet
    monkeypatch.setattr(neighbours, "_ALIKE", 2.0)
    centred = KnnModule(train, labels, [5], TEMPERATURE, num_classes=7)
    torch.testing.assert_close(centred(queries)[5].float(), module(queries)[5])


@pytest.mark.parametrize("val", ["train", "linked", "relabelled"])
def test_an_image_is_not_its_own_neighbour(tmp_path, caplog, val):
    """Each class has two images in other classes' colours, so only an image itself would be a correct neighbour."""
    rng = np.random.default_rng(0)
    colours = [tuple(int(c) for c in rng.integers(0, 255, 3)) for _ in range(4)]
    for index, colour in enumerate(colours):
        for name, shift in ((f"class{index}", 0), (f"class{(index + 1) % 4}", 1)):
            (tmp_path / "train" / name).mkdir(parents=True, exist_ok=True)
            moved = tuple(c + shift for c in colour)
            Image.new("RGB", (20, 20), moved).save(tmp_path / "train" / name / f"{shift}.png")
    if val == "linked":
        (tmp_path / "linked").symlink_to(tmp_path / "train")
    if val == "relabelled":  # fewer classes, and files that are links
        for name in ("class1", "class3"):
            (tmp_path / val / name).mkdir(parents=True)
            for file in (tmp_path / "train" / name).iterdir():
                (tmp_path / val / name / file.name).symlink_to(file)
    datasets = [f"LabelledFolder:root={tmp_path}/{name}" for name in ("train", val)]
    with caplog.at_level("INFO", "dinov2"):
        options = {"nb_knn": [1, 100], "num_workers": 0, "n_per_class_list": [-1, 2]}
        results = eval_knn_with_model(MeanColour(), str(tmp_path / "out"), *datasets, **options)
    assert results["('full', 1) Top 1"] == results["('2 per class', 1) Top 1"] == 0.0
    assert "('full', 7) Top 1" in results  # 8 images except itself
    count = 4 if val == "relabelled" else 8
    assert f"kNN: {count} of the {count} images to classify are training images, too" in caplog.text


def test_one_dataset_given_twice_is_opened_and_measured_once(tmp_path, caplog):
    values = np.arange(400, dtype=np.uint16).reshape(20, 20) * 10
    for folder in ("train/a", "train/b", "val/a"):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(values).save(tmp_path / folder / "1.png")
    train, val = (f"LabelledFolder:root={tmp_path}/{name}" for name in ("train", "val"))
    for other, times in ((train, 1), (val, 2)):
        caplog.clear()
        with caplog.at_level("INFO", "dinov2"):
            pair = open_pair(("--train-dataset", train, None), ("--val-dataset", other, None))
        assert caplog.text.count("intensity: values from") == times
        assert [len(dataset) for dataset in pair] == [2, 2 if other == train else 1]


def test_other_images_have_all_neighbours_and_the_linear_evaluation_warns_of_the_same_ones(tmp_path, caplog):
    write_classes(tmp_path / "both" / "train", {"red": (250, 20, 20), "blue": (20, 20, 250)}, 2)
    write_classes(tmp_path / "both" / "val", {"red": (240, 20, 20), "blue": (20, 20, 240)}, 2)
    train, val = (LabelledFolder(str(tmp_path / "both" / name)) for name in ("train", "val"))
    assert find_same_files(train, val).tolist() == [-1] * 4
    assert find_same_files(train, train).tolist() == [0, 1, 2, 3]
    assert find_same_files(train, Relabelled(train, np.array([1, 0]))).tolist() == [0, 1, 2, 3]
    shared = LabelledFolder(str(tmp_path / "both"))  # classes "train" and "val": one half of it is in train
    assert find_same_files(train, shared).tolist() == [0, 1, 2, 3, -1, -1, -1, -1]
    both = f"LabelledFolder:root={tmp_path}/both"
    make_eval_data_loader(both, 2, 0, MetricType.MEAN_ACCURACY, train_dataset=train, has_mapping=True)
    assert "--val-dataset: 4 of 8 images are images of --train-dataset, too" in caplog.text


def test_limited_samples_per_class():
    labels = torch.arange(90) % 3
    train, queries = features_of(0, labels), features_of(1, labels)
    results = eval_knn_features(train, labels, queries, labels, nb_knn=[1, 10], n_per_class_list=[-1, 4], n_tries=2)
    assert set(results) == {("full", 1), ("full", 10), ("4 per class", 1), ("4 per class", 4)}
    assert float(results["4 per class", 1]["top-1"]) != float(results["full", 1]["top-1"])


def test_no_features():
    empty = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    with pytest.raises(DataError, match="got 0 for training"):
        eval_knn_features(*empty, torch.ones(1, 3), torch.zeros(1, dtype=torch.int64), nb_knn=[1])


class MeanColour(torch.nn.Module):
    patch_size = 1

    def forward(self, images):
        return images.mean(dim=(2, 3))


def write_classes(root, colours, count, size=20):
    for name, colour in colours.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (size, size), tuple(max(c - 5 * i, 0) for c in colour)).save(root / name / f"{i}.png")


def test_with_model_writes_upstreams_lines(tmp_path):
    colours = {"red": (250, 20, 20), "green": (20, 250, 20), "blue": (20, 20, 250)}
    write_classes(tmp_path / "train", colours, 4)
    write_classes(tmp_path / "val", {"red": (230, 40, 40), "blue": (40, 40, 230)}, 3)  # one class less
    for _ in range(2):
        results = eval_knn_with_model(
            MeanColour(),
            str(tmp_path / "out"),
            f"LabelledFolder:root={tmp_path}/train",
            f"LabelledFolder:root={tmp_path}/val",
            nb_knn=[2, 100],
            num_workers=0,
        )
    assert results == {f"('full', {k}) Top {n}": 100.0 for k in (2, 12) for n in (1, 5)}  # of 12 images
    lines = (tmp_path / "out" / "results_eval_knn.json").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{key: value} for key, value in results.items()] * 2


def test_classes_that_were_never_seen(tmp_path):
    write_classes(tmp_path / "train", {"red": (250, 20, 20)}, 1)
    write_classes(tmp_path / "val", {"rouge": (250, 20, 20)}, 1)
    with pytest.raises(DataError, match="rouge"):
        eval_knn_with_model(
            MeanColour(), str(tmp_path), f"LabelledFolder:root={tmp_path}/train", f"LabelledFolder:root={tmp_path}/val"
        )


def test_bad_numbers_are_refused_before_any_work():
    with pytest.raises(ConfigError, match="nb_knn"):
        main(get_knn_args_parser().parse_args(["--nb_knn", "0"]))


class Counted(torch.utils.data.Dataset):
    """Images of classes 0, 1, 0, ..., whose pixels have the class's value; ``reads`` counts in all processes."""

    def __init__(self, count):
        self.count, self.reads = count, multiprocessing.Value("i", 0)

    def __getitem__(self, index):
        with self.reads.get_lock():
            self.reads.value += 1
        return torch.full((3, 2, 2), float(index % 2)) + 1e-3 * index, index % 2

    def get_targets(self):
        return np.arange(self.count) % 2

    def __len__(self):
        return self.count


def test_between_evaluations_the_processes_read_ahead_for_the_next_one():
    train, val = Counted(7), Counted(4)
    network = ModelWithNormalize(torch.nn.Sequential(MeanColour(), torch.nn.Linear(3, 3)))
    before = set(multiprocessing.active_children())
    accuracy = KnnAccuracy(train, val, batch_size=2, num_workers=1, k=3)
    try:
        found, processes = [], []
        for _ in range(3):
            found.append(accuracy(network))
            processes.append(set(multiprocessing.active_children()) - before)
        assert len(set(found)) == 1 and processes[0] == processes[1] == processes[2] and len(processes[0]) == 1
        asked = 1 + 3 * 11 + 2 * 2  # one for the shape, 11 in each call, two batches for the next call
        deadline = time.monotonic() + 60
        while train.reads.value + val.reads.value < asked and time.monotonic() < deadline:
            time.sleep(0.01)
        assert train.reads.value + val.reads.value == asked
    finally:
        accuracy.close()
    assert set(multiprocessing.active_children()) == before
