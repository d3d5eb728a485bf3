"""Copies on the stand-in: delayed ones arrive intact if the engine waits for them, and torn otherwise.

Run by ``test_cuda_host.py``.
"""

import itertools

import torch

from dinov2_custom.data.loaders import Copier, make_train_loader
from dinov2_custom.utils.transfer import to_device, to_host
from tests.cuda_host.counts import counted, syncs
from tests.data.pictures import make_folder, train_config

CUDA = torch.device("cuda", 0)


def test_a_copy_without_a_wait_is_detected():
    host = torch.arange(4.0).pin_memory()
    device = host.to(CUDA, non_blocking=True)
    host.fill_(7)
    values = device.tolist()  # no device tensor in an assertion: printing it would need kernels
    assert values == [7.0] * 4  # what the host wrote too early


def test_a_slot_is_free_once_the_copier_was_waited_for():
    host = torch.arange(4.0).pin_memory()
    copied = Copier(CUDA)(lambda: {"x": host.to(CUDA, non_blocking=True)})
    with counted() as found:
        copied.wait()
    host.fill_(7)
    values = copied.batch["x"].tolist()
    assert values == [0, 1, 2, 3] and found["sync event"] == 1


def test_numbers_on_their_way_to_the_host_are_waited_for():
    device = to_device(torch.arange(3.0), CUDA)
    copy = to_host(device)
    with counted() as found:
        assert copy.tolist() == [0, 1, 2]
    assert found["sync event"] == 1 and copy.tensor.is_pinned()
    with counted() as found:
        to_host(device)
    assert syncs(found) == 0


def test_batches_of_other_processes_reach_the_device_whole(tmp_path):
    """Crops are unprocessed: changing and normalising them needs kernels, see ``inside_compute.py``."""
    make_folder(tmp_path / "images", [f"{i}.png" for i in range(20)])

    def loader(**train):
        made = make_train_loader(train_config(str(tmp_path / "images"), **train), rank=0, world_size=1)
        made.colours = "cpu"
        made.finish = lambda crops, device, colours=None: crops.to(device, non_blocking=True, copy=True)
        return made

    on_host = itertools.islice(loader().batches(), 12)
    with counted() as found:
        on_device = loader(num_workers=2).batches(device=CUDA)
        copied = next(on_device)
        for wanted in on_host:
            following = next(on_device)  # from now on, the previous slot is refilled
            for name in ("collated_global_crops", "collated_local_crops"):
                arrived = copied[name].cpu()
                assert torch.equal(arrived, wanted[name])
            copied = following
        on_device.close()
    assert 1 <= found["cudaHostRegister"] <= 5 and found["copy pageable to device"] == 0
    assert found["stream waits for event"] >= 12
