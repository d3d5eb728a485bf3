"""Measure the cost of a growing collection: start-up, memory of each process, listing.

    python -m benchmarks.index_scale                      # simulated sources of 1e4 .. 1e9 images
    python -m benchmarks.index_scale --files 1000000      # also list that many (empty) files created in --folder

Two tables. The first: "computed names" is a source without an index, which leaves the sampler and the loader; "mapped
index" has a packed index file of that many paths, as a listing writes it. The second table uses real files. Every row
is measured in a separate process; private memory is Private_Dirty in smaps_rollup (Linux only), which excludes pages of
the mapped file.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

import numpy as np
from PIL import Image

MIB = 2**20
PATH_BYTES = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[10.0**k for k in range(4, 10)])
    parser.add_argument("--index-up-to", type=float, default=1e7, help="largest index file written (48 bytes an image)")
    parser.add_argument("--files", type=int, default=0, help="files to make, list and remove again")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        print(json.dumps(TASKS[args.task](args)))
        return
    header = [
        "source",
        "images",
        "time to first batch",
        "start-up",
        "worker, private",
        "trainer, private",
    ]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for task, sizes in (("loader", args.sizes), ("index", [s for s in args.sizes if s <= args.index_up_to])):
        for size in sizes:
            print_row(run(task, args, sizes=[size]))
    if args.files:
        print("\n| listing | files | seconds | files/s | peak memory |\n|---|---|---|---|---|")
        folder = make_files(args.folder, args.files)
        try:
            for task in ("walk", "list", "again", "changed"):
                print_row(run(task, args, folder=folder))
        finally:
            shutil.rmtree(folder)
            shutil.rmtree(folder + "_cache", ignore_errors=True)


def print_row(cells: list) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def run(task: str, args: argparse.Namespace, **changed) -> list:
    """Run one task in a new process and return its row."""
    options = {**vars(args), **changed, "task": task}
    command = [sys.executable, "-m", "benchmarks.index_scale"]
    for name in ("task", "folder", "workers"):
        command += [f"--{name}", str(options[name])]
    command += ["--sizes", *map(str, options["sizes"])]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


# the loader over simulated sources


def measure_loader(args: argparse.Namespace, indexed: bool = False) -> list:
    """Start a real loader over a simulated source and wait for its first batch."""
    from dinov2_custom.data import loaders
    from dinov2_custom.data.datasets import SourceDataset
    from dinov2_custom.data.index import PathTable, load
    from dinov2_custom.data.sources import Source

    size, picture = int(args.sizes[0]), io.BytesIO()
    Image.new("RGB", (256, 256), (200, 30, 90)).save(picture, "JPEG")

    class Simulated(Source):
        """``size`` copies of one image; the names come from the index file or are computed."""

        def __init__(self):
            self.names = PathTable(index=load(file)) if indexed else None

        def __len__(self):
            return size

        def name(self, i):
            return self.names[i] if indexed else f"/simulated/{i // 1000:08d}/{i}.jpg"

        def read(self, i):
            return picture.getvalue() if self.name(i).endswith("jpg") else b""

        def parts(self):
            return [("simulated", size)]

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        file = os.path.join(folder, "paths.idx")
        if indexed:
            write_index(file, size)
        start = time.perf_counter()
        loaders.make_dataset = lambda dataset_str: SourceDataset(Simulated())
        loader = loaders.make_train_loader(config(args.workers), rank=0, world_size=1)
        made = time.perf_counter() - start
        batches = iter(loader)
        next(batches)
        first = time.perf_counter() - start
        for _ in range(20):
            next(batches)
        workers = [private(pid) for pid in children(os.getpid())]
        own = private(os.getpid())
        batches.close()
    kind = "mapped index" if indexed else "computed names"
    worker = f"{max(workers) / MIB:.1f} MiB" if workers else "-"
    return [kind, f"{size:.0e}", f"{first:.2f} s", f"{1e3 * made:.1f} ms", worker, f"{own / MIB:.0f} MiB"]


def config(workers: int) -> SimpleNamespace:
    from tests.data.pictures import train_config

    cfg = train_config("simulated", batch_size_per_gpu=16, num_workers=workers)
    cfg.crops.global_crops_size, cfg.crops.local_crops_size, cfg.student.patch_size = 64, 32, 16
    return cfg


def write_index(file: str, size: int) -> None:
    """Write the index of ``size`` paths of equal length, without creating Python objects."""
    from dinov2_custom.data.index import save

    text = np.frombuffer(b"/simulated/".ljust(PATH_BYTES - 4, b"x") + b".jpg", np.uint8)
    ends = np.arange(PATH_BYTES, (size + 1) * PATH_BYTES, PATH_BYTES, dtype=np.uint64)
    save(file, {"path_text": np.tile(text, size), "path_ends": ends})


def children(pid: int) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
                with open(f"/proc/{entry}/cmdline") as file:
                    tracker = "resource_tracker" in file.read()
            except OSError:
                continue
            if parent == pid and not tracker:
                found.append(int(entry))
    return found


def private(pid: int) -> int:
    """Return the private dirty bytes of this process."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        rows = [line.split() for line in file if line.startswith("Private_Dirty")]
    return 1024 * sum(int(row[1]) for row in rows)


# listing existing files


def make_files(folder: str, number: int) -> str:
    root = tempfile.mkdtemp(prefix="index_scale_", dir=folder)
    for start in range(0, number, 1000):
        inner = os.path.join(root, f"{start // 100_000:04d}", f"{start // 1000:07d}")
        os.makedirs(inner)
        for i in range(start, min(start + 1000, number)):
            os.close(os.open(os.path.join(inner, f"image_{i:09d}.jpg"), os.O_CREAT | os.O_WRONLY))
    for place, _, _ in os.walk(root):
        os.utime(place, (1e9, 1e9))
    return root


def measure_listing(args: argparse.Namespace, kind: str) -> list:
    os.environ["XDG_CACHE_HOME"] = args.folder + "_cache"
    from dinov2_custom.data.sources import FolderSource

    if kind == "changed":
        inner = os.path.join(args.folder, "0000", "0000000")
        os.close(os.open(os.path.join(inner, "one_more.jpg"), os.O_CREAT | os.O_WRONLY))
        os.utime(inner, (1e9 + 1, 1e9 + 1))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    if kind == "walk":
        from pathlib import Path

        source = sorted(str(path) for path in Path(args.folder).rglob("*") if path.is_file())
    else:
        source = FolderSource(args.folder)
    seconds = time.perf_counter() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / MIB
    names = {
        "walk": "pathlib rglob, sorted list, for comparison",
        "list": "first start: listed, index written",
        "again": "next start: index mapped",
        "changed": "a file was added: listed again",
    }
    return [names[kind], len(source), f"{seconds:.3f}", f"{len(source) / seconds:.0f}", f"+{peak:.0f} MiB"]


TASKS = {
    "loader": measure_loader,
    "index": lambda args: measure_loader(args, indexed=True),
    **{kind: (lambda args, kind=kind: measure_listing(args, kind)) for kind in ("walk", "list", "again", "changed")},
}

if __name__ == "__main__":
    main()
