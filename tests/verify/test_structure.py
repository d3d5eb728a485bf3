import random

import pytest
from PIL import Image

from dinov2_custom.verify.structure import fault
from tests.data.pictures import encode, picture
from tests.verify.files import animation, bad_files, jpeg, overwritten, sound_files

FORMATS = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}


@pytest.mark.parametrize("name", sound_files())
def test_nothing_is_wrong_with_sound_files(name):
    data = sound_files()[name]
    assert fault(data, "JPEG" if data[:2] == b"\xff\xd8" else FORMATS.get(name[-4:], "OTHER")) == ""


def test_every_flipped_bit_of_a_png_is_found():
    data, rng = encode(picture(30, 20)), random.Random(0)
    for _ in range(300):
        place = rng.randrange(8, len(data))
        assert fault(overwritten(data, bytes([data[place] ^ 1 << rng.randrange(8)]), place / len(data) + 1e-9), "PNG")


@pytest.mark.parametrize(
    "name, text",
    [
        ("no_end.jpg", "cut off"),
        ("cut.jpg", "cut off"),
        ("header_only.jpg", "length"),
        ("zeros_inside.jpg", "run of zeros"),
        ("erased_inside.jpg", "in the pixel data"),
        ("noise_inside.jpg", " at byte "),
        ("cut.png", "cut off"),
        ("cut.webp", "cut off"),
    ],
)
def test_faults_are_named(name, text):
    assert text in fault(bad_files()[name][0], FORMATS[name[name.index(".") :]])


def test_a_run_of_ones_is_no_fill():
    data = jpeg()
    assert "run of 0xff" in fault(overwritten(data, b"\xff" * 64 + b"\0"), "JPEG")
    assert fault(data[:-2] + b"\xff" * 5 + data[-2:], "JPEG") == "", "fill bytes before a marker"


@pytest.mark.parametrize("change, text", [("drop", "expected"), ("swap", "out of order")])
def test_restart_markers_are_counted(change, text):
    data = jpeg(size=(160, 160), restart_marker_rows=1)
    places = [i for i in range(len(data) - 1) if data[i] == 0xFF and 0xD0 <= data[i + 1] <= 0xD7]
    assert len(places) == 9
    last = places[-1]
    broken = (
        data[:last] + data[last + 2 :] if change == "drop" else overwritten(data, b"\xff\xd6", last / len(data) + 1e-9)
    )
    assert text in fault(broken, "JPEG")


@pytest.mark.parametrize("quality", [20, 75, 95])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 2}])
def test_no_false_alarm(quality, options):
    for size in ((1, 1), (7, 9), (64, 64), (250, 131)):
        for image in (picture(*size, seed=quality), Image.new("RGB", size, (9, 9, 9))):
            for mode in ("RGB", "L", "CMYK"):
                for subsampling in (0, 1, 2):
                    data = encode(image.convert(mode), "JPEG", quality=quality, subsampling=subsampling, **options)
                    assert fault(data, "JPEG") == "", (size, mode, subsampling)


def test_other_formats_are_ignored():
    assert fault(b"anything", "TIFF") == ""
    assert fault(animation("GIF"), "GIF") == ""
    assert "cut off" in fault(animation("GIF")[:-1], "GIF")
