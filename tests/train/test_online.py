"""Evaluation during training: the same weights with and without, the same rows after a kill, the best teacher kept."""

import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from dinov2_custom.data.loaders import make_train_loader
from dinov2_custom.errors import ConfigError, DataError
from dinov2_custom.train import online
from dinov2_custom.train.health import rankme
from dinov2_custom.train.online import START_FILE, OnlineEvaluation, describe, geometry, similarity
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from dinov2_custom.train.teacher_file import save_atomically, teacher_path
from dinov2_custom.utils.run_folder import find_weights
from tests.processes import launch_source
from tests.train.batches import tiny_config
from tests.train.test_train import NOT_NUMBERS_OF_TRAINING, RUN, clean, images, rows, train, weights

__all__ = ["clean", "images"]  # fixtures
SETTINGS = (*RUN, "evaluation.online.every=3", "evaluation.online.images=6", "checkpointing.period=3")
HELD_OUT = {"eval_rankme", "eval_uniformity", "eval_alignment", "eval_loss", "eval_s"}
TO_START = {"eval_cosine_to_start", "eval_cka_to_start", "start_rankme", "start_uniformity", "start_alignment"}
KNN = {"eval_knn", "start_knn", "pixels_knn", "knn_images"}


def of_evaluation(out) -> dict[int, dict]:
    """Return the numbers of training and evaluation by iteration, without times."""
    return {
        row["iteration"]: {key: value for key, value in row.items() if key not in NOT_NUMBERS_OF_TRAINING | {"eval_s"}}
        for row in rows(out)
    }


def best_teacher(out) -> dict:
    return torch.load(out / "eval" / "best" / "teacher_checkpoint.pth", weights_only=True)


@pytest.mark.parametrize(
    "more", [(), ("train.centering=sinkhorn_knopp", "student.drop_path_rate=0.3", "train.lean=false")]
)
def test_weights_are_bitwise_the_same_with_and_without(images, tmp_path, capsys, more):
    base = [f"train.dataset_path={images}", *RUN, *more]
    state = torch.get_rng_state()
    train(*base, "--output-dir", tmp_path / "without")
    knn = [f"evaluation.online.{name}=LabelledFolder:root={images}" for name in ("knn_train", "knn_val")]
    options = ["evaluation.online.every=3", "evaluation.online.images=6", *knn]
    train(*base, *options, "--output-dir", tmp_path / "with")
    assert torch.equal(state, torch.get_rng_state())
    without, with_ = weights(tmp_path / "without"), weights(tmp_path / "with")
    assert without.keys() == with_.keys() and all(torch.equal(without[key], with_[key]) for key in without)
    found = of_evaluation(tmp_path / "with")
    for iteration in (2, 5, 7):
        assert HELD_OUT | TO_START | KNN <= found[iteration].keys() | {"eval_s"}
        assert all(math.isfinite(value) for value in found[iteration].values())
    assert not (HELD_OUT | TO_START | KNN) & found[0].keys()
    added = ("eval_", "start_", "pixels_", "knn_")
    of_training = {key: value for key, value in found[7].items() if not key.startswith(added)}
    assert of_training.keys() == of_evaluation(tmp_path / "without")[7].keys()
    assert of_training["total_loss"] == of_evaluation(tmp_path / "without")[7]["total_loss"]
    log = capsys.readouterr().out
    line = next(line for line in log.splitlines() if "evaluation: kNN" in line)
    assert "start 0." in line and "pixels 0." in line and "RankMe" in line and "training" in line
    assert "6 training images, as none are held out" in log
    page = Path(__file__).resolve().parents[2] / "docs" / "monitoring.md"
    keys = {key for row in rows(tmp_path / "with") for key in row}
    assert keys <= set(re.findall(r"`(\w+)`", page.read_text()))


def test_a_killed_run_writes_the_same_rows_and_keeps_the_same_best_teacher(images, tmp_path, monkeypatch):
    base = [f"train.dataset_path={images}", *SETTINGS, "train.path_preserved=held.txt", "train.frac=0.5"]
    train(*base, "--output-dir", tmp_path / "whole")

    calls, evaluate = [], online.OnlineEvaluation.evaluate

    def killed(self, model, iteration, *rest):
        if iteration == 5 and not calls:
            calls.append(iteration)
            raise KeyboardInterrupt
        return evaluate(self, model, iteration, *rest)

    monkeypatch.setattr(online.OnlineEvaluation, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        train(*base, "--output-dir", tmp_path / "killed")
    train(*base, "--output-dir", tmp_path / "killed")
    assert of_evaluation(tmp_path / "whole") == of_evaluation(tmp_path / "killed")
    assert list(of_evaluation(tmp_path / "whole")) == [0, 2, 5, 7]
    a, b = (best_teacher(tmp_path / name) for name in ("whole", "killed"))
    assert a["iteration"] == b["iteration"] and all(
        torch.equal(a["teacher"][key], b["teacher"][key]) for key in a["teacher"]
    )
    values = {
        iteration: row["eval_rankme"] for iteration, row in of_evaluation(tmp_path / "whole").items() if iteration
    }
    assert a["iteration"] == max(values, key=values.get) and a["eval_rankme"] == max(values.values())
    numbered = torch.load(tmp_path / "whole/eval/training_7/teacher_checkpoint.pth", weights_only=True)
    assert numbered.keys() == {"teacher"} and numbered["teacher"].keys() == a["teacher"].keys()
    assert find_weights(str(tmp_path / "whole")).endswith("training_7/teacher_checkpoint.pth")


def test_held_out_images_are_evaluated_and_not_trained_on(images, tmp_path, capsys):
    train(f"train.dataset_path={images}", *SETTINGS, "train.path_preserved=held.txt", "train.frac=0.5",
          "evaluation.online.images=99", "evaluation.online.best=none", "evaluation.online.compare_to_start=false",
          "--output-dir", tmp_path / "out")  # fmt: skip
    assert "6 held-out images" in capsys.readouterr().out
    assert not (tmp_path / "out" / "eval" / "best").exists() and not (tmp_path / "out" / START_FILE).exists()
    assert not TO_START & of_evaluation(tmp_path / "out")[7].keys()


def test_best_by_loss_is_the_lowest_and_needs_datasets_for_knn(images, tmp_path):
    images = shutil.copytree(images, tmp_path / "images")
    next(images.rglob("*.png")).rename(images / os.fsdecode(b"\xe9.png"))  # names may be any bytes
    train(f"train.dataset_path={images}", *SETTINGS, "evaluation.online.best=loss", "--output-dir", tmp_path / "out")
    losses = {i: row["eval_loss"] for i, row in of_evaluation(tmp_path / "out").items() if "eval_loss" in row}
    assert best_teacher(tmp_path / "out")["iteration"] == min(losses, key=losses.get)
    for wrong in ("evaluation.online.best=knn", f"evaluation.online.knn_val=LabelledFolder:root={images}"):
        with pytest.raises(ConfigError, match=r"evaluation\.online\.knn"):
            train(f"train.dataset_path={images}", *SETTINGS, wrong, "--output-dir", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


TWO = """
import sys
from dinov2_custom.train import get_args_parser, main
assert main(get_args_parser().parse_args(sys.argv[1:])) == 0
"""


def test_two_processes_share_the_readable_images_also_sharded(images, tmp_path):
    images = shutil.copytree(images, tmp_path / "images")
    (images / "class_1" / "torn.png").write_bytes(b"torn")
    parts = [f"compute_precision.{m}.{p}" for m in ("student", "teacher") for p in ("backbone", "dino_head")]
    sharded = [f"{part}.sharding_strategy=FULL_SHARD" for part in parts]
    labelled = [f"evaluation.online.{name}=LabelledFolder:root={images}" for name in ("knn_train", "knn_val")]
    base = [f"train.dataset_path={images}", *SETTINGS, *labelled, "evaluation.online.images=13"]
    for name, every in (("with", 3), ("without", 0)):
        options = [f"evaluation.online.every={every}", "train.batch_size_per_gpu=2", "--output-dir", tmp_path / name]
        launch_source(tmp_path, TWO, *map(str, [*base, *sharded, *options]))
    one, two = weights(tmp_path / "with"), weights(tmp_path / "without")
    assert all(torch.equal(one[key], two[key]) for key in two)
    train(*base, "--output-dir", tmp_path / "one")
    one, two = (of_evaluation(tmp_path / name)[7] for name in ("one", "with"))
    for key in ("start_rankme", "start_uniformity", "start_alignment", "start_knn", "pixels_knn"):
        assert two[key] == pytest.approx(one[key], rel=1e-4), key
    assert two["knn_images"] == one["knn_images"] == 12


OUT = Path("unused")  # of tiny_config


@pytest.fixture(scope="module")
def network():
    return SSLMetaArch(tiny_config()).train()


@pytest.fixture
def evaluation_of(images):
    """Return a function to the evaluation of a run in ``OUT``, in the current folder, with further settings."""

    def make(*more, root=images):
        options = (f"train.dataset_path={root}", "train.num_workers=0", "evaluation.online.every=1")
        cfg = tiny_config(*options, "evaluation.online.images=12", *more)
        return OnlineEvaluation(cfg, make_train_loader(cfg, rank=0, world_size=1))

    return make


def labelled(train, val):
    return [f"evaluation.online.knn_{k}=LabelledFolder:root={v}" for k, v in (("train", train), ("val", val))]


def test_labelled_files_that_disappear_are_left_out_and_the_folder_ends_knn_only(
    images, tmp_path, network, evaluation_of, caplog
):
    val = shutil.copytree(images, tmp_path / "val")
    (val / "class_0" / "0.png").write_bytes(b"torn before the start")
    evaluation = evaluation_of(*labelled(images, val))
    evaluation.begin([], False)
    evaluation.evaluate_start(network, 0.05)
    assert caplog.text.count("evaluation.online.knn_val: 1 of 12") == 1 and "class_0/0.png" in caplog.text
    first = evaluation.evaluate(network, 0, 0.05, lambda: 0.0)
    assert first["knn_images"] == 11 and first["eval_knn"] == first["start_knn"]
    gone = val / "class_1" / "1.png"
    gone.unlink()
    second = evaluation.evaluate(network, 1, 0.05, lambda: 0.0)
    assert second["knn_images"] == 10 and "evaluation.online.knn_val: 2 of 12" in caplog.text
    other = val / "class_1" / "3.png"
    kept = other.read_bytes()
    other.unlink()  # two fewer than at the start, 8 % of the labelled images: another kNN
    unlike = evaluation.evaluate(network, 2, 0.05, lambda: 0.0)
    assert not {"eval_knn", "knn_images", "start_knn"} & unlike.keys() and not evaluation.is_best
    assert "2 labelled images could be read at the start and not now" in caplog.text
    other.write_bytes(kept)
    assert evaluation.evaluate(network, 3, 0.05, lambda: 0.0)["knn_images"] == 10
    shutil.rmtree(val)
    third = evaluation.evaluate(network, 2, 0.05, lambda: 0.0)
    assert "evaluation.online.knn_val: 12 of 12" in caplog.text and "restore the folder" in caplog.text
    assert not {"eval_knn", "start_knn", "pixels_knn"} & third.keys() and "eval_rankme" in third
    assert not evaluation.is_best
    with pytest.raises(DataError, match=r"evaluation\.online\.knn_val: expected .*val"):
        evaluation_of(*labelled(images, val))


def test_labelled_images_are_the_same_by_their_names(images, tmp_path, network, evaluation_of, caplog):
    val = shutil.copytree(images, tmp_path / "val")
    first = evaluation_of(*labelled(images, val))
    again = evaluation_of(*labelled(f"{images}/", f"{val}/"))
    assert first._digest_of_labelled == again._digest_of_labelled
    (val / "class_0" / "0.png").unlink()
    assert evaluation_of(*labelled(images, val))._digest_of_labelled != first._digest_of_labelled


def test_an_image_left_out_of_the_votes_is_nobodys_own(images, tmp_path, network, evaluation_of):
    """A dataset that is compared with itself without a file gives the accuracy of one that never had the file."""
    both = shutil.copytree(images, tmp_path / "both")
    evaluation = evaluation_of(*labelled(both, both))
    (both / "class_0" / "4.png").unlink()
    fewer = evaluation_of(*labelled(both, both))
    assert evaluation.knn.exclude is not None
    one, other = (each._knn("eval_knn", network.teacher["backbone"]) for each in (evaluation, fewer))
    assert one == other and one["knn_images"] == 11


def test_the_start_is_compared_with_on_the_same_readable_images_only(images, tmp_path, network, evaluation_of, caplog):
    own = shutil.copytree(images, tmp_path / "own")
    files = sorted(own.rglob("*.png"))
    (own / "class_0" / "0.png").write_bytes(b"torn")
    evaluation = evaluation_of(root=own)
    evaluation.begin([], False)
    evaluation.evaluate_start(network, 0.05)
    assert len(evaluation.start["features"]) == len(evaluation.readable) == 11 and "0.png" in caplog.text
    assert evaluation.evaluate(network, 0, 0.05, lambda: 0.0)["eval_cosine_to_start"] == pytest.approx(1)
    save_atomically({"teacher": {}, **evaluation.facts}, teacher_path(OUT.absolute(), "best"))
    for name, torn in (("as before", ()), ("another", files[-1:]), ("all", files)):
        resumed = evaluation_of(root=own)
        caplog.clear()
        for path in torn:
            path.write_bytes(b"torn")
        resumed.begin([{"iteration": 0, "eval_rankme": 99.0}], True)
        row = resumed.evaluate(network, 1, 0.05, lambda: 0.0)
        assert ("eval_cosine_to_start" in row) == ("start_rankme" in row) == (name == "as before")
        assert ("eval_rankme" in row) == (name != "all") and resumed.is_best == (name == "another")
        assert ("no comparison with the start" in caplog.text) == (name != "as before")
    assert "none of the 12" in caplog.text


def test_the_best_is_chosen_among_values_of_one_evaluation(network, evaluation_of, caplog):
    first = evaluation_of()
    first.begin([], False)
    first.evaluate(network, 4, 0.05, lambda: 0.0)
    save_atomically({"teacher": {}, **first.facts}, teacher_path(OUT.absolute(), "best"))
    rows = [{"iteration": 2, "eval_rankme": 50.0}, {"iteration": 4, "eval_rankme": 7.0}]  # 50: of an earlier evaluation
    same = evaluation_of("evaluation.online.compare_to_start=false")
    same.begin(rows, True)
    assert same.best == 7.0 and "compared" not in caplog.text
    for other in ("evaluation.online.images=4", "evaluation.online.best=loss"):
        caplog.clear()
        changed = evaluation_of("evaluation.online.compare_to_start=false", other)
        changed.begin(rows, True)
        assert changed.best == -math.inf and "cannot be compared" in caplog.text
        changed.evaluate(network, 6, 0.05, lambda: 0.0)
        assert changed.is_best and changed.facts["evaluation"]["since"] == 6


def test_labelled_images_added_by_a_resume_leave_the_comparison_of_the_others(images, network, evaluation_of, caplog):
    first = evaluation_of()
    first.begin([], False)
    first.evaluate_start(network, 0.05)
    resumed = evaluation_of(*labelled(images, images))
    resumed.begin([], True)
    row = resumed.evaluate(network, 3, 0.05, lambda: 0.0)
    assert {"eval_knn", "start_rankme", "eval_cosine_to_start", "eval_cka_to_start"} <= row.keys()
    assert not {"start_knn", "pixels_knn"} & row.keys()
    assert "no start_knn" in caplog.text and "no comparison" not in caplog.text
    others = evaluation_of("evaluation.online.images=4")
    others.begin([], True)
    row = others.evaluate(network, 3, 0.05, lambda: 0.0)
    assert not {"start_rankme", "eval_cosine_to_start"} & row.keys() and "its images" in caplog.text


@pytest.mark.parametrize("content", [b"torn", "tensor", "other keys"])
def test_a_damaged_file_of_the_start_stops_no_resume(evaluation_of, caplog, content):
    path = OUT.absolute() / START_FILE
    path.parent.mkdir(parents=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(torch.ones(2) if content == "tensor" else {"other": 1}, path)
    resumed = evaluation_of()
    resumed.begin([], True)
    assert resumed.start is None and str(path) in caplog.text and "no comparison with the start" in caplog.text


def test_evaluations_that_say_little_are_warned_about(images, tmp_path, evaluation_of, caplog):
    single = shutil.copytree(images / "class_0", tmp_path / "single" / "class_0").parent
    evaluation_of("evaluation.online.images=1", *labelled(images, single)).begin([], False)
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    for part in ("images: expected at least 2", "knn_val: expected images of at least 2 classes", "6 images; chance"):
        assert sum(part in warning for warning in warnings) == 1
    assert "CKA" not in describe({"eval_cosine_to_start": 0.9, "eval_s": 1.0}, 0.0)


def test_geometry_of_known_features():
    same = torch.ones(5, 2, 3)
    found = geometry(same)
    assert rankme(same[:, 0]) == pytest.approx(1, abs=1e-4)
    assert found["alignment"] == 0 and float(found["uniformity"]) == pytest.approx(0, abs=1e-14)
    axes = torch.eye(4)[:, None].repeat(1, 2, 1)
    axes[:, 1] *= 3  # lengths do not matter
    found = geometry(axes)
    assert rankme(axes[:, 0]) == pytest.approx(4, rel=1e-4)
    assert float(found["alignment"]) == pytest.approx(0, abs=1e-12)
    assert float(found["uniformity"]) == pytest.approx(-4)  # squared distances are 2
    opposite = torch.stack([torch.eye(4), -torch.eye(4)], dim=1)
    assert float(geometry(opposite)["alignment"]) == pytest.approx(4)


def test_similarity_ignores_a_rotation_in_cka_only():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 6, generator=generator)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    assert similarity(features, features) == pytest.approx({"cosine_to_start": 1, "cka_to_start": 1})
    turned = similarity(2 * features @ rotation, features)
    assert turned["cka_to_start"] == pytest.approx(1, rel=1e-5) and turned["cosine_to_start"] < 0.9
    other = similarity(torch.randn(20, 6, generator=generator), features)
    assert other["cka_to_start"] < 0.7
