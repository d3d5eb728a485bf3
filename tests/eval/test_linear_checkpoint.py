"""The error if the checkpoint of a linear evaluation cannot be written; the rest is in test_linear.py."""

import errno
import os

import pytest
import torch

from dinov2_custom.errors import CheckpointError
from dinov2_custom.eval import linear
from dinov2_custom.eval.linear import LinearCheckpointer


def make(folder):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    return LinearCheckpointer(model, folder, optimizer, scheduler)


@pytest.mark.parametrize(
    "number, words",
    [
        (errno.ENOSPC, "make room, then the same command resumes"),
        (errno.EACCES, "allow it (owner, permissions), or choose another directory, then"),
        (errno.EROFS, "have the file system mounted for writing"),
        (errno.EBADF, "fix that, then"),
    ],
)
def test_the_advice_is_that_of_the_error(tmp_path, monkeypatch, number, words):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    checkpointer = make(tmp_path)
    monkeypatch.setattr(linear, "save_atomically", fails)
    with pytest.raises(CheckpointError) as e:
        checkpointer.save("model_final", 3)
    assert os.strerror(number) in str(e.value) and words in str(e.value)


@pytest.mark.parametrize(
    "change",
    [{"model": 3}, {"model": {"weight": 1}}, {"optimizer": []}, {"optimizer": {}}, {"scheduler": 7}, {"iteration": "x"}]
    + [{"iteration": float("inf")}, {"iteration": -2}],
)
def test_values_that_no_evaluation_writes_are_one_error(tmp_path, change):
    make(tmp_path).save("running", 3)
    assert make(tmp_path).resume_or_load(None, resume=True) == 3
    torch.save(torch.load(tmp_path / "running.pth", weights_only=True) | change, tmp_path / "running.pth")
    with pytest.raises(CheckpointError, match="running.pth.*--no-resume"):
        make(tmp_path).resume_or_load(None, resume=True)


def test_the_advice_on_given_classifiers_is_another_file(tmp_path):
    (tmp_path / "first").mkdir()
    make(tmp_path / "first").save("running", 3)
    given = tmp_path / "first" / "running.pth"
    torch.save(torch.load(given, weights_only=True) | {"iteration": -2}, given)
    with pytest.raises(CheckpointError, match="running.pth.*--classifier-fpath"):
        make(tmp_path / "second").resume_or_load(str(given), resume=True)


@pytest.mark.parametrize("name", ["../elsewhere.pth", "/etc/passwd", "", "a\0b", "x" * 5000, "a/b"])
def test_the_name_of_the_last_one_is_a_files_here(tmp_path, name):
    (tmp_path / "last_checkpoint").write_text(name)
    assert make(tmp_path).resume_or_load(None, resume=True) == -1
