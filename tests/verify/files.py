"""Sound and bad image files of many kinds for the tests of verify and prepare, and datasets that misbehave."""

from __future__ import annotations

import faulthandler
import io
import os
import signal
import struct
import time
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.pictures import encode, picture


def jpeg(seed: int = 0, size: tuple[int, int] = (160, 120), mode: str = "RGB", **options) -> bytes:
    return encode(picture(*size, seed).convert(mode), "JPEG", **{"quality": 90, **options})


def overwritten(data: bytes, part: bytes, at: float = 0.5) -> bytes:
    """Overwrite bytes, starting at the fraction ``at`` of the file."""
    place = int(len(data) * at)
    return data[:place] + part + data[place + len(part) :]


def huge_png(side: int = 60_000) -> bytes:
    """Return a small PNG file whose header declares ``side`` x ``side`` pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def deep(mode: str) -> Image.Image:
    ramp = np.linspace(0, 1, 24 * 20).reshape(20, 24)
    return Image.fromarray({"I;16": (ramp * 65535).astype(np.uint16), "F": ramp.astype(np.float32)}[mode])


def animation(kind: str) -> bytes:
    frames = [picture(20, 16, seed) for seed in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def sound_files() -> dict[str, bytes]:
    """Return name -> bytes of sound files."""
    small = picture(20, 16)
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "plain.jpg": jpeg(),
        "progressive.jpg": jpeg(progressive=True),
        "optimized.jpg": jpeg(optimize=True),
        "restarts.jpg": jpeg(restart_marker_rows=1),
        "odd_size.jpg": jpeg(size=(157, 83), restart_marker_blocks=3),
        "grey.jpg": jpeg(mode="L"),
        "444.jpg": jpeg(subsampling=0),
        "cmyk.jpg": jpeg(mode="CMYK"),
        "flat.jpg": encode(Image.new("RGB", (400, 400), "white"), "JPEG", optimize=True),
        "flat_usual_tables.jpg": encode(Image.new("RGB", (400, 400), "white"), "JPEG"),
        "tail.jpg": jpeg() + b"written by a camera" * 10,
        "turned.jpg": jpeg(exif=exif),
        "one_pixel.jpg": jpeg(size=(1, 1)),
        "named_wrongly.png": jpeg(),
        "rgb.png": encode(small),
        "alpha.png": encode(small.convert("RGBA")),
        "palette.png": encode(small.quantize(16)),
        "one_bit.png": encode(small.convert("1")),
        "deep.png": encode(deep("I;16")),
        "deep.tif": encode(deep("I;16"), "TIFF"),
        "float.tif": encode(deep("F"), "TIFF"),
        "cmyk.tif": encode(small.convert("CMYK"), "TIFF", compression="tiff_lzw"),
        "pages.tif": animation("TIFF"),
        "jpeg.tif": encode(picture(200, 150), "TIFF", compression="jpeg"),
        "jpeg_grey.tif": encode(picture(200, 150).convert("L"), "TIFF", compression="jpeg"),
        "deflate.tif": encode(picture(200, 150), "TIFF", compression="tiff_adobe_deflate"),
        "moving.webp": animation("WEBP"),
        "still.webp": encode(small, "WEBP"),
        "plain.bmp": encode(small, "BMP"),
    }


def bad_files() -> dict[str, tuple[bytes, str]]:
    """Return name -> (bytes, word that the reason must contain)."""
    small, plain = encode(picture(40, 30)), jpeg(size=(320, 240))
    pages, no_value = animation("TIFF"), np.full((4, 4), np.nan, np.float32)
    return {
        "bytes_0.jpg": (b"", "empty"),
        "text.jpg": (b"<html>404 not found</html>\n", "not an image"),
        "noise.jpg": (np.random.default_rng(0).bytes(3000), "not an image"),
        "cut.jpg": (plain[: len(plain) // 2], "damaged JPEG"),
        "no_end.jpg": (plain[:-2], "damaged JPEG"),
        "header_only.jpg": (plain[:300], ""),
        "zeros_inside.jpg": (overwritten(plain, bytes(1024)), "damaged JPEG"),
        "erased_inside.jpg": (overwritten(plain, b"\xff" * 1024), "damaged JPEG"),
        "noise_inside.jpg": (overwritten(plain, np.random.default_rng(1).bytes(2048)), "damaged JPEG"),
        "bit.png": (overwritten(small, bytes([small[len(small) // 2] ^ 4])), "checksum"),
        "cut.png": (small[:-20], "damaged PNG"),
        "huge.png": (huge_png(), "too large"),
        "cut.webp": (encode(picture(40, 30), "WEBP")[:-30], ""),
        "cut.tif": (encode(picture(40, 30), "TIFF")[:1500], ""),
        "last_page.tif": (pages[: len(pages) - 700], ""),
        "zeros_inside_deflate.tif": (overwritten(_tiff("tiff_adobe_deflate"), bytes(300)), "damaged TIFF: part"),
        "zeros_inside_jpeg.tif": (overwritten(_tiff("jpeg"), bytes(300)), "damaged TIFF: part"),
        "no_value.tif": (encode(Image.fromarray(no_value), "TIFF"), "no finite value"),
        "cut.bmp": (encode(picture(40, 30), "BMP")[:-700], "damaged BMP"),
    }


def _tiff(compression: str) -> bytes:
    return encode(picture(200, 150), "TIFF", compression=compression)


def write_files(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def die(number: signal.Signals) -> None:
    """End this process by a signal, without a report by pytest."""
    faulthandler.disable()
    os.kill(os.getpid(), number)


class Listed:
    """A dataset of files given by path. Each read appends a line to ``log``: process, name.

    A file named crash* kills the process that reads it, with the signal in its suffix; hang* stops the process.
    """

    def __init__(self, paths, log: Path | None = None, pause_s: float = 0.0):
        self.paths, self.log, self.pause_s = [str(path) for path in paths], log, pause_s
        self.left_out, self.passed_over = dict, list

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        return self.paths[i]

    def read(self, i: int) -> bytes:
        path = Path(self.paths[i])
        if self.log is not None:
            with open(self.log, "ab", buffering=0) as file:
                file.write(f"{os.getpid()} {path.name}\n".encode())
        time.sleep(self.pause_s)
        if path.name.startswith("crash"):
            die(signal.Signals[path.suffix[1:]])
        if path.name.startswith("hang"):
            time.sleep(1000)
        return path.read_bytes()
