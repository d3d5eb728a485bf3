import io
import random
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from dinov2_custom.verify.check import check_image
from dinov2_custom.verify.tiff import deflate_fault, read_coefficients, tiff_fault
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


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_lossless_jpeg_is_not_decoded_at_a_fraction_of_its_size(mode):
    simplejpeg, imagecodecs = pytest.importorskip("simplejpeg"), pytest.importorskip("imagecodecs")
    data = imagecodecs.jpeg8_encode(np.asarray(picture(640, 480).convert(mode)), lossless=True)
    with pytest.raises(ValueError, match="nsupported"):  # it would overwrite the memory after a buffer of 80 x 60
        read_coefficients(data, simplejpeg)
    assert check_image(data, simplejpeg)[:5] == ("", "JPEG", mode, 640, 480)
    assert check_image(data[: len(data) // 2], simplejpeg).reason
    page = io.BytesIO()
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(page, np.asarray(picture(640, 480).convert(mode)), compression="jpeg", tile=(64, 64),
                     compressionargs={"lossless": True})  # fmt: skip
    check_image(page.getvalue(), simplejpeg)  # survives; Pillow's libtiff may or may not know the process


def test_deflate_bomb_is_checked_in_little_memory():
    bomb = zlib.compressobj(9)
    parts = [bomb.compress(bytes(1 << 24)) for _ in range(16)] + [bomb.flush()]
    tracemalloc.start()
    assert deflate_fault(b"".join(parts)) == "" and deflate_fault(b"".join(parts)[:-4] + bytes(4)) != ""
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 24
