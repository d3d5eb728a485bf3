"""Write an ONNX file for any batch size at one image size."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_custom.errors import optional
from dinov2_custom.export.portable import Portable
from dinov2_custom.reading import to_facts

INPUT, OUTPUTS = "image", ("cls_token", "patch_tokens")


def normalized(images: Tensor, normalize: dict[str, tuple[float, ...]]) -> Tensor:
    """Return (images - mean) / std for images (B, C, H, W) in 0..1."""
    mean, std = (images.new_tensor(normalize[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    return (images - mean) / std


class _TwoOutputs(nn.Module):
    def __init__(self, backbone: nn.Module, normalize: dict[str, tuple[float, ...]] | None) -> None:
        super().__init__()
        self.backbone, self.normalize = backbone, normalize

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone.forward_features(normalized(image, self.normalize) if self.normalize else image)
        return features["x_norm_clstoken"], features["x_norm_patchtokens"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the exporter's diagnostic output."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def write_onnx(model: Portable, path: Path) -> None:
    """Write a graph ``image (batch, C, S, S) -> cls_token (batch, D), patch_tokens (batch, N, D)``, float32.

    Positions of ``model.image_size`` are part of the graph; other sizes need separate exports. The file's
    metadata has ``mean``, ``std``, ``image_size``, ``patch_size`` and ``normalizes``, and ``intensity`` and ``page``
    if they are not the defaults, each as JSON. Images are in 0..1 and normalized in the graph if
    ``model.normalizes``, else already normalized.
    """
    for name in ("onnx", "onnxscript"):
        optional(name, "--to onnx")
    backbone = copy.deepcopy(model.backbone).float().cpu().eval()
    backbone.pos_embed = nn.Parameter(model.state["pos_embed"].clone(), requires_grad=False)
    for block in backbone.all_blocks():
        block.attn.backend = "sdpa"
    image = torch.zeros(2, model.in_chans, model.image_size, model.image_size)
    facts = {**model.normalize, "image_size": model.image_size, "patch_size": backbone.patch_size}
    facts |= {"normalizes": model.normalizes, **to_facts(model.reading)}
    graph = _TwoOutputs(backbone, model.normalize if model.normalizes else None).eval()
    write_graph(graph, image, OUTPUTS, facts, path)


def write_graph(graph: nn.Module, image: Tensor, outputs: Sequence[str], facts: Mapping[str, Any], path: Path) -> None:
    """Write ``graph`` of an ``image`` (batch, C, S, S) for any batch size, with ``facts`` as JSON in its metadata."""
    with quiet():
        program = torch.onnx.export(
            graph,
            (image,),
            dynamo=True,
            input_names=[INPUT],
            output_names=list(outputs),
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            verbose=False,
        )
        program.model.metadata_props.update({name: json.dumps(fact) for name, fact in facts.items()})
        program.save(str(path))
