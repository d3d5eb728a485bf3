"""Which exit code a node of several processes ends with, whatever order torchrun noticed their ends in."""

import runpy
from types import SimpleNamespace

import pytest

from tests.sky.conftest import REPOSITORY


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([75, -9], 137),  # noticed at once, the one that only lost the other first
        ([-9, 75], 137),
        ([-15, 75, 1], 1),
        ([-15, 75], 143),
        ([75, -15], 75),
        ([75], 75),
        ([143, -15], 143),
    ],
)
def test_the_code_is_that_of_the_cause(codes, expected):
    failures = [SimpleNamespace(exitcode=code, timestamp=when) for when, code in enumerate(codes)]
    code_of_the_cause = runpy.run_path(str(REPOSITORY / "sky" / "torchrun.py"))["code_of_the_cause"]
    assert code_of_the_cause(reversed(failures)) == expected
