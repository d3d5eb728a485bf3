import pytest
import torch

from dinov2_custom.errors import CheckpointError
from dinov2_custom.models.vision_transformer import vit_nano
from dinov2_custom.train.checkpoint import save_teacher
from dinov2_custom.train.pretrained import start_from_weights
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from dinov2_custom.utils.weights import read_weights
from tests.train.batches import tiny_config
from tests.train.test_step_guard import run
from tests.train.test_train import write_images


def run_of(*overrides):
    torch.manual_seed(0)
    return SSLMetaArch(tiny_config(*overrides))


def scrambled(model, seed):
    """Set every tensor to new values that differ between student and teacher."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def equal(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_heads_of_a_teacher_checkpoint_are_used(tmp_path, caplog):
    source = scrambled(run_of(), 1)
    path = save_teacher(source, tmp_path, "training_1")
    target = run_of(f"student.pretrained_weights={path}", "train.seed=5")
    with caplog.at_level("INFO", "dinov2"):
        start_from_weights(target.cfg, target)
    expected = source.teacher.state_dict()
    assert equal(expected, target.student.state_dict()) and equal(expected, target.teacher.state_dict())
    assert (
        "into the configured backbone, 0 missing" in caplog.text and "into the configured dino_head, 0" in caplog.text
    )


def test_heads_of_another_shape_start_at_random_and_say_so(tmp_path, caplog):
    path = save_teacher(scrambled(run_of(), 1), tmp_path, "training_1")
    target = run_of(f"student.pretrained_weights={path}", "dino.head_n_prototypes=48")
    before = {name: value.clone() for name, value in target.student["dino_head"].state_dict().items()}
    start_from_weights(target.cfg, target)
    assert equal(before, target.student["dino_head"].state_dict())
    assert "dino_head: expected" in caplog.text and "last_layer" in caplog.text and "at random" in caplog.text


def test_a_whole_run_gives_student_teacher_and_centres(tmp_path, caplog):
    source = scrambled(run_of(), 2)
    torch.save({"model": source.state_dict(), "iteration": 7, "optimizer": {}}, tmp_path / "model_0000007.pth")
    both = [f"MODEL.WEIGHTS={tmp_path / 'model_0000007.pth'}", f"student.pretrained_weights={tmp_path / 'absent'}"]
    target = run_of(*both, "train.seed=5")
    start_from_weights(target.cfg, target)
    assert equal(source.state_dict(), target.state_dict())
    assert "MODEL.WEIGHTS takes precedence" in caplog.text


def test_model_weights_takes_a_bare_backbone_too(tmp_path):
    source = scrambled(run_of(), 3)
    torch.save(source.student["backbone"].state_dict(), tmp_path / "flat.pth")
    target = run_of(f"MODEL.WEIGHTS={tmp_path / 'flat.pth'}")
    start_from_weights(target.cfg, target)
    assert equal(source.student["backbone"].state_dict(), target.teacher["backbone"].state_dict())


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("key", ["MODEL.WEIGHTS", "student.pretrained_weights"])
def test_a_file_that_would_run_code_is_refused_and_does_not(tmp_path, key):
    torch.save({"model": Bomb(tmp_path / "ran")}, tmp_path / "bomb.pth")
    target = run_of(f"{key}={tmp_path / 'bomb.pth'}")
    with pytest.raises(CheckpointError, match="more than tensors"):
        start_from_weights(target.cfg, target)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["MODEL.WEIGHTS", "student.pretrained_weights"])
def test_a_run_directory_means_its_newest_teacher(tmp_path, key, caplog):
    save_teacher(scrambled(run_of(), 1), tmp_path, "training_9")
    newest = scrambled(run_of(), 2)
    path = save_teacher(newest, tmp_path, "training_10")
    target = run_of(f"{key}={tmp_path}")
    with caplog.at_level("INFO", "dinov2"):
        start_from_weights(target.cfg, target)
    assert equal(newest.teacher.state_dict(), target.teacher.state_dict()) and f"{path}: " in caplog.text
    (tmp_path / "empty").mkdir()
    target = run_of(f"{key}={tmp_path / 'empty'}")
    with pytest.raises(CheckpointError, match=f"^{key}: expected a weight file or a run directory, got .*empty w"):
        start_from_weights(target.cfg, target)


@pytest.mark.parametrize("key", ["MODEL.WEIGHTS", "student.pretrained_weights"])
def test_the_key_of_a_file_that_does_not_fit_is_named(tmp_path, key):
    torch.save(vit_nano(patch_size=4, img_size=16, ffn_layer="swiglu").state_dict(), tmp_path / "w.pth")
    target = run_of(f"{key}={tmp_path / 'w.pth'}")
    with pytest.raises(CheckpointError, match=f"^{key}: expected the .* tensors of"):
        start_from_weights(target.cfg, target)


def test_a_runs_own_checkpoint_starts_another(tmp_path):
    images = write_images(tmp_path / "images", 12)
    assert run(images, tmp_path / "first", "train.max_steps=2", "optim.warmup_epochs=0") == 0
    kept = read_weights(tmp_path / "first" / "model_final")["model"]
    target = run_of(f"MODEL.WEIGHTS={tmp_path / 'first' / 'model_final'}", "train.seed=5")
    start_from_weights(target.cfg, target)
    assert kept.keys() == target.state_dict().keys() and equal(kept, target.state_dict())
