import pytest

from dinov2_custom.train.gpus import GPUS, find_gpu


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("Tesla T4", "T4"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA RTX 6000 Ada Generation", None),
    ],
)
def test_a_device_is_found_by_the_words_of_its_name(device, name):
    assert find_gpu(device) == name


def test_those_that_people_rent_and_buy_are_there():
    wanted = "T4 L4 A10 A5000 A6000 3090 4090 5090 A100-40GB A100-80GB L40S H100 H200 B200"
    assert set(wanted.split()) <= set(GPUS)
    assert all(gpu.memory < gpu.bandwidth < gpu.flops for gpu in GPUS.values())
