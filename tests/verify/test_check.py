import random

import pytest

from dinov2_custom.data.decode import decode_rgb, find_simplejpeg
from dinov2_custom.verify.check import check_image
from tests.verify.files import bad_files, jpeg, overwritten, sound_files


@pytest.fixture(params=["simplejpeg", "pillow"])
def simplejpeg(request):
    if request.param == "pillow":
        return None
    return pytest.importorskip("simplejpeg")


@pytest.mark.parametrize("name", sound_files())
def test_sound(name, simplejpeg):
    data = sound_files()[name]
    found = check_image(data, simplejpeg)
    assert found.reason == ""
    image = decode_rgb(data, name)
    assert (found.width, found.height) == image.size, "what is sound can be trained on"
    assert found.by == ("simplejpeg" if found.format == "JPEG" and simplejpeg else "pillow")


@pytest.mark.parametrize("name", bad_files())
def test_bad(name, simplejpeg):
    data, word = bad_files()[name]
    reason = check_image(data, simplejpeg).reason
    assert reason and word in reason
    assert "<_io" not in reason and "\n" not in reason


def test_reported_properties():
    found = check_image(sound_files()["cmyk.jpg"])
    assert found[1:6] == ("JPEG", "CMYK", 160, 120, 1)
    assert check_image(sound_files()["pages.tif"]).frames == 3
    assert check_image(sound_files()["deep.png"]).mode == "I;16"


def test_all_pages_are_decoded():
    assert "frame 3 of 3" in check_image(bad_files()["last_page.tif"][0]).reason


def test_damage_not_reported_by_pillow_is_found():
    simplejpeg = pytest.importorskip("simplejpeg")
    data, rng, silent = jpeg(size=(320, 240)), random.Random(0), 0
    for _ in range(20):
        damaged = overwritten(data, bytes(512), rng.uniform(0.2, 0.8))
        try:
            decode_rgb(damaged)
            silent += 1
        except Exception:
            continue
        assert check_image(damaged, simplejpeg).reason, "a block of zeros"
        assert check_image(damaged).reason, "without simplejpeg too"
    assert silent >= 15


def test_the_small_decode_finds_what_the_full_one_finds():
    simplejpeg = pytest.importorskip("simplejpeg")
    rng = random.Random(0)
    files = [jpeg(), jpeg(progressive=True), jpeg(mode="L"), jpeg(mode="CMYK"), jpeg(restart_marker_rows=2)]
    found = 0
    for turn in range(150):
        data = files[turn % len(files)]
        damaged = overwritten(data, rng.randbytes(rng.choice([1, 16, 200])), rng.uniform(0.2, 0.9))
        try:
            simplejpeg.decode_jpeg(damaged, colorspace="CMYK" if turn % len(files) == 3 else "RGB")
        except ValueError:
            found += 1
            assert check_image(damaged, simplejpeg).reason
    assert found > 50


class Refusing:
    """A fake simplejpeg that rejects a file with a message."""

    def __init__(self, message):
        self.message = message

    def decode_jpeg_header(self, data):
        raise ValueError(self.message)


@pytest.mark.parametrize("message, sound", [("Invalid SOS parameters for sequential JPEG", True),
                                            ("Unsupported JPEG data precision 12", True),
                                            ("Corrupt JPEG data: bad Huffman code", False)])  # fmt: skip
def test_quirks_of_headers_are_no_damage(message, sound):
    found = check_image(jpeg(), Refusing(message))
    assert (found.reason == "") == sound
    assert found.by == ("pillow" if sound else "simplejpeg")


def test_simplejpeg_is_optional(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    assert find_simplejpeg.__wrapped__() is None
