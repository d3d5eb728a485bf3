"""Read weight files, without running any code from them, and give their tensors the released names."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import pickletools
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dinov2_custom.errors import CheckpointError
from dinov2_custom.files import parse_json_object, utf8_path
from dinov2_custom.utils.checkpoint_folder import read_folder
from dinov2_custom.utils.download import describe_start, fetch
from dinov2_custom.utils.hugging_face import from_hugging_face, is_hugging_face
from dinov2_custom.utils.paths import local_path
from dinov2_custom.utils.run_folder import how_to_gather, is_upstream_shard

logger = logging.getLogger("dinov2")
RELEASED_URL = "https://dl.fbaipublicfiles.com/dinov2"
_INDEX = "model.safetensors.index.json"
_MAX_DEPTH = 100
_DIGEST = re.compile(r"-([a-f0-9]{8,64})\.")  # as torch.hub parses it
_WRAPPERS = ("teacher", "model", "state_dict", "student")
_PREFIXES = re.compile(r"(?:^|(?<=\.))(?:module|backbone|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_CLS_TOKEN = re.compile(r"(|.*?\.)(?:embeddings\.)?cls_token")
_ADAPTER = re.compile(r"(?:^|\.)(?:base_layer|modules_to_save|(?:lora|hada|lokr|ia3|oft|vera)_\w+)(?:\.|$)")  # PEFT's
_CHUNKED = re.compile(r"(^|\.)blocks\.\d+\.(\d+)\.")
_HEADS = ("dino_head.", "ibot_head.")
_TIMM = {"cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight"}  # and no mask token


def read_weights(source: str | os.PathLike) -> Any:
    """Read a file of tensors and plain values: a path, an http(s) URL, or a path for one of iopath's handlers.

    A folder stands for the ``model.safetensors`` in it, whole or sharded, as Hugging Face writes it, or is
    a training checkpoint.

    Raises:
        CheckpointError: the file is missing, torn, or holds anything but tensors and plain values.
    """
    path = to_local(source)
    if is_upstream_shard(path) and path.is_file():
        raise CheckpointError(
            f"expected a weight file, got {path}, which one of the processes of a run of facebookresearch/dinov2 "
            f"wrote; {how_to_gather(path.parent)}"
        )
    if (path / _INDEX).is_file():
        path = path / _INDEX
    if path.name.endswith(".index.json"):
        return _checked(_read_parts(path), path)
    if (path / "model.safetensors").is_file():
        path = path / "model.safetensors"
    if path.is_dir():
        return _checked(read_folder(path), path)
    return _checked(_read_file(path), path)


def _read_file(path: Path) -> Any:
    if path.exists() and not path.is_file():  # opening a pipe blocks, a device has no end
        raise CheckpointError(f"expected a weight file at {path}, got a folder, pipe or device; give a regular file")
    try:
        if path.suffix == ".safetensors" or _start(path)[8:] == b"{":  # the file name of an export is arbitrary
            return _with_metadata(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as e:
        raise CheckpointError(f"expected a weight file at {path}, found nothing; check the path") from e
    except Exception as e:  # torch raises many types on torn files, safetensors its own
        reason = _reason(e, path)
        raise CheckpointError(f"expected a weight file of tensors at {path}, could not read it: {reason}") from e


def _with_metadata(path: Path) -> OrderedDict[str, Tensor]:
    """Read a safetensors file; the strings in its header become ``_metadata[""]``, as in state dicts."""
    with utf8_path(path) as plain, safe_open(plain, "pt") as file:
        state = OrderedDict(load_file(plain))
        state._metadata = {"": file.metadata() or {}}
    return state


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(9)  # safetensors: an 8-byte length, then JSON


def _reason(error: Exception, path: Path) -> str:
    """Return why a file cannot be read. torch's messages are long, and advise disabling the safeguard."""
    if is_cut(path) or "unexpected EOF" in str(error):
        return f"it is cut short, at {path.stat().st_size:,} bytes; copy or download it again"
    if found := re.search(r"\bGLOBAL (\S+)", str(error)):
        return (
            f"it holds more than tensors and plain values: {found[1]}, for which code of the file would have to run; "
            "where you trust its origin, torch.load it with weights_only=False, then torch.save its state dict alone"
        )
    if what := describe_start(path):
        return what
    if isinstance(error, pickle.UnpicklingError | LookupError | EOFError):
        return "it is torn, or holds more than tensors and plain values"
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def is_cut(path: Path) -> bool:
    """Return whether a file begins as a torch or safetensors file and ends prematurely.

    Nothing is unpickled. For torch's legacy format, in which tensors follow pickles, only the pickles are scanned.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
            if start.startswith(b"PK"):
                return not zipfile.is_zipfile(file)
            if start[8:] == b"{":
                length = int.from_bytes(start[:8], "little")
                size = path.stat().st_size - 8 - length
                if size < 0:
                    return True
                entries = parse_json_object(start[8:] + file.read(length - 1)).values()
                return size < max(entry.get("data_offsets", (0, 0))[1] for entry in entries)
            file.seek(0)
            while start.startswith(b"\x80") and file.peek(1).startswith(b"\x80"):
                try:
                    for _ in pickletools.genops(file):
                        pass
                except (ValueError, struct.error):
                    return not file.read(1)
    except (OSError, ValueError, LookupError, AttributeError, TypeError, MemoryError, OverflowError):
        pass  # damaged in another way
    return False


def _checked(file: Any, path: Path) -> Any:
    """Return ``file`` if all its tensors are materialised and it contains no cycles."""
    found: dict[int, bool] = {}  # container id -> whether all of it has been visited

    def look(value: Any, where: str, depth: int = 0) -> None:
        if isinstance(value, Tensor):
            if kind := _unusual(value):
                raise CheckpointError(
                    f"expected plain dense tensors in {path}, got {kind} at {where or 'its top'}; save it as one with "
                    "its numbers (.to_dense(), .dequantize(), or the model's state dict once it has been loaded)"
                )
        elif isinstance(value, Mapping | list | tuple):
            if found.get(id(value)) is False or depth > _MAX_DEPTH:
                what = "something that holds itself" if depth <= _MAX_DEPTH else f"{_MAX_DEPTH} levels of it"
                raise CheckpointError(
                    f"expected a dict of tensors in {path}, got {what} at {where[:200]}; save its state dict alone"
                )
            if id(value) not in found:
                found[id(value)] = False
                for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
                    look(inner, f"{where}.{key!s:.80}".lstrip("."), depth + 1)
                found[id(value)] = True

    look(file, "")
    return file


def _unusual(tensor: Tensor) -> str:
    kinds = {
        "a meta tensor": tensor.is_meta,
        "a quantized tensor": tensor.is_quantized,
        "a nested tensor": tensor.is_nested,
        "a sparse tensor": tensor.layout != torch.strided,
    }
    return next((kind for kind, is_so in kinds.items() if is_so), "")


def to_local(source: str | os.PathLike) -> Path:
    """Return the file or folder of ``source``, downloaded if it is an http(s) URL or handled by iopath."""
    if not is_url(source):
        return local_path(source)
    url, folder = str(source), Path(torch.hub.get_dir()) / "checkpoints"
    if not url.startswith(RELEASED_URL):  # only released files have globally unique names
        folder /= hashlib.sha256(url.encode()).hexdigest()[:16]
    return fetch(url, folder)


def check_sha256(path: Path, start: str = "") -> None:
    """Compare a file's SHA-256 with its ``start``, else with the one in its name: ``<name>-<start>.pth``.

    Raises:
        CheckpointError: the digest differs.
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
            "delete the file and download it again"
        )


def _read_parts(index: Path) -> dict[str, Tensor]:
    try:
        names = parse_json_object(index.read_bytes())["weight_map"]
        if not names or not all(isinstance(name, str) for name in names.values()):
            raise ValueError("no names of files in it")
        files = sorted({Path(name).name for name in names.values()})  # never a file outside the folder
    except (OSError, ValueError, KeyError, AttributeError) as e:
        reason = "no weight_map" if isinstance(e, KeyError | AttributeError) else e
        raise CheckpointError(
            f"expected the list of a weight file's parts at {index}, got {reason}; download it again"
        ) from e
    parts = [_read_file(index.with_name(name)) for name in files]
    state = {key: value for part in parts if isinstance(part, Mapping) for key, value in part.items()}
    if missing := [key for key in names if key not in state]:
        raise CheckpointError(
            f"expected the {len(names)} tensors that {index} lists, got no {', '.join(missing[:3])} in "
            f"{', '.join(files[:3])}; download the parts again"
        )
    return state


def is_url(source: str | os.PathLike) -> bool:
    return str(source).startswith(("http://", "https://"))


def flat_state(file: Any, checkpoint_key: str | None = None) -> dict[str, Tensor]:
    """Return a backbone's tensors under the released, flat names, without heads.

    The tensors may be under ``checkpoint_key`` (else teacher, model, state_dict or student); in a whole training state,
    the teacher's are used. ``blocks.<chunk>.<i>.`` becomes ``blocks.<i>.``,
    and names of Hugging Face's and timm's models become the released ones.

    Raises:
        CheckpointError: no dict of tensors, or position embeddings of an impossible shape.
    """
    state = _unwrapped(file, checkpoint_key)
    if "pos_embed" in state and (state["pos_embed"].ndim != 3 or state["pos_embed"].shape[1] < 2):
        shape = tuple(state["pos_embed"].shape)
        raise CheckpointError(f"pos_embed: expected (1, 1 + patches, width), got {shape}; use another file")
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
        raise CheckpointError(
            f"expected a weight file with a dict of tensors, got a {type(file).__name__}; save the model's state dict"
        )
    while key := next((k for k in (checkpoint_key, *_WRAPPERS) if k and isinstance(file.get(k), Mapping)), None):
        file = file[key]
    state = {name: value for name, value in file.items() if isinstance(value, Tensor)}
    if odd := [name for name in state if not isinstance(name, str)]:
        raise CheckpointError(
            f"expected tensors by name, got {odd[0]!r:.80} as a name: a list, or an optimizer's state; give the file "
            "with the model's state dict"
        )
    if adapter := next((name for name in state if _ADAPTER.search(name)), None):
        raise CheckpointError(
            f"expected a model's own weights, got an adapter of PEFT beside or without them ({adapter}); merge it with "
            "model.merge_and_unload() and save the state dict of what that returns"
        )
    state = _of_one_model({flat_name(name): value for name, value in state.items()}, checkpoint_key)
    try:
        if is_hugging_face(state):
            return from_hugging_face(state)
        return from_timm(state) if _TIMM <= set(state) and "mask_token" not in state else state
    except (LookupError, RuntimeError) as e:  # missing or inconsistent tensors
        reason = str(e).partition("\n")[0]
        raise CheckpointError(
            f"expected the tensors of a DINOv2 of timm or transformers, could not rename them: {reason}"
        ) from e


def _of_one_model(state: dict[str, Tensor], checkpoint_key: str | None) -> dict[str, Tensor]:
    """Return a backbone's tensors and the other tensors, without their common prefix.

    The prefix is the part before ``cls_token``. Of several (student and teacher), ``checkpoint_key``'s is
    used, else the teacher's.
    """
    prefixes = [match[1] for name in state if (match := _CLS_TOKEN.fullmatch(name))]
    if not prefixes or "" in prefixes:
        return state
    prefix = min(prefixes, key=lambda p: (checkpoint_key not in p.split("."), "teacher" not in p, "student" in p))
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a timm ``vit_*_dinov2``'s tensors under the released names.

    timm has no mask token (zeros here, the initial value in training); with registers, positions cover patches only
    and the class token includes its own. A SwiGLU's ``fc1`` is ``w12``, with twice ``fc2``'s input width.
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
