"""Every format is loaded by its library, and its features are compared with the model's own."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dinov2_custom.cli import EXPORT_FORMATS
from dinov2_custom.cli import export_parser as get_args_parser
from dinov2_custom.data.depth import Reading
from dinov2_custom.data.transforms import make_classification_eval_transform
from dinov2_custom.errors import CheckpointError, ConfigError
from dinov2_custom.export import compare, hugging_face
from dinov2_custom.export.main import _WRITERS, export, main
from dinov2_custom.export.portable import Portable, portable
from dinov2_custom.export.timm_folder import _config, write_timm
from dinov2_custom.models.vision_transformer import vit_giant2, vit_nano
from dinov2_custom.teacher import Teacher, load_teacher
from dinov2_custom.utils import hugging_face as reading
from dinov2_custom.utils.weights import flat_name
from tests.eval.test_setup import make_run
from tests.export.backbones import KINDS, NORMALIZE, features_of, make_teacher, random_images
from tests.processes import run

pytestmark = pytest.mark.filterwarnings("ignore")  # of other libraries
FORMATS = [form for form in EXPORT_FORMATS if form != "rf-detr"]  # see test_rf_detr_folder.py
TOLERANCE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture
def onnx_runtime():
    pytest.importorskip("onnxscript", reason="NO ONNX CHECK: the extra 'export' is not installed")
    return pytest.importorskip("onnxruntime", reason="NO ONNX CHECK: the extra 'export' is not installed")


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
    teacher = make_teacher("patch 14")._replace(reading=Reading((0.0, 4095.0), 1))
    export(portable(teacher), "hf", tmp_path / "hf")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    pixels = torch.randint(0, 256, (90, 130, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy()).resize((260, 180), Image.Resampling.BICUBIC)
    theirs = torch.as_tensor(np.asarray(processor(image, return_tensors="pt")["pixel_values"][0]))
    ours = make_classification_eval_transform(resize_size=64, crop_size=56, **teacher.normalize)(image)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert (processor.intensity, processor.page) == ([0, 4095], 1)


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
    """The released g's feed-forward width must agree between timm and this package."""
    with torch.device("meta"):
        own = vit_giant2(patch_size=14, img_size=28, ffn_layer="swiglufused", init_values=1.0, block_chunks=0)
        config = _config(Portable(own, {}, 28, NORMALIZE, in_chans=3, swiglu=True, hidden=4096))
        theirs = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
    assert config["architecture"] == "vit_giant_patch14_dinov2"
    count = sum(p.numel() for name, p in own.named_parameters() if name != "mask_token")
    assert sum(p.numel() for p in theirs.parameters()) == count


def test_transformers_supports_the_giants_architecture(transformers):
    """The released g's feed-forward width must agree between transformers and this package."""
    with torch.device("meta"):
        own = vit_giant2(patch_size=14, img_size=28, ffn_layer="swiglufused", init_values=1.0, block_chunks=0)
        config = hugging_face._config(Portable(own, {}, 28, NORMALIZE, in_chans=3, swiglu=True, hidden=4096))
        theirs = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**config))
    assert type(theirs).__name__ == "Dinov2Model"
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in own.parameters())


@pytest.mark.parametrize("kind", ["chunks, no layerscale, no biases", "swiglu, registers"])
def test_onnx_takes_any_batch(onnx_runtime, kind, tmp_path):
    teacher = make_teacher(kind)
    export(portable(teacher, 48), "onnx", tmp_path / "model.onnx")
    session = onnx_runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for count in (1, 2, 5):
        images = random_images(48, count)
        tokens, patches = (torch.from_numpy(a) for a in session.run(None, {"image": images.numpy()}))
        wanted = features_of(teacher.backbone, images)
        torch.testing.assert_close(torch.cat([tokens[:, None], patches], dim=1), wanted, **TOLERANCE)
    assert [output.name for output in session.get_outputs()] == ["cls_token", "patch_tokens"]


OF_TIMM = {
    "vit_small_patch14_dinov2": {},
    "vit_small_patch14_reg4_dinov2": {},
    "vit_giant_patch14_dinov2": {"mlp_ratio": 5.5},  # a SwiGLU: twice 176, as ours of this width
}


@pytest.mark.parametrize("name", OF_TIMM)
def test_timms_own_files_are_read(timm, name, tmp_path):
    arguments = {"img_size": 56, "embed_dim": 64, "depth": 3, "num_heads": 1} | OF_TIMM[name]
    theirs = timm.create_model(name, num_classes=0, **arguments).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for value in theirs.parameters():
        value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    teacher = load_teacher(str(tmp_path / "model.safetensors"))
    assert teacher.image_size == 56 and teacher.backbone.num_register_tokens == theirs.num_reg_tokens
    images = random_images(56)
    wanted = without_registers(theirs.forward_features(images), teacher.backbone)
    torch.testing.assert_close(features_of(teacher.backbone, images), wanted, **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_timm_folder_comes_back(kind, tmp_path):
    """It loads like a run directory's weights, except for the mask token, which timm does not have."""
    teacher = make_teacher(kind)
    write_timm(portable(teacher), tmp_path)
    images = random_images(teacher.image_size)
    loaded = load_teacher(str(tmp_path)).backbone
    torch.testing.assert_close(features_of(loaded, images), features_of(teacher.backbone, images))
    assert not loaded.mask_token.any()


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


@pytest.mark.parametrize("form", ["hf", "timm", "torch", "safetensors"])
def test_the_range_of_values_and_the_page_come_back(form, tmp_path):
    path = tmp_path / {"torch": "m.pth", "safetensors": "m.safetensors"}.get(form, form)
    for given in (Reading((100.0, 4095.5), 2), Reading()):
        teacher = make_teacher()._replace(reading=given)
        export(portable(teacher), form, path, overwrite=True)
        assert load_teacher(str(path)).reading == given
        if form == "torch":  # the facts do not interfere
            teacher.backbone.load_state_dict(torch.load(path, weights_only=True))


def test_a_run_directory_from_the_command_line(tmp_path):
    _, model, _ = make_run(tmp_path / "run", "student.block_chunks=2")
    command = ["run/export/export.py", str(tmp_path / "run"), "--to", "torch"]
    done = run(*command, "--output", str(tmp_path / "model.pth"), "--image-size", "24")
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


@pytest.mark.parametrize("form", FORMATS)
def test_names_that_are_not_utf_8(form, tmp_path, request):
    """Libraries in Rust and C++ cannot open them, neither to compare an export nor to read one."""
    if form in ("timm", "onnx"):
        request.getfixturevalue({"onnx": "onnx_runtime"}.get(form, form))
    folder, teacher = tmp_path / os.fsdecode(b"caf\xe9"), make_teacher()
    source, path = folder / "source.pth", folder / os.fsdecode(b"\xe9" + _WRITERS[form][1].encode())
    export(portable(teacher), "torch", source)
    assert main(get_args_parser().parse_args([str(source), "--to", form, "--output", str(path)])) == 0
    assert path.exists() and not list(folder.glob(".*"))
    if form != "onnx":
        images = random_images(teacher.image_size)
        loaded = load_teacher(str(path)).backbone
        torch.testing.assert_close(features_of(loaded, images), features_of(teacher.backbone, images))


def barely_trained(kind):
    """Return a model whose LayerScale is near 1e-5, its initial value: its blocks hardly change the features."""
    teacher = make_teacher(kind)
    for name, value in teacher.backbone.named_parameters():
        if "gamma" in name:
            value.mul_(1e-5)
    return portable(teacher)


class Faulty:
    """Write ``model`` as ``form`` with some tensors changed, like a faulty writer."""

    def __init__(self, model, form, folder):
        self.model, self.form, self.folder = model, form, folder
        (self.write, self.suffix), self.count = _WRITERS[form], 0
        if form == "onnx":  # slow to write: the file is changed
            self.write(model, folder / "right.onnx")

    def __call__(self, change):
        """Return a new path; ``change`` takes a tensor's released name and the tensor, and returns what to write."""
        self.count += 1
        path = self.folder / f"{self.count}{self.suffix}"
        if self.form == "onnx":
            onnx = pytest.importorskip("onnx")
            graph = onnx.load(self.folder / "right.onnx")
            for one in graph.graph.initializer:
                value = torch.from_numpy(onnx.numpy_helper.to_array(one).copy())
                name, turned = self.find(one.name, value)
                if name:
                    changed = change(name, value.T).T if turned else change(name, value)
                    one.CopyFrom(onnx.numpy_helper.from_array(changed.contiguous().numpy(), one.name))
            onnx.save(graph, path)
            return path
        if not self.suffix:
            path.mkdir()
        self.write(self.model._replace(state={n: change(n, value) for n, value in self.model.state.items()}), path)
        return path

    def find(self, name, value):
        """Return the released name of a tensor of the graph, and whether it is transposed, as linear layers' are."""
        if name.startswith("backbone."):
            return flat_name(name), False
        for own, wanted in self.model.state.items():
            if value.ndim == wanted.ndim == 2 and torch.equal(value.T, wanted):
                return own, True
        return "", False


OF_EACH_KIND = [
    "blocks.1.attn.qkv.weight",
    "blocks.1.attn.qkv.bias",
    "blocks.1.attn.proj.weight",
    "blocks.1.norm2.weight",
    "blocks.1.ls1.gamma",
    "pos_embed",
    "cls_token",
    "mask_token",
    "patch_embed.proj.weight",
    "norm.bias",
]
OF_KIND = {
    "registers": [*OF_EACH_KIND, "register_tokens", "blocks.1.mlp.fc1.weight", "blocks.1.mlp.fc2.weight"],
    "swiglu": [*OF_EACH_KIND, "blocks.1.mlp.w12.weight", "blocks.1.mlp.w3.bias"],
}
NOT_HELD = {"timm": {"mask_token"}, "onnx": {"mask_token"}}


@pytest.mark.parametrize("kind", OF_KIND)
@pytest.mark.parametrize("form", FORMATS)
def test_one_wrong_tensor_is_refused(form, kind, request, tmp_path):
    request.getfixturevalue({"timm": "timm", "hf": "transformers", "onnx": "onnx_runtime"}.get(form, "tmp_path"))
    model = barely_trained(kind)
    faulty = Faulty(model, form, tmp_path)
    for wrong in OF_KIND[kind]:
        path = faulty(lambda name, value, wrong=wrong: value.roll(1, -1) if name == wrong else value)
        if wrong in NOT_HELD.get(form, ()):
            assert "tensors are the same" in compare.check(model, form, path)
            continue
        with pytest.raises(CheckpointError, match=f"--to {form}: expected .* tensors") as refusal:
            compare.check(model, form, path)
        differing = {line.partition(":")[0].strip() for line in str(refusal.value).splitlines()[1:]}
        folded = {"cls_token"} if (form, kind, wrong) == ("timm", "registers", "pos_embed") else set()
        assert differing == {wrong} | folded  # timm's class token holds its position then


@pytest.mark.parametrize("form", FORMATS)
def test_other_blocks_behind_a_small_layerscale_are_refused(form, request, tmp_path):
    """They change the features by less than the tolerance."""
    request.getfixturevalue({"timm": "timm", "hf": "transformers", "onnx": "onnx_runtime"}.get(form, "tmp_path"))
    model = barely_trained("patch 14")
    generator = torch.Generator().manual_seed(2)
    path = Faulty(model, form, tmp_path)(
        lambda name, value: torch.randn(value.shape, generator=generator) if re.search("attn|mlp", name) else value
    )
    with pytest.raises(CheckpointError, match="got 32 others"):
        compare.check(model, form, path)


WRONG_NAMES = {  # released -> transformers' and back, in both tables
    "norms": ({"norm1.": "norm2.", "norm2.": "norm1."}, {"norm1.": "norm2.", "norm2.": "norm1."}),
    "layerscales": (
        {"ls1.gamma": "layer_scale2.lambda1", "ls2.gamma": "layer_scale1.lambda1"},
        {"layer_scale1.lambda1": "ls2.gamma", "layer_scale2.lambda1": "ls1.gamma"},
    ),
}


@pytest.mark.parametrize("tables", WRONG_NAMES.values(), ids=WRONG_NAMES)
def test_names_that_are_wrong_in_both_directions_are_refused(transformers, tables, tmp_path, monkeypatch):
    """The tensors are then as expected, so the features must differ, even with a small LayerScale."""
    for table, wrong in zip((hugging_face._TO_LAYER, reading.IN_LAYER), tables, strict=True):
        for key, value in wrong.items():
            monkeypatch.setitem(table, key, value)
    with pytest.raises(CheckpointError, match="expected transformers to give the same features, got a difference"):
        export(barely_trained("registers"), "hf", tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_an_untrained_model_is_exported_to_onnx(onnx_runtime, tmp_path):
    """Most of its tensors are equal, and the exporter stores equal tensors once."""
    backbone = vit_nano(img_size=32, patch_size=8, init_values=1e-5, block_chunks=2).requires_grad_(False).eval()
    said = export(portable(Teacher(backbone, 32, NORMALIZE, "weights")), "onnx", tmp_path / "model.onnx")
    assert "tensors are the same" in said


def test_a_large_onnx_export_finds_its_tensors(onnx_runtime, tmp_path, monkeypatch):
    """torch writes them into a second file above 1.5 GB."""
    from torch.onnx._internal.exporter import _onnx_program

    monkeypatch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 0)
    teacher = make_teacher("patch 14")
    export(portable(teacher), "onnx", tmp_path / "model.onnx")
    (tmp_path / "there").mkdir()
    moved = [file.rename(tmp_path / "there" / file.name) for file in tmp_path.glob("model*")]
    assert sorted(file.name for file in moved) == ["model.onnx", "model.onnx.data"]
    session = onnx_runtime.InferenceSession(str(tmp_path / "there" / "model.onnx"), providers=["CPUExecutionProvider"])
    images = random_images(56)
    tokens, _ = session.run(None, {"image": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(tokens), features_of(teacher.backbone, images)[:, 0], **TOLERANCE)


@pytest.mark.parametrize("normalize", [False, True])
def test_onnx_metadata_describes_the_preprocessing(onnx_runtime, normalize, tmp_path):
    teacher = make_teacher("patch 14")._replace(reading=Reading((0, 4095)))
    export(portable(teacher)._replace(normalizes=normalize), "onnx", tmp_path / "model.onnx")
    session = onnx_runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    facts = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
    assert facts == {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.25, 0.3],
        "image_size": 56,
        "patch_size": 14,
        "normalizes": normalize,
        "intensity": [0, 4095],
    }
    pixels = torch.rand(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    images = (pixels - torch.tensor(facts["mean"]).view(3, 1, 1)) / torch.tensor(facts["std"]).view(3, 1, 1)
    tokens, _ = session.run(None, {"image": (pixels if normalize else images).numpy()})
    torch.testing.assert_close(torch.from_numpy(tokens), features_of(teacher.backbone, images)[:, 0], **TOLERANCE)


def test_normalization_is_part_of_onnx_alone(tmp_path):
    with pytest.raises(ConfigError, match="--normalize: expected --to onnx"):
        main(get_args_parser().parse_args([str(tmp_path), "--to", "hf", "--normalize"]))


@pytest.mark.parametrize("kind", ["patch 14", "registers"])
def test_transformers_backbone_classes(transformers, kind, tmp_path):
    """In transformers 5.24 ``AutoBackbone.from_pretrained`` refuses a local folder; the classes do not."""
    teacher = make_teacher(kind)
    export(portable(teacher), "hf", tmp_path / "hf")
    name = "Dinov2WithRegistersBackbone" if kind == "registers" else "Dinov2Backbone"
    model = getattr(transformers, name).from_pretrained(tmp_path / "hf", out_indices=[2, 4]).eval()
    images = random_images(teacher.image_size)
    with torch.inference_mode():
        maps = model(images).feature_maps
        wanted = teacher.backbone.get_intermediate_layers(images, [1, 3], reshape=True)
    for got, own in zip(maps, wanted, strict=True):
        torch.testing.assert_close(got, own, **TOLERANCE)


def test_a_missing_library_is_reported(tmp_path, monkeypatch):
    def missing(*_):
        raise ImportError("No module named 'timm'")

    monkeypatch.setitem(compare._LOADERS, "timm", missing)
    said = export(portable(make_teacher()), "timm", tmp_path / "timm")
    assert said == "not compared: timm cannot be imported here (No module named 'timm')"
    assert json.loads((tmp_path / "timm" / "config.json").read_text())["model_args"]["patch_size"] == 14


def test_models_that_cannot_be_exported_are_rejected(tmp_path):
    teacher = make_teacher()
    with pytest.raises(ConfigError, match="expected a multiple of the patch size 14, got 60; use 56 or 70"):
        portable(teacher, 60)
    bare = portable(make_teacher(ffn_layer="identity"))
    for form in ("hf", "timm"):
        with pytest.raises(ConfigError, match="ffn_layer=identity"):
            export(bare, form, tmp_path / form)
    (tmp_path / "there").write_text("result")
    with pytest.raises(ConfigError, match="found an earlier result"):
        export(portable(teacher), "torch", tmp_path / "there")
    with pytest.raises(ConfigError, match="found a file"):
        export(portable(teacher), "timm", tmp_path / "there", overwrite=True)
    export(portable(teacher), "torch", tmp_path / "there", overwrite=True)
    assert set(FORMATS) == {"hf", "timm", "torch", "safetensors", "onnx"}
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("form", ["hf", "timm", "torch"])
def test_only_an_earlier_export_is_overwritten(form, tmp_path):
    """A folder of images or of a run is never overwritten by mistake."""
    model, path = portable(make_teacher()), tmp_path / "run"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "image.png").write_text("mine")
    with pytest.raises(ConfigError, match="found a folder with (config.json, )?image.png; choose another$"):
        export(model, form, path, overwrite=True)
    assert (path / "image.png").read_text() == "mine"
    for overwrite in (False, True):  # the second time over the first result
        export(model, form, tmp_path / "export", overwrite)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc, where even root cannot make folders")
@pytest.mark.parametrize("form", ["hf", "torch"])
def test_a_place_where_nothing_can_be_written(form):
    with pytest.raises(ConfigError, match="writable place.* in /proc -> choose another with --output$"):
        export(portable(make_teacher()), form, Path("/proc/out"))
