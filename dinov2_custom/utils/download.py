"""One file from a URL to disk: with a progress bar, all of it or nothing.

Not the reading of it (``weights.py``). Read :func:`fetch` first.
"""

from __future__ import annotations

import os
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from dinov2_custom.errors import CheckpointError

_CHUNK = 1 << 20
_TIMEOUT_S = 60


def fetch(url: str, folder: str | os.PathLike, *, progress: bool = True) -> Path:
    """Return ``folder/<last part of url>``, downloaded if it is not there yet.

    Args:
        progress: show a bar on stderr.

    Raises:
        CheckpointError: no answer, fewer bytes than the server announced, or a full disk; nothing is left behind then.
    """
    target = Path(folder).expanduser() / Path(urllib.parse.urlparse(url).path).name
    if target.is_file():
        return target
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
            announced = int(answer.headers.get("Content-Length") or 0)
            with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f"{target.name}.", delete=False) as file:
                temporary = Path(file.name)
                received = _copy(answer, file, announced, target.name if progress else None)
        if announced and received != announced:
            raise CheckpointError(
                f"{url}: expected {announced:,} bytes, got {received:,}; the connection broke, try again"
            )
        temporary.chmod(0o644)
        os.replace(temporary, target)
    except (OSError, urllib.error.URLError) as e:
        raise CheckpointError(
            f"{url}: expected to download {target.name} into {target.parent}, got {e}; put the file there by other "
            "means, or give its path instead"
        ) from e
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return target


def _copy(answer, file, announced: int, name: str | None) -> int:
    from tqdm import tqdm

    received = 0
    with tqdm(total=announced or None, desc=name, unit="B", unit_scale=True, disable=name is None) as bar:
        while chunk := answer.read(_CHUNK):
            file.write(chunk)
            received += len(chunk)
            bar.update(len(chunk))
    return received
