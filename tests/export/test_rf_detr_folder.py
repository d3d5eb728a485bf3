"""An RF-DETR around a backbone: transformers loads all of its tensors."""

import json
import os

import pytest
import torch

from dinov2_custom.cli import export_parser
from dinov2_custom.data.depth import Reading
from dinov2_custom.errors import CheckpointError, ConfigError
from dinov2_custom.export.compare import unlike_tensors, wanted_tensors
from dinov2_custom.export.main import export, main
from dinov2_custom.export.portable import portable
from dinov2_custom.export.rf_detr_folder import backbone_of, prove, read_model
from dinov2_custom.utils.hugging_face import from_hugging_face
from tests.export.backbones import make_teacher

transformers = pytest.importorskip("transformers", reason="needs transformers with RF-DETR (the extra decoder)")
if not hasattr(transformers, "RfDetrForObjectDetection"):
    pytest.skip("needs transformers>=5.24 with RF-DETR (the extra decoder)", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers


def unlike(detector, model):
    return unlike_tensors(from_hugging_face(backbone_of(detector).state_dict()), wanted_tensors(model, "hf"))


@pytest.mark.parametrize("kind", ["swiglu", "chunks, no layerscale, no biases"])
def test_from_pretrained_loads_every_tensor_also_for_other_classes(kind, tmp_path):
    teacher = make_teacher(kind)._replace(reading=Reading((0.0, 4095.0), 1))
    model = portable(teacher)
    said = export(model, "rf-detr", tmp_path / "out")
    assert "tensors are the same" in said and "new: train them" in said
    detector = transformers.RfDetrForObjectDetection
    assert unlike(read_model(detector, tmp_path / "out"), model) == []
    names = {0: "cell", 1: "parasite", 2: "other"}
    other = detector.from_pretrained(tmp_path / "out", id2label=names, ignore_mismatched_sizes=True)
    assert unlike(other, model) == [] and other.class_embed.weight.shape[0] == 3
    for name in ("AutoModelForObjectDetection", "RfDetrForInstanceSegmentation"):
        assert unlike(getattr(transformers, name).from_pretrained(tmp_path / "out"), model) == []
    facts = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())  # its class needs torchvision
    assert facts["size"] == {"height": model.image_size, "width": model.image_size}
    assert tuple(facts["image_mean"]) == teacher.normalize["mean"] and facts["intensity"] == [0, 4095]


def test_a_folder_of_the_backbone_alone_is_not_enough(tmp_path):
    """transformers loads it without an error and leaves the backbone random."""
    model = portable(make_teacher("patch 14"))
    export(model, "hf", tmp_path / "hf")
    detector, found = transformers.RfDetrForObjectDetection.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert found["missing_keys"]
    with pytest.raises(CheckpointError, match="others"):
        prove(detector, model)


def test_registers_are_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ConfigError, match="without register tokens, got 4"):
        export(portable(make_teacher("registers")), "rf-detr", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_card_says_that_the_decoder_is_new(tmp_path):
    export(portable(make_teacher("patch 14")), "torch", tmp_path / "backbone.pth")
    not_utf_8 = tmp_path / os.fsdecode(b"caf\xe9")
    flags = [str(tmp_path / "backbone.pth"), "--to", "rf-detr", "--output", str(not_utf_8)]
    assert main(export_parser().parse_args(flags)) == 0
    not_utf_8.rename(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "train it before use" in card and "RfDetrForObjectDetection.from_pretrained" in card
    assert "pipeline_tag: object-detection" in card
    with torch.no_grad():
        detector = transformers.RfDetrForObjectDetection.from_pretrained(tmp_path / "out").eval()
        assert detector(torch.zeros(1, 3, 56, 56)).pred_boxes.shape == (1, 16, 4)
