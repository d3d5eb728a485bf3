"""Load an export in the library it was written for and compare its features with the model's own.

Read :func:`differences` first.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dinov2_custom.errors import CheckpointError
from dinov2_custom.export.onnx_file import INPUT
from dinov2_custom.export.portable import Portable
from dinov2_custom.teacher import backbone_like
from dinov2_custom.utils.weights import flat_state, read_weights

TOLERANCE = 1e-4
_LIBRARY = {"hf": "transformers", "timm": "timm", "onnx": "onnxruntime", "torch": "torch", "safetensors": "safetensors"}


def check(model: Portable, form: str, path: Path) -> str:
    """Return a line on how far the features in the other library are; "not compared" when it is not installed.

    Raises:
        CheckpointError: further than ``TOLERANCE`` of the largest feature.
    """
    try:
        difference = differences(model, form, path)
    except ImportError as e:
        return f"not compared: {_LIBRARY[form]} cannot be imported here ({e})"
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"--to {form}: expected {_LIBRARY[form]} to give the same features, got a difference of {difference:.1e} "
            f"(allowed {TOLERANCE:.0e}); nothing was written"
        )
    return f"features in {_LIBRARY[form]} differ by at most {difference:.1e}"


@torch.inference_mode()
def differences(model: Portable, form: str, path: Path) -> float:
    """Return the largest difference of class and patch features on two random images, over the largest feature."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, model.in_chans, model.image_size, model.image_size, generator=generator)
    own = model.backbone.cpu().float().forward_features(images)
    wanted = torch.cat([own["x_norm_clstoken"][:, None], own["x_norm_patchtokens"]], dim=1)
    got = _FEATURES[form](path, images, model)
    return float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1))


def _without_registers(tokens: Tensor, model: Portable) -> Tensor:
    return torch.cat([tokens[:, :1], tokens[:, 1 + model.backbone.num_register_tokens :]], dim=1)


def _hugging_face(path: Path, images: Tensor, model: Portable) -> Tensor:
    from transformers import AutoModel
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded = AutoModel.from_pretrained(path).eval()
    finally:
        if bars:
            logging.enable_progress_bar()
    return _without_registers(loaded(images).last_hidden_state, model)


def _timm(path: Path, images: Tensor, model: Portable) -> Tensor:
    try:
        import timm
    except (RuntimeError, AttributeError) as e:  # a torchvision of another torch
        raise ImportError(str(e)) from e
    loaded = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    return _without_registers(loaded.forward_features(images), model)


def _plain(path: Path, images: Tensor, model: Portable) -> Tensor:
    state = flat_state(read_weights(path))
    loaded = backbone_like(state, str(path))
    loaded.load_state_dict(state)
    features = loaded.eval().forward_features(images)
    return torch.cat([features["x_norm_clstoken"][:, None], features["x_norm_patchtokens"]], dim=1)


def _onnx(path: Path, images: Tensor, model: Portable) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rows = []
    for batch in (images, images[:1]):  # the batch is free
        cls_token, patches = (torch.from_numpy(a) for a in session.run(None, {INPUT: batch.numpy()}))
        rows.append(torch.cat([cls_token[:, None], patches], dim=1))
    return torch.cat([rows[1], rows[0][1:]])


_FEATURES = {"hf": _hugging_face, "timm": _timm, "onnx": _onnx, "torch": _plain, "safetensors": _plain}
