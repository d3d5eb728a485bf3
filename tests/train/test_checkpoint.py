import os
import pickle
import re
import subprocess

import pytest
import torch

from dinov2_custom.errors import CheckpointError
from dinov2_custom.train import checkpoint as ckpt
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from dinov2_custom.train.train import build_optimizer
from tests.train.batches import random_batch, tiny_config


def make(folder, *overrides, **keep):
    cfg = tiny_config("student.drop_path_rate=0.3", *overrides)
    model = SSLMetaArch(cfg).train()
    optimizer = build_optimizer(cfg, model.get_params_groups())
    return cfg, model, ckpt.Checkpointer(folder, model, optimizer, None, **keep)


def advance(cfg, model, optimizer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        draws = torch.Generator().manual_seed(seed)
        model.forward_backward(random_batch(cfg, seed), teacher_temp=0.05, generator=draws)
        optimizer.step()
        model.update_teacher(0.9)


def test_resumed_run_equals_uninterrupted_bit_for_bit(tmp_path):
    cfg, straight, saver = make(tmp_path)
    advance(cfg, straight, saver.optimizer, range(3))
    saver.save(2)
    advance(cfg, straight, saver.optimizer, range(3, 6))

    _, resumed, loader = make(tmp_path, "train.seed=99")
    assert loader.load_latest() == 2
    advance(cfg, resumed, loader.optimizer, range(3, 6))
    for (name, a), b in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_nothing_to_load(tmp_path):
    assert make(tmp_path / "absent")[2].load_latest() is None


@pytest.mark.parametrize("damage", ["torn", "empty", "text"])
def test_unreadable_newest_falls_back_with_a_warning(tmp_path, caplog, damage):
    _, _, saver = make(tmp_path)
    saver.save(1)
    newest = saver.save(2)
    whole = newest.read_bytes()
    newest.write_bytes({"torn": whole[: len(whole) // 2], "empty": b"", "text": b"<html>"}[damage])
    assert make(tmp_path)[2].load_latest() == 1
    assert "falling back" in caplog.text and newest.name in caplog.text


def test_only_unreadable_checkpoints_is_an_error_that_names_the_way_out(tmp_path):
    (tmp_path / "model_0000001.pth").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="--no-resume"):
        make(tmp_path)[2].load_latest()


def test_malicious_pickle_is_refused_unread(tmp_path):
    class Attack:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"model": Attack()}))
    with pytest.raises(CheckpointError, match=r"evil\.pth"):
        ckpt.read_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()


def test_another_architecture_names_tensors_and_shapes(tmp_path):
    make(tmp_path)[2].save(0)
    with pytest.raises(CheckpointError, match=r"expected \(64, 3, 2, 2\), got \(64, 3, 4, 4\)"):
        make(tmp_path, "student.patch_size=2")[2].load_latest()


@pytest.mark.parametrize("on_error", ["warn", "stop"])
def test_failed_save_leaves_the_old_one_and_no_litter(tmp_path, monkeypatch, caplog, on_error):
    saver = make(tmp_path, on_error=on_error)[2]
    path = saver.save(0)
    before = path.read_bytes()

    def full_disk(obj, file):
        file.write(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    message = "got No space left on device; the newest complete one (model_0000000.pth) is intact"
    if on_error == "stop":
        with pytest.raises(CheckpointError, match=re.escape(message)):
            saver.save(1)
    else:
        saver.save(1)
        assert message in caplog.text
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_0000000.pth"]


def test_old_ones_are_pruned_also_after_a_resume(tmp_path):
    saver = make(tmp_path, keep_last=2)[2]
    saver.save(1)
    saver.save(2)
    again = make(tmp_path, keep_last=2)[2]
    again.load_latest()
    again.save(3)
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == ["model_0000002.pth", "model_0000003.pth"]


def test_really_full_disk(tmp_path, caplog):
    saver = make(tmp_path / "disk", on_error="warn")[2]
    saver.save(0)
    size = (tmp_path / "disk" / "model_0000000.pth").stat().st_size
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "tmpfs", small]).returncode:
        pytest.skip("NO FULL DISK TEST: mounting a small tmpfs needs root")
    try:
        saver.folder = small
        saver.save(1)
        saver.save(2)
        assert "No space left on device" in caplog.text
        assert sorted(p.name for p in small.iterdir()) == ["last_checkpoint", "model_0000001.pth"]
        assert saver.load_latest() == 1
        with pytest.raises(CheckpointError, match="model_final.pth, got No space left"):
            saver.save(3, final=True)
    finally:
        subprocess.run(["umount", small], check=True)


def test_every_so_many_are_kept_for_good(tmp_path):
    saver = make(tmp_path, keep_last=1, keep_every=4)[2]
    for iteration in range(1, 10, 2):
        saver.save(iteration)
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == [f"model_{i:07d}.pth" for i in (3, 7, 9)]


def test_periodic_after_final_is_newer(tmp_path):
    saver = make(tmp_path)[2]
    saver.save(4, final=True)
    saver.save(7)
    assert saver.load_latest() == 7


def test_pending_centre_is_saved(tmp_path):
    cfg, model, saver = make(tmp_path, "train.centering=centering")
    advance(cfg, model, saver.optimizer, [0])
    assert model.dino_loss.center.abs().max() == 0
    saver.save(0)
    restored = make(tmp_path)[2]
    restored.load_latest()
    assert restored.model.dino_loss.center.abs().max() > 0


def test_teacher_file_has_upstreams_layout(tmp_path):
    _, model, _ = make(tmp_path)
    path = ckpt.save_teacher(model, tmp_path, "training_7")
    assert path == tmp_path / "eval" / "training_7" / "teacher_checkpoint.pth"
    state = torch.load(path, weights_only=True)
    assert list(state) == ["teacher"]
    assert set(state["teacher"]) == set(model.teacher.state_dict())
    assert {key.split(".")[0] for key in state["teacher"]} == {"backbone", "dino_head"}


def test_set_aside_keeps_everything(tmp_path):
    saver = make(tmp_path)[2]
    saver.save(3)
    (tmp_path / "config.yaml").write_text("x")
    (tmp_path / "notes.txt").write_text("the user's own")
    aside = ckpt.set_aside(tmp_path, lambda: "then")
    assert sorted(p.name for p in aside.iterdir()) == ["config.yaml", "last_checkpoint", "model_0000003.pth"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "previous_then"]
    assert ckpt.set_aside(tmp_path, lambda: "later") is None
