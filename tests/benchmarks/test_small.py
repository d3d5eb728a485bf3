"""What benchmarks/small.py counts as reached, and that its textures are classes that pixels do not tell apart."""

import pytest

from benchmarks.small import LabelledSet, pixel_accuracies, row
from tests.data.textures import FAMILIES, make_textures

RESULT = {"untrained": 0.4, "trained": 0.51, "rankme_untrained": 3.0, "rankme_trained": 9.0, "teacher_entropy": 2.0}
RESULT |= {"prototype_entropy": 5.0, "num_prototypes": 256, "core_seconds": 90.0, "seconds": 60.0, "collapse": ""}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "yes"),
        ({"trained": 0.49}, "no"),
        ({"untrained": 0.3, "trained": 0.44}, "no"),  # below the pixels
        ({"collapse": "one prototype takes every image"}, "one prototype takes every image"),
    ],
)
def test_reached_is_a_gain_above_pixels_without_collapse(change, said):
    assert row("cells", 0, 0.45, 0.6, RESULT | change)[-1] == said


def test_textures_are_the_same_every_time_and_chance_for_pixels(tmp_path):
    for folder in ("one", "two"):
        make_textures(tmp_path / folder, per_family=8, size=32)
    one, two = ([file.read_bytes() for file in sorted((tmp_path / f).rglob("*.png"))] for f in ("one", "two"))
    assert one == two and len(set(one)) == 8 * len(FAMILIES)
    assert max(pixel_accuracies(LabelledSet("textures", tmp_path / "one", [0]))) < 0.3
