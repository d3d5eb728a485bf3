"""Describe a benchmark run (machine, versions, command), measure its CPU time, and write its page."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import resource
import sys
from pathlib import Path

RESULTS = Path(__file__).with_name("results")


def describe(module: str, *more: str) -> str:
    """Return machine, versions and command of this run as markdown."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        cpu = names[0] if names else cpu
    versions = [f"python={platform.python_version()}"]
    for name in ("torch", "numpy", "pillow", "simplejpeg", "opencv-python-headless"):
        try:
            versions.append(f"{name}={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name}=absent")
    return (
        f"* machine: {cpu}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}\n"
        f"* versions: {' '.join([*versions, *more])}\n"
        f"* command: `python -m {module} {' '.join(sys.argv[1:])}`\n"
    )


def core_seconds() -> float:
    """Return the CPU time of all child processes that have ended, excluding waiting."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table(header: list[str], rows: list[list[object]]) -> str:
    """Return a markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def add_write_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--write", action="store_true", help="also write the page to benchmarks/results/")


def finish(page: str, name: str, write: bool) -> None:
    """Print the page; write it to ``benchmarks/results/<name>.md`` if asked to."""
    print(page, flush=True)
    if write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.md").write_text(page)
