"""The prediction's counts, against the closed formula of a step's operations and kernels counted by hand."""

import pytest
import torch

from benchmarks import roofline
from benchmarks.memory import config
from dinov2_custom.train.flops import flops_per_image
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch


def test_operations_of_a_step_are_those_of_the_closed_formula():
    cfg = config("student.arch=vit_small student.drop_path_rate=0 dino.head_n_prototypes=4096", batch_size=4)
    counted, update, mfu = roofline.predict(cfg)
    with torch.device("meta"):
        backbone = SSLMetaArch(cfg).student["backbone"]
    expected = 4 * flops_per_image(cfg, backbone.embed_dim, backbone.n_blocks)
    assert counted.operations == pytest.approx(expected, rel=0.04)  # attention computes its scores twice
    assert mfu == pytest.approx(expected / roofline.PEAK_FLOPS["H100"] / (counted.total + update))


def test_kernels_take_the_longest_of_launch_bytes_and_operations():
    counted = roofline.Roofline()
    with counted:
        x = torch.empty(1024, 2048, device="meta")
        x.t().unsqueeze(0)  # moves nothing
        x.add(x)  # read once
        x.bfloat16() @ torch.empty(2048, 4096, device="meta", dtype=torch.bfloat16)
        torch.empty(1, device="meta").add_(1)
    assert counted.kernels == 4
    assert counted.operations == 2 * 1024 * 2048 * 4096
    moved = 2 * 4 * 1024 * 2048
    assert counted.seconds["add"] == pytest.approx(moved / roofline.BYTES)
    assert counted.seconds["products"] == pytest.approx(counted.operations / roofline.PRODUCTS)
    assert counted.seconds["add_"] == roofline.LAUNCH
