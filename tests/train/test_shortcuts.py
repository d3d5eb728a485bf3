"""FSDP2's classes and hooks are no change where this package sharded; a user's hooks beside them, and their own
sharding, are."""

from __future__ import annotations

from tests.test_parallel import facts_of_two

SHARDED = """
import json, sys, torch
from dinov2_custom import distributed, parallel
from dinov2_custom.compat import fsdp
from dinov2_custom.layers.block import BlockChunk
from dinov2_custom.train.gradients import accumulate_gradients
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from tests.train.batches import random_batch, tiny_config
from tests.train.test_shortcuts import looked_at

distributed.enable()
rank = distributed.get_global_rank()
parts = [f"compute_precision.{m}.{p}" for m in ("student", "teacher") for p in ("backbone", "dino_head", "ibot_head")]
strategies = [f"{part}.sharding_strategy=FULL_SHARD" for part in parts]
own = ("student.drop_path_rate=0.3", "ibot.separate_head=true", "train.view_groups=4")
cfg = tiny_config(*own, "train.centering=sinkhorn_knopp", *strategies)  # which has no centre that moves
model = SSLMetaArch(cfg).train()
reducer = parallel.parallelize(cfg, model)

def step(model, reducer):
    model.student.zero_grad(set_to_none=True)
    accumulate_gradients(cfg, model, reducer, random_batch(cfg, seed=rank), iter(()), 0.05,
                         torch.Generator().manual_seed(0))
    return [p.grad.full_tensor().norm().item() for p in model.student.parameters()]

lean = step(model, reducer)
facts = {"class": type(model.student["backbone"].all_blocks()[0]).__name__, "lean": looked_at(model)}
seen = []
first, second, *_ = model.student["backbone"].all_blocks()
handles = [first.register_forward_hook(lambda *_: seen.append("block"))]
handles.append(second.attn.qkv.register_forward_pre_hook(lambda *_: seen.append("qkv")))
handles.append(model.student["dino_head"].register_forward_hook(lambda *_: seen.append("head")))
hooked = step(model, reducer)
facts["hooked"], facts["seen"] = looked_at(model), sorted(set(seen))
for handle in handles:
    handle.remove()
again = step(model, reducer)
facts["again"] = looked_at(model)
facts["same"] = [max(abs(a - b) / (abs(a) + 1e-4) for a, b in zip(lean, other)) for other in (hooked, again)]

cfg = tiny_config("student.block_chunks=2", "student.drop_path_rate=0.3")
own = SSLMetaArch(cfg).train()
alone = SSLMetaArch(cfg).train()
wrap = fsdp.get_fsdp_wrapper(cfg.compute_precision.student.backbone, {BlockChunk})
own.student["backbone"] = wrap(own.student["backbone"])
own.forward_backward(random_batch(cfg, seed=rank), 0.05, torch.Generator().manual_seed(0))
facts["own"] = looked_at(own)
facts["gradients"] = all(p.grad is not None for p in own.student["backbone"].blocks.parameters())
json.dump(facts, open(f"{sys.argv[1]}/{rank}.json", "w"))
distributed.disable()
"""


def looked_at(model):
    """Return how many blocks and whether heads run from their weights, and what is changed of the others."""
    model.look_at_modules()
    found = model.shortcuts
    return [len(found.student), len(found.teacher), found.heads, list(found.changes)]


def test_sharded_by_this_package_or_by_the_user(tmp_path):
    for facts in facts_of_two(tmp_path, SHARDED):
        assert facts["class"].startswith("FSDP")
        assert facts["lean"] == facts["again"] == [4, 4, True, []]
        student, teacher, heads, changes = facts["hooked"]
        assert (student, teacher, heads) == (2, 4, False) and facts["seen"] == ["block", "head", "qkv"]
        expected = ("student.backbone.blocks.0", "student.backbone.blocks.1.attn.qkv", "student.dino_head")
        assert all(name in change for name, change in zip(expected, changes, strict=True))
        assert max(facts["same"]) < 1e-3
        student, teacher, heads, changes = facts["own"]
        assert (student, teacher, heads) == (0, 4, True) and len(changes) == 2 and "FSDPBlockChunk" in changes[0]
        assert facts["gradients"]
