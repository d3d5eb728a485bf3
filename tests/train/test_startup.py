"""What a run logs before its first step and after its last one."""

import shlex
from pathlib import Path

import pytest

from dinov2_custom.train.course import Course, run_length
from dinov2_custom.train.startup import describe_end, short_run_warning
from tests.train.batches import tiny_config

SMALL = (
    "student.layerscale=1.0", "dino.head_n_prototypes=256", "teacher.momentum_teacher=0.97",
    "crops.global_crops_scale=[0.5,1.0]",
)  # fmt: skip
LONG = (
    "student.layerscale=1e-5", "dino.head_n_prototypes=65536", "teacher.momentum_teacher=0.996",
    "crops.global_crops_scale=[0.32,1.0]",
)  # fmt: skip


def doubts(num_images, *overrides):
    cfg = tiny_config(*overrides)
    return short_run_warning(cfg, Course(run_length(cfg, num_images, 1)), num_images)


def test_values_of_long_runs_are_named_in_a_short_one():
    text = doubts(818, *LONG, "train.max_steps=260")
    assert text.startswith("260 iterations, 818 images: ") and "configs/small.yaml" in text
    keys = ("student.layerscale=1e-05", "dino.head_n_prototypes=65,536", "momentum_teacher=0.996", "global_crops_scale")
    assert all(key in text for key in keys)


@pytest.mark.parametrize("num_images", [300, 3000])
@pytest.mark.parametrize("steps", [260, 600, 20_000])
def test_values_of_short_runs_are_not(num_images, steps):
    assert doubts(num_images, *SMALL, f"train.max_steps={steps}") == ""


@pytest.mark.parametrize("length", ["train.max_steps=100000", "train.max_hours=8"])
def test_values_of_long_runs_are_not_in_one_on_many_images(length):
    assert doubts(100_000, *LONG, length) == ""


def test_each_value_is_checked_against_what_it_depends_on():
    assert doubts(818, *LONG, "train.max_steps=100000").count("(") == 1  # prototypes: there are no more images
    assert "head_n_prototypes" not in doubts(100_000, *LONG, "train.max_steps=260")
    assert "layerscale" not in doubts(818, *LONG, "student.layerscale=null", "train.max_steps=260")
    assert doubts(818, *LONG, "train.max_steps=260", "student.pretrained_weights=/some/weights.pth") == ""


def test_the_next_command_has_the_datasets_of_the_evaluation():
    train, val = "LabelledFolder:root=/some labelled/train", "LabelledFolder:root=/some labelled/val"
    known = (f"evaluation.online.knn_train={train}", f"evaluation.online.knn_val={val}")
    for options, datasets in ((known, [train, val]), ((), ["LabelledFolder:root=TRAIN", "LabelledFolder:root=VAL"])):
        words = shlex.split(describe_end(tiny_config(*options), Path("t.pth"), Path("c"))[-1])
        assert [words[words.index(f"--{name}-dataset") + 1] for name in ("train", "val")] == datasets
