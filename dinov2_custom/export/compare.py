"""Load an export in the library it was written for and compare its tensors and features with the model's.

There are two comparisons, as each alone misses some faults. All tensors must equal the model's bit for bit, because
features hardly depend on a branch whose LayerScale is near 1e-5, or on the mask token. And features must agree while
both sides' LayerScale is near 1, which shows that both compute the same function.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2_custom.errors import CheckpointError
from dinov2_custom.export.onnx_file import INPUT, normalized
from dinov2_custom.export.portable import Portable, completed
from dinov2_custom.models.vision_transformer import DinoVisionTransformer
from dinov2_custom.teacher import backbone_like
from dinov2_custom.utils.hugging_face import from_hugging_face
from dinov2_custom.utils.weights import flat_name, flat_state, from_timm, read_weights

TOLERANCE = 1e-4
_LIBRARY = {"hf": "transformers", "timm": "timm", "onnx": "onnxruntime", "torch": "torch", "safetensors": "safetensors"}


class _Loaded(NamedTuple):
    """An export loaded by its library.

    Attributes:
        tensors: its tensors, under the released names.
        features: maps LayerScales by name, (B, C, H, W) -> class and patch features (B, 1 + N, D) with those
            LayerScales.
    """

    tensors: dict[str, Tensor]
    features: Callable[[dict[str, Tensor], Tensor], Tensor]


@torch.inference_mode()
def check(model: Portable, form: str, path: Path) -> str:
    """Return a line on the comparison; "not compared" if the library is not installed.

    Raises:
        CheckpointError: a tensor differs from the model's, or features differ by more than ``TOLERANCE`` of the largest
            one.
    """
    library = _LIBRARY[form]
    try:
        loaded = _LOADERS[form](path, model)
    except ImportError as e:
        return f"not compared: {library} cannot be imported here ({e})"
    wanted = wanted_tensors(model, form)
    if unlike := unlike_tensors(loaded.tensors, wanted):
        raise CheckpointError(
            f"--to {form}: expected {library} to load the model's {len(wanted)} tensors, got {len(unlike)} others; "
            "nothing was written:\n  " + "\n  ".join(unlike[:5])
        )
    difference = _difference(model, loaded, wanted)
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"--to {form}: expected {library} to give the same features, got a difference of {difference:.1e} "
            f"(allowed {TOLERANCE:.0e}); nothing was written"
        )
    return f"features in {library} differ by at most {difference:.1e} with LayerScale near 1, tensors are the same"


def wanted_tensors(model: Portable, form: str) -> dict[str, Tensor]:
    """Return the expected tensors, from the backbone itself."""
    backbone, side = model.backbone, model.image_size
    state = {flat_name(name): value.detach().float().cpu() for name, value in backbone.state_dict().items()}
    num_patches = (side // backbone.patch_size) ** 2
    positions = backbone.interpolate_pos_encoding(torch.zeros(1, 1 + num_patches, 1), side, side)
    state["pos_embed"] = positions.float().cpu()
    if form in ("hf", "timm"):
        state = completed(model._replace(state=state))
    if form == "timm" and backbone.num_register_tokens:
        state = _class_token_with_position(state)
    if form in ("timm", "onnx"):
        del state["mask_token"]
    return state


def _class_token_with_position(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same model with the class token's position added to the token, as timm stores it with registers."""
    positions = state["pos_embed"].clone()
    positions[:, :1] = 0
    return state | {"cls_token": state["cls_token"] + state["pos_embed"][:, :1], "pos_embed": positions}


def unlike_tensors(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """Return a line for every tensor that is missing, unexpected or different."""
    lines = [f"{name}: missing" for name in wanted if name not in got]
    lines += [f"{name}: unexpected" for name in got if name not in wanted]
    for name, value in wanted.items():
        if name in got and got[name].shape != value.shape:
            lines.append(f"{name}: expected {tuple(value.shape)}, got {tuple(got[name].shape)}")
        elif name in got and not torch.equal(got[name].float().cpu(), value):
            lines.append(f"{name}: differs by {(got[name].float().cpu() - value).abs().max():.1e}")
    return lines


def _difference(model: Portable, loaded: _Loaded, wanted: dict[str, Tensor]) -> float:
    """Return the largest difference of class and patch features on two random images, relative to the largest feature.

    The LayerScales of both sides are divided by their mean magnitude. Equal ones stay equal, because an ONNX file may
    store them only once.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, model.in_chans, model.image_size, model.image_size, generator=generator)
    if not model.normalizes:
        images = 4 * images - 2
    scales = {name: value for name, value in wanted.items() if name.endswith(".gamma")}
    scales = {name: value / value.abs().mean().clamp_min(1e-30) for name, value in scales.items()}
    own = _own_features(model, scales, normalized(images, model.normalize) if model.normalizes else images)
    got = loaded.features(scales, images)
    return float((got - own).abs().max() / own.abs().max().clamp_min(1))


def _own_features(model: Portable, scales: dict[str, Tensor], images: Tensor) -> Tensor:
    backbone = model.backbone.cpu().float()
    parameters = {name: scales[flat_name(name)] for name in backbone.state_dict() if flat_name(name) in scales}
    return torch.func.functional_call(_Tokens(backbone), {f"backbone.{k}": v for k, v in parameters.items()}, images)


class _Tokens(torch.nn.Module):
    def __init__(self, backbone: DinoVisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone.forward_features(images)
        return torch.cat([features["x_norm_clstoken"][:, None], features["x_norm_patchtokens"]], dim=1)


def _in_place(tensors: dict[str, Tensor], tokens: Callable[[Tensor], Tensor]) -> _Loaded:
    """Wrap a loaded torch module whose memory ``tensors`` share."""

    def features(scales: dict[str, Tensor], images: Tensor) -> Tensor:
        for name, value in scales.items():
            tensors[name].copy_(value)
        return tokens(images)

    return _Loaded(tensors, features)


def _without_registers(tokens: Tensor, model: Portable) -> Tensor:
    return torch.cat([tokens[:, :1], tokens[:, 1 + model.backbone.num_register_tokens :]], dim=1)


def _hugging_face(path: Path, model: Portable) -> _Loaded:
    from transformers import AutoModel
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded = AutoModel.from_pretrained(path).eval()
    finally:
        if bars:
            logging.enable_progress_bar()
    tensors = from_hugging_face(loaded.state_dict())
    return _in_place(tensors, lambda images: _without_registers(loaded(images).last_hidden_state, model))


def _timm(path: Path, model: Portable) -> _Loaded:
    try:
        import timm
    except (RuntimeError, AttributeError) as e:  # a torchvision built for another torch
        raise ImportError(str(e)) from e
    loaded = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    tensors = from_timm(loaded.state_dict())
    del tensors["mask_token"]  # timm has none
    return _in_place(tensors, lambda images: _without_registers(loaded.forward_features(images), model))


def _plain(path: Path, model: Portable) -> _Loaded:
    state = flat_state(read_weights(path))
    loaded = backbone_like(state, str(path))
    loaded.load_state_dict(state)
    return _in_place(loaded.eval().state_dict(), _Tokens(loaded))


def _onnx(path: Path, model: Portable) -> _Loaded:
    import onnx
    import onnxruntime

    held = {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in onnx.load(path).graph.initializer}
    names = {flat_name(name): name for name in held if name.startswith("backbone.")}
    tensors = {name: held[full] for name, full in names.items()}
    # the exporter stores a linear layer's weight transposed and unnamed, equal tensors once, and no zero biases
    for name, value in wanted_tensors(model, "onnx").items():
        forms = [value, value.T] if value.ndim == 2 else [value]
        same = name not in tensors and any(torch.equal(one, form) for one in held.values() for form in forms)
        if same or (name not in tensors and name.endswith(".bias") and not value.any()):
            tensors[name] = value

    def features(scales: dict[str, Tensor], images: Tensor) -> Tensor:
        options = onnxruntime.SessionOptions()
        values = {
            names[n]: onnxruntime.OrtValue.ortvalue_from_numpy(v.numpy()) for n, v in scales.items() if n in names
        }
        for name, value in values.items():  # ``values`` must outlive the session
            options.add_initializer(name, value)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        rows = []
        for batch in (images, images[:1]):  # the batch dimension is dynamic
            cls_token, patches = (torch.from_numpy(a) for a in session.run(None, {INPUT: batch.numpy()}))
            rows.append(torch.cat([cls_token[:, None], patches], dim=1))
        return torch.cat([rows[1], rows[0][1:]])

    return _Loaded(tensors, features)


_LOADERS = {"hf": _hugging_face, "timm": _timm, "onnx": _onnx, "torch": _plain, "safetensors": _plain}
