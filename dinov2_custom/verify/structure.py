"""Find faults in JPEG, PNG, WebP and GIF files that need no pixel decoding and that decoders silently ignore.

PNG has a checksum per chunk, so every flipped bit is found. JPEG has none, so only syntax errors are found (markers,
restart counters, padding, long runs of zeros where the Huffman tables allow none).

Source: ITU-T T.81 annex B (JPEG), W3C PNG specification section 5, RFC 9649 (WebP), GIF89a section 27.
"""

from __future__ import annotations

import re
import struct
import zlib

SOI, EOI, SOS, DHT, DRI, DNL = 0xD8, 0xD9, 0xDA, 0xC4, 0xDD, 0xDC
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOFn
ZERO_RUN = 64  # bytes
PAD_RUN = 64
MARKER = re.compile(rb"\xff[^\x00\xff]", re.DOTALL)
PADS = re.compile(rb"\xff\xff+")


class _Fault(Exception):
    """A fault, with its description, caught by :func:`fault`."""


def fault(data: bytes, format: str) -> str:
    """Return the fault in the bytes of an image file of Pillow's ``format``, or "" (also for other formats)."""
    check = {"JPEG": _jpeg, "MPO": _jpeg, "PNG": _png, "WEBP": _webp, "GIF": _gif}.get(format)
    try:
        if check is not None:
            check(data)
    except _Fault as e:
        return str(e)
    except (struct.error, IndexError):
        return "cut off inside a header"
    return ""


def _png(data: bytes) -> None:
    view, at = memoryview(data), 8
    while at < len(data):
        if at + 12 > len(data):
            raise _Fault("cut off inside a chunk")
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            raise _Fault(f"cut off inside chunk {_shown(kind)}")
        if zlib.crc32(view[at + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise _Fault(f"checksum of chunk {_shown(kind)} at byte {at} is wrong")
        at = end + 4
        if kind == b"IEND":
            return
    raise _Fault("cut off: no IEND chunk")


def _shown(kind: bytes) -> str:
    return kind.decode("ascii", "replace") if kind.isalpha() else kind.hex()


def _webp(data: bytes) -> None:
    size = struct.unpack_from("<I", data, 4)[0] + 8
    if size > len(data):
        raise _Fault(f"cut off: {len(data):,} of {size:,} bytes")


def _gif(data: bytes) -> None:
    if not data.rstrip(b"\0").endswith(b";"):
        raise _Fault("cut off: no trailer")


def _jpeg(data: bytes) -> None:
    """Parse the segments up to the end-of-image marker; bytes after it are allowed, because cameras write them."""
    scans = _Scans(data)
    at = 2
    while True:
        if at >= len(data):
            raise _Fault("cut off: no end-of-image marker")
        if data[at] != 0xFF:
            raise _Fault(f"bytes at {at} that belong to no segment")
        if data[at + 1] == 0xFF:
            at += 1
            continue
        marker = data[at + 1]
        if marker == EOI:
            return scans.finish()
        if marker in (0, SOI) or 0xD0 <= marker <= 0xD7:
            raise _Fault(f"marker 0x{marker:02x} at byte {at} between segments")
        length = struct.unpack_from(">H", data, at + 2)[0]
        body = data[at + 4 : at + 2 + length]
        if length < 2 or len(body) != length - 2:
            raise _Fault(f"segment 0x{marker:02x} at byte {at} has a wrong length")
        at += 2 + length
        if marker in FRAMES:
            scans.frame(marker, body)
        elif marker == DHT:
            scans.tables(body)
        elif marker == DRI:
            scans.interval = struct.unpack(">H", body)[0]
        elif marker == SOS:
            at = scans.scan(at, body)


class _Scans:
    """Check the entropy-coded data of a JPEG, given its segments in order."""

    def __init__(self, data: bytes):
        self.data = data
        self.interval = 0
        self.sequential = False
        self.size = (0, 0)
        self.components: dict[int, tuple[int, int]] = {}
        self.zeros_plausible: dict[int, bool] = {}  # AC table -> whether its shortest code means end of block
        self.num_scans = 0

    def frame(self, marker: int, body: bytes) -> None:
        _, height, width, count = struct.unpack_from(">BHHB", body)
        self.sequential = marker in (0xC0, 0xC1)
        self.size = (width, height)
        self.components = {body[6 + 3 * i]: (body[7 + 3 * i] >> 4, body[7 + 3 * i] & 15) for i in range(count)}

    def tables(self, body: bytes) -> None:
        at = 0
        while at < len(body):
            count = sum(body[at + 1 : at + 17])
            if body[at] >> 4 and count:
                self.zeros_plausible[body[at] & 15] = body[at + 17] == 0
            at += 17 + count

    def scan(self, start: int, header: bytes) -> int:
        """Check the data from ``start`` to the next marker other than a restart; return that marker's offset."""
        self.num_scans += 1
        counters = []
        for match in MARKER.finditer(self.data, start):
            marker = self.data[match.end() - 1]
            if marker & 0xF8 != 0xD0:
                break
            counters.append(marker & 7)
        else:
            raise _Fault("cut off inside the pixel data")
        end = match.start()
        if marker not in (EOI, SOS, DHT, DRI, DNL, 0xDB, 0xFE) and not 0xE0 <= marker <= 0xEF:
            raise _Fault(f"marker 0x{marker:02x} in the pixel data at byte {end}")
        self._check_restarts(counters, header)
        self._check_pads(start, end)
        self._check_zeros(start, end, header)
        return end

    def _check_restarts(self, counters: list[int], header: bytes) -> None:
        if counters != [i % 8 for i in range(len(counters))]:
            raise _Fault("restart markers out of order")
        expected = self._restarts_expected(header)
        if expected is not None and len(counters) != expected:
            raise _Fault(f"{len(counters)} restart markers, expected {expected}")

    def _restarts_expected(self, header: bytes) -> int | None:
        """Return the number of restart markers in a scan, or None if it cannot be determined."""
        (width, height), sampling = self.size, list(self.components.values())
        if not self.interval:
            return 0
        if not (width and height and sampling and all(h and v for h, v in sampling)):
            return None
        h_max, v_max = max(h for h, _ in sampling), max(v for _, v in sampling)
        if header[0] == 1 and header[1] in self.components:
            h, v = self.components[header[1]]
            columns, rows = -(-_up(width * h, h_max) // 8), -(-_up(height * v, v_max) // 8)
        else:
            columns, rows = _up(width, 8 * h_max), _up(height, 8 * v_max)
        return _up(columns * rows, self.interval) - 1

    def _check_pads(self, start: int, end: int) -> None:
        """Detect erased disk blocks: longer runs of 0xff than the fill bytes before a marker."""
        if self.data.find(b"\xff\xff", start, end + 1) < 0:
            return
        for run in PADS.finditer(self.data, start, end + 1):
            if self.data[run.end()] == 0 or run.end() - run.start() >= PAD_RUN:
                raise _Fault(f"a run of 0xff in the pixel data at byte {run.start()}")

    def _check_zeros(self, start: int, end: int, header: bytes) -> None:
        """Detect blocks of a file that were never written.

        Unless zero bits mean "end of block" in every table of the scan, such a run would decode to equal non-zero
        coefficients in block after block.
        """
        tables = [header[2 + 2 * i] & 15 for i in range(header[0])]
        if not self.sequential or all(self.zeros_plausible.get(table, True) for table in tables):
            return
        zeros = self.data.find(bytes(ZERO_RUN), start, end)
        if zeros >= 0:
            raise _Fault(f"a run of zeros in the pixel data at byte {zeros}")

    def finish(self) -> None:
        if not self.num_scans:
            raise _Fault("no pixel data")


def _up(a: int, b: int) -> int:
    return -(-a // b)
