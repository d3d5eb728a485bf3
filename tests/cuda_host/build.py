"""Build the stand-in of the CUDA runtime for the torch of this interpreter; see :func:`build`.

Functions that torch imports and the sources do not define become stubs that return 0 and report it once on stderr,
except for those in ``QUIET``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

SOURCES = ("runtime.cpp", "memory.cpp", "device.cpp", "driver.cpp", "libraries.cpp")
HEADERS = ("/usr/local/cuda/include", "/usr/include")  # after those of CUDA's own packages beside torch
STUBBED = re.compile(r"_*cuda[A-Z]\w*|cublas\w+|cu[A-Z]\w+")
QUIET = re.compile(r"cublas(Set|Get|Create|Destroy|Lt)\w+|cublas\w*(Gemm|gemm|Gemv|gemv|Dot|dot|Matmul)\w*")


class Unavailable(RuntimeError):
    """The stand-in cannot be built here; the message names what is missing."""


def build(folder: Path) -> Path:
    """Return the library to preload, built into ``folder`` unless it exists.

    Raises:
        Unavailable: torch is not a CUDA build, or a compiler or CUDA header is missing.
    """
    torch_lib = Path(importlib.util.find_spec("torch").origin).parent / "lib"
    if not (torch_lib / "libtorch_cuda.so").exists():
        raise Unavailable("torch is a build without CUDA")
    compiler = shutil.which("g++")
    if not compiler:
        raise Unavailable("there is no g++")
    packaged = torch_lib.parents[1].glob("nvidia/cu*/include")
    headers = [*map(str, packaged), os.environ.get("CUDA_HOME", "") + "/include", *HEADERS]
    include = next((one for one in headers if Path(one, "crt", "host_runtime.h").exists()), None)
    if include is None:
        raise Unavailable(
            f"there is no crt/host_runtime.h of CUDA in {', '.join(headers)}; pip install 'cuda-toolkit[crt]'"
        )
    here = Path(__file__).parent
    texts = [(here / name).read_bytes() for name in (*SOURCES, "runtime.h", "build.py")]
    key = hashlib.sha256(b"".join(texts) + str(torch_lib).encode()).hexdigest()[:16]
    library = folder / key / "libcuda.so.1"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    stubs = library.parent / f"stubs{os.getpid()}.cpp"
    stubs.write_text(_stubs(torch_lib, b"".join(texts).decode()))
    sources = [here / name for name in SOURCES] + [stubs]
    # the name that Triton and torch load the driver by, so that they find this library already loaded
    made = f"{library}.{os.getpid()}"  # another process may also be building it
    linked = ["-shared", "-Wl,-soname,libcuda.so.1", "-o", made]
    options = ["-std=c++17", "-O1", "-fPIC", "-Wall", f"-I{include}", f"-I{here}"]
    done = subprocess.run([compiler, *options, *map(str, sources), *linked, "-ldl"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"building the stand-in failed:\n{done.stderr}")
    os.replace(made, library)
    return library


def _stubs(torch_lib: Path, sources: str) -> str:
    """Return a source with a stub for each imported function that ``sources`` do not define."""
    names: set[str] = set()
    for library in torch_lib.glob("lib*.so"):
        table = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
        names |= {line.split()[-1].partition("@")[0] for line in table.stdout.splitlines()}
    missing = sorted(n for n in names if STUBBED.fullmatch(n) and not re.search(rf"\b{n}\(", sources))
    lines = [
        "namespace host { void note_once(const char *name); void count_quietly(const char *name); }",
        'extern "C" {',
    ]
    for name in missing:
        counted = "count_quietly" if QUIET.fullmatch(name) else "note_once"
        lines.append(f'long {name}() {{ host::{counted}("{name}"); return 0; }}')
    return "\n".join([*lines, "}\n"])
