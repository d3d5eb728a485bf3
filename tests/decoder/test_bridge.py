import json

import pytest
import torch

from dinov2_custom.decoder.bridge import Facts, build, load, save
from dinov2_custom.errors import CheckpointError, ConfigError
from dinov2_custom.export.portable import portable
from dinov2_custom.export.rf_detr_folder import TOLERANCE, backbone_of, prove
from dinov2_custom.reading import Reading
from tests.export.backbones import make_teacher


@pytest.mark.parametrize(
    "kind, task, head",
    [
        ("patch 14", "detection", "auto"),
        ("swiglu", "instance", "auto"),
        ("chunks, no layerscale, no biases", "detection", "auto"),
        ("swiglu, registers", "semantic", "upernet"),
        ("registers", "semantic", "linear"),
    ],
)
def test_every_tensor_and_the_features_arrive_and_the_folder_loads_whole(kind, task, head, tiny, tmp_path):
    teacher = make_teacher(kind)
    decoder = build(teacher, task, ("a", "b"), tiny(f"head={head}"))
    assert prove(decoder.model, portable(teacher)) <= TOLERANCE
    assert decoder.facts.normalize == teacher.normalize and decoder.facts.image_size == teacher.image_size
    save(decoder, tmp_path)
    loaded = load(tmp_path)
    own, got = decoder.model.state_dict(), loaded.model.state_dict()
    assert own.keys() == got.keys() and all(torch.equal(own[name], got[name]) for name in own)
    assert loaded.facts == decoder.facts


def test_the_first_weights_need_none_of_the_gpus_of_the_machine(tiny, monkeypatch):
    """torch keeps the random state of all GPUs unless told otherwise, and warns if there are several."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: pytest.fail("a GPU was initialised"))
    build(make_teacher("patch 14"), "semantic", ("a", "b"), tiny("head=linear"))


def test_a_tensor_that_did_not_arrive_is_named(tiny):
    teacher = make_teacher("patch 14")
    decoder = build(teacher, "detection", ("a",), tiny())
    with torch.no_grad():
        backbone_of(decoder.model).embeddings.mask_token.add_(1)  # no feature depends on it
    with pytest.raises(CheckpointError, match="mask_token"):
        prove(decoder.model, portable(teacher))
    random = build(teacher, "detection", ("a",), tiny(), random_backbone=True)
    with pytest.raises(CheckpointError, match="others"):
        prove(random.model, portable(teacher))


def test_positions_are_resampled_to_the_size_of_the_images(tiny):
    teacher = make_teacher("patch 14")
    decoder = build(teacher, "detection", ("a",), tiny("image_size=84"))
    assert backbone_of(decoder.model).embeddings.position_embeddings.shape[1] == 1 + 6 * 6
    assert prove(decoder.model, portable(teacher, 84)) <= TOLERANCE


@pytest.mark.parametrize(
    "kind, task, classes, overrides, named",
    [
        ("registers", "detection", ("a",), [], "register"),
        ("patch 14", "semantic", ("a",), [], "two classes"),
        ("patch 14", "detection", ("a",), ["head=linear"], "head"),
        ("patch 14", "detection", ("a",), ["image_size=50"], "patch size"),
        ("patch 14", "detection", ("a",), ["width=20"], "width"),
    ],
)
def test_what_a_decoder_cannot_hold_is_one_error(kind, task, classes, overrides, named, tiny):
    with pytest.raises(ConfigError, match=named):
        build(make_teacher(kind), task, classes, tiny(*overrides))


def test_a_torn_folder_is_refused(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    save(build(make_teacher("patch 14"), "detection", ("a",), tiny()), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["class_embed.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="class_embed.weight"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(CheckpointError, match="that transformers reads"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="decoder.json"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize(
    "key, value",
    [
        ("head", "__class__"), ("task", ["detection"]), ("classes", 5), ("normalize", {"mean": "abc"}),
        ("image_size", "x"), ("reading", []), ("more", 1), ("", None),
    ],
)  # fmt: skip
def test_facts_of_something_else_are_refused(key, value, tmp_path):
    facts = Facts("detection", "rf_detr", ("a",), 56, {"mean": (0.5,) * 3, "std": (0.5,) * 3}, Reading())
    content = facts._asdict() | {"reading": {}}
    (tmp_path / "decoder.json").write_text(json.dumps(content | {key: value} if key else [content]))
    with pytest.raises(CheckpointError, match="decoder.json"):
        load(tmp_path)
