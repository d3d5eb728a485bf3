import pytest

from dinov2_custom.train.gpus import GPUS, describe_device, find_device, find_gpu


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
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_a_device_is_found_by_the_words_of_its_name(device, name):
    assert find_gpu(device) == name


def test_those_that_people_rent_and_buy_are_there():
    wanted = "T4 L4 A10 A5000 A6000 3090 4090 5090 A100-40GB A100-80GB L40S H100 H200 B200"
    assert set(wanted.split()) <= set(GPUS)
    assert all(gpu.memory < gpu.bandwidth < gpu.flops for gpu in GPUS.values())


def test_the_device_of_the_last_start_is_found_in_a_log():
    names = ["NVIDIA A100-SXM4-40GB", "AMD (old) CPU", "NVIDIA H100 80GB HBM3"]
    lines = [describe_device("cuda", name, 8, 2) for name in names]
    log = "".join(f"I20260131 18:00:00 1 dinov2 train.py:100] {line}\nother (text) threads=1\n" for line in lines)
    assert find_device(log) == names[-1] and find_device(log.partition("NVIDIA H100")[0]) == names[1]
    assert find_device("no such line") is None
