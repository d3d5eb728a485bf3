import io

import numpy as np
import pytest
from PIL import Image

from dinov2_custom.data.decode import decode_rgb
from dinov2_custom.prepare.change import Options, prepare_image, shrunk_size, with_suffix
from tests.data.pictures import encode, picture
from tests.verify.files import bad_files, deep, jpeg, sound_files


def before_format(data):
    return Image.open(io.BytesIO(data)).format


def only(prepared):
    assert len(prepared.outputs) == 1
    return prepared.outputs[0]


@pytest.mark.parametrize("name", sound_files())
def test_without_options_nothing_is_changed(name):
    data = sound_files()[name]
    prepared = prepare_image(data, name, Options())
    assert prepared.action == "kept"
    assert only(prepared).data == data
    assert only(prepared).name == ("named_wrongly.jpg" if name == "named_wrongly.png" else name)


@pytest.mark.parametrize("name", bad_files())
def test_bad_images_are_left_out(name):
    prepared = prepare_image(bad_files()[name][0], name, Options(short_side=8))
    assert prepared.action == "bad" and prepared.outputs == () and prepared.reason


@pytest.mark.parametrize("name", sound_files())
@pytest.mark.parametrize("format", ["keep", "jpeg", "png"])
def test_shrunk_and_converted(name, format):
    data = sound_files()[name]
    output = only(prepare_image(data, name, Options(short_side=10, format=format, quality=95)))
    image = Image.open(io.BytesIO(output.data))
    before = decode_rgb(data)
    assert image.size == (output.width, output.height) == shrunk_size(*before.size, 10)
    assert image.format == {"jpeg": "JPEG", "png": "PNG"}.get(format, image.format)
    assert output.name == with_suffix(name, image.format)
    wanted = before.resize(image.size, Image.Resampling.LANCZOS)
    # brightness: most JPEG files hold colour at half the size
    found, wanted = (np.asarray(one.convert("L"), float) for one in (decode_rgb(output.data), wanted))
    assert np.abs(found - wanted).mean() < (4 if {image.format, before_format(data)} & {"JPEG", "WEBP"} else 0.5)


def test_png_is_exact():
    data = encode(picture(50, 40))
    output = only(prepare_image(encode(picture(50, 40), "BMP"), "a/b.bmp", Options(format="png")))
    assert output.name == "a/b.png"
    assert (np.asarray(decode_rgb(output.data)) == np.asarray(decode_rgb(data))).all()


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    output = only(prepare_image(encode(Image.fromarray(stripes)), "s.png", Options(short_side=16)))
    inside = np.asarray(decode_rgb(output.data))[:, 2:-2]
    assert 120 < inside.min() and inside.max() < 135


def test_grey_stays_grey_and_depth_follows_the_rules_of_training():
    grey = only(prepare_image(jpeg(mode="L"), "g.jpg", Options(short_side=20)))
    assert Image.open(io.BytesIO(grey.data)).mode == "L"
    data = encode(deep("I;16"))
    output = only(prepare_image(data, "d.png", Options(format="jpeg", quality=100)))
    before, after = (np.asarray(decode_rgb(one), float) for one in (data, output.data))
    assert np.abs(before - after).max() <= 2 and 120 < after.mean() < 135


def test_orientation_is_preserved():
    data = sound_files()["turned.jpg"]
    for format in ("keep", "png"):
        output = only(prepare_image(data, "t.jpg", Options(short_side=60, format=format)))
        image = Image.open(io.BytesIO(output.data))
        assert dict(image.getexif()) == {0x0112: 6}
        assert (image.width, image.height) == (80, 60), "the pixels are not turned"


def test_quality():
    sizes = [len(only(prepare_image(encode(picture(80, 60)), "q.png", Options(format="jpeg", quality=q))).data)
             for q in (50, 95)]  # fmt: skip
    assert sizes[0] < 0.6 * sizes[1]


@pytest.mark.parametrize(
    "name, format, wanted",
    [
        ("a/b.JPG", "JPEG", "a/b.JPG"),
        ("b.jpeg", "JPEG", "b.jpeg"),
        ("b.png", "JPEG", "b.jpg"),
        ("b.2024", "PNG", "b.2024.png"),
        ("row7", "WEBP", "row7.webp"),
    ],
)
def test_suffix(name, format, wanted):
    assert with_suffix(name, format) == wanted


@pytest.mark.parametrize(
    "size, side, wanted",
    [((400, 300), 0, (400, 300)), ((400, 300), 300, (400, 300)), ((400, 300), 150, (200, 150)),
     ((300, 400), 150, (150, 200)), ((5000, 3), 2, (3333, 2)), ((100, 100), 512, (100, 100))],
)  # fmt: skip
def test_size(size, side, wanted):
    assert shrunk_size(*size, side) == wanted


def test_signed_grey_follows_the_rules_of_training_too():
    values = np.arange(-128, 128, dtype=np.int8).reshape(16, 16)
    tifffile, file = pytest.importorskip("tifffile"), io.BytesIO()
    tifffile.imwrite(file, values, photometric="minisblack")
    written = Image.open(io.BytesIO(only(prepare_image(file.getvalue(), "s.tif", Options(format="png"))).data))
    assert written.mode == "L"
    np.testing.assert_array_equal(np.asarray(written), values.astype(int) + 128)


def test_another_page_keeps_its_own_shape():
    first, second = picture(100, 50), picture(40, 80, 1)
    data = encode(first, "TIFF", save_all=True, append_images=[second])
    output = only(prepare_image(data, "a.tif", Options(short_side=20, page=1)))
    assert (output.width, output.height) == Image.open(io.BytesIO(output.data)).size == (20, 40)
    assert only(prepare_image(data, "a.tif", Options(short_side=40, page=1))).data == data
    assert "data.page=2, expected at most 1" in prepare_image(data, "a.tif", Options(short_side=20, page=2)).reason
