"""KoLeo over several processes: value and gradient are those of one process with all features."""

import json

import torch

from dinov2_custom.loss import KoLeoLoss
from tests.processes import launch_source

SCRIPT = """
import json, sys, torch
from dinov2_custom import distributed
from dinov2_custom.loss import KoLeoLoss
from tests.loss.test_koleo_loss import features
distributed.enable()
rank, size = distributed.get_global_rank(), distributed.get_global_size()
results = {}
for kind in ("all", "process"):
    x = features().chunk(size)[rank].clone().requires_grad_()
    loss = KoLeoLoss(over_all_ranks=kind == "all")(x)
    (3 * loss).backward()
    everything = torch.zeros_like(features())
    everything.chunk(size)[rank].copy_(x.grad / size)  # what averaged gradients amount to
    results[kind] = [float(loss), distributed.all_reduce(everything).tolist()]
json.dump(results, open(f"{sys.argv[1]}{rank}", "w"))
distributed.disable()
"""


def features():
    """Return (8, 5), where the nearest neighbours of some rows are in the other half, and two rows are equal."""
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(3))
    x[6] = 1.1 * x[0] + 0.01
    x[7] = x[2]
    return x


def test_two_processes_are_one(tmp_path):
    whole = features().requires_grad_()
    loss = KoLeoLoss()(whole)
    (3 * loss).backward()
    assert torch.equal(KoLeoLoss(over_all_ranks=True)(whole), loss)  # a single process has nothing to gather
    launch_source(tmp_path, SCRIPT, str(tmp_path / "rank"))
    for rank in (0, 1):
        results = json.loads((tmp_path / f"rank{rank}").read_text())
        value, gradient = results["all"]
        torch.testing.assert_close(torch.tensor(value), loss.detach(), rtol=0, atol=1e-6)
        torch.testing.assert_close(torch.tensor(gradient), whole.grad, rtol=1e-5, atol=1e-5)
        assert abs(results["process"][0] - float(loss.detach())) > 0.1
