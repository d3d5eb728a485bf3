"""Every format is loaded by the library that it is for, and its features are compared with the model's own."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_custom.data.transforms import make_classification_eval_transform
from dinov2_custom.errors import CheckpointError, ConfigError
from dinov2_custom.export import compare, hugging_face
from dinov2_custom.export.args import FORMATS, get_args_parser
from dinov2_custom.export.main import export, main
from dinov2_custom.export.portable import Portable, portable
from dinov2_custom.export.timm_folder import _config
from dinov2_custom.models.vision_transformer import vit_giant2
from dinov2_custom.teacher import load_teacher
from tests.eval.test_setup import make_run
from tests.export.backbones import KINDS, NORMALIZE, features_of, make_teacher, random_images

pytestmark = pytest.mark.filterwarnings("ignore")  # of other libraries
REPOSITORY = Path(__file__).resolve().parents[2]
TOLERANCE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="NO TRANSFORMERS CHECK: the extra 'export' is not installed")


def without_registers(tokens, backbone):
    return torch.cat([tokens[:, :1], tokens[:, 1 + backbone.num_register_tokens :]], dim=1)


@pytest.mark.parametrize("larger", [False, True], ids=["own size", "larger"])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers(transformers, kind, larger, tmp_path):
    teacher = make_teacher(kind)
    size = teacher.image_size + larger * 2 * teacher.backbone.patch_size
    said = export(portable(teacher, size), "hf", tmp_path / "hf")
    model = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    registers = teacher.backbone.num_register_tokens
    assert type(model).__name__ == ("Dinov2WithRegistersModel" if registers else "Dinov2Model")
    images = random_images(size)
    with torch.inference_mode():
        outputs = model(images)
    wanted = features_of(teacher.backbone, images)
    torch.testing.assert_close(without_registers(outputs.last_hidden_state, teacher.backbone), wanted, **TOLERANCE)
    torch.testing.assert_close(outputs.pooler_output, wanted[:, 0], **TOLERANCE)
    assert said.startswith("features in transformers differ by at most")


def test_transformers_prepares_images_as_evaluation_does(transformers, tmp_path):
    teacher = make_teacher("patch 14")
    export(portable(teacher), "hf", tmp_path / "hf")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    pixels = torch.randint(0, 256, (90, 130, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy()).resize((260, 180), Image.Resampling.BICUBIC)
    theirs = torch.as_tensor(np.asarray(processor(image, return_tensors="pt")["pixel_values"][0]))
    ours = make_classification_eval_transform(resize_size=64, crop_size=56, **teacher.normalize)(image)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_timm(timm, kind, tmp_path):
    teacher = make_teacher(kind)
    size = teacher.image_size + 2 * teacher.backbone.patch_size
    export(portable(teacher, size), "timm", tmp_path / "timm")
    model = timm.create_model(f"local-dir:{tmp_path}/timm", pretrained=True).eval()
    images = random_images(size)
    wanted = features_of(teacher.backbone, images)
    with torch.inference_mode():
        torch.testing.assert_close(
            without_registers(model.forward_features(images), teacher.backbone), wanted, **TOLERANCE
        )
        torch.testing.assert_close(model(images), wanted[:, 0], **TOLERANCE)
    assert tuple(model.pretrained_cfg["mean"]) == teacher.normalize["mean"] and model.num_classes == 0


def test_timm_loads_the_giants_architecture(timm):
    """The released g's feed-forward width, by timm's own definition and by ours."""
    with torch.device("meta"):
        own = vit_giant2(patch_size=14, img_size=28, ffn_layer="swiglufused", init_values=1.0, block_chunks=0)
        config = _config(Portable(own, {}, 28, NORMALIZE, in_chans=3, swiglu=True, hidden=4096))
        theirs = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
    assert config["architecture"] == "vit_giant_patch14_dinov2"
    count = sum(p.numel() for name, p in own.named_parameters() if name != "mask_token")
    assert sum(p.numel() for p in theirs.parameters()) == count


def test_transformers_knows_the_giants_architecture(transformers):
    """The released g, by transformers' own definition of its feed-forward width and by ours."""
    with torch.device("meta"):
        own = vit_giant2(patch_size=14, img_size=28, ffn_layer="swiglufused", init_values=1.0, block_chunks=0)
        config = hugging_face._config(Portable(own, {}, 28, NORMALIZE, in_chans=3, swiglu=True, hidden=4096))
        theirs = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**config))
    assert type(theirs).__name__ == "Dinov2Model"
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in own.parameters())


@pytest.mark.parametrize("kind", ["chunks, no layerscale, no biases", "swiglu, registers"])
def test_onnx_takes_any_batch(kind, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="NO ONNX CHECK: the extra 'export' is not installed")
    pytest.importorskip("onnxscript", reason="NO ONNX CHECK: the extra 'export' is not installed")
    teacher = make_teacher(kind)
    export(portable(teacher, 48), "onnx", tmp_path / "model.onnx")
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for count in (1, 2, 5):
        images = random_images(48, count)
        tokens, patches = (torch.from_numpy(a) for a in session.run(None, {"image": images.numpy()}))
        wanted = features_of(teacher.backbone, images)
        torch.testing.assert_close(torch.cat([tokens[:, None], patches], dim=1), wanted, **TOLERANCE)
    assert [output.name for output in session.get_outputs()] == ["cls_token", "patch_tokens"]


@pytest.mark.parametrize("form", ["torch", "safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_released_layout_comes_back(kind, form, tmp_path):
    teacher = make_teacher(kind)
    path = tmp_path / f"model.{form}"
    path = path.with_suffix(".safetensors" if form == "safetensors" else ".pth")
    export(portable(teacher), form, path)
    loaded = load_teacher(str(path))
    images = random_images(teacher.image_size)
    assert torch.equal(features_of(loaded.backbone, images), features_of(teacher.backbone, images))
    assert loaded.described_by == "the shapes of its tensors"
    assert not any(name.startswith("blocks.0.0.") for name in loaded.backbone.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_hugging_face_folder_comes_back(kind, tmp_path):
    teacher = make_teacher(kind)
    hugging_face.write_hugging_face(portable(teacher), tmp_path)
    images = random_images(teacher.image_size)
    loaded = load_teacher(str(tmp_path)).backbone
    torch.testing.assert_close(features_of(loaded, images), features_of(teacher.backbone, images))


def test_a_run_directory_from_the_command_line(tmp_path):
    _, model, _ = make_run(tmp_path / "run", "student.block_chunks=2")
    command = [sys.executable, "run/export/export.py", str(tmp_path / "run"), "--to", "torch"]
    command += ["--output", str(tmp_path / "model.pth"), "--image-size", "24"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env={"PYTHONPATH": str(REPOSITORY)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "model.pth")
    assert "features in torch differ by at most" in done.stderr
    state = torch.load(tmp_path / "model.pth", weights_only=True)
    assert torch.equal(state["blocks.3.norm1.weight"], model.teacher.backbone.state_dict()["blocks.1.3.norm1.weight"])
    assert state["pos_embed"].shape == (1, 37, 64)
    assert not any(name.startswith("dino_head") for name in state)
    (tmp_path / "model.pth").rename(tmp_path / "run" / "resized.pth")  # beside a configuration for another size
    assert load_teacher(str(tmp_path / "run" / "resized.pth")).image_size == 24


def test_default_output_is_named_after_the_run(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "cells")
    monkeypatch.chdir(tmp_path)
    assert main(get_args_parser().parse_args([str(tmp_path / "cells"), "--to", "torch"])) == 0
    assert (tmp_path / "outputs" / "export" / "cells_torch.pth").is_file()
    logging.getLogger("dinov2").handlers.clear()


def test_wrong_features_are_noticed_and_nothing_is_left(transformers, tmp_path, monkeypatch):
    model = portable(make_teacher())
    swapped = dict(model.state) | {"blocks.1.ls1.gamma": model.state["blocks.1.ls1.gamma"] + 0.01}
    with pytest.raises(CheckpointError, match=r"expected transformers to give the same features, got a difference"):
        export(model._replace(state=swapped), "hf", tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_a_missing_library_is_said(tmp_path, monkeypatch):
    def missing(*_):
        raise ImportError("No module named 'timm'")

    monkeypatch.setitem(compare._FEATURES, "timm", missing)
    said = export(portable(make_teacher()), "timm", tmp_path / "timm")
    assert said == "not compared: timm cannot be imported here (No module named 'timm')"
    assert json.loads((tmp_path / "timm" / "config.json").read_text())["model_args"]["patch_size"] == 14


def test_what_cannot_be_exported_is_refused(tmp_path):
    teacher = make_teacher()
    with pytest.raises(ConfigError, match="expected a multiple of the patch size 14, got 60; take 56 or 70"):
        portable(teacher, 60)
    bare = portable(make_teacher(ffn_layer="identity"))
    for form in ("hf", "timm"):
        with pytest.raises(ConfigError, match="ffn_layer=identity"):
            export(bare, form, tmp_path / form)
    (tmp_path / "there").write_text("result")
    with pytest.raises(ConfigError, match="found an earlier result"):
        export(portable(teacher), "torch", tmp_path / "there")
    export(portable(teacher), "torch", tmp_path / "there", overwrite=True)
    assert set(FORMATS) == {"hf", "timm", "torch", "safetensors", "onnx"}
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
