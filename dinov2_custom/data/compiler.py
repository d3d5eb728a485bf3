"""Compile a C file of ours once and keep the library, where this machine has a C compiler.

Libraries are kept in ``$XDG_CACHE_HOME/dinov2_custom`` (else ``~/.cache/dinov2_custom``) under a name made of the
source and the processor. Not in here: what is done with them (``native``). Read :func:`compiled` first.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from dinov2_custom.files import cache_folder, ours

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-std=c99", "-shared", "-fPIC")
OF_THIS_PROCESSOR = (("-march=native",), ("-mcpu=native",), ())
TIMEOUT_S = 60


def compiled(source: Path) -> Path:
    """Return the path of the library of a C file, compiling it first where it is missing.

    Raises:
        OSError, subprocess.SubprocessError: no compiler, or it fails, or there is no place for the library.
    """
    name = hashlib.blake2b(source.read_bytes() + repr((FLAGS, _processor())).encode(), digest_size=12).hexdigest()
    folder = cache_folder()
    library = folder / f"{source.stem}-{name}.so"
    if library.is_file() and ours(library):
        return library
    compiler = next((path for path in map(shutil.which, COMPILERS) if path), None)
    if compiler is None:
        raise OSError(f"no C compiler ({', '.join(COMPILERS)})")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "made.so"
        for more in OF_THIS_PROCESSOR:
            command = [compiler, *FLAGS, *more, "-o", str(made), str(source), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
            if done.returncode == 0:
                os.replace(made, library)  # at once: other processes may be waiting for it
                return library
    raise OSError(f"{compiler} failed: {(done.stderr.strip().splitlines() or [''])[-1]}")


def _processor() -> str:
    """Name what the compiler optimises for; nodes of a cluster may share one cache."""
    text = f"{platform.system()} {platform.machine()} {platform.processor()}"
    try:
        with open("/proc/cpuinfo") as file:
            kinds = {line for line in file if line.startswith(("model name", "flags", "Features"))}
    except OSError:
        return text
    return text + "".join(sorted(kinds))
