"""Features that a real card computes in bf16 point where those of the CPU in float32 do."""

import torch
import torch.nn.functional as F

from dinov2_custom.embed.main import compute
from tests.export.backbones import make_teacher
from tests.gpu import NEEDS_GPU

pytestmark = NEEDS_GPU


def test_features_in_bf16():
    backbone = make_teacher("registers").backbone
    images = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    on_cpu = compute(backbone, images, "cls+mean")
    on_gpu = compute(backbone.to("cuda"), images.to("cuda"), "cls+mean", precision="bf16").cpu()
    assert not torch.equal(on_gpu, on_cpu)
    assert F.cosine_similarity(on_gpu, on_cpu).min() > 0.999
