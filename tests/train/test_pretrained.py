import sys

import pytest
import torch

from dinov2_custom.errors import CheckpointError
from dinov2_custom.models.vision_transformer import vit_micro, vit_nano
from dinov2_custom.train.checkpoint import save_teacher
from dinov2_custom.train.pretrained import load_pretrained_backbone, start_from_weights
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from dinov2_custom.utils.weights import read_weights
from tests.train.batches import tiny_config
from tests.train.test_step_guard import run
from tests.train.test_train import write_images


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


def run_of(*overrides):
    torch.manual_seed(0)
    return SSLMetaArch(tiny_config(*overrides))


def scrambled(model, seed):
    """Give every tensor other values, student and teacher different ones."""
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
    assert "pretrained backbone" in caplog.text and "pretrained dino_head" in caplog.text
    assert "missing=0 unexpected=0" in caplog.text


def test_heads_of_another_shape_start_at_random_and_say_so(tmp_path, caplog):
    path = save_teacher(scrambled(run_of(), 1), tmp_path, "training_1")
    target = run_of(f"student.pretrained_weights={path}", "dino.head_n_prototypes=48")
    before = {name: value.clone() for name, value in target.student["dino_head"].state_dict().items()}
    start_from_weights(target.cfg, target)
    assert equal(before, target.student["dino_head"].state_dict())
    assert "dino_head: does not fit" in caplog.text and "last_layer" in caplog.text


def test_a_whole_run_gives_student_teacher_and_centres(tmp_path, caplog):
    source = scrambled(run_of(), 2)
    torch.save({"model": source.state_dict(), "iteration": 7, "optimizer": {}}, tmp_path / "model_0000007.pth")
    both = [f"MODEL.WEIGHTS={tmp_path / 'model_0000007.pth'}", f"student.pretrained_weights={tmp_path / 'absent'}"]
    target = run_of(*both, "train.seed=5")
    start_from_weights(target.cfg, target)
    assert equal(source.state_dict(), target.state_dict())
    assert "MODEL.WEIGHTS wins" in caplog.text


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
    assert equal(newest.teacher.state_dict(), target.teacher.state_dict()) and f"from={path}" in caplog.text
    (tmp_path / "empty").mkdir()
    target = run_of(f"{key}={tmp_path / 'empty'}")
    with pytest.raises(CheckpointError, match=f"^{key}: expected a weight file or a run directory, got .*empty w"):
        start_from_weights(target.cfg, target)


@pytest.mark.parametrize("key", ["MODEL.WEIGHTS", "student.pretrained_weights"])
def test_the_key_of_a_file_that_does_not_fit_is_named(tmp_path, key):
    torch.save(make(ffn_layer="swiglu").state_dict(), tmp_path / "w.pth")
    target = run_of(f"{key}={tmp_path / 'w.pth'}")
    with pytest.raises(CheckpointError, match=f"^{key}: expected weights of this architecture"):
        start_from_weights(target.cfg, target)


def test_weights_from_a_handler_of_iopath(tmp_path):
    file_io = pytest.importorskip("iopath.common.file_io", reason="NO TEST OF IOPATH: run pip install iopath")

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
    assert equal(source.state_dict(), target.state_dict())
    load_pretrained_backbone(target, f"file://{tmp_path / 'w.pth'}")


def test_without_iopath_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "iopath.common.file_io", None)
    with pytest.raises(CheckpointError, match=r"expected the package iopath.*dinov2_custom\[iopath\]"):
        load_pretrained_backbone(make(), "shelf://w.pth")


def test_a_runs_own_checkpoint_starts_another(tmp_path):
    images = write_images(tmp_path / "images", 12)
    assert run(images, tmp_path / "first", "train.max_steps=2", "optim.warmup_epochs=0") == 0
    kept = read_weights(tmp_path / "first" / "model_final")["model"]
    target = run_of(f"MODEL.WEIGHTS={tmp_path / 'first' / 'model_final'}", "train.seed=5")
    start_from_weights(target.cfg, target)
    assert kept.keys() == target.state_dict().keys() and equal(kept, target.state_dict())
