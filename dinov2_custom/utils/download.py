"""Download a file from a URL completely or not at all, with a progress bar.

``torch.hub.download_url_to_file`` keeps truncated files and HTML pages, and waits forever for a server that stopped
responding.
"""

from __future__ import annotations

import http.client
import os
import shutil
import urllib.parse
import urllib.request
from pathlib import Path

from dinov2_custom.errors import CheckpointError
from dinov2_custom.files import atomic_write
from dinov2_custom.utils.paths import without_credentials

_CHUNK = 1 << 20
_TIMEOUT_S = 60
_STARTS = (b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)))


def fetch(url: str, folder: str | os.PathLike, *, progress: bool = True) -> Path:
    """Return ``folder/<last part of url>``, downloaded if it does not exist yet.

    Args:
        progress: show a bar on stderr.

    Raises:
        CheckpointError: no response, a truncated or corrupt one, not a weight file, or a full disk; no partial file is
            left.
    """
    from tqdm import tqdm

    target = Path(folder).expanduser() / Path(urllib.parse.urlparse(url).path).name
    if target.is_file():
        return target
    shown = without_credentials(url)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer,
            atomic_write(target, "wb", exclusive=True) as file,
        ):
            announced = int(answer.headers.get("Content-Length") or 0)
            bar = tqdm.wrapattr(
                file, "write", announced or None, bytes=False, desc=target.name, unit="B", unit_scale=True,
                disable=not progress,
            )  # fmt: skip
            with bar as to_file:
                shutil.copyfileobj(answer, to_file, _CHUNK)
            received = file.tell()
            if announced and received != announced:
                raise CheckpointError(
                    f"{shown}: expected {announced:,} bytes, got {received:,}; the connection broke, try again"
                )
            file.flush()
            if what := describe_start(Path(file.name)):
                raise CheckpointError(
                    f"{shown}: expected a weight file, got {what}; check the address, nothing was kept"
                )
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise CheckpointError(
            f"{shown}: expected to download {target.name} into {target.parent}, got {type(e).__name__}: "
            f"{' '.join(str(e).split())}; put the file there by other means, or give its path instead"
        ) from e
    return target


def describe_start(path: Path) -> str:
    """Return "" if a file begins like a weight file (torch's zip or pickle, safetensors), else a description."""
    try:
        with open(path, "rb") as file:
            start = file.read(200)
    except OSError:
        return ""
    text = start.lstrip().lower()
    if start.startswith(_STARTS) or (len(start) > 8 and start[8:9] == b"{" and start[5:8] == bytes(3)):
        return ""
    if text.startswith(b"<"):
        return "an HTML or XML page, of a login or an error perhaps"
    if text.startswith(b"version https://git-lfs"):
        return "the pointer of a file in Git LFS (git lfs pull gets the file)"
    if not text:
        return "an empty file"
    return f"a file that begins with {start[:20]!r}, as no weight file does"
