"""Put the oracle's package into ``<repository>/.oracle`` with pip: one pinned file, checked by hash, no dependencies.

Not part of the package: the wheel is CC-BY-NC, is used by the tests only and is never shipped. Read
:func:`ensure_oracle` first.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
MARKER = Path("dinov2") / "train" / "ssl_meta_arch.py"
TIMEOUT_S = 300


class OracleUnavailable(RuntimeError):
    """The oracle's package is neither on disk nor to be had from the package index."""


def ensure_oracle(target: Path = REPOSITORY / ".oracle") -> Path:
    """Return the folder that holds upstream's ``dinov2``, installing it first where it is missing.

    Raises:
        OracleUnavailable: with pip's last words.
    """
    return ensure_package(target, MARKER, REQUIREMENTS)


def ensure_package(target: Path, marker: Path, requirements: Path) -> Path:
    """Return ``target`` with the one package of ``requirements`` in it; ``marker`` is a file of the package.

    Safe when several test processes ask at once: each installs into a folder of its own and renames it; the first wins.

    Raises:
        OracleUnavailable: with pip's last words.
    """
    if (target / marker).is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".oracle-", dir=target.parent))
    try:
        _pip_install(scratch / "new", requirements)
        _move_into_place(scratch / "new", target, scratch / "old", marker)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if not (target / marker).is_file():
        raise OracleUnavailable(f"expected {target / marker} after the installation, found nothing; delete {target}")
    return target


def package_or_skip(name: str, requirements: Path) -> Path:
    """Return ``<repository>/.oracle_<name>`` with the package ``name`` in it.

    Where it cannot be had the test is skipped, or fails if ``DINOV2_REQUIRE_ORACLE=1``.
    """
    try:
        return ensure_package(REPOSITORY / f".oracle_{name}", Path(name) / "__init__.py", requirements)
    except OracleUnavailable as e:
        import pytest  # the benchmarks use this package without it

        if os.environ.get("DINOV2_REQUIRE_ORACLE") == "1":
            pytest.fail(f"NO {name.upper()} CHECK: {e}", pytrace=False)
        pytest.skip(f"NO {name.upper()} CHECK: {e}")


def _pip_install(folder: Path, requirements: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--require-hashes", "--requirement", str(requirements), "--target", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise OracleUnavailable(f"could not run pip to fetch the oracle: {e}") from e
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise OracleUnavailable("pip could not fetch the oracle: " + " | ".join(words))


def _move_into_place(new: Path, target: Path, old: Path, marker: Path) -> None:
    """Rename ``new`` to ``target``; a complete ``target`` made by another process meanwhile is kept."""
    if target.exists() and not (target / marker).is_file():
        try:
            os.rename(target, old)  # a torn folder
        except FileNotFoundError:
            pass
    try:
        os.rename(new, target)
    except OSError:
        if not (target / marker).is_file():
            raise
