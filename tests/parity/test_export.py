"""The exported .pth is a weight file for upstream's own model: strict names, same features."""

from __future__ import annotations

import pytest
import torch

from dinov2_custom.export.main import export
from dinov2_custom.export.portable import portable
from tests.export.backbones import features_of, make_teacher, random_images


@pytest.mark.parametrize("kind", ["patch 14", "chunks, no layerscale, no biases", "swiglu"])
def test_upstream_loads_the_torch_export(oracle, kind, tmp_path):
    teacher = make_teacher(kind)
    export(portable(teacher), "torch", tmp_path / "model.pth")
    own = teacher.backbone
    theirs = oracle.vits.DinoVisionTransformer(
        img_size=teacher.image_size,
        patch_size=own.patch_size,
        embed_dim=own.embed_dim,
        depth=own.n_blocks,
        num_heads=own.num_heads,
        block_chunks=0,
        ffn_layer="swiglufused" if kind == "swiglu" else "mlp",
        init_values=None if "layerscale" in kind else 1.0,
        **({"qkv_bias": False, "proj_bias": False, "ffn_bias": False} if "biases" in kind else {}),
    ).eval()
    theirs.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True), strict=True)
    images = random_images(teacher.image_size)
    torch.testing.assert_close(features_of(theirs, images), features_of(own, images), rtol=0, atol=1e-4)
