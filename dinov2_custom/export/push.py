"""Upload an export and its card to a model repository of the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from dinov2_custom.errors import ConfigError, optional
from dinov2_custom.export.card import card_path, curves_path


def open_hub(repo: str) -> Any:
    """Return the client of the Hub (HF_ENDPOINT), after checking name, connection and login, before the export.

    The token is read by huggingface_hub: from HF_TOKEN or the file that ``hf auth login`` writes.

    Raises:
        ConfigError: huggingface_hub is missing, the name is invalid, or the Hub does not accept the login.
    """
    hub = optional("huggingface_hub", "--push")
    try:
        hub.utils.validate_repo_id(repo)
    except ValueError as e:
        raise ConfigError(f"--push: expected user/name, got {repo!r}: {e}") from e
    if repo.count("/") != 1:
        raise ConfigError(f"--push: expected user/name, got {repo!r}")
    api = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    try:
        api.whoami()
    except Exception as e:  # huggingface_hub's, and those of its connections
        raise _refused(hub, api, repo, e, "nothing was exported") from e
    return api


def push(api: Any, repo: str, path: Path) -> str:
    """Upload the export at ``path``, a folder or file, in one commit; return the address of the repository.

    A repository that does not exist is created as a private one. The card becomes its README.md.

    Raises:
        ConfigError: the Hub refuses, or the connection is lost.
    """
    hub = optional("huggingface_hub", "--push")
    beside = [path, path.with_name(path.name + ".data"), card_path(path), curves_path(path)]
    files = sorted(path.iterdir()) if path.is_dir() else [file for file in beside if file.is_file()]
    names = {card_path(path): "README.md"}
    operations = [
        hub.CommitOperationAdd(path_in_repo=names.get(file, file.name), path_or_fileobj=str(file)) for file in files
    ]
    try:
        address = api.create_repo(repo, private=True, exist_ok=True)
        api.create_commit(repo, operations, commit_message=f"Upload {path.name}")
    except Exception as e:  # see above
        raise _refused(hub, api, repo, e, f"the export is at {path}") from e
    return str(address)


def _refused(hub: Any, api: Any, repo: str, error: Exception, state: str) -> ConfigError:
    causes = [error]  # of a large file, the error itself says only that it was not uploaded
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    lines = [f"{type(one).__name__}: {str(one).strip().partition(chr(10))[0].removesuffix('.')}" for one in causes]
    reason = re.sub(r"\?[^\s'\"]+", "?...", ", ".join(dict.fromkeys(lines)))  # queries sign an address
    if token := hub.get_token():
        reason = reason.replace(token, "<HF_TOKEN>")
    return ConfigError(
        f"--push: expected to write to the repository {repo} at {api.endpoint}, got {reason}; {state}; check the "
        "network, and that `hf auth login` or HF_TOKEN gives a token that may write there"
    )
