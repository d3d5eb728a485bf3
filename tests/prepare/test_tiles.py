import io

import numpy as np
import pytest
from PIL import Image

from dinov2_custom.data.depth import Reading
from dinov2_custom.errors import DataError
from dinov2_custom.prepare.change import Options
from dinov2_custom.prepare.tiles import DecodedBands, TiffBands, cut, read_tiles, starts, write_tiles
from tests.data.pictures import encode, picture

WIDTH, HEIGHT, TILE = 150, 100, 64


@pytest.fixture
def pixels():
    return np.asarray(picture(WIDTH, HEIGHT))


@pytest.fixture
def tifffile():
    return pytest.importorskip("tifffile")


def written(tifffile, tmp_path, values, **options):
    path = str(tmp_path / "slide.tif")
    tifffile.imwrite(path, values, **options)
    return path


def test_starts():
    assert starts(64, 64) == [0] and starts(10, 64) == [0]
    assert starts(128, 64) == [0, 64]
    assert starts(150, 64) == [0, 64, 86]


def test_tiles_cover_the_image(pixels):
    seen = np.zeros((HEIGHT, WIDTH), bool)
    for tile in cut(DecodedBands(encode(picture(WIDTH, HEIGHT)), "x", "PNG"), "s/a.tif", Options(tile=TILE)):
        top, left = (int(part[1:]) for part in tile.name.removesuffix(".png").split("_")[-2:])
        assert tile.name.startswith("s/a_y") and (tile.width, tile.height) == (TILE, TILE)
        found = np.asarray(Image.open(io.BytesIO(tile.data)))
        assert (found == pixels[top : top + TILE, left : left + TILE]).all()
        seen[top : top + TILE, left : left + TILE] = True
    assert seen.all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rowsperstrip": 7, "photometric": "rgb"},
        {"tile": (32, 48)},
        {"tile": (16, 16), "compression": "zlib"},
        {"rowsperstrip": 16, "compression": "zlib", "predictor": True},
        {"bigtiff": True, "tile": (64, 64)},
    ],
    ids=str,
)
def test_bands_of_a_tiff_are_its_pixels(tifffile, tmp_path, pixels, options):
    bands = TiffBands(written(tifffile, tmp_path, pixels, **options), "x")
    assert (bands.width, bands.height) == (WIDTH, HEIGHT)
    for top in range(0, HEIGHT, 9):
        bottom = min(HEIGHT, top + 17)
        assert (bands.rows(top, bottom) == pixels[top:bottom]).all()
    bands.close()


@pytest.mark.parametrize("compression", ["jpeg", "lzw"])
def test_slides_as_scanners_write_them(tifffile, tmp_path, pixels, compression):
    pytest.importorskip("imagecodecs", reason="NOT CHECKED: imagecodecs is not installed")
    path = written(tifffile, tmp_path, pixels, tile=(64, 64), compression=compression, photometric="rgb")
    bands = TiffBands(path, "x")
    found = bands.rows(0, HEIGHT).astype(int)
    bands.close()
    with Image.open(path) as whole:
        assert np.abs(found - np.asarray(whole.convert("RGB"))).max() <= (2 if compression == "jpeg" else 0)
    assert np.abs(found - pixels).mean() < 8


@pytest.mark.parametrize("kind", ["grey", "white is zero", "deep", "alpha"])
def test_kinds_of_tiff(tifffile, tmp_path, pixels, kind):
    grey = pixels[:, :, 0]
    values, options, wanted = {
        "grey": (grey, {"photometric": "minisblack"}, grey),
        "white is zero": (255 - grey, {"photometric": "miniswhite"}, grey),
        "deep": (grey.astype(np.uint16) * 257, {"photometric": "minisblack"}, grey),
        "alpha": (np.dstack([pixels, grey]), {"photometric": "rgb", "extrasamples": ["unassalpha"]}, pixels),
    }[kind]
    bands = TiffBands(written(tifffile, tmp_path, values, **options), "x")
    wanted = wanted if wanted.ndim == 3 else np.repeat(wanted[:, :, None], 3, 2)
    assert (bands.rows(0, HEIGHT) == wanted).all()
    bands.close()


def test_unreadable_files_are_reported(tifffile, tmp_path):
    five = {"photometric": "minisblack", "planarconfig": "contig"}
    for values, options, text in (
        (np.zeros((9, 9), np.complex64), {"photometric": "minisblack"}, "complex64"),
        (np.zeros((9, 9, 5), np.uint8), five, "5 channels"),
        (np.zeros((9, 9, 3), np.uint8), {"photometric": "ycbcr", "compression": "zlib"}, "YCbCr"),
    ):
        with pytest.raises(DataError, match=text):
            TiffBands(written(tifffile, tmp_path, values, **options), "x")
    bands = TiffBands(written(tifffile, tmp_path, np.zeros((9, 9), np.float32), photometric="minisblack"), "x")
    with pytest.raises(DataError, match="the range of float32: x; give --intensity"):
        bands.rows(0, 9)
    bands.close()
    with pytest.raises(DataError, match="expected a TIFF, .*: x .*convert it"):
        TiffBands(io.BytesIO(b"no tiff"), "x")
    pages = written(tifffile, tmp_path, np.zeros((3, 9, 9), np.uint8), photometric="minisblack")
    with pytest.raises(DataError, match="expected at most 2, its last page, as --page, got 3: x"):
        TiffBands(pages, "x", Reading(page=3))


def test_damage_is_reported(tifffile, tmp_path, pixels):
    path = written(tifffile, tmp_path, pixels, tile=(32, 32), compression="zlib")
    with open(path, "rb") as file:
        data = bytearray(file.read())
    data[5000:5100] = bytes(100)
    bands = TiffBands(io.BytesIO(bytes(data)), "x")
    with pytest.raises(DataError, match="damaged TIFF: part .*: x"):
        bands.rows(0, HEIGHT)
    bands.close()


def test_a_missing_codec_is_no_damage(tifffile, tmp_path, pixels, monkeypatch):
    bands = TiffBands(written(tifffile, tmp_path, pixels), "x")

    def decode(*args, **kwargs):
        raise ValueError("<COMPRESSION.JPEG: 7> requires the 'imagecodecs' package")

    monkeypatch.setattr(type(bands._page), "decode", decode)
    with pytest.raises(DataError, match=r"pip install 'dinov2_custom\[slides\]'"):
        bands.rows(0, HEIGHT)
    bands.close()


def test_tifffile_is_optional(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(DataError, match=r"pip install 'dinov2_custom\[slides\]'"):
        TiffBands("x.tif", "x")


def test_through_a_file(tmp_path, pixels):
    bands = DecodedBands(encode(picture(WIDTH, HEIGHT)), "x", "JPEG")
    options = Options(tile=TILE, quality=80)
    assert write_tiles(bands, "a.jpg", options, tmp_path / "s.tar") == 6
    assert list(read_tiles(tmp_path / "s.tar")) == list(cut(bands, "a.jpg", options))
    assert [tile.name for tile in cut(bands, "a.jpg", options)][0] == "a_y000000_x000000.jpg"
