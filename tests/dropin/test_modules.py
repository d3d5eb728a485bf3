"""Hooks, patches, wrappers and subclasses of a backbone's modules behave as in upstream."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from dinov2_custom.hub import backbones as hub
from dinov2_custom.layers import block as our_block
from dinov2_custom.models import vision_transformer as vits
from tests.dropin.idioms import HOOKS, IDIOMS, blocks_of, class_patch_of_attention, instance_patch_of_attention
from tests.oracle import preserved_rng, reduced_depth
from tests.parity.pair import unsettle

KWARGS = dict(img_size=56, patch_size=14, init_values=1.0, block_chunks=0)
_same = partial(assert_close, rtol=1e-4, atol=1e-4)


def make_pair(oracle, **options):
    """Return (upstream's, ours): three blocks of ViT-S/14 with the same, unsettled weights, in evaluation mode."""
    with preserved_rng(0), reduced_depth(oracle.vits, 3), reduced_depth(vits, 3):
        theirs, ours = (module.vit_small(**{**KWARGS, **options}).eval() for module in (oracle.vits, vits))
    return load(theirs, ours)


def load(theirs, ours):
    unsettle(theirs, seed=1)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def images(batch=2, size=56):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def outcome(backbone):
    """Return results of the public calls, and the gradients of all parameters."""
    backbone.zero_grad()
    features = backbone(images(), is_training=True)
    layers = backbone.get_intermediate_layers(images(), n=2, return_class_token=True)
    (features["x_norm_clstoken"].square().sum() + layers[0][0].square().mean()).backward()
    gradients = {name: p.grad for name, p in backbone.named_parameters()}
    return [backbone(images()), features["x_norm_patchtokens"], features["x_prenorm"], layers], gradients


class Patches(pytest.MonkeyPatch):
    """Patches for one side that are undone before the other side runs."""

    def __init__(self):
        super().__init__()
        self.callbacks = []

    def callback(self, function):
        self.callbacks.append(function)

    def undo(self):
        super().undo()
        for function in self.callbacks:
            function()


def after(apply, backbone):
    """Return the observations and results after ``apply`` modified a model in use."""
    patches = Patches()
    backbone(images())
    try:
        seen = apply(backbone, patches)
        results, gradients = outcome(backbone)
        return list(seen), results, gradients
    finally:
        patches.undo()


def compare(theirs, ours, apply):
    expected, got = after(apply, theirs), after(apply, ours)
    assert [x.shape for x in got[0]] == [x.shape for x in expected[0]]
    _same(got[0], expected[0])
    _same(got[1], expected[1])
    for name, gradient in expected[2].items():
        if gradient is None:
            assert got[2][name] is None
        else:
            assert (got[2][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name
    return expected


@pytest.mark.parametrize("idiom", IDIOMS)
def test_idiom(oracle, idiom):
    theirs, ours = make_pair(oracle)
    before = ours(images()).detach()
    seen, (features, *_), _ = compare(theirs, ours, IDIOMS[idiom])
    if idiom in HOOKS:
        assert len(seen) == 2 * 3 * 3  # in and out, of three blocks in three calls
        assert all(x.dim() == 3 and x.shape[:2] == (2, 17) for x in seen)
    elif idiom not in ("hook_on_one_block", "full_backward_hook"):
        assert (features - before).abs().max() > 0.05  # it had an effect


@pytest.mark.parametrize("apply", [class_patch_of_attention, instance_patch_of_attention])
def test_patches_of_the_plain_attention_class(oracle, apply):
    made = []
    for module in (oracle.vits, vits):
        block = type(blocks_of(module.vit_small(**KWARGS))[0])
        attention = block.__mro__[1].__init__.__defaults__[-2]
        assert attention.__name__ == "Attention"
        with reduced_depth(module, 2):
            model = module.DinoVisionTransformer(
                embed_dim=96, num_heads=3, block_fn=partial(block, attn_class=attention), **KWARGS
            )
        made.append(model.eval())
    seen, *_ = compare(*load(*made), apply)
    assert all(x.shape == (2, 3, 17, 17) for x in seen) and len(seen) == 2 * 3


def test_attention_maps_are_softmax_of_what_qkv_gives(oracle):
    """Most attention-map scripts use this hook on ``qkv``."""
    maps = []
    for backbone in make_pair(oracle):
        seen = HOOKS["hook on attn.qkv"](backbone, None)
        backbone(images())
        q, k, _ = seen[-1].reshape(2, 17, 3, 6, 64).permute(2, 0, 3, 1, 4)
        maps.append((q @ k.transpose(-2, -1) * 64**-0.5).softmax(dim=-1))
    _same(maps[1], maps[0])


@pytest.mark.parametrize("chunks", [0, 1])
def test_chunks_and_blocks_are_called(oracle, chunks):
    """Test ``for blk in model.blocks: x = blk(x)``, here and in the user's own loop."""
    results = []
    for backbone in make_pair(oracle, block_chunks=chunks):
        seen = []
        for stage in backbone.blocks:
            stage.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out.detach()))
        features = backbone(images(), is_training=True)
        x = backbone.prepare_tokens_with_masks(images())
        for stage in backbone.blocks:
            x = stage(x)
        _same(x, features["x_prenorm"])
        results.append((seen, x))
    _same(results[1], results[0])


def cut(backbone):
    backbone.blocks = backbone.blocks[:2]


def lengthen(backbone):
    block = blocks_of(backbone)[0]
    stage = backbone.blocks[-1] if isinstance(backbone.blocks[-1], torch.nn.ModuleList) else backbone.blocks
    stage.append(copy.deepcopy(block))


def leave_out(number):
    def apply(backbone):
        stage = backbone.blocks[number] if isinstance(backbone.blocks[0], torch.nn.ModuleList) else backbone.blocks
        stage[number] = torch.nn.Identity()

    return apply


@pytest.mark.parametrize("chunks", [0, 3])
@pytest.mark.parametrize("change", [cut, lengthen, leave_out(1), leave_out(2)], ids=["cut", "longer", "no 2", "no 3"])
@torch.no_grad()
def test_layers_of_models_with_other_blocks_than_they_were_built_with(oracle, chunks, change):
    found = []
    for backbone in make_pair(oracle, block_chunks=chunks):
        change(backbone)
        found.append([backbone(images())])
        for n in (1, 2, [0, 1]):
            found[-1] += backbone.get_intermediate_layers(images(), n)
    _same(found[1], found[0])


def test_block_subclasses(oracle):
    """Test a ``forward(self, x)``, and an ``__init__`` that does not call ``Block``'s."""
    made = []
    for module in (oracle.vits, vits):
        nested = type(blocks_of(module.vit_small(**KWARGS))[0])
        attention = type(blocks_of(module.vit_small(**KWARGS))[0].attn)

        class Rolled(nested):
            def forward(self, x):
                return super().forward(x).roll(1, -1)

        class Own(Rolled):
            def __init__(self, dim, num_heads, drop_path=0.0, nested=nested, **options):
                torch.nn.Module.__init__(self)
                inner = nested(dim, num_heads, drop_path=drop_path, **options)
                for name, child in inner.named_children():
                    setattr(self, name, child)
                self.sample_drop_ratio = drop_path

        def make(dim, num_heads, number=iter(range(9)), Rolled=Rolled, Own=Own, attention=attention, **options):  # noqa: B008
            cls = (Rolled, Own)[next(number) % 2]
            return cls(dim, num_heads, attn_class=attention, **options)

        with reduced_depth(module, 4):
            made.append(module.DinoVisionTransformer(embed_dim=96, num_heads=3, block_fn=make, **KWARGS).eval())
    compare(*load(*made), lambda backbone, patches: [])


def test_attention_of_another_library(oracle, timm):
    made = []
    for module in (oracle.vits, vits):
        block = type(blocks_of(module.vit_small(**KWARGS))[0])
        attention = partial(block, attn_class=timm.models.vision_transformer.Attention)
        with reduced_depth(module, 2):
            made.append(module.DinoVisionTransformer(embed_dim=96, num_heads=3, block_fn=attention, **KWARGS).eval())
    assert type(blocks_of(made[1])[0].attn).__module__.startswith("timm.")
    compare(*load(*made), HOOKS["hook on attn"])


def test_lora_in_a_hub_model(oracle):
    ours = hub.dinov2_vits14(pretrained=False).eval()
    with preserved_rng(0):
        theirs = oracle.vits.vit_small(img_size=518, patch_size=14, init_values=1.0, block_chunks=0).eval()
    compare(*load(theirs, ours), IDIOMS["lora_around_qkv"])


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="NO PEFT CHECK: peft is not installed (the extra 'dev' has it)")


@pytest.mark.parametrize("targets", [["qkv"], ["qkv", "attn.proj", "fc1", "fc2"]], ids=str)
def test_peft(oracle, peft, targets):
    theirs, ours = make_pair(oracle)
    config = {"r": 4, "target_modules": targets, "init_lora_weights": False}
    theirs, ours = (peft.get_peft_model(one, peft.LoraConfig(**config)) for one in (theirs, ours))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    _, _, gradients = compare(theirs, ours, lambda backbone, patches: [])
    trained = [name for name, gradient in gradients.items() if gradient is not None]
    assert len(trained) == 3 * 2 * len(targets) and all("lora_" in name for name in trained)
    plain = make_pair(oracle)[1]
    assert (ours(images()) - plain(images())).abs().max() > 0.01


def test_drop_path_of_a_called_block_is_upstreams(oracle):
    """Above 0.1, from torch's global generator; below, samples are zeroed by other draws than upstream's."""
    theirs, ours = make_pair(oracle, drop_path_rate=0.4, drop_path_uniform=True)
    results = []
    for backbone in (theirs, ours):
        with preserved_rng(3):
            results.append(backbone.train()(images(batch=7)))
    _same(results[1], results[0])


def test_blocks_take_lists(oracle):
    crops = [torch.randn(5, 17, 384), torch.randn(3, 5, 384)]
    for drop_path in (0.0, 0.05, 0.4):
        results = []
        for backbone in make_pair(oracle, drop_path_rate=drop_path, drop_path_uniform=True):
            with preserved_rng(3):
                results.append([out.detach() for out in blocks_of(backbone.train())[1](crops)])
        _same(results[1], results[0])


def test_no_class_of_ours_needs_attributes_that_upstreams_have_not(oracle):
    """A subclass sets upstream's attributes in its own ``__init__``, and inherits the rest."""
    theirs, ours = (blocks_of(one)[0] for one in make_pair(oracle))
    for name in ("", "attn", "mlp", "ls1"):
        mine, other = vars(ours.get_submodule(name)), vars(theirs.get_submodule(name))
        assert set(mine) - set(other) <= {"init_values", "dim"}, name
    assert our_block.has_own_forward(ours)
