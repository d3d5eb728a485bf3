"""Images in uncompressed tar files (plain or WebDataset style), read in place at their offsets.

The headers are scanned once into an index (shard, offset, length, name); afterwards each image takes one read, which
gives random access over all shards. Members with an image extension are images; all others (``.json``, ``.cls``,
``.txt`` of WebDataset) are skipped.

Source of the format: POSIX.1-2001 pax / ustar interchange formats, and GNU tar's long names and base-256 numbers.
"""

from __future__ import annotations

import glob
import itertools
import logging
import math
import os
import posixpath
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dinov2_custom.errors import DataError

from .index import CACHE_FROM, PathTable, cached, pack_stamps, pack_texts
from .listing import (
    CHECK_PATH,
    EXTENSIONS,
    Listing,
    PassedOver,
    PatientMap,
    Progress,
    is_pattern,
    log_passed_over,
)
from .sources import OpenFiles, Root, Source, as_roots, pack_passed_over, real, unreadable

logger = logging.getLogger("dinov2")
BLOCK = 512
MAX_OPEN = 64
MAX_HEADER = 1 << 20
LOOK_AHEAD = 1 << 16  # bytes after the end mark, where tar pads to a whole record (10 KiB by default)
MAX_SIZE = 1 << 62  # fits into 64-bit integers, with room for sums
MAX_LINKS = 10
MAX_PATTERNS = 1_000_000
TAR_SUFFIXES = (".tar",)
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
REGULAR = (b"0", b"\0", b"7")
HARD_LINK = b"1"
LINKS = (HARD_LINK, b"2")
WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")


class Member(NamedTuple):
    """One file in a tar; its bytes are [offset, offset + size)."""

    name: str
    offset: int
    size: int


class Walk(NamedTuple):
    """Result of scanning the headers of the tar ``path``.

    faults: reasons why some of its bytes were not scanned, with offsets. left_out: reason -> names of skipped files.
    """

    path: str
    members: list[Member]
    faults: list[str]
    left_out: dict[str, list[str]]

    def passed_over(self, is_wanted: Callable[[str], bool]) -> list[PassedOver]:
        """Return the faults, and the number of skipped files whose names are wanted."""
        found = list(self.faults)
        for why, names in self.left_out.items():
            if wanted := [name for name in names if is_wanted(name)]:
                found.append(f"{len(wanted):,} files skipped: {why}, the first is {wanted[0]}")
        return [PassedOver(self.path, reason) for reason in found]


class Link(NamedTuple):
    """A hard or symbolic link in a tar to the member named ``target``."""

    name: str
    target: str


class TarSource(Source):
    """The images in tar files; ``path`` names tars, folders of tars, or patterns such as ``/d/s-{0000..0127}.tar``.

    Raises:
        DataError: if files are missing, compressed or not tars (lists all of them), or hold no image.
    """

    def __init__(
        self, path: Root | Sequence[Root], extensions: Sequence[str] = EXTENSIONS, *, cache_from: int = CACHE_FROM
    ):
        self._folders: list[PassedOver] = []
        self.shards = find_files(as_roots(path), TAR_SUFFIXES, "tar files", self._folders)
        places = [place for one in self.shards for place in (one, real(one))]
        key = ["tars, passed over", *sorted(set(extensions)), *places]
        self.index = cached(key, lambda on_count: index_tars(self.shards, extensions, on_count), cache_from)
        self.names = PathTable(index=self.index)
        self._files = OpenFiles(MAX_OPEN)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        """Return ``<shard>!<member>``."""
        return f"{self.shards[int(self.index['shard'][i])]}!{self.names[i]}"

    def read(self, i: int) -> bytes:
        shard = self.shards[int(self.index["shard"][i])]
        offset, size = int(self.index["offset"][i]), int(self.index["size"][i])
        return self._files.read_all(shard, offset, size, self.name(i))

    def passed_over(self) -> list[PassedOver]:
        return self._folders + super().passed_over()

    def parts(self) -> list[tuple[str, int]]:
        counts = np.bincount(self.index["shard"], minlength=len(self.shards)).tolist()
        return list(zip(self.shards, counts, strict=True))


def index_tars(
    shards: Sequence[str], extensions: Sequence[str], on_count: Callable[[int], None]
) -> dict[str, np.ndarray]:
    """Scan tar files into index arrays: name, shard, offset and size of every image, and stamps of the shards.

    The arrays also include the files that could not be scanned completely.
    """
    started = time.time_ns()
    stats = [os.stat(shard) for shard in shards]
    wanted = tuple(extension.lower() for extension in extensions)
    progress = Progress("reading tar headers", "images")
    rows: list[np.ndarray] = [np.empty((0, 3), np.int64)]
    errors: list[str] = []
    passed_over: list[PassedOver] = []

    def is_wanted(name: str) -> bool:
        """Return whether a member is an image by its extension and not hidden (macOS adds ``._x.jpg`` to x.jpg)."""
        return name.lower().endswith(wanted) and not name.rpartition("/")[2].startswith(".")

    def walked(shard: str) -> tuple[list[Member], list[PassedOver]] | DataError:
        try:
            walk = walk_tar(shard)
        except DataError as e:
            return e
        return [member for member in walk.members if is_wanted(member.name)], walk.passed_over(is_wanted)

    def names() -> Iterator[list[str]]:
        for number, found in enumerate(PatientMap(probes=4).map(walked, shards)):
            if isinstance(found, DataError):
                errors.append(str(found))
                continue
            members, missed = found
            passed_over.extend(missed)
            rows.append(np.array([(number, m.offset, m.size) for m in members], np.int64).reshape(-1, 3))
            yield [member.name for member in members]
            progress.add(len(members))
            on_count(progress.count)

    packed = pack_texts(names(), "path")
    progress.end()
    table = np.concatenate(rows)
    if errors or not len(table):
        none = f"expected images ({' '.join(extensions)}) in tar files, got none in {', '.join(shards[:3])}"
        log_passed_over(passed_over)
        raise DataError("; ".join(errors[:10]) or f"{none}; check the names of the members with tar -tf")
    columns = {"shard": table[:, 0].astype(np.int32), "offset": table[:, 1].copy(), "size": table[:, 2].copy()}
    return {**packed, **columns, **pack_passed_over(passed_over), **pack_stamps(shards, stats, started)}


def walk_tar(path: str) -> Walk:
    """Find the regular files of a tar, and links to them, in order, by reading only the headers.

    A link has its own name and the bytes of its target. A truncated tar returns the files that its headers declare; a
    damaged header ends the scan. Both are faults, as is a second tar after the end of the first. Links to files outside
    the tar and sparse files are skipped.

    Raises:
        DataError: if it cannot be read, is compressed, or is not a tar.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            return _walk(file, path)
    except (OSError, MemoryError) as e:
        raise unreadable(e, path) from e


def _walk(file, path: str) -> Walk:
    end, position = os.fstat(file.fileno()).st_size, 0
    members: list[Member | Link] = []
    sparse: list[str] = []
    overrides: dict[str, str] = {}
    defaults: dict[str, str] = {}
    _refuse_compressed(file.read(BLOCK), path)
    while position + BLOCK <= end:
        file.seek(position)
        header = file.read(BLOCK)
        if not any(header):
            # two blocks of zeros end a tar; a header after a single one is read, with a warning
            following = file.read(BLOCK)
            if not _checksum_holds(following):
                return _resolve_links(path, members, sparse, _trailing_tar(file, position + 2 * BLOCK, end))
            logger.warning(f"damaged tar: {path} byte={position} is a lone block of zeros; the files after it are used")
            position, header = position + BLOCK, following
        start = position + BLOCK
        try:
            if not _checksum_holds(header):
                raise ValueError("no tar header")
            size, kind = _number(header[124:136]), header[156:157]
            if kind in (b"L", b"x", b"g", b"K"):
                content = file.read(min(size, MAX_HEADER))
                if kind in (b"L", b"K"):
                    overrides["path" if kind == b"L" else "linkpath"] = _text(content)
                else:
                    (overrides if kind == b"x" else defaults).update(_pax(content))
            else:
                own = {**defaults, **overrides}
                size = _number(own["size"].encode(), base=10) if "size" in own else size
                name = own.get("path") or _name(header)
                if kind == b"S" or any(key.startswith("GNU.sparse.") for key in own):
                    sparse.append(own.get("GNU.sparse.name") or name)
                elif kind in REGULAR and not name.endswith("/"):
                    members.append(Member(name, start, size))
                elif kind in LINKS:
                    target = own.get("linkpath") or _text(header[157:257])
                    if kind != HARD_LINK:  # a symbolic link's is relative to its folder
                        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
                    members.append(Link(name, target))
                overrides = {}
                size = 0 if kind in WITHOUT_CONTENT else size
        except ValueError as e:
            if position == 0:
                raise DataError(f"expected an uncompressed tar: {path} ({e} at its start)") from e
            rest = f"{end - position:,} bytes from there on are not"
            fault = f"damaged tar: byte={position} ({e}); {_used(members)}, {rest}"
            return _resolve_links(path, members, sparse, fault)
        position = start + -(-size // BLOCK) * BLOCK
    return _resolve_links(path, members, sparse, _cut_off(members, position, end))


def _used(members: Sequence[Member | Link]) -> str:
    return f"{len(members):,} files before it are used"


def _cut_off(members: list[Member | Link], position: int, end: int) -> str:
    """Return why a tar of ``end`` bytes is truncated, if the scan ended at ``position``; "" if nothing is lost."""
    last = members[-1] if members else None
    if position > end and isinstance(last, Member) and last.offset + last.size > end:
        return f"truncated tar: ends in the middle of {last.name}, file {len(members):,}; any after it are missing"
    if position != end or not end:
        return f"truncated tar: byte={min(position, end)}; {_used(members)}, any after it are missing"
    return ""


def _trailing_tar(file, position: int, end: int) -> str:
    """Return the fault if a header follows the end mark, which ends at ``position``; "" if there is only padding."""
    file.seek(position)
    rest = file.read(LOOK_AHEAD)
    start = (len(rest) - len(rest.lstrip(b"\0"))) // BLOCK * BLOCK
    if not _checksum_holds(rest[start : start + BLOCK]):
        return ""
    place = position + start
    return f"a second tar after the end: byte={place}; its {end - place:,} bytes are not used (tar -A joins archives)"


def _resolve_links(path: str, members: list[Member | Link], sparse: list[str], fault: str) -> Walk:
    """Return the result with each link replaced by a member of the same name with the bytes of its target."""
    faults, left_out = [fault] if fault else [], {"sparse files are not read": sparse}
    if not any(isinstance(member, Link) for member in members):
        return Walk(path, members, faults, left_out)
    places = {posixpath.normpath(member.name): member for member in members}
    found, dangling = [], []
    for member in members:
        target, steps = member, 0
        while isinstance(target, Link) and steps < MAX_LINKS:  # links to links, possibly cyclic
            target, steps = places.get(posixpath.normpath(target.target)), steps + 1
        if isinstance(target, Member):
            found.append(target._replace(name=member.name))
        else:
            dangling.append(member.name)
    return Walk(path, found, faults, left_out | {"links to no file in the tar": dangling})


def _checksum_holds(header: bytes) -> bool:
    """Verify the header's checksum: the sum of its bytes, with the eight checksum bytes counted as blanks."""
    try:
        return _number(header[148:156]) == sum(header) - sum(header[148:156]) + 8 * 32
    except ValueError:
        return False


def _number(field: bytes, base: int = 8) -> int:
    """Parse a number: digits, or GNU's base-256 encoding (first byte 0x80)."""
    if field[:1] == b"\x80":
        number = int.from_bytes(field[1:], "big")
    else:
        digits = field.split(b"\0", 1)[0].strip() or b"0"
        if not digits.isdigit() or len(digits) > 20:
            raise ValueError(f"illegal number {digits[:20]!r}")
        number = int(digits, base)
    if number > MAX_SIZE:
        raise ValueError(f"illegal size {number:,}")
    return number


def _name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _pax(content: bytes) -> dict[str, str]:
    """Parse the records ``<length> <key>=<value>\\n`` of a pax header."""
    found, position = {}, 0
    while (blank := content.find(b" ", position)) > 0 and content[position:blank].isdigit():
        following = position + int(content[position:blank])
        key, _, value = content[blank + 1 : following - 1].partition(b"=")
        found[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        position = max(following, blank)
    return found


def _refuse_compressed(start: bytes, path: str) -> None:
    for magic, name in COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(
                f"expected an uncompressed tar: {path} (it is compressed with {name}, which allows no access by "
                "offset; decompress it)"
            )


# finding files


def find_files(
    places: Sequence[str], suffixes: Sequence[str], what: str, passed_over: list[PassedOver] | None = None
) -> list[str]:
    """Return the files named by paths, folders (at any depth, sorted) and patterns (braces, ``*``).

    Unreadable folders are appended to ``passed_over``.

    Raises:
        DataError: if some are missing (lists all of them), or folders hold no such files.
    """
    found: list[str] = []
    wrong: list[str] = []
    unread = [] if passed_over is None else passed_over
    for place in itertools.chain.from_iterable([one] if os.path.exists(one) else expand_braces(one) for one in places):
        if is_pattern(place):
            matching = [path for path in sorted(glob.iglob(place, recursive=True)) if os.path.isfile(path)]
            found += matching
            wrong += [] if matching else [f"{place} (matches no file)"]
        elif os.path.isdir(place):
            listing = Listing(suffixes, outputs=True)
            inside = [path for chunk in listing.chunks(place) for path in chunk]
            unread += listing.passed_over
            found += inside
            wrong += [] if inside else [f"{place} (a folder with none)"]
        elif os.path.isfile(place):
            found.append(place)
        else:
            wrong.append(f"{place} (missing)")
    if wrong:
        log_passed_over(unread)
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise DataError(f"expected {what}, got {', '.join(wrong[:10])}{more}; {CHECK_PATH}")
    return found


def expand_braces(pattern: str) -> Iterable[str]:
    """Expand ``{0000..0127}`` (keeping the width) and ``{a,b}``, the first varying slowest; keep other braces.

    Raises:
        DataError: if the pattern expands to more than a million names.
    """
    count = math.prod(len(choices) for match in _BRACES.finditer(pattern) if (choices := _choices(match[1])))
    if count > MAX_PATTERNS:
        raise DataError(
            f"expected a pattern for at most {MAX_PATTERNS:,} files, got one for {count:,}: {pattern}; check its ranges"
        )
    match = next((m for m in _BRACES.finditer(pattern) if _choices(m[1])), None)
    if match is None:
        return [pattern]
    before, after = pattern[: match.start()], expand_braces(pattern[match.end() :])
    return [f"{before}{choice}{rest}" for choice in _choices(match[1]) for rest in after]


class _Range(Sequence):
    """The numbers ``first..last`` as strings, generated on demand."""

    def __init__(self, first: str, last: str):
        self.width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        self.numbers = range(int(first), int(last) + 1)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> str:
        return f"{self.numbers[i]:0{self.width}d}"


def _choices(inside: str) -> Sequence[str]:
    if limits := _RANGE.fullmatch(inside):
        return _Range(*limits.groups())
    return inside.split(",") if "," in inside else []
