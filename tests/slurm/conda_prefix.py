"""Create a real conda environment without conda or a channel: a package built here, installed by py-rattler."""

import asyncio
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path


def make_conda_prefix(prefix: Path, hook: str) -> Path:
    """Install a package with an activate.d script and this interpreter into ``prefix``, and return it."""
    channel = prefix.parent / f"{prefix.name}_channel"
    (channel / "noarch").mkdir(parents=True)
    (channel / "linux-64").mkdir()
    _write_package(channel / "linux-64" / "shim-1-0.tar.bz2", {"etc/conda/activate.d/shim.sh": hook.encode()})
    asyncio.run(_install(channel, prefix))
    base = getattr(sys, "_base_executable", sys.executable)
    subprocess.run([base, "-m", "venv", "--without-pip", "--copies", str(prefix)], check=True)
    shutil.rmtree(channel)
    assert (prefix / "conda-meta" / "shim-1-0.json").is_file()
    return prefix


def _write_package(path: Path, files: dict[str, bytes]) -> None:
    listed = [
        {"_path": name, "path_type": "hardlink", "sha256": hashlib.sha256(data).hexdigest(), "size_in_bytes": len(data)}
        for name, data in files.items()
    ]
    about = {"name": "shim", "version": "1", "build": "0", "build_number": 0, "depends": [], "subdir": "linux-64"}
    members = {
        **files,
        "info/index.json": json.dumps(about).encode(),
        "info/paths.json": json.dumps({"paths": listed, "paths_version": 1}).encode(),
        "info/files": "\n".join(files).encode(),
    }
    with tarfile.open(path, "w:bz2") as package:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            package.addfile(entry, io.BytesIO(data))


async def _install(channel: Path, prefix: Path) -> None:
    import rattler
    from rattler.index import index_fs

    await index_fs(str(channel))
    source = rattler.Channel(channel.as_uri())
    records = await rattler.solve(sources=[source], specs=["shim"], platforms=["linux-64", "noarch"])
    await rattler.install(records, str(prefix), show_progress=False)
