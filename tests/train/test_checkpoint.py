import json
import os
import pickle
import re
import shutil
import subprocess
import threading

import pytest
import torch

from dinov2_custom.errors import CheckpointError
from dinov2_custom.train import checkpoint as ckpt
from dinov2_custom.train.run_directory import made_and_locked
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from dinov2_custom.train.train import build_optimizer
from dinov2_custom.utils import checkpoint_folder as folder
from dinov2_custom.utils.checkpoint_folder import Written
from dinov2_custom.utils.weights import read_weights
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
    assert loader.load_latest().iteration == 2
    advance(cfg, resumed, loader.optimizer, range(3, 6))
    for (name, a), b in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_restored_state_is_on_the_parameters_device(tmp_path):
    """This includes step counts, which fused kernels need on the GPU. Here the other device is "meta"."""
    cfg, model, saver = make(tmp_path)
    advance(cfg, model, saver.optimizer, range(1))
    saver.save(0)
    with torch.device("meta"):
        elsewhere = SSLMetaArch(cfg)
    optimizer = build_optimizer(cfg, elsewhere.get_params_groups())
    assert ckpt.Checkpointer(tmp_path, elsewhere, optimizer).load_latest().iteration == 0
    kept = [value for state in optimizer.state.values() for value in state.values()]
    assert len(kept) == 3 * len(list(model.student.parameters()))
    assert {value.device.type for value in kept} == {"meta"}


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def state_file(checkpoint):
    return checkpoint / "rank_00000.safetensors"


def test_nothing_to_load(tmp_path):
    assert make(tmp_path / "absent")[2].load_latest() is None


def test_non_tensor_values_are_kept(tmp_path):
    saver = make(tmp_path, "train.seed=7")[2]
    saver.save(2, draws=123, extra={"wandb_run_id": "abc"})
    resumed = make(tmp_path)[2].load_latest()
    assert (resumed.iteration, resumed.draws) == (2, 123)
    assert resumed.values["wandb_run_id"] == "abc" and resumed.values["seed"] == 7
    assert resumed.values["versions"]["torch"] == torch.__version__
    assert resumed.values["config"]["dino"]["head_n_prototypes"] == 32


@pytest.mark.parametrize("damage", ["torn", "empty", "text", "flipped", "gone", "marker"])
def test_unreadable_newest_falls_back_with_a_warning(tmp_path, caplog, damage):
    _, _, saver = make(tmp_path)
    saver.save(1)
    newest = saver.save(2)
    file = newest / "checkpoint.json" if damage == "marker" else state_file(newest)
    whole = file.read_bytes()
    flipped = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
    torn = whole[: len(whole) // 2]
    damaged = {"torn": torn, "marker": torn, "empty": b"", "text": b"<html>", "flipped": flipped}
    file.unlink() if damage == "gone" else file.write_bytes(damaged[damage])
    assert make(tmp_path)[2].load_latest().iteration == 1
    assert "using the one before" in caplog.text and newest.name in caplog.text


def rewritten(marker, change, *, with_checksum):
    """Change the marker's values, and recompute its checksum or keep the old one."""
    values = json.loads(marker.read_text())
    change(values)
    if with_checksum:
        files = {name: Written(**fields) for name, fields in values.pop("files").items()}
        del values["crc32"]
        folder.write_marker(marker.parent, files, values)
    else:
        marker.write_text(json.dumps(values, indent=1))


@pytest.mark.parametrize("key", ["iteration", "draws", "number", "seed", "world_size", "config", "saved_at", "format"])
def test_a_marker_with_any_altered_value_is_rejected(tmp_path, caplog, key):
    saver = make(tmp_path)[2]
    saver.save(1, draws=7)
    marker = saver.save(2, draws=9) / "checkpoint.json"

    def alter(values):
        if key == "config":
            values["config"]["train"]["seed"] += 1
        else:
            values[key] += 1 if key != "format" else -1

    rewritten(marker, alter, with_checksum=False)
    assert make(tmp_path)[2].load_latest().iteration == 1
    assert "using the one before" in caplog.text and "model_0000002" in caplog.text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("iteration", -1), ("iteration", 1.0), ("iteration", True), ("iteration", None), ("iteration", "2"),
        ("iteration", float("inf")), ("iteration", float("nan")), ("iteration", 2**63), ("iteration", 10**4000),
        ("draws", -1), ("draws", "many"), ("draws", float("inf")), ("number", 0), ("number", []), ("world_size", 0),
        ("scaler", {"scale": 1.0}), ("scaler", 3), ("config", []), ("course", {"elapsed_s": float("nan")}),
        ("course", {"elapsed_s": "long"}), ("wandb_run_id", 7), ("mlflow_run_id", 7), ("files", {}),
        ("windows", [1.0]), ("windows", {"lr": 1.0}), ("windows", {"lr": ["one"]}), ("windows", {"lr": [10**4000]}),
        ("data", 16), ("data", {"images": 16}), ("data", {"images": "16", "digest": ""}), ("has_row_of_stop", "yes"),
        ("has_row_of_stop", 2), ("skipped_steps", "no"),
    ],
)  # fmt: skip
def test_invalid_values_are_rejected_despite_a_valid_checksum(tmp_path, caplog, key, value):
    saver = make(tmp_path)[2]
    saver.save(1)
    marker = saver.save(2) / "checkpoint.json"
    rewritten(marker, lambda values: values.update({key: value}), with_checksum=True)
    assert make(tmp_path)[2].load_latest().iteration == 1
    assert "using the one before" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000, b'{"a":' * 100_000, b"[]", b"null", b'"x"', b"\xff\xfe\x00", b'{"format": 3}',
        b'{"format": 3, "iteration": 2, "iteration": 3, "files": {}}', b'{"iteration": ' + b"9" * 10_000 + b"}",
    ],
    ids=range(9),
)  # fmt: skip
def test_whatever_stands_in_a_marker_the_one_before_is_used_or_one_error_raised(tmp_path, caplog, text):
    saver = make(tmp_path)[2]
    first = saver.save(1)
    (saver.save(2) / "checkpoint.json").write_bytes(text)
    assert make(tmp_path)[2].load_latest().iteration == 1
    (first / "checkpoint.json").write_bytes(text)
    with pytest.raises(CheckpointError, match="expected a readable checkpoint, got 2 unreadable ones.*--no-resume"):
        make(tmp_path)[2].load_latest()
    make(tmp_path)[2].save(3)  # a new run in this folder is not affected
    assert make(tmp_path)[2].load_latest().iteration == 3


def test_numbers_that_are_not_finite_may_be_kept_beside(tmp_path):
    make(tmp_path)[2].save(2, extra={"window": [float("nan"), float("inf"), 1.0]})
    assert make(tmp_path)[2].load_latest().values["window"][1:] == [float("inf"), 1.0]


def test_missing_newest_falls_back_with_a_warning(tmp_path, caplog):
    saver = make(tmp_path)[2]
    saver.save(1)
    (saver.save(2) / "checkpoint.json").unlink()
    assert make(tmp_path)[2].load_latest().iteration == 1
    assert "last_checkpoint names model_0000002, which is missing or incomplete" in caplog.text


def test_only_unreadable_checkpoints_is_an_error_that_names_the_way_out(tmp_path):
    state_file(make(tmp_path)[2].save(1)).write_bytes(b"no")
    with pytest.raises(CheckpointError, match="--no-resume"):
        make(tmp_path)[2].load_latest()


def test_the_newest_checkpoint_is_the_last_written_one_for_any_clock(tmp_path, monkeypatch):
    saver = make(tmp_path)[2]
    monkeypatch.setattr(ckpt.time, "time", lambda: 2e9)
    os.utime(saver.save(8), (2e9, 2e9))
    monkeypatch.setattr(ckpt.time, "time", lambda: 1e9)
    saver.save(4)
    (tmp_path / "last_checkpoint").unlink()
    assert saver.load_latest().iteration == 4


def attack(tmp_path):
    class Attack:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    return pickle.dumps({"model": Attack()})


def test_malicious_pickle_is_refused_unread(tmp_path):
    (tmp_path / "evil.pth").write_bytes(attack(tmp_path))
    with pytest.raises(CheckpointError, match=r"evil\.pth"):
        read_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("file", ["checkpoint.json", "rank_00000.safetensors", ".metadata"])
def test_a_malicious_checkpoint_runs_nothing(tmp_path, file):
    saver = make(tmp_path / "run")[2]
    saver.save(1)
    newest = saver.save(2)
    (newest / file).write_bytes(attack(tmp_path))
    assert make(tmp_path / "run")[2].load_latest().iteration == (2 if file == ".metadata" else 1)
    assert not (tmp_path / "owned").exists()


def test_a_marker_cannot_name_files_elsewhere(tmp_path):
    saver = make(tmp_path)[2]
    saver.save(1)
    newest = saver.save(2)
    marker = newest / "checkpoint.json"
    values = json.loads(marker.read_text())
    values["files"] = {"../model_0000001/rank_00000.safetensors": values["files"]["rank_00000.safetensors"]}
    marker.write_text(json.dumps(values))
    assert make(tmp_path)[2].load_latest().iteration == 1


def test_another_architecture_names_tensors_and_shapes(tmp_path):
    make(tmp_path)[2].save(0)
    with pytest.raises(CheckpointError, match=r"expected \(64, 3, 2, 2\), got \(64, 3, 4, 4\)"):
        make(tmp_path, "student.patch_size=2")[2].load_latest()


@pytest.mark.parametrize("on_error", ["warn", "stop"])
@pytest.mark.parametrize("async_save", [False, True])
def test_failed_save_leaves_the_old_one_and_no_litter(tmp_path, monkeypatch, caplog, on_error, async_save):
    saver = make(tmp_path, on_error=on_error, async_save=async_save)[2]
    saver.save(0)
    saver.wait()
    before = state_file(tmp_path / "model_0000000").read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    message = "got No space left on device; the newest complete one (model_0000000) is intact; make room, then"

    def save():
        saver.save(1)
        saver.wait()

    if on_error == "stop":
        with pytest.raises(CheckpointError, match=re.escape(message)):
            save()
    else:
        save()
        assert message in caplog.text
    assert state_file(tmp_path / "model_0000000").read_bytes() == before
    assert names(tmp_path) == ["last_checkpoint", "model_0000000"]


@pytest.mark.parametrize("async_save", [False, True])
def test_a_full_disk_is_reported_once_and_counted_at_the_end(tmp_path, monkeypatch, caplog, async_save):
    saver = make(tmp_path, on_error="warn", async_save=async_save)[2]
    saver.save(0)
    saver.wait()
    flush = os.fsync
    for errors in ([28] * 3, [122]):  # no space, then over quota

        def fails(descriptor, error=errors[0]):
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr(os, "fsync", fails)
        for _ in errors:
            saver.save(1)
            saver.wait()
    said = [record.getMessage() for record in caplog.records if "expected to write" in record.getMessage()]
    assert [os.strerror(e) in text for e, text in zip((28, 122), said, strict=True)] == [True, True]
    monkeypatch.setattr(os, "fsync", flush)
    caplog.clear()
    saver.save(4, final=True)
    counts = f"3 x {os.strerror(28)}, 1 x {os.strerror(122)}"
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"checkpoints and teachers that could not be written: {counts}"
    ]


def test_an_async_save_writes_the_state_at_its_start(tmp_path, monkeypatch):
    cfg, model, saver = make(tmp_path, async_save=True)
    advance(cfg, model, saver.optimizer, [0])
    go, write = threading.Event(), ckpt.write_pieces
    monkeypatch.setattr(ckpt, "write_pieces", lambda *args: go.wait(60) and write(*args))
    saver.save(0)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not (tmp_path / "last_checkpoint").exists()
    advance(cfg, model, saver.optimizer, [1])
    go.set()
    saver.wait()
    _, restored, loader = make(tmp_path)
    assert loader.load_latest().iteration == 0
    for name, tensor in restored.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert not torch.equal(expected["student.backbone.norm.weight"], model.state_dict()["student.backbone.norm.weight"])


def test_a_teacher_is_written_aside_too_with_its_state_at_that_time(tmp_path, monkeypatch):
    cfg, model, saver = make(tmp_path, async_save=True)
    go, write = threading.Event(), ckpt.save_atomically
    monkeypatch.setattr(ckpt, "save_atomically", lambda *args: go.wait(60) and write(*args))
    path = saver.save_teacher("best", facts={"iteration": 0})
    expected = {name: tensor.clone() for name, tensor in model.teacher.state_dict().items()}
    assert not path.exists()
    advance(cfg, model, saver.optimizer, [0])
    go.set()
    saver.wait()
    written = torch.load(path, weights_only=True)
    assert written["iteration"] == 0 and written["teacher"].keys() == expected.keys()
    assert all(torch.equal(written["teacher"][name], expected[name]) for name in expected)
    name = "backbone.norm.weight"
    assert not torch.equal(expected[name], model.teacher.state_dict()[name])
    monkeypatch.setattr(ckpt, "save_atomically", lambda *args: 1 / 0)
    saver.save_teacher("best")
    with pytest.raises(ZeroDivisionError):
        saver.save(1)


def test_the_last_save_waits_for_the_one_before(tmp_path):
    saver = make(tmp_path, async_save=True)[2]
    saver.save(0)
    saver.save(1, final=True)
    assert names(tmp_path) == ["last_checkpoint", "model_0000000", "model_final"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_final"


def test_what_ends_the_writing_thread_is_raised_at_the_next_save_and_closing_waits(tmp_path, monkeypatch, caplog):
    saver = make(tmp_path, async_save=True)[2]
    go, write = threading.Event(), ckpt.write_pieces
    monkeypatch.setattr(ckpt, "write_pieces", lambda *args: go.wait(60) and write(*args))
    saver.save(0)
    threading.Timer(0.3, go.set).start()
    saver.close()
    assert names(tmp_path) == ["last_checkpoint", "model_0000000"]
    monkeypatch.setattr(ckpt, "write_pieces", lambda *args: 1 / 0)
    saver.save(1)
    with pytest.raises(ZeroDivisionError):
        saver.save(2)
    saver.save(3)
    saver.close()
    assert "not complete: division by zero" in caplog.text


def test_old_ones_are_pruned_also_after_a_resume(tmp_path):
    saver = make(tmp_path, keep_last=2)[2]
    saver.save(1)
    saver.save(2)
    again = make(tmp_path, keep_last=2)[2]
    again.load_latest()
    again.save(3)
    assert names(tmp_path) == ["last_checkpoint", "model_0000002", "model_0000003"]


def test_a_bad_newest_one_does_not_cost_the_good_ones(tmp_path):
    saver = make(tmp_path, keep_last=1)[2]
    saver.save(9)
    again = make(tmp_path, keep_last=1)[2]
    again.save(5)
    assert names(tmp_path) == ["last_checkpoint", "model_0000005"]
    assert again.load_latest().iteration == 5
    (tmp_path / "model_0000005" / "checkpoint.json").write_text("{")
    again.save(6)
    assert names(tmp_path) == ["last_checkpoint", "model_0000006"]


def test_really_full_disk(tmp_path, caplog):
    saver = make(tmp_path / "disk", on_error="warn")[2]
    saver.save(0)
    size = state_file(tmp_path / "disk" / "model_0000000").stat().st_size
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "tmpfs", small]).returncode:
        pytest.skip("needs root: to mount a small disk")
    try:
        saver.folder = saver.store.folder = small
        saver.save(1)
        saver.save(2)
        assert "No space left on device" in caplog.text
        assert sorted(p.name for p in small.iterdir()) == ["last_checkpoint", "model_0000001"]
        assert saver.load_latest().iteration == 1
        with pytest.raises(CheckpointError, match="model_final, got No space left"):
            saver.save(3, final=True)
    finally:
        subprocess.run(["umount", small], check=True)


def test_every_so_many_are_kept_for_good(tmp_path):
    saver = make(tmp_path, keep_last=1, keep_every=4)[2]
    for iteration in range(1, 10, 2):
        saver.save(iteration)
    assert names(tmp_path) == ["last_checkpoint", *(f"model_{i:07d}" for i in (3, 7, 9))]


def test_periodic_after_final_is_newer(tmp_path):
    saver = make(tmp_path)[2]
    saver.save(4, final=True)
    saver.save(7)
    assert saver.load_latest().iteration == 7


def test_a_longer_run_replaces_the_final_one_when_the_new_one_is_complete(tmp_path, monkeypatch):
    saver = make(tmp_path)[2]
    assert saver.save(4, final=True) == tmp_path / "model_final"
    seen, rename = [], os.rename

    def watch(a, b):
        seen.append({p.name for p in tmp_path.iterdir() if (p / "checkpoint.json").exists()})
        rename(a, b)

    monkeypatch.setattr(os, "rename", watch)
    assert saver.save(7, final=True) == tmp_path / "model_final"
    assert seen == [{"model_final"}, {"model_0000007"}]  # what is complete when the second and the third are renamed
    assert names(tmp_path) == ["last_checkpoint", "model_final"]
    assert saver.load_latest().iteration == 7


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


@pytest.mark.parametrize("how", ["renamed", "removed", "replaced"])
@pytest.mark.parametrize("what", ["save", "save_teacher"])
def test_a_missing_run_directory_is_detected_at_the_next_save(tmp_path, how, what):
    run = tmp_path / "run"
    with made_and_locked(run):
        saver = make(run, on_error="warn")[2]
        saver.save(0)
        saver.save_teacher("training_0")
        run.rename(tmp_path / "elsewhere") if how != "removed" else shutil.rmtree(run)
        if how == "replaced":
            (run / "logs").mkdir(parents=True)
        expected = f"expected the run directory {run} with this run's files, got none: it was renamed"
        with pytest.raises(CheckpointError, match=expected):
            saver.save(1) if what == "save" else saver.save_teacher("training_1")
    assert not list(run.rglob("model*")) and not list(run.rglob("teacher*"))


def test_set_aside_keeps_everything(tmp_path):
    saver = make(tmp_path)[2]
    saver.save(3)
    (tmp_path / "config.yaml").write_text("x")
    (tmp_path / "notes.txt").write_text("the user's own")
    aside = ckpt.set_aside(tmp_path, lambda: "then")
    assert sorted(p.name for p in aside.iterdir()) == ["config.yaml", "last_checkpoint", "model_0000003"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "previous_then"]
    assert ckpt.set_aside(tmp_path, lambda: "later") is None
    saver.save(4)
    assert names(ckpt.set_aside(tmp_path, lambda: "then")) == ["last_checkpoint", "model_0000004"]  # the same second
    assert names(tmp_path) == ["notes.txt", "previous_then", "previous_then_2"]
