"""List the image files below a folder without a stat call per file, using threads on slow (network) file systems.

The order is that of the sorted paths and does not depend on the file system.
"""

from __future__ import annotations

import glob
import itertools
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from dinov2_custom.errors import DataError, command

logger = logging.getLogger("dinov2")
CHECK_PATH = "check the path, in training train.dataset_path"
EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".tif", ".tiff", ".webp", ".bmp", ".dib", ".gif", ".ppm", ".pgm", ".pbm",
    ".pnm", ".jp2", ".j2k", ".j2c", ".jpx", ".avif", ".heic", ".heif",
)  # fmt: skip
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")  # "ftyp" brands of HEIC files
# magic bytes by format; formats with a short, ambiguous magic (BMP, PPM) are recognised by extension only
BEGINNING = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|II\*\0|MM\0\*|RIFF....WEBP|\0\0\0\x0cjP  \r\n\x87\n"
    rb"|....ftyp(avif|" + b"|".join(HEIF_BRANDS) + rb")",
    re.DOTALL,
)
MAX_LOGGED = 10
PATTERN = re.compile(r"[*?[]")
ADVICE = {".tar": "Tar:path={}", ".parquet": "Parquet:path={}", ".arrow": "Parquet:path={}"}
LISTS = (".txt", ".lst", ".csv", ".tsv", ".jsonl", ".ndjson")
ADVICE_FILE = {**ADVICE, **dict.fromkeys(LISTS, "ImageList:path={}")}
LOCK, OUTPUTS = ".lock", ("config.yaml", "prepare.json", "verify_results.jsonl")  # files in our output folders


class PassedOver(NamedTuple):
    """A folder or file of a dataset that could not be listed completely, and the reason."""

    path: str
    reason: str


class Scan(NamedTuple):
    """Contents of one folder, without subfolders' contents.

    files: sorted names of images, separated by NUL. status: None if the folder cannot be read, for ``reason``.
    """

    files: str
    folders: list[str]
    others: Counter[str]
    status: os.stat_result | None
    reason: str = ""


OUTPUT = Scan("", [], Counter(), None)  # a folder that one of our commands writes to


class Listing:
    """A recursive listing: iterate over :meth:`chunks`, then read the attributes.

    ``others`` counts non-image files by extension; ``stamps`` has (folder, status before it was read, or None if it was
    unreadable) for every folder; ``passed_over`` has the unreadable folders. ``outputs``: whether to descend into
    output folders of training, verify and prepare below the root.
    """

    def __init__(
        self,
        extensions: Sequence[str] = EXTENSIONS,
        on_count: Callable[[int], None] = lambda count: None,
        *,
        outputs: bool = False,
    ):
        self.extensions = frozenset(extension.lower() for extension in extensions)
        self.on_count = on_count
        self.outputs = outputs
        self.others: Counter[str] = Counter()
        self.stamps: list[tuple[str, os.stat_result | None]] = []
        self.passed_over: list[PassedOver] = []
        self.progress = Progress("listing", "files")
        self._seen: set[tuple[int, int]] = set()
        self._workers = PatientMap()

    def chunks(self, root: str) -> Iterator[list[str]]:
        """Yield the image paths below ``root`` in sorted order, in chunks; a folder seen before yields nothing."""
        scans = self._scan_all(root)
        pending: list[str | list[str]] = [root]
        while pending:
            piece = pending.pop()
            if isinstance(piece, list):
                yield piece
            elif piece in scans:
                pending += reversed(_pieces(piece, scans.pop(piece)))

    def matches(self, pattern: str) -> Iterator[list[str]]:
        """Yield the image files that match a pattern (``*``, ``?``, ``[..]``, ``**``) and those below matching folders.

        They come in one chunk, sorted and without duplicates.
        """
        found: set[str] = set()
        for path in sorted(glob.iglob(pattern, recursive=True)):
            if os.path.isdir(path):
                found.update(itertools.chain.from_iterable(self.chunks(path)))
                continue
            extension = os.path.splitext(path)[1].lower()
            if extension in self.extensions or (not extension and _begins_as_image(path, self.extensions)):
                found.add(path)
            else:
                self.others[extension or "files without extension"] += 1
        yield sorted(found)

    def _scan_all(self, root: str) -> dict[str, Scan]:
        """Scan level by level; a folder that is reached again through a link is entered only once."""
        scans: dict[str, Scan] = {}
        level = [root]
        while level:
            deeper: list[str] = []
            for folder, scan in zip(level, self._workers.map(self._scan, level), strict=True):
                if scan is OUTPUT and folder == root:
                    scan = self._scan(folder, output=True)
                if scan is OUTPUT:
                    self.others["folders with the output of a run"] += 1
                    logger.info(
                        f"folder skipped: {folder} (the output of a run; name it in train.dataset_path to use it)"
                    )
                    continue
                self.stamps.append((folder, scan.status))
                if scan.status is None:
                    self.others["unreadable folders"] += 1
                    self.passed_over.append(PassedOver(folder, scan.reason))
                    continue
                identity = (scan.status.st_dev, scan.status.st_ino)
                if identity not in self._seen:
                    self._seen.add(identity)
                    scans[folder] = scan
                    self.others.update(scan.others)
                    deeper += [os.path.join(folder, name) for name in scan.folders]
                self.on_count(self.progress.count)
            level = deeper
        return scans

    def _scan(self, folder: str, output: bool = False) -> Scan:
        """Read one folder; ``output``: even if it is an output folder."""
        files, folders, others, extensions, marks = [], [], Counter(), self.extensions, []
        try:
            status = os.stat(folder)
            with os.scandir(folder) as entries:
                for number, entry in enumerate(entries, start=1):
                    name = entry.name
                    if number % 4096 == 0:
                        self.progress.add(4096)
                    if name[0] == ".":
                        marks += [name] if name == LOCK else []
                        continue
                    dot = name.rfind(".")
                    extension = name[dot:].lower() if dot > 0 else ""
                    image = extension in extensions if extension else _begins_as_image(entry.path, extensions)
                    if entry.is_dir(follow_symlinks=False) or (not image and entry.is_symlink() and entry.is_dir()):
                        folders.append(name)
                    elif image:
                        files.append(name)
                    else:
                        marks += [name] if name in OUTPUTS else []
                        others[extension or "files without extension"] += 1
        except OSError as e:
            return Scan("", [], Counter(), None, f"unreadable: {type(e).__name__}: {e.strerror}")
        if LOCK in marks and len(marks) > 1 and not output and not self.outputs:
            return OUTPUT
        self.progress.add((len(files) + len(folders) + others.total()) % 4096)
        files.sort()
        return Scan("\0".join(files), sorted(folders), others, status)


def _pieces(folder: str, scan: Scan) -> list[str | list[str]]:
    """Return a folder's files (in lists) and subfolders, in the sorted order of all paths below it."""
    prefix = os.path.join(folder, "")
    files = [prefix + name for name in scan.files.split("\0")] if scan.files else []
    if not scan.folders:
        return [files]
    ends = {os.path.join(prefix + name, ""): prefix + name for name in scan.folders}
    pieces: list[str | list[str]] = []
    for is_folder, group in itertools.groupby(sorted([*files, *ends]), key=ends.__contains__):
        some = list(group)
        pieces += [ends[one] for one in some] if is_folder else [some]
    return pieces


def list_images(
    roots: Sequence[str], extensions: Sequence[str] = EXTENSIONS, passed_over: list[PassedOver] | None = None
) -> list[str]:
    """Return the image files below ``roots``, root by root, sorted by path within each.

    Extensions are case-insensitive. Hidden files and folders are skipped; links to folders are followed, but no folder
    is entered twice; no file is opened. Unreadable folders are appended to ``passed_over``, or logged if that is None.

    Raises:
        DataError: if some roots are not folders (lists all of them), or none holds an image.
    """
    listing = Listing(extensions)
    chunks = list_chunks(roots, listing)
    paths = [path for chunk in itertools.chain.from_iterable(chunks) for path in chunk]
    if passed_over is None:
        log_passed_over(listing.passed_over)
    else:
        passed_over += listing.passed_over
    return paths


def log_passed_over(those: Sequence[PassedOver]) -> None:
    """Log a warning for each, or for the first few and the total number if there are many."""
    for path, reason in those[:MAX_LOGGED]:
        logger.warning(f"skipped: {path} ({reason})")
    if len(those) > MAX_LOGGED:
        logger.warning(f"skipped: {len(those) - MAX_LOGGED:,} more ({command('run/data/verify.py')} lists them)")


def list_chunks(roots: Sequence[str], listing: Listing) -> Iterator[Iterator[list[str]]]:
    """Yield, for each root, the chunks of :meth:`Listing.chunks`; log the total time at the end.

    Raises:
        DataError: as :func:`list_images`.
    """
    missing = [root for root in roots if not (os.path.isdir(root) or is_pattern(root))]
    if missing or not roots:
        got = "; ".join(f"{root} ({_what_it_is(root)})" for root in missing)
        raise DataError(f"expected folders of images, got {got or 'no folder'}; {CHECK_PATH}")
    found = 0

    def counted(chunks: Iterator[list[str]]) -> Iterator[list[str]]:
        nonlocal found
        for chunk in chunks:
            found += len(chunk)
            yield chunk

    for root in roots:
        yield counted(listing.matches(root) if is_pattern(root) else listing.chunks(root))
    listing.progress.end(f"{found} images")
    if not found:
        inside = ", ".join(f"{count} {kind}" for kind, count in listing.others.most_common(5)) or "no files"
        if any(map(is_pattern, roots)):
            inside += " (quote a pattern on the command line, and use ** for folders of any depth)"
        log_passed_over(listing.passed_over)
        advice = [f"give {ADVICE[kind].format(roots[0])}" for kind in ADVICE if kind in listing.others]
        raise DataError(
            f"expected images ({' '.join(sorted(listing.extensions))}), got {inside} in {', '.join(roots)}; "
            f"{', '.join(advice) or CHECK_PATH + ', or convert the files'}"
        )


def is_pattern(place: str) -> bool:
    """Return whether a place is a pattern: it contains ``*``, ``?`` or ``[`` and is not an existing path."""
    return PATTERN.search(place) is not None and not os.path.exists(place)


def _begins_as_image(path: str, extensions: Collection[str]) -> bool:
    """Return whether a file without extension is an image by its first bytes.

    Always false if only some extensions were requested.
    """
    if not extensions >= set(EXTENSIONS) or not os.path.isfile(path):
        return False
    try:
        with open(path, "rb", buffering=0) as file:
            return BEGINNING.match(file.read(16)) is not None
    except OSError:
        return False


def _what_it_is(place: str) -> str:
    """Explain why a place is not a folder and, for a file, how to train on it."""
    if not os.path.exists(place):
        return "missing"
    advice = next((text for suffix, text in ADVICE_FILE.items() if place.lower().endswith(suffix)), None)
    if advice is None:
        return "a file; give its folder, or a list of images as ImageList:path=.."
    return f"a file; give {advice.format(place)}"


class Progress:
    """Log a count and its rate: first after half a second, then at intervals that double up to ten seconds."""

    def __init__(self, task: str, unit: str, first_s: float = 0.5, clock: Callable[[], float] = time.monotonic):
        self.task = task
        self.unit = unit
        self.count = 0
        self.clock = clock
        self.start = clock()
        self.interval = first_s
        self.next = self.start + first_s

    def add(self, number: int) -> None:
        """Add ``number`` to the count."""
        self.count += number
        now = self.clock()
        if now >= self.next:
            self.interval = min(2 * self.interval, 10.0)
            self.next = now + self.interval
            logger.info(f"{self.task}: {self._sum(now)}")

    def end(self, result: str = "") -> None:
        """Log the total if progress was logged before."""
        now = self.clock()
        if now - self.start >= 0.5:
            logger.info(f"{self.task} done: {self._sum(now)} {now - self.start:.1f} s {result}".rstrip())

    def _sum(self, now: float) -> str:
        return f"{self.count} {self.unit}, {self.count / max(now - self.start, 1e-9):.0f} {self.unit}/s"


class PatientMap:
    """Ordered ``map`` that switches to threads when calls mostly wait (network file system) rather than compute."""

    def __init__(self, threads: int = 16, probes: int = 32, waiting: float = 0.5):
        self.threads = threads
        self.probes = probes
        self.waiting = waiting
        self.calls, self.wall, self.cpu = 0, 0.0, 0.0

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Yield ``function(item)`` for every item."""
        items = iter(items)
        for item in items:
            if self.waits:
                break
            wall, cpu = time.perf_counter(), time.thread_time()
            result = function(item)
            self.calls, self.wall = self.calls + 1, self.wall + time.perf_counter() - wall
            self.cpu += time.thread_time() - cpu
            yield result
        else:
            return
        items = itertools.chain([item], items)
        with ThreadPoolExecutor(self.threads) as pool:
            while some := list(itertools.islice(items, 64 * self.threads)):
                yield from pool.map(function, some)

    @property
    def waits(self) -> bool:
        """Whether the calls so far spent most of their time waiting."""
        return self.calls >= self.probes and self.cpu < (1 - self.waiting) * self.wall
