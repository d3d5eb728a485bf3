"""What every script says when a disk is full, and what stays a fault with a traceback."""

import errno
import os

import pytest

from dinov2_custom import entry


def failing(number, *names):
    def main():
        raise OSError(number, os.strerror(number), *names)

    return main


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_no_room_is_one_sentence(capsys, number):
    assert entry.reported(failing(number, "/runs/config.yaml"), error_code=2) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: expected room to write for /runs/config.yaml, got {os.strerror(number)}; make room")
    assert said.count("\n") == 1


def test_a_really_full_file_too(capsys):
    def main():
        with open("/dev/full", "w") as file:
            file.write("x")

    if not os.path.exists("/dev/full"):
        pytest.skip("NO FULL FILE: /dev/full is Linux's")
    assert entry.reported(main) == 1
    assert capsys.readouterr().err.startswith("error: expected room to write, got No space left on device")


def test_other_faults_keep_their_traceback():
    with pytest.raises(OSError):
        entry.reported(failing(errno.EIO))
