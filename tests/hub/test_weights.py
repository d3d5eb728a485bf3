"""Load weights into hub models: Meta's layout by download, own runs by path; the features equal upstream's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from dinov2_custom.errors import CheckpointError, ConfigError, DINOv2Error
from dinov2_custom.hub import backbones, classifiers, dinotxt, utils
from dinov2_custom.hub.utils import CenterPadding
from dinov2_custom.models import vision_transformer
from dinov2_custom.utils import weights as weight_files
from tests.eval.test_setup import make_run
from tests.hub.served import serve
from tests.oracle import preserved_rng
from tests.parity.conftest import oracle  # noqa: F401 - a fixture
from tests.parity.pair import unsettle

SMALL = {"img_size": 518, "patch_size": 14, "init_values": 1.0, "block_chunks": 0}


@pytest.fixture(scope="module")
def upstreams(oracle):  # noqa: F811
    """Upstream's own ViT-S/14 for 518 pixels, unsettled."""
    with preserved_rng(0):
        model = oracle.vits.vit_small(**SMALL).eval()
    unsettle(model, seed=1)
    return model


@pytest.fixture
def released(upstreams, tmp_path, monkeypatch):
    """A server with Meta's paths, and an empty torch.hub folder; yields (folder of the files, paths asked for)."""
    folder = tmp_path / "site" / "dinov2" / "dinov2_vits14"
    folder.mkdir(parents=True)
    torch.save(upstreams.state_dict(), folder / "dinov2_vits14_pretrain.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with serve(tmp_path / "site") as (url, asked):
        for module in (utils, weight_files):
            monkeypatch.setattr(module, "RELEASED_URL", f"{url}/dinov2")
        yield folder, asked


@pytest.mark.parametrize("size", [(518, 518), (224, 224), (210, 280)], ids=str)
@torch.no_grad()
def test_features_are_upstreams(upstreams, released, size):
    ours = backbones.dinov2_vits14().eval()
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    expected, got = (model(images, is_training=True) for model in (upstreams, ours))
    for name in ("x_norm_clstoken", "x_norm_patchtokens"):
        assert_close(got[name], expected[name], rtol=1e-5, atol=1e-5)
    assert released[1] == ["/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"]


@torch.no_grad()
def test_antialiased_positions_without_offset(upstreams, released, oracle):  # noqa: F811
    """Upstream's revision here has only the offset of .1, so it gets resampled positions."""
    ours = backbones.dinov2_vits14(interpolate_antialias=True, interpolate_offset=0.0).eval()
    with preserved_rng(0):
        theirs = oracle.vits.vit_small(**{**SMALL, "img_size": 224}).eval()
    state = dict(upstreams.state_dict())
    grid = state["pos_embed"][:, 1:].view(1, 37, 37, 384).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(16, 16), mode="bicubic", antialias=True)
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    theirs.load_state_dict(state)
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected, got = theirs(images), ours(images)
    assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (backbones.dinov2_vits14().eval()(images) - expected).abs().max() > 1e-4  # the options do matter


def test_weights_are_downloaded_once_and_own_their_memory(upstreams, released):
    for _ in range(2):
        model = backbones.dinov2_vits14(weights="LVD142M")
    assert len(released[1]) == 1
    assert model.training and all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    for name, tensor in upstreams.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_a_classifier_gets_both_files(upstreams, released, tmp_path):
    folder, asked = released
    heads = {"linear": torch.nn.Linear(2 * 384, 1000), "linear4": torch.nn.Linear(5 * 384, 1000)}
    for name, head in heads.items():
        torch.save(head.state_dict(), folder / f"dinov2_vits14_{name}_head.pth")
    for layers, name in ((1, "linear"), (4, "linear4")):
        model = classifiers.dinov2_vits14_lc(layers=layers)
        assert torch.equal(model.linear_head.weight, heads[name].weight)
    assert [path.rpartition("/")[2] for path in asked] == [
        "dinov2_vits14_pretrain.pth",
        "dinov2_vits14_linear_head.pth",
        "dinov2_vits14_linear4_head.pth",
    ]
    own = torch.nn.Linear(2 * 384, 7)
    torch.save(own.state_dict(), tmp_path / "own.pth")
    assert classifiers.dinov2_vits14_lc(layers=1, weights=tmp_path / "own.pth").linear_head.out_features == 7
    with pytest.raises(CheckpointError, match=r"weight \(classes, 1920\).*got .*\(7, 768\)"):
        classifiers.dinov2_vits14_lc(layers=4, weights=str(tmp_path / "own.pth"))


def test_weights_by_url(upstreams, released):
    url = f"{weight_files.RELEASED_URL}/dinov2_vits14/dinov2_vits14_pretrain.pth"
    model = backbones.dinov2_vits14(weights=url)
    assert torch.equal(model.cls_token, upstreams.cls_token)


@pytest.mark.parametrize("registers", [0, 2])
@torch.no_grad()
def test_a_runs_own_teacher(tmp_path, registers):
    """Patch size, image size, registers, FFN and resampling follow the run, not the released models."""
    overrides = ["student.arch=vit_small", "student.ffn_layer=swiglufused", "student.block_chunks=4"]
    overrides += [f"student.num_register_tokens={registers}", "student.interpolate_offset=0.0"]
    _, run, weights = make_run(tmp_path / "run", *overrides)
    name = "dinov2_vits14_reg" if registers else "dinov2_vits14"
    model = getattr(backbones, name)(weights=weights).eval()
    assert (model.patch_size, model.num_register_tokens, model.interpolate_offset) == (4, registers, 0.0)
    assert model.interpolate_antialias is False and not model.chunked_blocks
    images = torch.randn(2, 3, 32, 16, generator=torch.Generator().manual_seed(0))
    assert_close(model(images), run.teacher["backbone"].eval()(images))


@torch.no_grad()
def test_a_run_with_channels_of_its_own(tmp_path):
    """Bag of channels, which no shape shows, follows the run's configuration."""
    model = vision_transformer.vit_small(4, 0, 1, True, img_size=8, block_chunks=0)
    torch.save({"teacher": model.state_dict()}, tmp_path / "teacher_checkpoint.pth")
    alone = backbones.dinov2_vits14(weights=tmp_path / "teacher_checkpoint.pth")
    assert (alone.patch_embed.proj.in_channels, alone.bag_of_channels) == (1, False)
    (tmp_path / "config.yaml").write_text("student: {arch: vit_small, in_chans: 1, channel_adaptive: true}\n")
    ours = backbones.dinov2_vits14(weights=tmp_path).eval()
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ((got, _),), ((wanted, _),) = (m.get_intermediate_layers(images) for m in (ours, model.eval()))
    assert got.shape == (2, 3, 4, 384)
    assert_close(got, wanted)


def test_weights_that_cannot_be_used(tmp_path):
    _, _, weights = make_run(tmp_path / "run")
    with pytest.raises(CheckpointError, match="tensors of vit_small, got .* of another shape"):
        backbones.dinov2_vits14(weights=weights)
    with pytest.raises(CheckpointError, match="expected LVD142M, a file or a run directory, got LVD143M"):
        backbones.dinov2_vits14(weights="LVD143M")
    torch.save({"model": {"weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="got a file without: .*other.pth"):
        backbones.dinov2_vits14(weights=tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="layers: expected 1 or 4, got 2"):
        classifiers.dinov2_vits14_lc(layers=2, pretrained=False)
    with pytest.raises(DINOv2Error, match="dino.txt's tokenizer"):
        dinotxt.get_tokenizer()


@pytest.mark.parametrize(("shape", "padded"), [((28, 42), (28, 42)), ((29, 40), (42, 42)), ((1, 15), (14, 28))])
def test_center_padding(shape, padded):
    images = torch.ones(1, 3, *shape)
    got = CenterPadding(14)(images)
    assert got.shape[-2:] == padded and got.sum() == images.sum()
    top, left = (padded[0] - shape[0]) // 2, (padded[1] - shape[1]) // 2
    assert torch.equal(got[..., top : top + shape[0], left : left + shape[1]], images)
