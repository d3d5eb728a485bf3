"""Load weights of any layout into a model, and build a frozen backbone from a run or a weight file.

All loading of weights goes through :func:`load_weights`: training, evaluations, export, features, plots, torch.hub.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov2_custom import distributed
from dinov2_custom.errors import CheckpointError, ConfigError
from dinov2_custom.files import parse_json, parse_json_object
from dinov2_custom.models import build_model
from dinov2_custom.models.pos_embed import resample_pos_embed
from dinov2_custom.models.vision_transformer import DinoVisionTransformer
from dinov2_custom.utils.paths import without_credentials
from dinov2_custom.utils.run_folder import find_weights, run_config_near
from dinov2_custom.utils.weights import flat_name, flat_state, read_weights

if TYPE_CHECKING:
    from dinov2_custom.reading import Reading

logger = logging.getLogger("dinov2")
_HEAD_DIM = 64  # of every architecture here and upstream
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
RELEASED_CROP_SIZE = 224  # of upstream's evaluations, regardless of the position embeddings
# Released weights without registers lack them, and some converted files lack the mask token, initialised to 0.
_OPTIONAL = ("mask_token", "register_tokens")


class Fit(NamedTuple):
    """How tensors fit a model: ``found`` under the model's own names; names that are ``missing`` from the file,
    ``unexpected`` in it, and ``misfits`` as "name: expected shape, got shape", or another kind of dtype, or NaN.
    """

    found: dict[str, Tensor]
    missing: list[str]
    unexpected: list[str]
    misfits: list[str]

    def examples(self, count: int = 3) -> list[str]:
        """Return up to ``count`` lines for each kind of mismatch."""
        missing = [f"{name}: missing" for name in self.missing[:count]]
        return [*self.misfits[:count], *missing, *(f"{name}: unexpected" for name in self.unexpected[:count])]

    def describe(self) -> str:
        """Return the number of mismatches of each kind."""
        return (
            f"{len(self.missing)} missing, {len(self.unexpected)} unexpected and {len(self.misfits)} of another shape "
            "or without finite numbers"
        )


def fit_state(model: nn.Module, state: Mapping[str, Tensor]) -> Fit:
    """Compare :func:`flat_state`'s tensors with ``model``'s, chunked or not; nothing is modified.

    LayerScales of ones and biases of zeros do not count as unexpected for a model without them: exports for
    libraries that always have them write these.
    """
    own = model.state_dict()
    names = {flat_name(name): name for name in own}
    found = {names[name]: value for name, value in state.items() if name in names}
    misfits = [f"{name}: {why}" for name, value in found.items() if (why := misfit(own[name], value))]
    unexpected = [name for name, value in state.items() if name not in names and not _does_nothing(name, value, names)]
    return Fit(found, [n for n in own if n not in found], unexpected, misfits)


def misfit(own: Tensor, value: Tensor) -> str:
    """Return why ``value`` cannot replace ``own``, or "" if it can."""
    if own.shape != value.shape:
        return f"expected {tuple(own.shape)}, got {tuple(value.shape)}"
    if own.is_floating_point() and not value.is_floating_point():
        return f"expected floating-point numbers, got {str(value.dtype).removeprefix('torch.')}"
    finite = torch.isfinite(value if value.element_size() > 1 else value.float())  # not supported for 8 bits
    if not finite.all():
        return f"expected finite numbers, got {int((~finite).sum())} of {value.numel()} NaN or infinite"
    return ""


def _does_nothing(name: str, value: Tensor, own: Mapping[str, str]) -> bool:
    if name.endswith(".bias"):
        return f"{name.removesuffix('bias')}weight" in own and not value.any()
    return name.endswith(".gamma") and bool((value == 1).all())


def load_weights(
    model: nn.Module,
    source: str | os.PathLike,
    state: Mapping[str, Tensor] | None = None,
    *,
    key: str,
    what: str,
    advice: str,
    optional: Collection[str] = (),
    allow_unexpected: bool = False,
    resample: bool = False,
    assign: bool = False,
) -> None:
    """Copy the tensors of a weight file into ``model``, all or none, and log a one-line summary.

    Args:
        source: path or URL of a file of any layout.
        state: :func:`flat_state` of the file, if it has already been read.
        key, what, advice: the flag or key that names the file, a description of ``model``, and the remedy, for the
            error.
        optional: tensors of the model that the file may lack; they keep their values.
        allow_unexpected: the file may have additional tensors.
        resample: resample position embeddings of another grid to the model's.
        assign: use the tensors, in float32, as the model's parameters instead of copying.

    Raises:
        CheckpointError: the file is unreadable, or tensors are missing, unexpected, of another shape or not finite;
            gives counts and the first names, and the model is unchanged.
    """
    state = dict(flat_state(read_weights(source)) if state is None else state)
    resampled = []
    if resample and _can_be_resampled(state.get("pos_embed"), model.pos_embed):
        resampled = [f"pos_embed, {state['pos_embed'].shape[1] - 1} positions to {model.pos_embed.shape[1] - 1}"]
        state["pos_embed"] = resample_pos_embed(
            state["pos_embed"],
            model.patch_embed.patches_resolution,
            antialias=model.interpolate_antialias,
            offset=model.interpolate_offset,
        )
    fit, num_wanted = fit_state(model, state), len(model.state_dict())
    needed = [name for name in fit.missing if name not in optional] if fit.found else fit.missing
    where = without_credentials(source)
    if needed or fit.misfits or (fit.unexpected and not allow_unexpected):
        trouble = fit._replace(missing=needed)
        examples = "\n  ".join(trouble.examples())
        raise CheckpointError(
            f"{key}: expected the {num_wanted} tensors of {what}, got {trouble.describe()} in {where}:\n  {examples}\n"
            f"{advice}"
        )
    tensors = {name: value.float() for name, value in fit.found.items()} if assign else fit.found
    model.load_state_dict(tensors, strict=False, assign=assign)
    counts = {"missing": fit.missing, "unexpected": fit.unexpected, "resampled": resampled}
    logger.log(
        logging.WARNING if fit.missing or fit.unexpected else logging.INFO,
        f"{where}: {len(fit.found)} of {num_wanted} tensors loaded into {what}, "
        + ", ".join(f"{len(names)} {kind}{_some(names)}" for kind, names in counts.items()),
    )


def _some(names: Sequence[str], count: int = 4) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return f" ({', '.join(names[:count])}{more})" if names else ""


def _can_be_resampled(given: Tensor | None, own: Tensor) -> bool:
    """Return whether ``given`` differs from ``own`` only in its number of patches, which form a square."""
    if given is None or given.shape[1] == own.shape[1] or not given.is_floating_point():
        return False
    return math.isqrt(given.shape[1] - 1) ** 2 == given.shape[1] - 1 and given[:, 0].shape == own[:, 0].shape


def load_pretrained_backbone(
    backbone: nn.Module,
    source: str | os.PathLike,
    state: Mapping[str, Tensor] | None = None,
    *,
    key: str = "student.pretrained_weights",
) -> None:
    """Load a backbone to be trained, from a file for any image size; see :func:`load_weights`."""
    load_weights(
        backbone,
        source,
        state,
        key=key,
        what="the configured backbone",
        advice="check student.arch, student.ffn_layer (released S, B and L use mlp, g swiglufused) and "
        "student.patch_size",
        optional=_OPTIONAL,
        allow_unexpected=True,
        resample=True,
    )


def load_teacher_backbone(model: nn.Module, source: str, state: Mapping[str, Tensor] | None = None) -> None:
    """Load a backbone for inference: tensors must match exactly in name and shape; heads are ignored."""
    load_weights(
        model,
        source,
        state,
        key="--pretrained-weights",
        what="the configured backbone",
        advice="use the config.yaml of the run that wrote the weights",
    )


class Teacher(NamedTuple):
    """A backbone in evaluation mode without gradients, with facts about its training.

    Attributes:
        image_size: side in pixels that ``pos_embed`` is sized for.
        normalize: ``{"mean": (3 floats), "std": (3 floats)}`` of images in 0..1.
        weights: the source file or URL.
        config_file: the configuration that describes it; empty if the architecture was derived from tensor shapes.
        reading: ``data.intensity`` and ``data.page`` of its training, see ``reading.py``; None if unknown.
    """

    backbone: DinoVisionTransformer
    image_size: int
    normalize: dict[str, tuple[float, ...]]
    weights: str
    config_file: str = ""
    reading: Reading | None = None

    @property
    def described_by(self) -> str:
        """Describe where the architecture comes from."""
        return self.config_file or "the shapes of its tensors"


def load_teacher(
    source: str, config_file: str = "", opts: Sequence[str] = (), allow_unknown_keys: bool = False
) -> Teacher:
    """Load the teacher of ``source``: a run directory (its newest teacher), a weight file, a URL or a folder
    of Hugging Face's.

    The architecture comes from ``config_file``, else from the config.yaml of the run around the weights, else from the
    shapes of the tensors (released weights).

    Raises:
        ConfigError: the configuration cannot be read.
        CheckpointError: the weights are missing, unreadable, or of another architecture.
    """
    # imported here: torch.hub, which needs no configurations, loads weights without OmegaConf and Pillow
    from dinov2_custom.configs.load import load_run_config
    from dinov2_custom.reading import reading_of

    weights = find_weights(source)
    config_file = config_file or str(run_config_near(weights) or "")
    file = read_weights(weights)
    state = flat_state(file)
    if not config_file:
        backbone = backbone_like(state, without_credentials(weights))
        size = backbone.patch_embed.img_size[0]
        normalize, reading = _of_an_export(weights, file)
    else:
        cfg = load_run_config(
            config_file,
            ["train.output_dir=", *opts],
            allow_unknown_keys=allow_unknown_keys,
            require_dataset=False,
            training=False,
        )
        size = _side_of(state) * cfg.student.patch_size or cfg.crops.global_crops_size  # exports may have another
        backbone, _ = build_model(cfg.student, only_teacher=True, img_size=size)
        normalize = {key: tuple(cfg.data.normalize[key]) for key in ("mean", "std")}
        reading = reading_of(cfg)
    load_teacher_backbone(backbone, weights, state)
    return Teacher(backbone.requires_grad_(False).eval(), size, normalize, weights, config_file, reading)


def is_released(config_file: str) -> bool:
    """Return whether ``config_file`` is "" or, like those of released weights, describes a network but no training."""
    from dinov2_custom.configs.load import find_config, read_yaml

    return not config_file or not {"train", "optim"} & set(read_yaml(find_config(config_file)))


def _of_an_export(weights: str, file: Any) -> tuple[dict[str, tuple[float, ...]], Reading]:
    """Return an export's normalisation and reading, else ImageNet's mean and standard deviation and no range.

    Exports for timm or transformers have them in a file beside the weights, others in ``file`` itself, see
    ``export.write``.
    """
    from dinov2_custom.reading import Reading, from_facts

    folder = Path(weights) if Path(weights).is_dir() else Path(weights).parent
    for name, section, prefix in (("config.json", "pretrained_cfg", ""), ("preprocessor_config.json", "", "image_")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = parse_json_object((folder / name).read_bytes())
            images = found[section] if section else found
            normalize = {key: tuple(float(number) for number in images[prefix + key]) for key in ("mean", "std")}
            return normalize, from_facts(found)
    with contextlib.suppress(AttributeError, ValueError, LookupError, TypeError):
        facts = file._metadata[""]
        texts = {name: facts[name] for name in ("intensity", "page") if name in facts}
        return dict(_IMAGENET), from_facts(
            {name: parse_json(fact) if isinstance(fact, str) else fact for name, fact in texts.items()}
        )
    return dict(_IMAGENET), Reading()


def _side_of(state: Mapping[str, Tensor]) -> int:
    """Return the patches per side of the position embeddings; 0 if they are missing or form no square."""
    num_patches = state["pos_embed"].shape[1] - 1 if "pos_embed" in state else 0
    return math.isqrt(num_patches) if math.isqrt(num_patches) ** 2 == num_patches else 0


def backbone_like(state: Mapping[str, Tensor], where: str) -> DinoVisionTransformer:
    """Build the backbone whose flat state dict is ``state``: width, depth, patch, registers and FFN from its shapes.

    The resampling of positions cannot be derived and is that of the released models: antialiased with registers.

    Raises:
        CheckpointError: ``state`` is not a DINOv2 backbone.
    """
    try:
        return DinoVisionTransformer(**arguments_of(state))
    except (LookupError, ValueError) as e:
        raise CheckpointError(
            f"expected the weights of a DINOv2 backbone at {where}, got tensors of an unknown architecture: {e}; give "
            "the configuration that it was trained with (--config-file)"
        ) from e


def arguments_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of ``DinoVisionTransformer`` from a backbone's flat state dict.

    Raises:
        LookupError, ValueError: ``state`` is not a DINOv2 backbone.
    """
    dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    if depth > len(state):  # each block has tensors; building arbitrarily many could exhaust the memory
        raise ValueError(f"tensors of block {depth - 1}, but only {len(state)} tensors in all")
    if not dim or dim % _HEAD_DIM or side * side != state["pos_embed"].shape[1] - 1:
        raise ValueError(f"width {dim} is no multiple of {_HEAD_DIM}, or the number of positions is no square number")
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    swiglu = "blocks.0.mlp.w12.weight" in state
    if not swiglu:
        hidden, ffn_layer = state["blocks.0.mlp.fc1.weight"].shape[0], "mlp"
    else:
        hidden, ffn_layer = 4 * dim, "swiglufused"
    return {
        "img_size": side * patch,
        "patch_size": patch,
        "in_chans": in_chans,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": dim // _HEAD_DIM,
        "mlp_ratio": hidden / dim,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "proj_bias": "blocks.0.attn.proj.bias" in state,
        "ffn_bias": f"blocks.0.mlp.{'w3' if swiglu else 'fc2'}.bias" in state,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in state else None,
        "ffn_layer": ffn_layer,
        "block_chunks": 0,
        "num_register_tokens": registers,
        "interpolate_antialias": bool(registers),
        "interpolate_offset": 0.0 if registers else 0.1,
    }


def device_of_choice(name: str = "auto", flag: str = "--device") -> torch.device:
    """Return the device ``name``; ``auto`` and ``cuda`` mean this process's own.

    Raises:
        ConfigError: the device does not exist.
        LaunchError: see :func:`dinov2_custom.distributed.get_device`.
    """
    if name == "auto" or (name == "cuda" and torch.cuda.is_available()):
        return distributed.get_device()
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as e:
        raise ConfigError(f"{flag}: expected a device of this machine, got {name!r}; leave it out") from e
    device = torch.device(name)
    return distributed.checked_gpu(device) if device.type == "cuda" else device
