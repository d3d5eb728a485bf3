"""Normalise the tensors of a weight file: any wrapper, prefix and block chunking."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinov2_custom.errors import CheckpointError
from dinov2_custom.utils.hugging_face import from_hugging_face, is_hugging_face
from dinov2_custom.utils.weight_file import RELEASED_URL, check_sha256, is_url, read_weights, to_local

__all__ = [
    "RELEASED_URL",
    "check_sha256",
    "flat_heads",
    "flat_name",
    "flat_state",
    "from_timm",
    "is_url",
    "read_weights",
    "to_local",
]
_WRAPPERS = ("teacher", "model", "state_dict", "student")
_PREFIXES = re.compile(r"(?:^|(?<=\.))(?:module|backbone|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_CLS_TOKEN = re.compile(r"(|.*?\.)(?:embeddings\.)?cls_token")
_ADAPTER = re.compile(r"(?:^|\.)(?:base_layer|modules_to_save|(?:lora|hada|lokr|ia3|oft|vera)_\w+)(?:\.|$)")  # PEFT's
_CHUNKED = re.compile(r"(^|\.)blocks\.\d+\.(\d+)\.")
_HEADS = ("dino_head.", "ibot_head.")
_TIMM = {"cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight"}  # and no mask token


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
