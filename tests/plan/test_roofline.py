"""The prediction's counts, against the closed formula of a step's operations and kernels counted by hand."""

import pytest
import torch

from benchmarks.memory import config
from dinov2_custom.plan import roofline
from dinov2_custom.train.flops import flops_per_image
from dinov2_custom.train.gpus import GPUS
from dinov2_custom.train.memory import measure_step
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch

H100 = GPUS["H100"]


def test_operations_of_a_step_are_those_of_the_closed_formula():
    cfg = config("student.arch=vit_small student.drop_path_rate=0 dino.head_n_prototypes=4096", batch_size=4)
    counted = roofline.predict(cfg)
    with torch.device("meta"):
        student = SSLMetaArch(cfg).student
    backbone = student["backbone"]
    expected = 4 * flops_per_image(cfg, backbone.embed_dim, backbone.n_blocks)
    assert counted.operations == pytest.approx(expected, rel=0.04)  # attention computes its scores twice
    assert counted.num_parameters == sum(p.numel() for p in student.parameters())
    assert counted.memory == measure_step(SSLMetaArch, cfg)


def test_recomputing_takes_longer_and_a_slower_gpu_too():
    cfg = config("student.arch=vit_small dino.head_n_prototypes=4096", batch_size=4)
    none, full = roofline.predict(cfg), roofline.predict(cfg, "full")
    assert full.operations > 1.15 * none.operations and full.memory.peak < none.memory.peak
    assert none.seconds(GPUS["T4"]).total() > none.seconds(H100).total()
    assert none.update_seconds(GPUS["T4"]) > 5 * none.update_seconds(H100) > 0


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
    seconds = counted.seconds(H100)
    assert seconds["add"] == pytest.approx(moved / (roofline.BYTES * H100.bandwidth))
    assert seconds["products"] == pytest.approx(counted.operations / (roofline.PRODUCTS * H100.flops))
    assert seconds["add_"] == roofline.LAUNCH
