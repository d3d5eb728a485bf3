import json

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_custom import cli
from dinov2_custom.decoder import evaluate, export, predict
from dinov2_custom.decoder.bridge import Facts, build, save
from dinov2_custom.decoder.inference import predict as apply
from dinov2_custom.errors import DataError
from dinov2_custom.reading import Reading
from tests.decoder.scenes import SIDE, make_split, write_coco
from tests.export.backbones import NORMALIZE, make_teacher


class Output:
    def __init__(self, **values):
        self.__dict__ |= values


def make(task, settings, folder):
    classes = ("ground", "square", "disc")[task != "semantic" :]
    save(build(make_teacher("patch 14", img_size=32, patch_size=8), task, classes, settings), folder)
    return folder


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_perfect_outputs_score_one(tmp_path):
    """Boxes and masks of a model that copies the labels have AP 1 in the pixels of the original images."""
    split = make_split(tmp_path / "a", 4)
    facts = Facts("instance", "rf_detr", split.classes, 96, NORMALIZE, Reading())

    def model(pixel_values):
        logits = torch.full((len(split.images), 4, 2), -20.0)
        boxes, masks = torch.full((len(split.images), 4, 4), 0.5), torch.full((len(split.images), 4, SIDE, SIDE), -1.0)
        for n, image in enumerate(split.images):
            for k, one in enumerate(image.instances):
                x, y, w, h = one.box
                logits[n, k, one.category] = 5.0 - k
                boxes[n, k] = torch.tensor([x + w / 2, y + h / 2, w, h]) / SIDE
                masks[n, k, y : y + h, x : x + w] = 1
        return Output(logits=logits, pred_boxes=boxes, pred_masks=masks)

    found = apply(model, torch.zeros(4, 3, 96, 96), [(SIDE, SIDE)] * 4, facts)
    for kind in ("detection", "instance"):
        scores = evaluate.measure(kind, split.classes, split, found)
        assert scores["ap"] > 0.99 and scores["ap50"] > 0.99


@pytest.mark.parametrize("task", ["detection", "instance", "semantic"])
def test_predictions_of_a_folder_are_coco_and_pictures(task, tiny, tmp_path):
    decoder = make(task, tiny(), tmp_path / "decoder")
    make_split(tmp_path / "images", 2)
    (tmp_path / "images" / "bad.png").write_bytes(b"no image")
    flags = [str(decoder), str(tmp_path / "images"), "--output-dir", str(tmp_path / "out"), "--threshold", "0"]
    assert predict.main(cli.decoder_predict_parser().parse_args([*flags, "--device", "cpu"])) == 0
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    names = [image["file_name"] for image in content["images"]]
    assert names == ["0.png", "0_mask.png", "1.png", "1_mask.png"]
    assert pixels_of(tmp_path / "out" / "pictures" / "0.png").shape[1:] == (10 * SIDE, 3)
    if task == "semantic":
        assert pixels_of(tmp_path / "out" / "masks" / "0.png").shape == (SIDE, SIDE)
        return
    one = content["annotations"][0]
    assert 0 <= one["bbox"][0] <= SIDE and (task == "detection" or one["segmentation"]["size"] == [SIDE, SIDE])
    with pytest.raises(DataError, match="expected images in .*, got none"):
        predict.images_in(tmp_path / "decoder")


@pytest.mark.parametrize(("task", "size"), [("detection", (40, 30)), ("semantic", (40, 30)), ("detection", (900, 700))])
def test_pictures_show_classes_and_scores_on_images_of_any_size(task, size):
    """Small images are enlarged; a label stays in the picture; the class background is not painted."""
    grey = Image.new("RGB", size, (90, 90, 90))
    facts = Facts(task, "", ("cell", "background", "parasite"), 32, NORMALIZE, Reading())
    blue = predict.colours(2)[1]
    if task == "semantic":
        found = np.ones((size[1], size[0]), np.uint8)
        found[5:15, 10:20] = 2
        picture = predict.draw(grey, found, facts)
        assert picture.size[0] == 480 and picture.size[1] > 360  # with a legend
        assert picture.getpixel((121, 61)) == blue and picture.getpixel((0, 0)) == (90, 90, 90)
        return
    found = [{"category_id": 2, "bbox": [0, 0, 10, 10], "score": 0.9}, {"category_id": 0, "bbox": [30, 5, 10, 20]}]
    picture = predict.draw(grey, found, facts)
    factor = picture.size[0] // size[0]
    assert max(picture.size) >= 448 and picture.size == (factor * size[0], factor * size[1])
    pixels = np.asarray(picture)
    assert tuple(pixels[10 * factor, 5 * factor]) == blue  # the frame's lower edge
    text = (pixels[: picture.size[1] // 20] == 0).all(-1)  # black on the label
    assert text.any() and grey.getpixel((0, 0)) == (90, 90, 90)


def test_the_evaluation_writes_scores_of_each_class(tiny, tmp_path, capsys):
    decoder = make("detection", tiny(), tmp_path / "decoder")
    data = write_coco(make_split(tmp_path / "a", 3), tmp_path / "a" / "labels.json")
    args = cli.decoder_eval_parser().parse_args([str(decoder), str(data), "--output-dir", str(tmp_path / "out")])
    assert evaluate.main(args) == 0
    assert "disc" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out" / "scores.json").read_text())["per_class"]) == 2


def test_a_detector_in_onnxruntime_equals_torch_and_normalises(tiny, tmp_path):
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    decoder = make("detection", tiny(), tmp_path / "decoder")
    out = tmp_path / "detector.onnx"
    flags = [str(decoder), "--output", str(out), "--normalize"]
    assert export.main(cli.decoder_export_parser().parse_args(flags)) == 0  # compares
    facts = {one.key: json.loads(one.value) for one in onnx.load(out).metadata_props}
    assert facts["classes"] == ["square", "disc"] and facts["normalizes"] and facts["image_size"] == 32
