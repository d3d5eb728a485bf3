"""Verification against a plain Pillow loop, CPU time of one core: python benchmarks/verify.py [folder of JPEG files]

Both process the same files in memory, alternating in one process; the result is the median over the rounds of
CPU(Pillow ``convert("RGB")``) / CPU(verify's check). The last row is the whole command with one decoder process,
reading, results file and report included, against reading and ``convert("RGB")`` of the same files. Without a folder
it generates synthetic photographs. ``--damage`` prints instead the fraction of damaged files that each method finds.
"""

from __future__ import annotations

import argparse
import io
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from dinov2_custom.data.decode import find_simplejpeg
from dinov2_custom.data.loaders import make_dataset
from dinov2_custom.verify.check import check_image
from dinov2_custom.verify.main import MARKER, verify

SIZES = {"500x375": (48, 500, 375), "1024x768": (24, 1024, 768), "4000x3000": (4, 4000, 3000)}
MEGABYTES = 80  # of files on disk
DAMAGE = {
    "one bit flipped": 0,
    "16 random bytes": 16,
    "512 random bytes": 512,
    "4096 random bytes": 4096,
    "512 zero bytes": -512,
    "4096 zero bytes": -4096,
    "end missing": None,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="JPEG files at any depth")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=200, help="of the folder, at most")
    parser.add_argument("--damage", action="store_true", help="measure what is found, not time")
    args = parser.parse_args()
    sets = _folder(Path(args.folder), args.images) if args.folder else {name: _make(*s) for name, s in SIZES.items()}
    for name, files in sets.items():
        if args.damage:
            _print_damage(name, files, args.images)
        else:
            _print_speed(name, files, args.rounds)


def _folder(folder: Path, limit: int) -> dict[str, list[bytes]]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    return {str(folder.name): [path.read_bytes() for path in paths[:: max(1, len(paths) // limit)][:limit]]}


def _make(count: int, width: int, height: int) -> list[bytes]:
    """Make JPEG files (quality 90, 4:2:0) of about two bits per pixel: smooth noise at every scale."""
    files = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        pixels = np.zeros((height, width, 3), np.float32)
        for cells in (4, 16, 64, 256, 1024):
            noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            pixels += (np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC)) - 127.5) * cells**-0.4
        buffer = io.BytesIO()
        Image.fromarray(np.clip(pixels + 128, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def by_pillow(data: bytes) -> bool:
    """Return whether a Pillow loop would detect the damage."""
    try:
        Image.open(io.BytesIO(data)).convert("RGB")
        return False
    except Exception:
        return True


def _cpu(function: Callable[[], object]) -> float:
    start = _used()
    function()
    return _used() - start


def _used() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def _print_speed(name: str, files: list[bytes], rounds: int) -> None:
    module = find_simplejpeg()
    ways: dict[str, Callable[[], object]] = {
        "Pillow convert": lambda: [by_pillow(data) for data in files],
        "check, Pillow": lambda: [check_image(data) for data in files],
    }
    if module is not None:
        ways["check, simplejpeg"] = lambda: [check_image(data, module) for data in files]
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        # amortise the command's process start-up over many images
        copies = max(1, MEGABYTES * 10**6 // sum(map(len, files)))
        paths = [images / f"{i:05}.jpg" for i in range(copies * len(files))]
        for i, path in enumerate(paths):
            path.write_bytes(files[i % len(files)])
        dataset = make_dataset(dataset_str=str(images))

        def command() -> None:
            with tempfile.TemporaryDirectory(dir=folder) as out:
                (Path(out) / MARKER).touch()
                verify(dataset, Path(out), workers=1)

        ways["Pillow convert, from disk"] = lambda: [by_pillow(path.read_bytes()) for path in paths]
        ways["verify, from disk to report"] = command
        for way in ways.values():
            way()
        times = {way: [] for way in ways}
        began = time.monotonic()
        for _ in range(rounds):
            for way, function in ways.items():
                times[way].append(_cpu(function))
    print(f"\n{name}: {len(files)} files, {np.mean([len(f) for f in files]) / 1e3:.0f} kB, {rounds} rounds, "
          f"{time.monotonic() - began:.0f} s")  # fmt: skip
    print("| way | ms an image, median CPU | ratio, median of rounds |\n|---|---|---|")
    for way, seconds in times.items():
        base = times["Pillow convert, from disk" if "disk" in way else "Pillow convert"]
        count = len(paths) if "disk" in way else len(files)
        ratio = statistics.median(a / b for a, b in zip(base, seconds, strict=True))
        print(f"| {way} | {statistics.median(seconds) / count * 1e3:.3f} | {ratio:.2f} |")


def _print_damage(name: str, files: list[bytes], count: int) -> None:
    module = find_simplejpeg()
    rng = random.Random(0)
    print(f"\n{name}: share of {count} damaged files that is found, %\n")
    print("| damage | Pillow convert | verify without simplejpeg | verify |\n|---|---|---|---|")
    for kind, size in {"none": None, **DAMAGE}.items():
        found = np.zeros(3)
        for turn in range(count):
            data = files[turn % len(files)]
            data = data if kind == "none" else _damage(data, size, rng)
            found += [by_pillow(data), bool(check_image(data).reason), bool(check_image(data, module).reason)]
        print(f"| {kind} | " + " | ".join(f"{share:.0f}" for share in found / count * 100) + " |", flush=True)


def _damage(data: bytes, size: int | None, rng: random.Random) -> bytes:
    """Change bytes at a random position in the last nine tenths: ``size`` random ones, zeros if negative, 0: a bit."""
    broken = bytearray(data)
    place = rng.randrange(max(700, len(data) // 10), len(data) - abs(size or 0) - 2)
    if size is None:
        return data[:place]
    if size == 0:
        broken[place] ^= 1 << rng.randrange(8)
    else:
        broken[place : place + abs(size)] = rng.randbytes(size) if size > 0 else bytes(-size)
    return bytes(broken)


if __name__ == "__main__":
    main()
