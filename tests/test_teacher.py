"""Resolving a run directory or weight file, the architecture of its tensors, and loading them into a model."""

from __future__ import annotations

import sys

import pytest
import torch

from dinov2_custom.errors import CheckpointError, ConfigError
from dinov2_custom.export.portable import portable
from dinov2_custom.export.timm_folder import write_timm
from dinov2_custom.hub.backbones import make_backbone
from dinov2_custom.models.vision_transformer import vit_micro, vit_nano
from dinov2_custom.teacher import (
    backbone_like,
    device_of_choice,
    fit_state,
    load_pretrained_backbone,
    load_teacher,
    load_teacher_backbone,
)
from dinov2_custom.utils.run_folder import find_weights
from dinov2_custom.utils.utils import load_pretrained_weights
from dinov2_custom.utils.weights import flat_name
from tests.eval.test_setup import make_run
from tests.export.backbones import KINDS, features_of, make_teacher, random_images
from tests.hub.served import serve


def test_a_run_means_its_newest_teacher(tmp_path):
    make_run(tmp_path / "run", "data.normalize.mean=[0.1,0.2,0.3]")
    source = tmp_path / "run" / "eval" / "training_9"
    for name in ("training_10", "manual_8", "other", "best"):
        (source.parent / name).mkdir()
        (source.parent / name / "teacher_checkpoint.pth").write_bytes((source / "teacher_checkpoint.pth").read_bytes())
    assert find_weights(str(tmp_path / "run")) == str(source.parent / "training_10" / "teacher_checkpoint.pth")
    teacher = load_teacher(str(tmp_path / "run"))
    assert teacher.image_size == 16 and teacher.normalize["mean"] == (0.1, 0.2, 0.3)
    assert teacher.described_by == str(tmp_path / "run" / "config.yaml")
    assert not teacher.backbone.training and not any(p.requires_grad for p in teacher.backbone.parameters())


def test_the_best_teacher_is_used_only_if_it_is_named(tmp_path):
    best = tmp_path / "eval" / "best"
    best.mkdir(parents=True)
    torch.save({"teacher": {}, "iteration": 3}, best / "teacher_checkpoint.pth")
    with pytest.raises(CheckpointError, match="expected a weight file or a run directory"):
        find_weights(str(tmp_path))
    assert find_weights(str(best)) == str(best / "teacher_checkpoint.pth")


def test_a_run_without_teacher_means_its_last_checkpoint(tmp_path):
    checkpoint = tmp_path / "model_0000004"
    checkpoint.mkdir()
    (checkpoint / "checkpoint.json").touch()
    (tmp_path / "last_checkpoint").write_text("model_0000004")
    assert find_weights(str(tmp_path)) == find_weights(str(checkpoint)) == str(checkpoint)
    (tmp_path / "last_checkpoint").unlink()
    with pytest.raises(CheckpointError, match="expected a weight file or a run directory"):
        find_weights(str(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_architecture_from_tensors(kind, tmp_path):
    backbone = make_teacher(kind).backbone
    state = {flat_name(name): value for name, value in backbone.state_dict().items()}
    torch.save(state, tmp_path / "released.pth")
    teacher = load_teacher(str(tmp_path / "released.pth"))
    images = random_images(teacher.image_size)
    assert torch.equal(features_of(teacher.backbone, images), features_of(backbone, images))


def test_registers_decide_how_positions_are_resampled():
    plain, registers = (backbone_like(make_teacher(kind).backbone.state_dict(), "") for kind in ("swiglu", "registers"))
    assert (plain.interpolate_antialias, plain.interpolate_offset) == (False, 0.1)
    assert (registers.interpolate_antialias, registers.interpolate_offset) == (True, 0.0)


def test_other_tensors_are_refused(tmp_path):
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match="expected the weights of a DINOv2 backbone at .*resnet.pth"):
        load_teacher(str(tmp_path / "resnet.pth"))
    (tmp_path / "torn.safetensors").write_bytes(b"0" * 64)
    pytest.importorskip("safetensors")
    with pytest.raises(CheckpointError, match="torn.safetensors, could not read it: a file that begins with"):
        load_teacher(str(tmp_path / "torn.safetensors"))


@pytest.mark.parametrize("content", [b"hello\n", b"", b"# a README\n\nwith text\n"])
def test_a_file_of_something_else_is_no_weight_file(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="a.pth, could not read it: (a file that begins with|an empty file)"):
        load_teacher(str(tmp_path / "a.pth"))


def test_devices():
    assert device_of_choice("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="--device: expected a device of this machine, got 'nonsense'"):
        device_of_choice("nonsense")


def backbone(seed=0):
    torch.manual_seed(seed)
    return vit_nano(patch_size=8, img_size=32, block_chunks=0, init_values=1.0).eval()


def fill(load):
    """Return a loader of new backbones with the file's weights."""

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
def test_every_loader_reports_non_finite_weights(tmp_path, loader, number):
    state = backbone().state_dict()
    state["blocks.1.norm1.weight"][3] = number
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"blocks\.1\.norm1\.weight: expected finite numbers, got 1 of 64"):
        LOADERS[loader](tmp_path / "w.pth")


@pytest.mark.parametrize("loader", LOADERS)
def test_no_loader_shows_secrets_in_a_url(tmp_path, monkeypatch, loader):
    torch.save({"norm.weight": torch.ones(3)}, tmp_path / "w.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with serve(tmp_path) as (url, _), pytest.raises(CheckpointError) as e:
        LOADERS[loader](f"{url}/w.pth?token=abc")
    assert f"{url}/w.pth" in str(e.value) and "token=" not in str(e.value)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (1, 1, 64), (1, 12, 64), (1, 65, 7), (1, 17, 64, 1)])
def test_every_loader_reports_positions_of_another_shape(tmp_path, loader, shape):
    torch.save(backbone().state_dict() | {"pos_embed": torch.zeros(shape)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="pos_embed: expected|the number of positions is no square number"):
        LOADERS[loader](tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("name", "value"),
    [("register_tokens", torch.zeros(3)), ("blocks.99999999.norm1.weight", torch.ones(64)), ("pos_embed", None)],
)
def test_an_ambiguous_architecture_is_reported(tmp_path, name, value):
    state = backbone().state_dict() | {name: value}
    torch.save({name: value for name, value in state.items() if value is not None}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="got tensors of an unknown architecture|register_tokens: expected"):
        load_teacher(str(tmp_path / "w.pth"))


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_every_loader_reports_other_dtypes(tmp_path, loader, dtype):
    state = backbone().state_dict()
    state["norm.bias"] = state["norm.bias"].to(dtype)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=f"norm.bias: expected floating-point numbers, got {str(dtype)[6:]}"):
        LOADERS[loader](tmp_path / "w.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_other_floating_point_numbers_are_read(dtype):
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


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_timm_export_is_read_back(tmp_path, kind):
    """This includes the original model, which may lack the LayerScale and biases that timm always has."""
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


def test_weights_from_a_handler_of_iopath(tmp_path):
    from iopath.common import file_io

    class Shelf(file_io.PathHandler):
        def _get_supported_prefixes(self):
            return ["shelf://"]

        def _get_local_path(self, path, force=False, **kwargs):
            return str(tmp_path / path.removeprefix("shelf://"))

    source, target = make().eval(), make().eval()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="^shelf://w.pth: expected a path that an iopath handler serves"):
        load_pretrained_backbone(target, "shelf://user:password@w.pth?token=abc")
    file_io.g_pathmgr.register_handler(Shelf(), allow_override=True)
    try:
        load_pretrained_backbone(target, "shelf://w.pth")
    finally:
        del file_io.g_pathmgr._path_handlers["shelf://"]
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in source.state_dict().items())
    load_pretrained_backbone(target, f"file://{tmp_path / 'w.pth'}")


def test_missing_iopath_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "iopath.common", None)
    with pytest.raises(CheckpointError, match="^shelf://w.pth: expected the package iopath"):
        load_pretrained_backbone(make(), "shelf://w.pth")


def test_one_log_line_lists_loaded_missing_unexpected_and_resampled(tmp_path, caplog):
    caplog.set_level("INFO", "dinov2")
    state = make(img_size=32).state_dict()
    torch.save(state, tmp_path / "w.pth")
    load_pretrained_backbone(make(), tmp_path / "w.pth")
    torch.save(state | {"head.weight": torch.ones(3)}, tmp_path / "other.pth")
    load_pretrained_backbone(make(num_register_tokens=4), tmp_path / "other.pth")
    first, second = ((record.levelname, record.getMessage()) for record in caplog.records)
    num = len(make().state_dict())
    assert first == (
        "INFO",
        f"{tmp_path / 'w.pth'}: {num} of {num} tensors loaded into the configured backbone, 0 missing, 0 unexpected, "
        "1 resampled (pos_embed, 64 positions to 16)",
    )
    assert second[0] == "WARNING" and f"{num} of {num + 1} tensors" in second[1]
    assert "1 missing (register_tokens), 1 unexpected (head.weight), 1 resampled" in second[1]
