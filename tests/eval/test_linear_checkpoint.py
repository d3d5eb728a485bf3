"""What a linear evaluation says when its checkpoint cannot be written; the rest is in test_linear.py."""

import errno
import os

import pytest
import torch

from dinov2_custom.errors import CheckpointError
from dinov2_custom.eval import linear_checkpoint
from dinov2_custom.eval.linear_checkpoint import LinearCheckpointer


@pytest.mark.parametrize(
    "number, words",
    [
        (errno.ENOSPC, "make room, then the same command goes on"),
        (errno.EACCES, "allow it (owner, permissions), or choose another directory, then"),
        (errno.EROFS, "have the file system mounted for writing"),
        (errno.EBADF, "mend that, then"),
    ],
)
def test_the_advice_is_that_of_the_error(tmp_path, monkeypatch, number, words):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    checkpointer = LinearCheckpointer(model, tmp_path, optimizer, scheduler)
    monkeypatch.setattr(linear_checkpoint, "save_atomically", fails)
    with pytest.raises(CheckpointError) as e:
        checkpointer.save("model_final", 3)
    assert os.strerror(number) in str(e.value) and words in str(e.value)
