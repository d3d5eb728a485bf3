"""What a run directory or a weight file means, and which architecture its tensors have."""

from __future__ import annotations

import pytest
import torch

from dinov2_custom.errors import CheckpointError, ConfigError
from dinov2_custom.teacher import backbone_like, device_of_choice, load_teacher
from dinov2_custom.utils.run_folder import find_weights
from dinov2_custom.utils.weights import flat_name
from tests.eval.test_setup import make_run
from tests.export.backbones import KINDS, features_of, make_teacher, random_images


def test_a_run_means_its_newest_teacher(tmp_path):
    make_run(tmp_path / "run", "data.normalize.mean=[0.1,0.2,0.3]")
    source = tmp_path / "run" / "eval" / "training_9"
    for name in ("training_10", "manual_8", "other"):
        (source.parent / name).mkdir()
        (source.parent / name / "teacher_checkpoint.pth").write_bytes((source / "teacher_checkpoint.pth").read_bytes())
    assert find_weights(str(tmp_path / "run")) == str(source.parent / "training_10" / "teacher_checkpoint.pth")
    teacher = load_teacher(str(tmp_path / "run"))
    assert teacher.image_size == 16 and teacher.normalize["mean"] == (0.1, 0.2, 0.3)
    assert teacher.described_by == str(tmp_path / "run" / "config.yaml")
    assert not teacher.backbone.training and not any(p.requires_grad for p in teacher.backbone.parameters())


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
