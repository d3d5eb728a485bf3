import torch

from dinov2_custom.train.checkpoint import save_teacher
from dinov2_custom.utils.weights import read_weights
from tests.train.test_pretrained import run_of, scrambled
from tests.train.test_step_guard import run
from tests.train.test_train import write_images


def backbone_of(path):
    model = read_weights(path)["model"]
    return {name: value for name, value in model.items() if "backbone." in name}, model


def test_a_frozen_backbone_stays_to_the_bit_while_the_heads_train_and_thaws(tmp_path):
    images = write_images(tmp_path / "images", 12)
    released = scrambled(run_of(), 1)
    with torch.no_grad():
        for tensor in released.state_dict().values():
            tensor.mul_(0.05)
    path = save_teacher(released, tmp_path, "released")
    start = {
        f"{part}.{name}": value
        for part in ("student", "teacher")
        for name, value in released.teacher.state_dict().items()
        if name.startswith("backbone.")
    }
    options = ["train.max_steps=8", "student.freeze_backbone_epochs=50%", "checkpointing.period=4"]
    options += [
        "optim.freeze_last_layer_epochs=0",
        "teacher.momentum_teacher=0.5",
        f"student.pretrained_weights={path}",
    ]
    assert run(images, tmp_path / "out", *options, "optim.warmup_epochs=0") == 0

    frozen, whole = backbone_of(tmp_path / "out" / "model_0000003")
    assert frozen.keys() == start.keys() and all(torch.equal(value, start[name]) for name, value in frozen.items())
    head = "dino_head.mlp.0.weight"
    assert not torch.equal(whole[f"student.{head}"], released.teacher.state_dict()[head])
    thawed, _ = backbone_of(tmp_path / "out" / "model_final")
    moved = [name for name, value in thawed.items() if not torch.equal(value, start[name])]
    assert len(moved) > 0.9 * len(start)


def test_a_resume_in_the_frozen_part_stays_frozen(tmp_path):
    images = write_images(tmp_path / "images", 12)
    options = ["student.freeze_backbone_epochs=100%", "optim.warmup_epochs=0", "optim.freeze_last_layer_epochs=0"]
    assert run(images, tmp_path / "out", *options, "train.max_steps=2") == 0
    before, _ = backbone_of(tmp_path / "out" / "model_final")
    assert run(images, tmp_path / "out", *options, "train.max_steps=4") == 0
    after, whole = backbone_of(tmp_path / "out" / "model_final")
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert whole["student.dino_head.mlp.0.weight"].isfinite().all()
