"""Every rule of the decoding table, on files of every kind."""

import io
import logging
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, features

from dinov2_custom.data import decode
from dinov2_custom.data.datasets import ImageDataset
from dinov2_custom.data.decode import Reading, decode_array, decode_rgb, has_dct
from dinov2_custom.errors import DataError, ResourceError
from dinov2_custom.verify.check import check_image
from tests.data.pictures import deep_rgb, encode, picture

RGB = picture(24, 18)
RAMP = np.arange(24 * 18).reshape(18, 24)


@pytest.fixture(autouse=True)
def forget_warnings():
    decode.warn_once.cache_clear()


def grey_levels(image: Image.Image) -> np.ndarray:
    """Return one plane of an RGB image whose three planes must be equal."""
    pixels = np.asarray(image)
    assert image.mode == "RGB" and (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 1] == pixels[..., 2]).all()
    return pixels[..., 0]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "WEBP", "GIF", "JPEG2000"])
def test_lossless_files_come_back_as_they_were(kind):
    if kind == "JPEG2000" and not features.check_codec("jpg_2000"):
        pytest.skip("NOT CHECKED: Pillow has no JPEG 2000 here")
    image = RGB.quantize(64) if kind == "GIF" else RGB
    data = encode(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(np.asarray(decode_rgb(data)), np.asarray(image.convert("RGB")))


def test_jpeg_is_pillows_and_arrays_are_writeable():
    data = encode(RGB, "JPEG", quality=90)
    np.testing.assert_array_equal(np.asarray(decode_rgb(data)), np.asarray(Image.open(io.BytesIO(data))))
    pixels = decode_array(data)
    assert pixels.shape == (18, 24, 3) and pixels.dtype == np.uint8 and pixels.flags.writeable


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "LAB"])
def test_eight_bit_modes_are_pillows_conversion(mode):
    image = RGB.convert(mode) if mode != "LAB" else Image.merge("LAB", RGB.split())
    data = encode(image, "TIFF")
    if mode == "YCbCr" and Image.open(io.BytesIO(data)).mode != mode:
        with pytest.raises(DataError, match="truncated"):  # Pillow 12 takes it for RGB with a fourth byte
            decode_rgb(data)
        return
    assert Image.open(io.BytesIO(data)).mode == mode
    expected = image.convert("RGB") if mode != "LAB" else Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(np.asarray(decode_rgb(data)), np.asarray(expected))


def test_cmyk_jpeg():
    data = encode(RGB.convert("CMYK"), "JPEG", quality=100)
    assert np.abs(np.asarray(decode_rgb(data)).astype(int) - np.asarray(RGB).astype(int)).mean() < 3


def test_ycck_jpeg():
    """Made from a CMYK file, of which Pillow stores the inverse, by changing the transform in its Adobe segment."""
    *cmy, _ = RGB.convert("CMYK").split()
    ycbcr = Image.merge("RGB", cmy).convert("YCbCr").split()
    black = Image.linear_gradient("L").resize(RGB.size).point(lambda level: level // 3)
    stored = Image.merge("CMYK", [*ycbcr, black.point(lambda level: 255 - level)])
    data = encode(stored.point(lambda level: 255 - level), "JPEG", quality=100, subsampling=0)
    place = data.index(b"Adobe") + 11
    assert data[place] == 0
    data = data[:place] + b"\2" + data[place + 1 :]
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    expected = np.asarray(Image.merge("CMYK", [*cmy, black]).convert("RGB")).astype(int)
    for pixels in (np.asarray(decode_rgb(data)), decode_array(data)):
        assert np.abs(pixels - expected).mean() < 2


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_rgb_is_the_high_bytes(kind):
    values = np.random.default_rng(0).integers(0, 65536, (18, 24, 3), dtype=np.uint16)
    values[0, 0] = (0, 65535, 255)
    for pixels in (np.asarray(decode_rgb(deep_rgb(kind, values))), decode_array(deep_rgb(kind, values))):
        np.testing.assert_array_equal(pixels, values >> 8)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped_and_hidden_colours_show(mode):
    image = RGB.convert(mode[:-1])
    expected = np.asarray(image.convert("RGB"))
    image.putalpha(0)
    np.testing.assert_array_equal(np.asarray(decode_rgb(encode(image))), expected)


@pytest.mark.parametrize("transparency", [3, bytes(range(64))])
def test_palette_with_transparency_is_its_colours(transparency):
    image = RGB.quantize(64)
    np.testing.assert_array_equal(
        np.asarray(decode_rgb(encode(image, transparency=transparency))), np.asarray(image.convert("RGB"))
    )


def test_transparent_colour_of_grey_and_rgb_files_is_ignored():
    for image, transparency in ((RGB.convert("L"), 7), (RGB, (1, 2, 3))):
        data = encode(image, transparency=transparency)
        np.testing.assert_array_equal(np.asarray(decode_rgb(data)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_divided_by_257(kind):
    values = np.linspace(0, 65535, 24 * 18).round().astype(np.uint16).reshape(18, 24)
    levels = grey_levels(decode_rgb(encode(Image.fromarray(values), kind)))
    np.testing.assert_array_equal(levels, np.round(values / 257))
    assert levels.max() == 255 and len(np.unique(levels)) == 256


def test_big_endian_16_bit():
    image = Image.frombytes("I;16B", (24, 18), (RAMP * 100).astype(">u2").tobytes())
    np.testing.assert_array_equal(grey_levels(decode.to_rgb(image, b"")), np.round(RAMP * 100 / 257))


def test_integers_within_16_bits_are_divided_by_257_and_others_stretched():
    within, beyond = (RAMP * 100).astype(np.int32), (RAMP * 1000 - 5000).astype(np.int32)
    np.testing.assert_array_equal(
        grey_levels(decode_rgb(encode(Image.fromarray(within), "TIFF"))), np.round(within / 257)
    )
    stretched = grey_levels(decode_rgb(encode(Image.fromarray(beyond), "TIFF")))
    np.testing.assert_array_equal(stretched, np.round(RAMP / RAMP.max() * 255))


@pytest.mark.parametrize("scale, offset, expected", [
    (1 / 431, 0.0, 255 / 431), (1 / 500, 0.0, 255 / 500), (0.01, -2.0, 255 / 431), (1.5 / 431, 0.0, 255 / 431),
    (3.0, 10.0, 255 / 431),
])  # fmt: skip
def test_floats_in_0_to_1_are_times_255_and_others_stretched(scale, offset, expected):
    values = (RAMP * scale + offset).astype(np.float32)
    levels = grey_levels(decode_rgb(encode(Image.fromarray(values), "TIFF")))
    assert np.abs(levels - RAMP * expected).max() <= 0.51


def test_floats_that_are_not_finite():
    values = (RAMP * 2.0).astype(np.float32)
    values[0, :3] = [np.nan, np.inf, -np.inf]
    levels = grey_levels(decode_rgb(encode(Image.fromarray(values), "TIFF")))
    assert levels[0, :3].tolist() == [0, 0, 0] and levels[-1, -1] == 255
    with pytest.raises(DataError, match="bad.tif.*no finite value"):
        decode_rgb(encode(Image.fromarray(np.full_like(values, np.nan)), "TIFF"), "bad.tif")


@pytest.mark.parametrize("values", [np.full((4, 5), 7.5, np.float32), np.full((4, 5), 70_000, np.int32)])
def test_constant_images_out_of_range_are_black(values):
    assert not grey_levels(decode_rgb(encode(Image.fromarray(values), "TIFF"))).any()


def test_each_mode_is_logged_once(caplog):
    data = encode(Image.fromarray(RAMP.astype(np.uint16)))
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        for _ in range(3):
            decode_rgb(data)
    assert [record.message for record in caplog.records] == [
        "images of 16 bits found: they are scaled by their depth; data.intensity=[low, high] sets one range for all"
    ]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_orientation_is_ignored_unless_asked_for(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(RGB, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    upright = np.asarray(decode_rgb(encode(RGB, kind))) if kind == "JPEG" else np.asarray(RGB)
    np.testing.assert_array_equal(np.asarray(decode_rgb(data)), upright)
    np.testing.assert_array_equal(decode_array(data), upright)
    np.testing.assert_array_equal(np.asarray(decode_rgb(data, exif=True)), np.rot90(upright, -1))
    np.testing.assert_array_equal(decode_array(data, exif=True), np.rot90(upright, -1))


def test_orientation_of_a_tiff_is_applied_by_pillow_for_upstream_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(RGB, "TIFF", exif=exif)
    for turned in (decode_rgb(data), decode_rgb(data, exif=True), Image.open(io.BytesIO(data)).convert("RGB")):
        np.testing.assert_array_equal(np.asarray(turned), np.rot90(np.asarray(RGB), -1))


@pytest.mark.parametrize("shape, kind, options", [
    ((9, 8, 3), np.float32, {"photometric": "rgb"}),
    ((9, 8), np.float64, {"photometric": "minisblack"}),
    ((3, 9, 8), np.uint16, {"photometric": "rgb", "planarconfig": "separate"}),
    ((9, 8), np.float32, {"photometric": "minisblack", "byteorder": ">", "compression": "zlib"}),
    ((9, 8), np.int16, {"photometric": "minisblack", "byteorder": ">", "compression": "zlib"}),
])  # fmt: skip
def test_tiffs_that_pillow_does_not_know_or_misreads_go_through_tifffile(shape, kind, options, monkeypatch):
    values = np.linspace(100, 900, np.prod(shape)).reshape(shape).astype(kind)
    data = tiff(values, **options)
    seen = np.moveaxis(values, 0, -1) if options.get("planarconfig") else values
    expected = np.round((seen.astype(np.float64) - 100) * 255 / 800)
    levels = np.asarray(decode_rgb(data, reading=Reading((100, 900))))
    np.testing.assert_array_equal(levels, expected if seen.ndim == 3 else np.repeat(expected[..., None], 3, axis=2))
    assert check_image(data).reason == ""
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(DataError, match=r"odd.tif .*tifffile may: pip install 'dinov2_custom\[slides\]'"):
        decode_rgb(data, "odd.tif")
    assert "tifffile may: pip install" in check_image(data).reason


def test_packed_12_bit_rgb(monkeypatch):
    """Pillow reports "not an image", but imagecodecs decodes it."""
    values = np.arange(24 * 18 * 3, dtype=np.uint16).reshape(18, 24, 3) * 3
    data = packed_12_bits(values)
    with pytest.raises(Image.UnidentifiedImageError):
        Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(np.asarray(decode_rgb(data)), np.round(values * (255 / 4095)))
    levels = np.asarray(decode_rgb(data, reading=Reading((0, 3885))))
    np.testing.assert_array_equal(levels, np.round(values * (255 / 3885)))
    assert check_image(data) == ("", "TIFF", "uint16 RGB", 24, 18, 1, "tifffile", "")
    import tifffile._imagecodecs  # what it has without the package imagecodecs

    monkeypatch.setattr("tifffile.tifffile.imagecodecs", tifffile._imagecodecs)
    with pytest.raises(DataError, match=r"x.tif .*needs the package imagecodecs: pip install 'dinov2_custom"):
        decode_rgb(data, "x.tif")


def packed_12_bits(values: np.ndarray) -> bytes:
    """Return an uncompressed TIFF of BitsPerSample 12 (two values in three bytes), which no library here writes."""
    height, width, _ = values.shape
    even, odd = values.reshape(-1, 2).T
    data = np.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], axis=1).astype(np.uint8).tobytes()
    short, long, bits = 3, 4, 8 + len(data)
    tags = [
        (256, long, 1, width), (257, long, 1, height), (258, short, 3, bits), (259, short, 1, 1), (262, short, 1, 2),
        (273, long, 1, 8), (277, short, 1, 3), (278, long, 1, height), (279, long, 1, len(data)),
    ]  # fmt: skip
    directory = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data) + 6)
    return head + data + struct.pack("<3H", 12, 12, 12) + struct.pack("<H", len(tags)) + directory + bytes(4)


def test_tiffs_of_other_channels_say_so():
    data = tiff(np.ones((9, 8, 5), np.uint8), photometric="minisblack", planarconfig="contig")
    with pytest.raises(DataError, match="odd.tif .*expected grey or RGB, got 5 channels"):
        decode_rgb(data, "odd.tif")


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_nodata_does_not_narrow_an_image_without_a_range(kind):
    values = (RAMP * 1000 - 5000).astype(kind)
    values[:2] = -99_999
    data = encode(Image.fromarray(values), "TIFF", tiffinfo={42113: "-99999"})  # GDAL_NODATA
    levels = grey_levels(decode_rgb(data))
    seen = values[2:].astype(np.float64)
    np.testing.assert_array_equal(levels[2:], np.round((seen - seen.min()) * (255 / (seen.max() - seen.min()))))
    assert not levels[:2].any()
    values[:] = -99_999
    assert not grey_levels(decode_rgb(encode(Image.fromarray(values), "TIFF", tiffinfo={42113: "-99999"}))).any()


def tiff(values: np.ndarray, **options) -> bytes:
    tifffile, file = pytest.importorskip("tifffile"), io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_tiff_in_which_white_is_zero(kind, compression):
    values = (RAMP * 150).astype(kind) if kind != np.uint8 else (RAMP % 256).astype(kind)
    black = decode_rgb(tiff(values, photometric="minisblack", compression=compression))
    top = 255 - np.asarray(black).astype(int)
    white = decode_rgb(tiff(values, photometric="miniswhite", compression=compression))
    np.testing.assert_allclose(np.asarray(white), top, atol=1 if kind == np.float32 else 0)
    assert top.min() < 50 and top.max() > 200
    share = np.linspace(0, 1, 432, dtype=np.float32).reshape(18, 24)
    levels = np.asarray(decode_rgb(tiff(share, photometric="miniswhite", compression=compression)))[..., 0]
    np.testing.assert_array_equal(levels, np.round((1 - share.astype(np.float64)) * 255))


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_unsigned_32_bit_tiff_is_not_read_as_signed(compression):
    values = np.array([[0, 1 << 30, 3 << 30, (1 << 32) - 1]], np.uint32).repeat(3, axis=0)
    levels = np.asarray(decode_rgb(tiff(values, compression=compression)))[0, :, 0]
    assert levels.tolist() == [0, 64, 191, 255]
    signed = values.astype(np.int64) - (1 << 31)
    assert np.asarray(decode_rgb(tiff(signed.astype(np.int32), compression=compression)))[0, :, 0].tolist() == [
        0, 64, 191, 255,
    ]  # fmt: skip
    small = np.array([[0, 257, 65535]], np.uint32)
    assert np.asarray(decode_rgb(tiff(small, compression=compression)))[0, :, 0].tolist() == [0, 1, 255]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_signed_8_bit_tiff_is_not_read_as_unsigned(order, compression):
    values = np.array([[-128, -1, 0, 1, 127]], np.int8).repeat(3, axis=0)
    data = tiff(values, photometric="minisblack", byteorder=order, compression=compression)
    assert np.asarray(Image.open(io.BytesIO(data)))[0].tolist() == [128, 255, 0, 1, 127], "Pillow reads it right now"
    assert np.asarray(decode_rgb(data))[0].tolist() == [[v] * 3 for v in (0, 127, 128, 129, 255)]
    assert check_image(data).reason == ""


def test_16_bit_rgba_is_the_high_bytes_without_alpha():
    tifffile, file = pytest.importorskip("tifffile"), io.BytesIO()
    values = np.random.default_rng(0).integers(0, 65536, (9, 8, 4), dtype=np.uint16)
    tifffile.imwrite(file, values, photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(np.asarray(decode_rgb(file.getvalue())), values[..., :3] >> 8)


def test_first_image_of_a_multi_picture_jpeg_is_decoded():
    data = encode(RGB, "MPO", save_all=True, append_images=[picture(24, 18, 1)], quality=95)
    np.testing.assert_array_equal(np.asarray(decode_rgb(data)), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.abs(np.asarray(decode_rgb(data)).astype(int) - np.asarray(RGB).astype(int)).mean() < 20


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_first_page_or_frame_of_several(kind):
    frames = [RGB, picture(24, 18, 1)] if kind != "GIF" else [RGB.quantize(32), picture(24, 18, 1).quantize(32)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    for pixels in (np.asarray(decode_rgb(data)), decode_array(data)):
        np.testing.assert_array_equal(pixels, np.asarray(frames[0].convert("RGB")))


JPEG, PNG = encode(RGB, "JPEG"), encode(RGB)


@pytest.mark.parametrize("data, got", [
    (b"", "got an empty file: x.jpg"),
    (b"hello, this is no picture\n", "got 26 bytes of text: x.jpg"),
    (b"<!DOCTYPE html><html></html>", "28 bytes of text"),
    (bytes(range(200)), "200 bytes of data"),
    (JPEG[: len(JPEG) // 2], "a truncated or broken JPEG"),
    (JPEG[:20], "a truncated or broken JPEG of 20 bytes"),
    (PNG[: len(PNG) // 2], "a truncated or broken PNG"),
    (PNG[:60] + bytes(40) + PNG[100:], "a truncated or broken PNG"),
    (encode(RGB, "TIFF")[:100], "a TIFF of 100 bytes that cannot be read"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "bytes of text"),
])  # fmt: skip
def test_broken_files_are_data_errors_that_name_the_source(data, got):
    with pytest.raises(DataError) as e:
        decode_rgb(data, "x.jpg")
    assert got in str(e.value) and "x.jpg" in str(e.value) and "0x" not in str(e.value)
    assert data == b"" or e.value.__cause__ is not None


needs_simplejpeg = pytest.mark.skipif(
    decode.find_simplejpeg() is None, reason="NOT CHECKED: simplejpeg is not installed"
)


@pytest.fixture
def without_pillow(monkeypatch):
    def refuse(*args):
        raise AssertionError("decoded by Pillow")

    monkeypatch.setattr(decode, "_decode_by_pillow", refuse)


@needs_simplejpeg
@pytest.mark.parametrize("size", [(1, 1), (24, 18), (37, 61), (250, 187)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_fast_jpeg_has_pillows_pixels(without_pillow, size, mode):
    scratch = decode.Scratch()
    for subsampling in (0, 1, 2):
        for options in ({"quality": 90}, {"quality": 35, "progressive": True}, {"quality": 100, "optimize": True}):
            data = encode(picture(*size).convert(mode), "JPEG", subsampling=subsampling, **options)
            expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            np.testing.assert_array_equal(decode_array(data), expected)
            np.testing.assert_array_equal(decode_array(data, scratch=scratch), expected)


@needs_simplejpeg
@pytest.mark.parametrize("fraction", [1, 2, 4, 8])
def test_shrunken_jpeg_is_the_same_with_and_without_simplejpeg(monkeypatch, fraction):
    asked = []

    def shrink(width, height):
        asked.append((width, height))
        return fraction

    for mode, size in (("RGB", (251, 187)), ("L", (64, 33)), ("RGB", (9, 12))):
        data = encode(picture(*size).convert(mode), "JPEG", quality=90)
        fast = decode_array(data, shrink=shrink)
        with monkeypatch.context() as patch:
            patch.setattr(decode, "find_simplejpeg", lambda: None)
            slow = decode_array(data, shrink=shrink)
        assert fast.shape == (-(-size[1] // fraction), -(-size[0] // fraction), 3)
        np.testing.assert_array_equal(fast, slow)
        assert asked[-2:] == [size, size]
    assert decode_array(PNG, shrink=shrink).shape == (18, 24, 3)


def test_jpeg_kinds_that_would_differ_are_pillows():
    for data in (encode(RGB.convert("CMYK"), "JPEG"), encode(RGB, "JPEG", keep_rgb=True)):
        np.testing.assert_array_equal(decode_array(data), np.asarray(decode_rgb(data)))


def test_jpeg_with_an_error_that_pillow_forgives_is_recovered():
    data = JPEG[:-2] + b"junk" * 5 + JPEG[-2:]
    np.testing.assert_array_equal(decode_array(data), np.asarray(decode_rgb(data)))
    with pytest.raises(DataError, match="a truncated or broken JPEG.*x.jpg"):
        decode_array(JPEG[: len(JPEG) // 2], "x.jpg")


def test_everything_works_without_simplejpeg(monkeypatch):
    expected = decode_array(JPEG)
    monkeypatch.setattr(decode, "find_simplejpeg", lambda: None)
    pixels = decode_array(JPEG, scratch=decode.Scratch())
    np.testing.assert_array_equal(pixels, expected)
    assert pixels.flags.writeable


@pytest.mark.parametrize("size", [(24, 18), (7, 1), (1, 7)])
def test_large_images_are_copied_in_strips(monkeypatch, size):
    monkeypatch.setattr(decode, "LARGE", 1)
    monkeypatch.setattr(decode, "STRIP", 3 * 24 * 5)
    image, scratch = (
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)),
        decode.Scratch(),
    )
    for memory in (None, scratch, scratch):
        pixels = decode_array(encode(image), scratch=memory)
        np.testing.assert_array_equal(pixels, np.asarray(image))
        assert pixels.flags.writeable and pixels.flags.c_contiguous
    assert np.shares_memory(pixels, scratch.take(1))


def test_scratch_is_used_again_and_grows():
    scratch = decode.Scratch()
    small, large = scratch.take(10), scratch.take(20)
    assert len(small) == 10 and len(large) == 20
    assert np.shares_memory(large, scratch.take(5)) and not np.shares_memory(small, large)


def test_decompression_bombs_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="slide.png .*432 pixels"):
        decode_rgb(PNG, "slide.png")
    with pytest.raises(DataError, match="slide.jpg .*432 pixels"):
        decode_array(JPEG, "slide.jpg")


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_lossless_jpeg_is_decoded_in_full_by_pillow(mode, caplog):
    imagecodecs = pytest.importorskip("imagecodecs")
    image = picture(320, 240).convert(mode)
    data = imagecodecs.jpeg8_encode(np.asarray(image), lossless=True)
    assert not has_dct(data)
    pixels = decode_array(data, shrink=lambda width, height: 8)
    assert np.array_equal(pixels, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"comment": b"x" * 60_000}, {"exif": b"Exif\0\0" + b"y" * 60_000}]
)
def test_common_jpegs_have_a_dct(options):
    assert has_dct(encode(picture(30, 20), "JPEG", **options))


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8\xff\xff", b"\xff\xd8\xff\xe0\0\0", b"\xff\xd8\0\xff\xc0\0\x11\x08"],
)
def test_truncated_or_garbled_headers_are_not_dct(data):
    assert not has_dct(data)


def test_running_out_of_memory_does_not_mark_the_image_bad(monkeypatch):
    def run_out(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(decode.Image, "open", run_out)
    with pytest.raises(ResourceError, match="x.png"):
        decode.decode_rgb(b"1", "x.png")


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize(("kind", "content", "times"), [
    (b"iCCP", lambda: b"p\0\0" + zlib.compress(bytes(2 << 20)), 1),
    (b"iTXt", lambda: b"k\0\1\0\0\0" + zlib.compress(b"x" * (3 << 20)), 1),
    (b"zTXt", lambda: b"k\0\0" + zlib.compress(b"x" * (3 << 20)), 1),
    (b"tEXt", lambda: b"k\0" + b"x" * (1 << 20), 70),
])  # fmt: skip
def test_png_with_large_text_or_colour_profile_is_sound(place, kind, content, times):
    chunk = png_chunk(kind, content()) * times
    data = encode(RGB, "PNG")
    cut = 33 if place == "before" else len(data) - 12
    data = data[:cut] + chunk + data[cut:]
    assert decode_rgb(data).tobytes() == RGB.tobytes()
    assert check_image(data)[:3] == ("", "PNG", "RGB")
    assert check_image(data[: len(data) - len(chunk) // 2 - 20]).reason


@pytest.mark.parametrize(
    "kind, suffix", [("GIF", "gif"), ("PPM", "ppm"), ("AVIF", "avif"), ("JPEG", "jfif"), ("DIB", "dib")]
)
def test_formats_that_are_listed_are_decoded(tmp_path, kind, suffix):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("NOT CHECKED: Pillow has no AVIF here")
    (tmp_path / f"a.{suffix}").write_bytes(encode(RGB, kind))
    ((image, _),) = ImageDataset(tmp_path)
    assert image.size == RGB.size and image.mode == "RGB"


def test_heic_without_its_package_names_the_package():
    data = b"\0\0\0\x18ftypheic" + bytes(100)
    with pytest.raises(DataError, match="pip install pillow-heif"):
        decode_rgb(data)


def test_only_formats_supported_by_pillow_are_requested(monkeypatch):
    """AVIF came with Pillow 11.3; passing a format unknown to Pillow would hide a file's actual fault."""
    Image.init()
    assert set(decode.formats()) <= set(Image.OPEN)
    monkeypatch.setattr(decode.importlib.util, "find_spec", lambda name: None)
    assert "AVIF" not in decode.formats.__wrapped__()
