import io
import random

import pytest
from PIL import Image

from dinov2_custom.verify.tiff import read_coefficients, tiff_fault
from tests.data.pictures import encode, picture
from tests.verify.files import jpeg, overwritten


def fault_of(data, simplejpeg=None):
    return tiff_fault(data, Image.open(io.BytesIO(data)), simplejpeg)


def parts_of(data):
    tags = Image.open(io.BytesIO(data)).tag_v2
    return list(zip(tags[273], tags[279], strict=True))


def test_every_change_inside_deflate_is_found():
    data, rng = encode(picture(120, 90), "TIFF", compression="tiff_adobe_deflate"), random.Random(0)
    assert fault_of(data) == ""
    for _ in range(60):
        offset, length = rng.choice(parts_of(data))
        place = offset + rng.randrange(length)
        broken = bytearray(data)
        broken[place] ^= 1 << rng.randrange(8)
        assert fault_of(bytes(broken)).startswith("part ")


@pytest.mark.parametrize("with_simplejpeg", [True, False])
def test_jpeg_inside(with_simplejpeg):
    simplejpeg = pytest.importorskip("simplejpeg") if with_simplejpeg else None
    data = encode(picture(300, 200), "TIFF", compression="jpeg")
    assert fault_of(data, simplejpeg) == ""
    offset, length = parts_of(data)[-1]
    broken = data[: offset + length // 2] + bytes(200) + data[offset + length // 2 + 200 :]
    assert fault_of(broken, simplejpeg).startswith(f"part {len(parts_of(data)) - 1}: ")


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})])
def test_nothing_to_check(kind, options):
    assert fault_of(encode(picture(30, 20), kind, **options)) == ""


def test_coefficients():
    simplejpeg = pytest.importorskip("simplejpeg")
    for data in (jpeg(), jpeg(mode="L"), jpeg(mode="CMYK"), jpeg(progressive=True), jpeg(size=(1, 1))):
        read_coefficients(data, simplejpeg)
        with pytest.raises(ValueError):
            read_coefficients(overwritten(data, b"", 0)[: len(data) * 3 // 4], simplejpeg)
