"""Resolve paths that are not local files through iopath's handlers."""

from __future__ import annotations

import os
import re
import urllib.parse
from pathlib import Path

from dinov2_custom.errors import CheckpointError

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def local_path(source: str | os.PathLike) -> Path:
    """Return a local file or folder for ``source``: the path itself, or a copy fetched by iopath's handler.

    Handlers that the program registered with iopath's ``g_pathmgr`` are tried first, then iopath's own for ``s3://``.

    Raises:
        CheckpointError: no package or no handler for such a path, or the handler failed.
    """
    text = str(source)
    if text.startswith("file://"):
        return Path(path_of_file_url(text))
    if not _SCHEME.match(text):
        return Path(source).expanduser()
    shown = without_credentials(text)
    try:
        from iopath.common import file_io
    except ImportError as e:  # torch.hub, which needs only torch, safetensors and tqdm
        raise CheckpointError(f"{shown}: expected the package iopath, got none ({e}); pip install iopath") from e
    try:
        return Path(_manager_for(text, file_io).get_local_path(text))
    except CheckpointError:
        raise
    except Exception as e:  # each handler raises its own errors
        raise CheckpointError(f"expected to fetch {shown}, got {type(e).__name__}: {e}; check path and access") from e


def path_of_file_url(source: str) -> str:
    """Return the path of a ``file://`` URL, with ``%20`` decoded; anything else unchanged."""
    return urllib.parse.unquote(urllib.parse.urlparse(source).path) if source.startswith("file://") else source


def without_credentials(source: str | os.PathLike) -> str:
    """Return ``source``, for messages; a URL loses user, password and query, which may hold secrets."""
    if not _SCHEME.match(str(source)):
        return str(source)
    parts = urllib.parse.urlsplit(str(source))
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _manager_for(text: str, file_io):
    """Return the path manager that has a handler for ``text``."""
    registered = file_io.g_pathmgr
    if any(text.startswith(prefix) for prefix in registered._path_handlers):
        return registered
    if text.startswith("s3://"):
        from iopath.common.s3 import S3PathHandler

        own = file_io.PathManager()
        own.register_handler(S3PathHandler())
        return own
    known = ", ".join(registered._path_handlers) or "none"
    raise CheckpointError(
        f"{without_credentials(text)}: expected a path that an iopath handler serves, got none for it (registered: "
        f"{known}, and s3://); register one with iopath.common.file_io.g_pathmgr, or give a local file"
    )
