"""A global batch over any number of GPUs: the product is always the same, or one line says which numbers would do."""

import subprocess
import sys

import pytest

from tests.sky.conftest import REPOSITORY

SCRIPT = REPOSITORY / "sky" / "split_batch.py"


def split(*numbers: int) -> subprocess.CompletedProcess:
    flags = ["--global-batch", str(numbers[0]), "--gpus", str(numbers[1]), "--at-most", str(numbers[2])]
    return subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    ("global_batch", "gpus", "at_most", "per_gpu", "accumulated"),
    [
        (1024, 1, 64, 64, 16),
        (1024, 8, 64, 64, 2),
        (1024, 16, 64, 64, 1),
        (1024, 32, 64, 32, 1),
        (1024, 8, 100, 64, 2),
        (96, 4, 10, 8, 3),
        (7, 7, 64, 1, 1),
        (22, 2, 8, 1, 11),
    ],
)
def test_the_product_is_the_global_batch(global_batch, gpus, at_most, per_gpu, accumulated):
    assert per_gpu * accumulated * gpus == global_batch and per_gpu <= at_most
    done = split(global_batch, gpus, at_most)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"train.batch_size_per_gpu={per_gpu} optim.accumulation_steps={accumulated}\n"


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (
            (1024, 6, 64),
            "divides the global batch of 1,024, got 6; take 4 or 8 GPUs, or for a new run GLOBAL_BATCH=1,020",
        ),
        ((8, 16, 64), "got 16; take 8 GPUs, or for a new run GLOBAL_BATCH=16"),
        ((1024, 0, 64), "of at least 1, got 1024, 0 and 64"),
        ((0, 8, 64), "of at least 1, got 0, 8 and 64"),
    ],
)
def test_what_does_not_divide_is_said_in_one_line(numbers, message):
    done = split(*numbers)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: expected ") and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_the_overrides_are_keys_of_the_configuration():
    from dinov2_custom.configs.schema import all_options

    assert {part.split("=")[0] for part in split(1024, 8, 64).stdout.split()} <= set(all_options())
