"""From a run directory or a weight file to a frozen backbone, with what is needed to feed it images.

What the evaluations, the export, the features and the plots start from. Not the training state (``train/checkpoint``).
Read :func:`load_teacher` first.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov2_custom import distributed
from dinov2_custom.configs.load import load_run_config, read_yaml
from dinov2_custom.errors import CheckpointError, ConfigError
from dinov2_custom.files import parse_json, parse_json_object
from dinov2_custom.models import build_model
from dinov2_custom.models.vision_transformer import DinoVisionTransformer
from dinov2_custom.reading import Reading, from_facts, reading_of
from dinov2_custom.utils.paths import without_credentials
from dinov2_custom.utils.run_folder import find_weights, run_config_near
from dinov2_custom.utils.weights import flat_state, load_state, read_weights

logger = logging.getLogger("dinov2")
_HEAD_DIM = 64  # of every architecture here and upstream
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
RELEASED_CROP_SIZE = 224  # of upstream's evaluations, whatever the size of the positions


class Teacher(NamedTuple):
    """A backbone in evaluation mode without gradients, and how it was trained.

    Attributes:
        image_size: pixels a side that ``pos_embed`` is sized for.
        normalize: ``{"mean": (3 floats), "std": (3 floats)}`` of images in 0..1.
        weights: the file they came from, or the URL.
        config_file: the configuration that describes it; empty when the shapes of the tensors had to.
        reading: ``data.intensity`` and ``data.page`` of its training, see ``reading.py``.
    """

    backbone: DinoVisionTransformer
    image_size: int
    normalize: dict[str, tuple[float, ...]]
    weights: str
    config_file: str = ""
    reading: Reading = Reading()

    @property
    def described_by(self) -> str:
        """Say where the architecture comes from."""
        return self.config_file or "the shapes of its tensors"


def load_teacher(
    source: str, config_file: str = "", opts: Sequence[str] = (), allow_unknown_keys: bool = False
) -> Teacher:
    """Load the teacher of ``source``: a run directory (its newest teacher), a weight file, a URL or a folder
    of Hugging Face's.

    The architecture comes from ``config_file``, else from the config.yaml of the run around the weights, else from the
    shapes of the tensors (released weights).

    Raises:
        ConfigError: a configuration that cannot be read.
        CheckpointError: nothing there, unreadable, or of another architecture.
    """
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
        size = _side_of(state) * cfg.student.patch_size or cfg.crops.global_crops_size  # an export may have another
        backbone, _ = build_model(cfg.student, only_teacher=True, img_size=size)
        normalize = {key: tuple(cfg.data.normalize[key]) for key in ("mean", "std")}
        reading = reading_of(cfg)
    _load(backbone, state, weights)
    return Teacher(backbone.requires_grad_(False).eval(), size, normalize, weights, config_file, reading)


def is_released(config_file: str) -> bool:
    """Return whether ``config_file`` is "" or, as those of released weights, describes a network and no training."""
    return not config_file or not {"train", "optim"} & set(read_yaml(Path(config_file).expanduser()))


def _of_an_export(weights: str, file: Any) -> tuple[dict[str, tuple[float, ...]], Reading]:
    """Return what an export says of its images, else ImageNet's mean and deviation and no range of values.

    One for timm or transformers says it in a file beside the weights, others in ``file`` itself, see ``export.write``.
    """
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


def load_teacher_backbone(model: nn.Module, source: str) -> None:
    """Copy every tensor of the backbone from ``source``, a path or URL; none may be missing, over or of another shape.

    ``{"teacher": ...}`` files, flat ones and whole training checkpoints (their teacher) are understood, prefixes and
    block chunks do not count, heads are left out.

    Raises:
        CheckpointError: unreadable, or of another architecture, with counts; the model is unchanged then.
    """
    _load(model, flat_state(read_weights(source)), source)


def _side_of(state: Mapping[str, Tensor]) -> int:
    """Return the patches a side that the positions are for; 0 when they are missing or form no square."""
    num_patches = state["pos_embed"].shape[1] - 1 if "pos_embed" in state else 0
    return math.isqrt(num_patches) if math.isqrt(num_patches) ** 2 == num_patches else 0


def _load(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    num_wanted = len(model.state_dict())
    expected = f"--pretrained-weights: expected the {num_wanted} tensors of the configured backbone"
    load_state(model, state, source, expected=expected, advice="use the config.yaml of the run that wrote the weights")
    logger.info(f"weights: {without_credentials(source)} tensors={num_wanted}")


def backbone_like(state: Mapping[str, Tensor], where: str) -> DinoVisionTransformer:
    """Build the backbone whose flat state dict is ``state``: width, depth, patch, registers and FFN by their shapes.

    Resampling of positions, which no shape tells, is as in the released models: with registers antialiased.

    Raises:
        CheckpointError: not a DINOv2 backbone.
    """
    try:
        return DinoVisionTransformer(**arguments_of(state))
    except (LookupError, ValueError) as e:
        raise CheckpointError(
            f"expected the weights of a DINOv2 backbone at {where}, could not tell its architecture: {e}; give the "
            "configuration that it was trained with"
        ) from e


def arguments_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of ``DinoVisionTransformer`` that a backbone's flat state dict was built with.

    Raises:
        LookupError, ValueError: not a DINOv2 backbone's.
    """
    dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    if depth > len(state):  # each block has tensors; building so many could exhaust the memory
        raise ValueError(f"tensors of block {depth - 1}, and {len(state)} tensors in all")
    if not dim or dim % _HEAD_DIM or side * side != state["pos_embed"].shape[1] - 1:
        raise ValueError(f"width {dim} is no multiple of {_HEAD_DIM}, or the positions form no square")
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
    """Return the device called ``name``; ``auto`` and ``cuda`` are this process's own.

    Raises:
        ConfigError: a device that is not there.
        LaunchError: see :func:`dinov2_custom.distributed.get_device`.
    """
    if name == "auto" or (name == "cuda" and torch.cuda.is_available()):
        return distributed.get_device()
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as e:
        raise ConfigError(f"{flag}: expected a device of this machine, got {name!r}; leave it out") from e
    return torch.device(name)
