"""Teacher checkpoints load both ways; the same weights give the same features, at native and other image sizes."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from dinov2_custom.models import build_model_from_cfg
from dinov2_custom.models import vision_transformer as vits
from dinov2_custom.train.train import do_test
from tests.oracle import OracleTrainer, preserved_rng, reduced_depth
from tests.parity.cases import P14, SEPARATE, SWIGLU
from tests.parity.pair import OurTrainer, unsettle

DEPTH = 4
MODELS = {
    "flat": "student.arch=vit_small",
    "chunks": f"student.arch=vit_small student.block_chunks=2 {SEPARATE}",
    "swiglu": f"student.arch=vit_small {SWIGLU}",
}
SMALL_HEADS = "dino.head_n_prototypes=64 ibot.head_n_prototypes=64"
# (height, width) of images for a model of img_size 224: itself, smaller, larger, oblong
SIZES = [(224, 224), (98, 98), (280, 280), (112, 224), (224, 112)]


def _images(size: tuple[int, int], batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def _same(got, expected):
    assert_close(got, expected, rtol=1e-5, atol=2e-5)


def _pair(oracle, overrides: str, tmp_path):
    dotlist = f"{overrides} {P14} {SMALL_HEADS} crops.global_crops_size=224".split()
    return OracleTrainer(oracle, dotlist, depth=DEPTH), OurTrainer(dotlist, str(tmp_path), depth=DEPTH)


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
def test_our_teacher_checkpoint_loads_into_upstream(oracle, overrides, tmp_path):
    theirs, ours = _pair(oracle, overrides, tmp_path)
    unsettle(ours.model, seed=1)
    file = torch.load(do_test(ours.cfg, ours.model, "training_0"), weights_only=True)
    assert list(file) == ["teacher"]
    theirs.model.teacher.load_state_dict(file["teacher"], strict=True)
    _compare_teachers(theirs.model.teacher, ours.model.teacher)


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
def test_upstreams_teacher_checkpoint_loads_into_ours(oracle, overrides, tmp_path):
    theirs, ours = _pair(oracle, overrides, tmp_path)
    unsettle(theirs.model, seed=1)
    theirs.cfg.train.output_dir = str(tmp_path)
    oracle.train.do_test(theirs.cfg, theirs.model, "training_0")
    file = torch.load(tmp_path / "eval" / "training_0" / "teacher_checkpoint.pth", weights_only=True)
    ours.model.teacher.load_state_dict(file["teacher"], strict=True)
    _compare_teachers(theirs.model.teacher, ours.model.teacher)


@torch.no_grad()
def _compare_teachers(theirs, ours):
    images = _images((224, 224))
    expected = theirs.backbone(images)
    _same(ours.backbone(images), expected)
    for head in set(theirs) - {"backbone"}:
        _same(ours[head](expected), theirs[head](expected))


@pytest.fixture(scope="module")
def backbones(oracle):
    """(upstream's, ours): ViT-S/14 for 224 px with the same, unsettled weights, in evaluation mode."""
    kwargs = dict(img_size=224, patch_size=14, init_values=1.0, block_chunks=0)
    with preserved_rng(0), reduced_depth(oracle.vits, DEPTH), reduced_depth(vits, DEPTH):
        theirs, ours = oracle.vits.vit_small(**kwargs).eval(), vits.vit_small(**kwargs).eval()
    unsettle(theirs, seed=1)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_features(backbones, size):
    theirs, ours = backbones
    images = _images(size)
    masks = torch.rand(2, size[0] // 14 * (size[1] // 14), generator=torch.Generator().manual_seed(1)) < 0.3
    _same(ours(images), theirs(images))
    for mask in (None, masks):
        expected, got = theirs(images, masks=mask, is_training=True), ours(images, masks=mask, is_training=True)
        for name in ("x_norm_clstoken", "x_norm_patchtokens", "x_prenorm"):
            _same(got[name], expected[name])
        assert got["masks"] is mask
        assert got["x_norm_regtokens"].shape == (2, 0, 384)


@torch.no_grad()
def test_features_of_several_sizes_at_once(backbones):
    theirs, ours = backbones
    crops = [_images((224, 224)), _images((98, 98), batch=5)]
    masks = [torch.rand(2, 256, generator=torch.Generator().manual_seed(1)) < 0.3, None]
    expected, got = theirs(crops, masks=masks, is_training=True), ours(crops, masks=masks, is_training=True)
    assert len(got) == len(expected) == 2
    for one, other in zip(got, expected, strict=True):
        for name in ("x_norm_clstoken", "x_norm_patchtokens", "x_prenorm"):
            _same(one[name], other[name])


@pytest.mark.parametrize("size", [(224, 224), (112, 280)], ids=str)
@pytest.mark.parametrize("n", [1, 3, [0, 2], [1]], ids=str)
@pytest.mark.parametrize("reshape", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("return_class_token", [False, True])
@torch.no_grad()
def test_intermediate_layers(backbones, size, n, reshape, norm, return_class_token):
    options = dict(n=n, reshape=reshape, norm=norm, return_class_token=return_class_token)
    images = _images(size, batch=1)
    expected, got = (model.get_intermediate_layers(images, **options) for model in backbones)
    assert isinstance(got, tuple)
    _same(got, expected)


@torch.no_grad()
def test_intermediate_layers_of_chunked_blocks(oracle):
    kwargs = dict(img_size=98, patch_size=14, init_values=1.0, block_chunks=2)
    with preserved_rng(0), reduced_depth(oracle.vits, DEPTH), reduced_depth(vits, DEPTH):
        theirs, ours = oracle.vits.vit_small(**kwargs).eval(), vits.vit_small(**kwargs).eval()
    unsettle(theirs, seed=1)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = _images((98, 98))
    for n in (2, [0, 3]):
        _same(ours.get_intermediate_layers(images, n=n), theirs.get_intermediate_layers(images, n=n))


@torch.no_grad()
def test_position_embedding_of_every_grid(backbones):
    theirs, ours = backbones
    for rows in (1, 2, 5, 15, 16, 17, 31, 37, 64):
        for columns in (1, 16, 23):
            tokens = torch.zeros(1, 1 + rows * columns, 384)
            sizes = rows * 14 + 3, columns * 14  # sizes need not be multiples of the patch
            expected = theirs.interpolate_pos_encoding(tokens, *sizes)
            _same(ours.interpolate_pos_encoding(tokens, *sizes), expected)


def test_teacher_alone_is_built_as_upstream_builds_it(oracle, tmp_path):
    theirs, ours = _pair(oracle, MODELS["chunks"], tmp_path)
    with reduced_depth(vits, DEPTH):
        teacher, width = build_model_from_cfg(ours.cfg, only_teacher=True)
    assert width == 384
    teacher.load_state_dict(theirs.model.teacher.backbone.state_dict(), strict=True)
