"""The same idioms in a training step: applied to a model in use, losses and gradients equal upstream's."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch

from dinov2_custom.errors import DINOv2Error
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from tests.dropin.idioms import IDIOMS, LoRA, blocks_of
from tests.dropin.test_modules import Patches, peft  # noqa: F401 - a fixture
from tests.oracle import make_batch
from tests.parity.cases import SMALL, SWIGLU, Case
from tests.parity.pair import Means, gradient_errors, loss_errors, make_pair
from tests.train.batches import random_batch, tiny_config

DROP = "student.drop_path_rate=0.3"
CASE = Case("small", "vit_small", f"{SMALL} {DROP} ibot.separate_head=true", depth=2)
CHUNKS = Case("chunks", "vit_small", f"{SMALL} {SWIGLU} {DROP} student.block_chunks=2", depth=2)
NO_DROP = Case("no drop path", "vit_small", f"{SMALL} student.drop_path_rate=0", depth=2)
# where upstream's training has no such call: it runs blocks on lists, through MemEffAttention alone
NOT_UPSTREAMS = ("replaced_attention", "hook_on_one_block", "full_backward_hook")
OWN_DRAWS = ("class_swap_of_blocks", "replaced_block")  # their ``forward`` does not take our draws


def two_steps(oracle, case, change, tmp_path, means=Means(groups=4, lean=True)):  # noqa: B008 - immutable
    """Return both models after a step as they were built and one with ``change``, and the errors of losses."""
    theirs, ours = make_pair(oracle, case, str(tmp_path), means)
    errors = {}
    for seed in (3, 4):
        batch = make_batch(oracle, theirs.cfg, case.batch_size, seed=seed)
        losses = []
        for trainer in (theirs, ours):
            trainer.model.student.zero_grad(set_to_none=True)
            patches = Patches()
            try:
                if seed == 4:
                    change(trainer.model, patches)
                losses.append(trainer.forward_backward(batch, teacher_temp=0.05, seed=seed))
            finally:
                patches.undo()
        errors = loss_errors(*losses)
    return theirs.model, ours.model, errors


def check(theirs, ours, errors):
    assert max(errors.values()) < 1e-5, errors
    gradients = {n: e for n, e in gradient_errors(theirs.student, ours.student).items() if not e < 1e-4}
    assert not gradients, gradients


@pytest.mark.parametrize("idiom", [name for name in IDIOMS if name not in NOT_UPSTREAMS])
def test_idiom(oracle, idiom, tmp_path, caplog):
    seen = []

    def change(model, patches):
        seen.append(IDIOMS[idiom](model.student.backbone, patches))

    case = NO_DROP if idiom in OWN_DRAWS else CASE
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        check(*two_steps(oracle, case, change, tmp_path))
    said = [record.message for record in caplog.records if record.message.startswith("train.lean")]
    assert len(said) == 1 and ("student.backbone.blocks" in said[0] or "another" in said[0] or "on all" in said[0])
    if seen[1]:
        assert all(x.dim() == 3 or x.shape[-1] == x.shape[-2] for x in seen[1])


def test_chunks_and_swiglu(oracle, tmp_path):
    check(*two_steps(oracle, CHUNKS, lambda model, _: IDIOMS["lora_around_qkv"](model.student.backbone, _), tmp_path))


@pytest.mark.parametrize("means", [Means(1, False), Means(2, True, "selective", padded=True), Means(4, True, "full")])
def test_lora_gets_gradients_whatever_saves_memory(oracle, means, tmp_path):
    change = IDIOMS["lora_around_qkv"]
    theirs, ours, errors = two_steps(oracle, CASE, lambda m, _: change(m.student.backbone, _), tmp_path, means)
    check(theirs, ours, errors)
    of_lora = [p for name, p in ours.student.named_parameters() if "_up" in name or "_down" in name]
    assert len(of_lora) == 2 * 4 and all(p.grad.abs().max() > 0 for p in of_lora)


def test_peft_in_a_running_model(oracle, peft, tmp_path):  # noqa: F811
    config = peft.LoraConfig(r=4, target_modules=["qkv", "fc1"], init_lora_weights=False)
    drawn = {}

    def change(model, _):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.inject_adapter_in_model(config, model.student.backbone)
        state = model.student.state_dict()
        drawn.update({n: v.clone() for n, v in state.items() if "lora_" in n and n not in drawn})
        model.student.load_state_dict({**state, **drawn})

    theirs, ours, errors = two_steps(oracle, CASE, change, tmp_path)
    assert max(errors.values()) < 1e-5, errors
    others = dict(theirs.student.named_parameters())
    trained = {n: p for n, p in ours.student.named_parameters() if "lora_" in n}
    assert len(trained) == 2 * 2 * 2
    for name, parameter in trained.items():
        expected = others[name].grad
        assert (parameter.grad - expected).norm() < 1e-4 * expected.norm(), name


@pytest.mark.parametrize("part", ["student", "teacher"])
def test_heads_and_losses(oracle, part, tmp_path):
    """Changed heads and losses are called, with all logits."""
    seen = []

    def change(model, _):
        getattr(model, part).dino_head.register_forward_hook(lambda m, args, out: seen.append(len(out)) or out * 0.5)
        loss = model.dino_loss.forward
        model.dino_loss.forward = lambda *args, **kwargs: loss(*args, **kwargs) * 2

    theirs, ours, errors = two_steps(oracle, CASE, change, tmp_path)
    check(theirs, ours, errors)
    assert seen and not ours.lean_heads and len(ours.shortcuts.student) == 2


@pytest.mark.parametrize("idiom", ["replaced_attention", "hook_on_one_block", "full_backward_hook"])
def test_what_upstreams_training_cannot_do(idiom):
    """The result is that of plain modules."""
    cfg = tiny_config(DROP, "train.view_groups=1")
    losses, gradients = [], []
    for lean in (True, False):
        model = SSLMetaArch(cfg).train()
        model.lean = lean
        model.forward_backward(random_batch(cfg), 0.05, torch.Generator().manual_seed(0))
        model.student.zero_grad()
        seen = IDIOMS[idiom](model.student["backbone"], None)
        losses.append(model.forward_backward(random_batch(cfg), 0.05, torch.Generator().manual_seed(1)))
        gradients.append([p.grad for p in model.student["backbone"].parameters()])
        assert idiom != "hook_on_one_block" or [x.shape[:2] for x in seen[::2]] == [(8, 17), (8, 5)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    assert losses[0].keys() == losses[1].keys()
    for name in losses[0]:
        torch.testing.assert_close(losses[0][name], losses[1][name])


def test_only_what_is_changed_is_called_and_only_while_it_is():
    cfg = tiny_config()
    model = SSLMetaArch(cfg).train()
    blocks = blocks_of(model.student["backbone"])
    handle = blocks[1].attn.register_forward_hook(lambda *_: None)
    model.forward_backward(random_batch(cfg), 0.05)
    assert model.shortcuts.student == set(blocks) - {blocks[1]} and len(model.shortcuts.teacher) == len(blocks)
    handle.remove()
    model.forward_backward(random_batch(cfg), 0.05)
    assert model.shortcuts.student == set(blocks) and not model.shortcuts.changes


def test_the_draws_of_a_hooked_block_are_the_steps():
    """They do not come from torch's global generator: a hook that only observes changes nothing."""
    cfg = tiny_config(DROP, "student.drop_path_uniform=true")
    found = []
    for hooked in (False, True):
        model = SSLMetaArch(cfg).train()
        if hooked:
            IDIOMS["hook on attn"](model.student["backbone"], None)
        torch.manual_seed(7 + hooked)
        model.forward_backward(random_batch(cfg), 0.05, torch.Generator().manual_seed(0))
        found.append([p.grad for p in model.student.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_a_backbone_whose_methods_have_upstreams_parameters():
    """A subclass written for upstream is called as upstream calls it."""
    cfg, found = tiny_config("student.drop_path_rate=0"), []
    for changed in (False, True):
        model = SSLMetaArch(cfg).train()
        seen = []

        class Mine(type(model.student["backbone"])):
            def forward_features_list(self, x_list, masks_list, seen=seen):
                seen.append(len(x_list))
                return super().forward_features_list(x_list, masks_list)

            def forward_features(self, x, masks=None, seen=seen):
                seen.append(None)
                return super().forward_features(x, masks)

        for side in (model.student, model.teacher) if changed else ():
            side["backbone"].__class__ = Mine
        found.append(model.forward_backward(random_batch(cfg), 0.05, torch.Generator().manual_seed(0)))
        assert len(seen) >= 3 * changed and len(model.shortcuts.changes) == 2 * changed
    assert found[0].keys() == found[1].keys()
    for name, loss in found[0].items():
        torch.testing.assert_close(found[1][name], loss, rtol=1e-4, atol=1e-5)


def test_modules_added_to_the_student_only_have_no_teacher():
    model = SSLMetaArch(tiny_config())
    for block in blocks_of(model.student["backbone"]):
        block.attn.qkv = LoRA(block.attn.qkv)
    with pytest.raises(DINOv2Error, match="model.teacher"):
        model.update_teacher(0.9)
    for block in blocks_of(model.teacher["backbone"]):
        block.attn.qkv = LoRA(block.attn.qkv)
    model.update_teacher(0.9)
    assert any("q_up" in name for group in model.get_params_groups() for name in _names_of(model, group))


def _names_of(model, group):
    names = {id(p): name for name, p in model.student.named_parameters()}
    return [names[id(p)] for p in group["params"]]
