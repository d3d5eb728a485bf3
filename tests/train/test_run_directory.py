"""Permissions of a run's files, and no secrets in them."""

import os

import pytest
from omegaconf import OmegaConf

from dinov2_custom.train.run_directory import changed_data, changed_keys
from tests.train.batches import tiny_config
from tests.train.test_step_guard import run
from tests.train.test_train import write_images


def files_of(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("umask", [0o077, 0o027])
def test_every_file_and_folder_of_a_run_follows_the_umask(tmp_path, umask):
    images = write_images(tmp_path / "images", 12)
    before = os.umask(umask)
    try:
        steps = ("train.max_steps=2", "optim.warmup_epochs=0", "train.log_every=1")
        assert run(images, tmp_path / "out", *steps) == 0
        assert run(images, tmp_path / "out", *steps, "--no-resume") == 0
    finally:
        os.umask(before)
    found = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert {"config.yaml", "checkpoint.json", "teacher_checkpoint.pth", "log.txt"} <= {path.name for path in found}
    wrong = {
        str(path): oct(path.stat().st_mode & 0o777)
        for path in found
        if path.stat().st_mode & 0o777 != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert wrong == {}


def test_what_comes_from_the_environment_is_in_no_file_of_a_run(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("PLACE", str(tmp_path / "hunter2"))
    write_images(tmp_path / "hunter2" / "images", 12)
    steps = ("train.max_steps=2", "optim.warmup_epochs=0", "train.log_every=1", "train.tensorboard=true")
    for seed in (0, 1):  # the second resumes with another seed, which is logged with what else has changed
        assert run("${oc.env:PLACE}/images", tmp_path / "out", *steps[seed and 1:], f"train.max_steps={2 + seed}") == 0
    assert len(files_of(tmp_path / "out")) > 8
    telling = [str(path) for path in files_of(tmp_path / "out") if b"hunter2" in path.read_bytes()]
    assert telling == []
    assert "${oc.env:PLACE}/images" in (tmp_path / "out" / "config.yaml").read_text()


def test_what_makes_other_pixels_than_before_is_named():
    before = {"images": 9, "digest": "a", "resize": "torch"}
    assert changed_data(before, dict(before)) == []
    (found,) = changed_data(before, before | {"resize": "Pillow"})
    assert "torch -> Pillow" in found
    images, crops = changed_data(before, {"images": 8, "digest": "b", "resize": "Pillow"})
    assert "9 -> 8" in images and crops == found
    assert changed_data({"images": 9, "digest": "a"}, before) == []  # a checkpoint without this value


def test_another_evaluation_is_named_among_the_changed_settings():
    before = {"config": OmegaConf.to_container(tiny_config("evaluation.online.images=32", "train.log_every=1"))}
    changes = changed_keys(before, tiny_config("evaluation.online.images=8", "train.log_every=2"))
    assert changes == ["evaluation.online.images: 32 -> 8"]
