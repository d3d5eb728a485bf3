import pytest
import torch

from dinov2_custom.errors import CheckpointError
from dinov2_custom.models.vision_transformer import vit_micro, vit_nano
from dinov2_custom.train.pretrained import load_pretrained_backbone


def make(arch=vit_nano, **kwargs):
    return arch(**({"patch_size": 4, "img_size": 16, "block_chunks": 0, "init_values": 1.0} | kwargs))


def wrap(state, how):
    head = {"dino_head.mlp.0.weight": torch.ones(1)}
    prefixed = {
        "flat": state,
        "model": {"model": state},
        "teacher": {"teacher": {f"backbone.{k}": v for k, v in state.items()} | head},
        "ddp": {"state_dict": {f"module.backbone.{k}": v for k, v in state.items()}},
        "training": {
            "model": {f"teacher.backbone.{k}": v for k, v in state.items()}
            | {f"student.backbone.{k}": torch.zeros_like(v) for k, v in state.items()},
            "iteration": 3,
        },
    }
    return prefixed[how]


@pytest.mark.parametrize("how", ["flat", "model", "teacher", "ddp", "training"])
@pytest.mark.parametrize(("from_chunks", "to_chunks"), [(0, 0), (0, 2), (2, 0), (4, 1)])
def test_every_wrapper_and_chunking(tmp_path, how, from_chunks, to_chunks):
    source, target = make(block_chunks=from_chunks).eval(), make(block_chunks=to_chunks).eval()
    torch.save(wrap(source.state_dict(), how), tmp_path / "w.pth")
    load_pretrained_backbone(target, tmp_path / "w.pth")
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(target(x), source(x))


def test_positions_are_resampled_to_the_new_grid(tmp_path):
    source, target = make(img_size=32).eval(), make(img_size=16).eval()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    load_pretrained_backbone(target, tmp_path / "w.pth")
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(target(x), source(x))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"ffn_layer": "swiglu"}, r"blocks\.0\.mlp\.fc1\.weight: missing"),
        ({"arch": vit_micro}, r"cls_token: expected \(1, 1, 64\), got \(1, 1, 128\)"),
        ({"patch_size": 2, "img_size": 8}, r"patch_embed\.proj\.weight: expected \(64, 3, 4, 4\), got \(64, 3, 2, 2\)"),
    ],
)
def test_weights_of_another_architecture_are_refused_and_change_nothing(tmp_path, source, message):
    torch.save(make(**source).state_dict(), tmp_path / "w.pth")
    target = make()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_pretrained_backbone(target, tmp_path / "w.pth")
    assert all(torch.equal(before[k], v) for k, v in target.state_dict().items())


def test_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="found nothing"):
        load_pretrained_backbone(make(), tmp_path / "absent.pth")
