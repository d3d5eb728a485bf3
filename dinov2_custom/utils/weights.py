"""Weight files in, flat tensors out: any wrapper, prefix and block chunking; and from there into a model.

Every start from weights goes through :func:`read_weights` (``weight_file``), :func:`flat_state` and :func:`load_state`.
Read these first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov2_custom.errors import CheckpointError
from dinov2_custom.utils.hugging_face import from_hugging_face, is_hugging_face
from dinov2_custom.utils.paths import without_credentials
from dinov2_custom.utils.weight_file import RELEASED_URL, check_sha256, is_url, read_weights, to_local

__all__ = [
    "RELEASED_URL",
    "Fit",
    "check_sha256",
    "fit_state",
    "flat_heads",
    "flat_name",
    "flat_state",
    "from_timm",
    "is_url",
    "load_state",
    "misfit",
    "read_weights",
    "to_local",
]
_WRAPPERS = ("teacher", "model", "state_dict", "student")
_PREFIXES = re.compile(
    r"(?:^|(?<=\.))(?:module|backbone|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_CLS_TOKEN = re.compile(r"(|.*?\.)(?:embeddings\.)?cls_token")
_ADAPTER = re.compile(r"(?:^|\.)(?:base_layer|modules_to_save|(?:lora|hada|lokr|ia3|oft|vera)_\w+)(?:\.|$)")  # PEFT's
_CHUNKED = re.compile(r"(^|\.)blocks\.\d+\.(\d+)\.")
_HEADS = ("dino_head.", "ibot_head.")
_TIMM = {"cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight"}  # and no mask token


def flat_state(file: Any, checkpoint_key: str | None = None) -> dict[str, Tensor]:
    """Return a backbone's tensors under the released, flat names, without heads.

    The tensors may lie under ``checkpoint_key`` (else teacher, model, state_dict or student); of a whole training state
    the teacher's are taken. ``blocks.<chunk>.<i>.`` becomes ``blocks.<i>.``,
    and the names of Hugging Face's and timm's models the released ones.

    Raises:
        CheckpointError: no dict of tensors, or positions, which set a model's size, of a shape that none have.
    """
    state = _unwrapped(file, checkpoint_key)
    if "pos_embed" in state and (state["pos_embed"].ndim != 3 or state["pos_embed"].shape[1] < 2):
        shape = tuple(state["pos_embed"].shape)
        raise CheckpointError(f"pos_embed: expected (1, 1 + patches, width), got {shape}; take the weights anew")
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
    except (LookupError, RuntimeError) as e:  # tensors that are missing, or do not go together
        reason = str(e).partition("\n")[0]
        raise CheckpointError(
            f"expected the tensors of a DINOv2 of timm or transformers, could not rename them: {reason}"
        ) from e


def _of_one_model(state: dict[str, Tensor], checkpoint_key: str | None) -> dict[str, Tensor]:
    """Return a backbone's tensors and those beside it without the prefix that all of them have.

    The prefix is what stands before ``cls_token``. Of several, as of a student and a teacher, ``checkpoint_key``'s is
    taken, else the teacher's.
    """
    prefixes = [match[1] for name in state if (match := _CLS_TOKEN.fullmatch(name))]
    if not prefixes or "" in prefixes:
        return state
    prefix = min(prefixes, key=lambda p: (checkpoint_key not in p.split("."), "teacher" not in p, "student" in p))
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


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
    ``unexpected`` in it, and ``misfits`` as "name: expected shape, got shape", or another kind of number, or NaN.
    """

    found: dict[str, Tensor]
    missing: list[str]
    unexpected: list[str]
    misfits: list[str]

    def examples(self, count: int = 3) -> list[str]:
        """Return up to ``count`` lines of each kind of trouble."""
        missing = [f"{name}: missing" for name in self.missing[:count]]
        return [*self.misfits[:count], *missing, *(f"{name}: unexpected" for name in self.unexpected[:count])]

    def describe(self) -> str:
        """Return how many of each kind there are."""
        return (
            f"{len(self.missing)} missing, {len(self.unexpected)} unexpected and {len(self.misfits)} of another shape "
            "or without finite numbers"
        )


def fit_state(model: nn.Module, state: Mapping[str, Tensor]) -> Fit:
    """Compare :func:`flat_state`'s tensors with ``model``'s, chunked or not; nothing is changed.

    What a model without LayerScale or biases may have and not notice, ones and zeros, is not unexpected: exports for
    libraries that always have them write it.
    """
    own = model.state_dict()
    names = {flat_name(name): name for name in own}
    found = {names[name]: value for name, value in state.items() if name in names}
    misfits = [f"{name}: {why}" for name, value in found.items() if (why := misfit(own[name], value))]
    unexpected = [name for name, value in state.items() if name not in names and not _does_nothing(name, value, names)]
    return Fit(found, [n for n in own if n not in found], unexpected, misfits)


def misfit(own: Tensor, value: Tensor) -> str:
    """Return why ``value`` cannot take the place of ``own``, "" where it can."""
    if own.shape != value.shape:
        return f"expected {tuple(own.shape)}, got {tuple(value.shape)}"
    if own.is_floating_point() and not value.is_floating_point():
        return f"expected floating-point numbers, got {str(value.dtype).removeprefix('torch.')}"
    finite = torch.isfinite(value if value.element_size() > 1 else value.float())  # not known for 8 bits
    if not finite.all():
        return f"expected finite numbers, got {int((~finite).sum())} of {value.numel()} NaN or infinite"
    return ""


def _does_nothing(name: str, value: Tensor, own: Mapping[str, str]) -> bool:
    if name.endswith(".bias"):
        return f"{name.removesuffix('bias')}weight" in own and not value.any()
    return name.endswith(".gamma") and bool((value == 1).all())


def load_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str | os.PathLike,
    *,
    expected: str,
    advice: str,
    optional: tuple[str, ...] = (),
    allow_unexpected: bool = False,
    assign: bool = False,
) -> Fit:
    """Copy :func:`flat_state`'s tensors into ``model``, all of them or none, and return how they fit.

    Args:
        source: the file, for the error, which begins with ``expected`` and ends with ``advice``.
        optional: tensors of the model that the file may lack.
        assign: make the tensors, in float32, the model's own instead.

    Raises:
        CheckpointError: tensors that are missing, unexpected, of another shape or not finite; nothing is changed then.
    """
    fit = fit_state(model, state)
    trouble = fit._replace(missing=[name for name in fit.missing if name not in optional])
    if trouble.missing or trouble.misfits or (trouble.unexpected and not allow_unexpected):
        examples = "\n  ".join(trouble.examples())
        where = without_credentials(source)
        raise CheckpointError(f"{expected}, got {trouble.describe()} in {where}:\n  {examples}\n{advice}")
    tensors = {name: value.float() for name, value in fit.found.items()} if assign else fit.found
    model.load_state_dict(tensors, strict=False, assign=assign)
    return fit
