"""Upstream's names around FSDP: nothing to do in one process, real shards in two."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dinov2_custom.compat import fsdp
from dinov2_custom.errors import CheckpointError
from tests.test_parallel import facts_of_two


def section(strategy):
    precision = SimpleNamespace(param_dtype="fp32", reduce_dtype="fp32", buffer_dtype="fp32")
    return SimpleNamespace(sharding_strategy=strategy, mixed_precision=precision)


def make(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    return model, torch.optim.AdamW(model.parameters())


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.arange(8.0).view(2, 4) / 8).square().sum().backward()
    optimizer.step()


def test_one_process_shards_nothing():
    model, _ = make()
    assert fsdp.get_fsdp_wrapper(section("NO_SHARD"), {nn.Linear})(model) is model
    assert not fsdp.is_fsdp(model) and not fsdp.is_sharded_fsdp(model) and fsdp.get_fsdp_modules(model) == []
    fsdp.free_if_fsdp(model)
    fsdp.reshard_fsdp_model(model)
    assert fsdp.rankstr() == "rank_0"


def test_a_checkpoint_goes_on(tmp_path):
    model, optimizer = make()
    step(model, optimizer)
    writer = fsdp.FSDPCheckpointer(model, tmp_path, optimizer=optimizer)
    assert not writer.has_checkpoint() and writer.get_checkpoint_file() == ""
    writer.save("model_0000007", iteration=7)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000007.pth"
    step(model, optimizer)

    other, other_optimizer = make(seed=1)
    reader = fsdp.FSDPCheckpointer(other, tmp_path, optimizer=other_optimizer)
    assert reader.resume_or_load("", resume=False) == {}
    assert reader.resume_or_load("", resume=True) == {"iteration": 7}
    step(other, other_optimizer)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_files_that_do_not_fit(tmp_path):
    model, _ = make()
    torch.save({"model": {"weight": torch.zeros(1)}}, tmp_path / "other.pth")
    torch.save({"model": nn.Linear}, tmp_path / "code.pth")
    for name in ("other.pth", "code.pth", "none.pth"):
        with pytest.raises(CheckpointError):
            fsdp.FSDPCheckpointer(model, tmp_path).load(tmp_path / name)


TWO = """
import json, sys
from pathlib import Path
import torch
from torch import nn
from dinov2_custom import distributed
from dinov2_custom.compat import fsdp
from dinov2_custom.errors import ConfigError
from tests.compat.test_fsdp import make, section, step
folder = Path(sys.argv[1])
distributed.enable()
model, optimizer = make()
model = fsdp.get_fsdp_wrapper(section("SHARD_GRAD_OP"), {nn.Linear})(model)
optimizer = torch.optim.AdamW(model.parameters())
facts = {"units": len(fsdp.get_fsdp_modules(model)), "is": fsdp.is_sharded_fsdp(model), "rank": fsdp.rankstr()}
facts["own"] = sum(p.to_local().numel() for p in model.parameters())
step(model, optimizer)
fsdp.reshard_fsdp_model(model)
fsdp.FSDPCheckpointer(model, folder, optimizer=optimizer).save("two", iteration=0)
step(model, optimizer)
after = [p.full_tensor().sum().item() for p in model.parameters()]
state = fsdp.FSDPCheckpointer(model, folder, optimizer=optimizer).resume_or_load("")
step(model, optimizer)
facts["same"] = state == {"iteration": 0} and after == [p.full_tensor().sum().item() for p in model.parameters()]
try:
    fsdp.get_fsdp_wrapper(section("NO_SHARD"))(nn.Linear(2, 2))
except ConfigError as e:
    facts["error"] = str(e)
(folder / f"{fsdp.rankstr()}.json").write_text(json.dumps(facts))
distributed.disable()
"""


def test_two_processes_share_the_parameters(tmp_path):
    facts = facts_of_two(tmp_path, TWO)
    for rank, fact in enumerate(facts):
        assert (fact["units"], fact["is"], fact["rank"], fact["same"]) == (3, True, f"rank_{rank}", True)
        assert "expected one of auto, SHARD_GRAD_OP, FULL_SHARD" in fact["error"]
    assert sum(fact["own"] for fact in facts) == sum(p.numel() for p in make()[0].parameters())
    # the same step in one process, read from the file of two
    model, optimizer = make()
    step(model, optimizer)
    other, other_optimizer = make(seed=1)
    fsdp.FSDPCheckpointer(other, tmp_path, optimizer=other_optimizer).resume_or_load("")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor)
