"""Names, prefixes and numbers of weight files, on their way into a model."""

import pytest
import torch

from dinov2_custom.errors import CheckpointError
from dinov2_custom.export.portable import portable
from dinov2_custom.export.timm_folder import write_timm
from dinov2_custom.hub.backbones import make_backbone
from dinov2_custom.models.vision_transformer import vit_nano
from dinov2_custom.teacher import load_teacher, load_teacher_backbone
from dinov2_custom.train.pretrained import load_pretrained_backbone
from dinov2_custom.utils.utils import load_pretrained_weights
from dinov2_custom.utils.weights import flat_heads, flat_state
from tests.export.backbones import KINDS, features_of, make_teacher, random_images
from tests.hub.served import serve


def backbone(seed=0):
    torch.manual_seed(seed)
    return vit_nano(patch_size=8, img_size=32, block_chunks=0, init_values=1.0).eval()


def fill(load):
    """Return a loader that gives a new backbone with the file's weights."""

    def filled(path):
        model = backbone(seed=1)
        load(model, path)
        return model

    return filled


LOADERS = {
    "teacher": lambda path: load_teacher(str(path)).backbone,
    "evaluations": fill(lambda model, path: load_teacher_backbone(model, str(path))),
    "training": fill(load_pretrained_backbone),
    "upstream's": fill(lambda model, path: load_pretrained_weights(model, path, "teacher")),
    "hub": lambda path: make_backbone("vit_nano", weights=str(path)).eval(),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_said_by_every_loader(tmp_path, loader, number):
    state = backbone().state_dict()
    state["blocks.1.norm1.weight"][3] = number
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"blocks\.1\.norm1\.weight: expected finite numbers, got 1 of 64"):
        LOADERS[loader](tmp_path / "w.pth")


@pytest.mark.parametrize("loader", LOADERS)
def test_what_may_be_secret_in_an_address_is_said_by_no_loader(tmp_path, monkeypatch, loader):
    torch.save({"norm.weight": torch.ones(3)}, tmp_path / "w.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with serve(tmp_path) as (url, _), pytest.raises(CheckpointError) as e:
        LOADERS[loader](f"{url}/w.pth?token=abc")
    assert f"{url}/w.pth" in str(e.value) and "token=" not in str(e.value)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (1, 1, 64), (1, 12, 64), (1, 65, 7), (1, 17, 64, 1)])
def test_positions_of_another_shape_are_said_by_every_loader(tmp_path, loader, shape):
    torch.save(backbone().state_dict() | {"pos_embed": torch.zeros(shape)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="pos_embed: expected|the positions form no square"):
        LOADERS[loader](tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("name", "value"),
    [("register_tokens", torch.zeros(3)), ("blocks.99999999.norm1.weight", torch.ones(64)), ("pos_embed", None)],
)
def test_an_architecture_that_shapes_do_not_tell_is_said(tmp_path, name, value):
    state = backbone().state_dict() | {name: value}
    torch.save({name: value for name, value in state.items() if value is not None}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="could not tell its architecture|register_tokens: expected"):
        load_teacher(str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    "change", [{"cls_token": torch.tensor(1.0)}, {"reg_token": torch.zeros(4, 64), "pos_embed": None}]
)
def test_timms_tensors_that_cannot_be_renamed_are_said(change):
    state = {name: value for name, value in backbone().state_dict().items() if name != "mask_token"} | change
    state["pos_embed"] = torch.zeros(16, 64) if state["pos_embed"] is None else state["pos_embed"]
    with pytest.raises(CheckpointError, match="of timm or transformers, could not rename them"):
        flat_state(state)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_numbers_of_another_kind_are_said_by_every_loader(tmp_path, loader, dtype):
    state = backbone().state_dict()
    state["norm.bias"] = state["norm.bias"].to(dtype)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=f"norm.bias: expected floating-point numbers, got {str(dtype)[6:]}"):
        LOADERS[loader](tmp_path / "w.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_other_floating_point_numbers_are_read(dtype):
    from dinov2_custom.utils.weights import fit_state

    state = {name: value.to(dtype) for name, value in backbone().state_dict().items()}
    assert fit_state(backbone(), state).misfits == []


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": {f"model.{k}": v for k, v in state.items()} | {"criterion.center": torch.ones(3)}},
        lambda state: {"state_dict": {f"model.student.backbone.{k}": v * 0 for k, v in state.items()}
                       | {f"model.teacher.backbone.{k}": v for k, v in state.items()}},
        lambda state: {"state_dict": {f"teacher_backbone.vit.{k}": v for k, v in state.items()}
                       | {f"student_backbone.vit.{k}": v * 0 for k, v in state.items()}},
        lambda state: {f"base_model.model.{k}": v for k, v in state.items()},
        lambda state: {"model": {f"_forward_module.net.encoder.{k}": v for k, v in state.items()}},
    ],
    ids=["lightning", "lightning, student and teacher", "two networks", "peft, merged", "others"],
)  # fmt: skip
def test_prefixes_of_other_libraries(tmp_path, loader, wrap):
    source = backbone()
    torch.save(wrap(source.state_dict()), tmp_path / "w.ckpt")
    images = random_images(32)
    torch.testing.assert_close(features_of(LOADERS[loader](tmp_path / "w.ckpt"), images), features_of(source, images))


def test_heads_are_those_beside_the_backbone():
    state = {"model.teacher.backbone.cls_token": 1.0, "model.teacher.dino_head.mlp.0.weight": 2.0}
    state |= {"model.student.backbone.cls_token": 3.0, "model.student.dino_head.mlp.0.weight": 4.0}
    state = {name: torch.tensor([value]) for name, value in state.items()}
    assert flat_state(state) == {"cls_token": torch.tensor([1.0])}
    assert flat_heads(state) == {"dino_head": {"mlp.0.weight": torch.tensor([2.0])}}
    assert flat_state(state, "student") == {"cls_token": torch.tensor([3.0])}


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_that_is_not_merged_is_refused(whole):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(backbone(), peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False))
    state = model.state_dict() if whole else peft.get_peft_model_state_dict(model)
    with pytest.raises(CheckpointError, match=r"merge_and_unload\(\)"):
        flat_state(state)
    merged = flat_state({f"base_model.model.{k}": v for k, v in model.merge_and_unload().state_dict().items()})
    assert not torch.equal(merged["blocks.0.attn.qkv.weight"], backbone().state_dict()["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("state", [{0: torch.ones(1)}, {"model": {1: torch.ones(1)}}, {(1, 2): torch.ones(1)}])
def test_tensors_by_number_are_said(state):
    with pytest.raises(CheckpointError, match="expected tensors by name, got"):
        flat_state(state)


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_timm_export_is_read_back(tmp_path, kind):
    """Also into the model that it came from, which may lack the LayerScale and biases that timm always has."""
    teacher = make_teacher(kind)
    write_timm(portable(teacher), tmp_path)
    images = random_images(teacher.image_size)
    expected = features_of(teacher.backbone, images)
    read = load_teacher(str(tmp_path))
    torch.testing.assert_close(features_of(read.backbone, images), expected)
    assert read.normalize == pytest.approx(teacher.normalize)
    for load in (load_teacher_backbone, load_pretrained_backbone):
        own = make_teacher(kind)
        own.backbone.pos_embed.zero_()
        load(own.backbone, str(tmp_path))
        torch.testing.assert_close(features_of(own.backbone, images), expected)
