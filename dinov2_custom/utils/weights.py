"""Weight files in, flat tensors out: any wrapper, prefix and block chunking; never any code from the file.

Not here: what a caller does about tensors that do not fit. Read :func:`flat_state` first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dinov2_custom.errors import CheckpointError
from dinov2_custom.utils.checkpoint_folder import read_folder
from dinov2_custom.utils.download import fetch
from dinov2_custom.utils.hugging_face import from_hugging_face, is_hugging_face
from dinov2_custom.utils.paths import local_path

logger = logging.getLogger("dinov2")
RELEASED_URL = "https://dl.fbaipublicfiles.com/dinov2"
_WRAPPERS = ("teacher", "model", "state_dict", "student")
_PREFIXES = re.compile(r"(?:^|(?<=\.))(?:module|backbone|_orig_mod|_fsdp_wrapped_module)\.")
_CHUNKED = re.compile(r"(^|\.)blocks\.\d+\.(\d+)\.")
_HEADS = ("dino_head.", "ibot_head.")
_DIGEST = re.compile(r"-([a-f0-9]{8,64})\.")  # as torch.hub reads it
_TIMM = {"cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight"}  # and no mask token


def read_weights(source: str | os.PathLike) -> Any:
    """Read a file of tensors and plain values: a path, an http(s) URL, or what one of iopath's handlers serves.

    A folder stands for the ``model.safetensors`` in it, whole or in parts, as Hugging Face writes it, or is
    a training checkpoint.

    Raises:
        CheckpointError: missing, torn, or holding anything but tensors and plain values.
    """
    path = to_local(source)
    if (path / "model.safetensors.index.json").is_file():
        return _read_parts(path)
    if (path / "model.safetensors").is_file():
        path = path / "model.safetensors"
    if path.is_dir():
        return read_folder(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as e:
        raise CheckpointError(f"expected a weight file at {path}, found nothing; check the path") from e
    except Exception as e:  # torch raises many kinds on torn files
        reason = f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
        # torch's own words advise to load it without the safeguard; other kinds come from files of text, or of nothing
        if isinstance(e, pickle.UnpicklingError | LookupError | EOFError):
            reason = "no weight file, or one that holds more than tensors and plain values"
        raise CheckpointError(f"expected a weight file of tensors at {path}, could not read it: {reason}") from e


def to_local(source: str | os.PathLike) -> Path:
    """Return the file or folder of ``source``, downloaded where it is an http(s) URL or of one of iopath's handlers."""
    return _local_copy(str(source)) if is_url(source) else local_path(source)


def check_sha256(path: Path, start: str = "") -> None:
    """Compare a file's SHA-256 with the ``start`` of it, else with what its name has: ``<name>-<start>.pth``.

    Raises:
        CheckpointError: another digest.
    """
    named = _DIGEST.search(path.name)
    start = named[1] if named else start
    if not start:
        logger.warning(f"check_hash: nothing to compare with for {path}, whose name ends in no -<SHA-256>")
        return
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if not digest.hexdigest().startswith(start):
        raise CheckpointError(
            f"check_hash: expected a SHA-256 that starts with {start}, got {digest.hexdigest()} of {path}; "
            "delete the file and get it again"
        )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as e:
        raise CheckpointError(f"expected a weight file at {path}, found nothing; check the path") from e
    except Exception as e:  # a class of its own, which the library does not document
        raise CheckpointError(f"expected a safetensors file at {path}, could not read it: {e}") from e


def _read_parts(folder: Path) -> dict[str, Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    names = {Path(name).name for name in index["weight_map"].values()}  # never a file outside the folder
    return {key: value for name in sorted(names) for key, value in _read_safetensors(folder / name).items()}


def is_url(source: str | os.PathLike) -> bool:
    return str(source).startswith(("http://", "https://"))


def _local_copy(url: str) -> Path:
    """Return the file of ``url`` in torch.hub's folder; only released files have names that are nobody else's."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return fetch(
        url, folder if url.startswith(RELEASED_URL) else folder / hashlib.sha256(url.encode()).hexdigest()[:16]
    )


def flat_state(file: Any, checkpoint_key: str | None = None) -> dict[str, Tensor]:
    """Return a backbone's tensors under the released, flat names, without heads.

    The tensors may lie under ``checkpoint_key`` (else teacher, model, state_dict or student); of a whole training state
    the teacher's are taken. ``blocks.<chunk>.<i>.`` becomes ``blocks.<i>.``,
    and the names of Hugging Face's and timm's models the released ones.

    Raises:
        CheckpointError: no dict of tensors.
    """
    state = _unwrapped(file, checkpoint_key)
    return {name: value for name, value in state.items() if not name.startswith(_HEADS)}


def flat_heads(file: Any, checkpoint_key: str | None = None) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of the same file's heads, ``dino_head`` and ``ibot_head``; a bare backbone has none."""
    heads: dict[str, dict[str, Tensor]] = {}
    for name, value in _unwrapped(file, checkpoint_key).items():
        if name.startswith(_HEADS):
            head, _, rest = name.partition(".")
            heads.setdefault(head, {})[rest] = value
    return heads


def _unwrapped(file: Any, checkpoint_key: str | None) -> dict[str, Tensor]:
    if not isinstance(file, Mapping):
        raise CheckpointError(f"expected a weight file that holds a dict of tensors, got a {type(file).__name__}")
    while key := next((k for k in (checkpoint_key, *_WRAPPERS) if k and isinstance(file.get(k), Mapping)), None):
        file = file[key]
    state = {name: value for name, value in file.items() if isinstance(value, Tensor)}
    for part in ("teacher.", "student."):
        if any(name.startswith(part) for name in state):
            state = {name.removeprefix(part): value for name, value in state.items() if name.startswith(part)}
    if is_hugging_face(state):
        return from_hugging_face(state)
    state = {flat_name(name): value for name, value in state.items()}
    return from_timm(state) if _TIMM <= set(state) and "mask_token" not in state else state


def from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a timm ``vit_*_dinov2``'s tensors under the released names, which most of them have.

    timm has no mask token (zeros here, what training starts from); with registers its positions are those of patches,
    and the class token has its own in it. A SwiGLU's ``fc1`` is ``w12``, twice as wide as ``fc2`` takes.
    """
    state = dict(state)
    dim = state["cls_token"].shape[-1]
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat((torch.zeros(1, 1, dim), state["pos_embed"].cpu()), dim=1)
    for second in [name.removesuffix("weight") for name in state if name.endswith(".mlp.fc2.weight")]:
        first = second.replace("fc2", "fc1")
        if len(state[f"{first}weight"]) == 2 * state[f"{second}weight"].shape[1]:
            for old, new in ((first, first.replace("fc1", "w12")), (second, second.replace("fc2", "w3"))):
                state |= {new + leaf: state.pop(old + leaf) for leaf in ("weight", "bias") if old + leaf in state}
    return state | {"mask_token": torch.zeros(1, dim)}


def flat_name(name: str) -> str:
    """Return a parameter's name without wrappers' prefixes, ``backbone.`` and block chunks."""
    return _CHUNKED.sub(r"\1blocks.\2.", _PREFIXES.sub("", name))


class Fit(NamedTuple):
    """How tensors fit a model: ``found`` by the model's own names; names that are ``missing`` from the file,
    ``unexpected`` in it, and ``misshapen`` as "name: expected shape, got shape".
    """

    found: dict[str, Tensor]
    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]

    def examples(self, count: int = 3) -> list[str]:
        """Return up to ``count`` lines of each kind of trouble."""
        missing = [f"{name}: missing" for name in self.missing[:count]]
        return [*self.misshapen[:count], *missing, *(f"{name}: unexpected" for name in self.unexpected[:count])]


def fit_state(model: nn.Module, state: Mapping[str, Tensor]) -> Fit:
    """Compare :func:`flat_state`'s names and shapes with ``model``'s, chunked or not; nothing is changed."""
    own = model.state_dict()
    names = {flat_name(name): name for name in own}
    found = {names[name]: value for name, value in state.items() if name in names}
    misshapen = [
        f"{name}: expected {tuple(own[name].shape)}, got {tuple(value.shape)}"
        for name, value in found.items()
        if own[name].shape != value.shape
    ]
    return Fit(found, [n for n in own if n not in found], [n for n in state if n not in names], misshapen)
