import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from dinov2_custom import cli, distributed
from dinov2_custom.decoder import train
from dinov2_custom.decoder.bridge import build, load
from dinov2_custom.decoder.train import (
    fit,
    learning_rate_factor,
    newest_checkpoint,
    parameter_groups,
    training_arguments,
)
from dinov2_custom.errors import ConfigError, LaunchError
from dinov2_custom.export.portable import portable
from dinov2_custom.export.rf_detr_folder import backbone_of
from dinov2_custom.export.write import write_torch
from dinov2_custom.logging import remove_logging
from dinov2_custom.plots.metrics_file import read_metrics
from tests.decoder.conftest import TINY
from tests.decoder.scenes import make_split, write_coco
from tests.export.backbones import make_teacher
from tests.logging.wandb_file import read_offline_run
from tests.processes import ENVIRONMENT, REPOSITORY, children, wait_until


@pytest.fixture(autouse=True)
def no_handlers_left():
    yield
    remove_logging("dinov2")


def test_a_process_trains_on_one_of_the_gpus_that_it_sees(tiny, tmp_path, monkeypatch):
    from accelerate.state import AcceleratorState

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(distributed, "get_device", lambda: torch.device("cuda", 0))
    arguments = training_arguments(tiny("batch=3"), output_dir=str(tmp_path))
    assert arguments.device == torch.device("cuda:0") and not arguments.use_cpu
    AcceleratorState._reset_state(reset_partial_state=True)
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 3)  # otherwise nn.DataParallel, and 6


class Wrapped(Exception):
    pass


def test_gradients_are_averaged_on_the_gpu_of_the_model(tiny, tmp_path, monkeypatch):
    """The rank on the node is not the number of the GPU if each task of a node sees only its own."""
    from accelerate import Accelerator

    class DDP:
        def __init__(self, model, device_ids, output_device, **options):
            raise Wrapped(device_ids, output_device)

    monkeypatch.setattr(Accelerator, "multi_device", True)
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", DDP)
    settings = tiny("head=linear")
    data = make_split(tmp_path / "a", 8, 0, True)
    with pytest.raises(Wrapped) as e:
        fit(make("semantic", settings), data, data, tmp_path / "run", settings)
    assert e.value.args == (None, None)


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    """End the process's training in the middle of an epoch."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def make(task, settings, **options):
    return build(
        make_teacher("patch 14", img_size=32, patch_size=8),
        task,
        ("ground", "square", "disc")[task != "semantic" :],
        settings,
        **options,
    )


@pytest.mark.parametrize("task", ["detection", "semantic", "instance"])
def test_a_run_continued_after_a_kill_ends_with_the_same_weights(task, tiny, tmp_path, monkeypatch):
    data, val = (make_split(tmp_path / name, 8, n, task == "semantic") for n, name in enumerate(("a", "b")))
    settings = tiny("precision=bf16") if task == "detection" else tiny("accumulation=2", "label_smoothing=0.1")
    fit(make(task, settings), data, val, tmp_path / "whole", settings)
    killed_in = tmp_path / os.fsdecode(b"not UTF-8 \xe9")
    with pytest.raises(Killed):
        fit(make(task, settings), data, val, killed_in, settings, [KillAt(3 if task == "detection" else 2)])
    torn = killed_in / train.CHECKPOINTS / "checkpoint-9"
    if task == "detection":  # without accumulation there is an epoch before the kill
        assert newest_checkpoint(torn.parent).endswith("checkpoint-2")
        torn.mkdir()
        assert newest_checkpoint(torn.parent).endswith("checkpoint-2")
        torn.rmdir()
    fit(make(task, settings), data, val, killed_in, settings)
    killed_in.rename(tmp_path / "killed")
    whole, killed = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    rows, again = (read_metrics(tmp_path / name / "training_metrics.json") for name in ("whole", "killed"))
    assert [row["iteration"] for row in rows] == [row["iteration"] for row in again] == list(range(len(rows)))
    assert [row["total_loss"] for row in rows] == [row["total_loss"] for row in again]
    assert {"val_loss", "val_miou" if task == "semantic" else "val_ap50", "lr", "epoch"} <= rows[-1].keys()


def test_the_backbone_learns_more_slowly_towards_its_first_block(tiny):
    model = make("detection", tiny()).model
    groups = parameter_groups(model, tiny("layer_decay=0.5", "lr=1"))
    lr = {id(value): group["lr"] for group in groups for value in group["params"]}
    decay = {id(value): group["weight_decay"] for group in groups for value in group["params"]}
    backbone = backbone_of(model)
    depth = len(backbone.encoder.layer)
    assert [lr[id(layer.mlp.fc1.weight)] for layer in backbone.encoder.layer] == [0.5**k for k in range(depth, 0, -1)]
    assert lr[id(backbone.embeddings.cls_token)] == 0.5 ** (depth + 1) and lr[id(model.class_embed.weight)] == 1
    assert decay[id(model.class_embed.weight)] > 0 and decay[id(model.class_embed.bias)] == 0
    assert decay[id(backbone.embeddings.position_embeddings)] == 0
    unused = [name for name, value in model.named_parameters() if id(value) not in lr]
    assert len(unused) == 1 and unused[0].endswith("mask_token")


def test_a_frozen_backbone_keeps_its_features_and_the_decoder_learns(tiny, tmp_path):
    data = make_split(tmp_path / "a", 8, semantic=True)
    settings = tiny("frozen=true", "head=linear", "epochs=1")
    decoder = make("semantic", settings)
    before = {name: value.clone() for name, value in decoder.model.state_dict().items()}
    fit(decoder, data, data, tmp_path / "out", settings)
    after = load(tmp_path / "out").model.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("backbone.")} == {n for n in same if n.startswith("backbone.")}
    assert "classifier.weight" not in same


def test_the_learning_rate_falls_to_a_tenth_at_11_12():
    factors = [learning_rate_factor(step, 12, 0) for step in range(12)]
    assert factors == [1.0] * 11 + [0.1]
    assert [learning_rate_factor(step, 100, 3) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_the_command_trains_compares_and_refuses_other_settings(tmp_path, monkeypatch, capsys):
    data = write_coco(make_split(tmp_path / "a", 8), tmp_path / "a" / "labels.json")
    monkeypatch.setattr(train, "load_backbone", lambda source: make_teacher("patch 14", img_size=32, patch_size=8))
    flags = ["--backbone", "b", "--task", "detection", "--train", str(data), "--val", str(data)]
    flags += ["--output-dir", str(tmp_path / "out"), "--compare-to", "random", *TINY, "epochs=1"]
    args = cli.decoder_train_parser().parse_args(flags)
    assert train.main(args) == 0
    assert "8 labelled images" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["images"] == 8
    args.opts = [*args.opts, "lr=1"]
    with pytest.raises(ConfigError, match="lr: 0.001 before, 1"):
        train.main(args)
    monkeypatch.setattr(train.distributed, "get_global_size", lambda: 2)
    with pytest.raises(ConfigError, match="processes: 1 before, 2 now"):
        train._describe(args, "b", tmp_path / "out", train.read_settings(args.opts[:-1]))


def test_mixed_precision_rounds_the_forward_pass_alone(tiny, tmp_path):
    data, losses = make_split(tmp_path / "a", 4), []
    for precision in ("fp32", "bf16"):
        settings = tiny(f"precision={precision}", "epochs=1", "dropout=0")
        decoder = make("detection", settings)
        fit(decoder, data, data, tmp_path / precision, settings)
        losses.append(read_metrics(tmp_path / precision / "training_metrics.json")[0]["total_loss"])
        assert {value.dtype for value in decoder.model.parameters()} == {torch.float32}
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.02)
    flags = ["--backbone", "b", "--task", "detection", "--train", "t", "--val", "v", "--output-dir", str(tmp_path)]
    with pytest.raises(ConfigError, match="fp16, which needs a GPU"):
        train.main(cli.decoder_train_parser().parse_args([*flags, "precision=fp16"]))


def test_accumulated_batches_are_one_batch_and_the_rate_falls_at_the_end(tiny, tmp_path):
    """The images have different numbers of objects; 10 of them are three steps, of which the last is a smaller one."""
    data = make_split(tmp_path / "a", 10)
    for name, keys in {"one": ["batch=4"], "two": ["batch=2", "accumulation=2"]}.items():
        settings = tiny(*keys, "epochs=4", "dropout=0", "clip_grad=0.1")
        fit(make("detection", settings), data, data, tmp_path / name, settings)
    rows, again = (read_metrics(tmp_path / name / "training_metrics.json") for name in ("one", "two"))
    assert [len(rows), len(again)] == [8, 12]  # two whole batches of 4 in an epoch, or five of 2
    for one, other in zip(rows[:2], again[:2], strict=True):
        assert other["total_loss"] == pytest.approx(one["total_loss"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    assert [row["lr"] for row in again].index(again[-1]["lr"]) in (10, 11) and again[-1]["lr"] < again[0]["lr"] / 5


@pytest.mark.filterwarnings("default")
def test_weights_and_biases_has_one_run_across_a_kill(tiny, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="NO W&B TEST: run pip install wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_RUN_ID", "WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    data = make_split(tmp_path / "a", 8, semantic=True)
    settings = tiny("head=linear", "frozen=true", "wandb.mode=offline", "wandb.project=cells")
    try:
        with pytest.raises(Killed):
            fit(make("semantic", settings), data, data, tmp_path / "out", settings, [KillAt(3)])
        fit(make("semantic", settings), data, data, tmp_path / "out", settings)
    finally:
        wandb.teardown()
    found = [read_offline_run(file) for file in (tmp_path / "out").glob("logs/wandb/offline-run-*/run-*.wandb")]
    first, second = sorted(found, key=lambda run: run.history[0]["_step"])
    assert (first.project, first.name, first.config["head"]) == ("cells", "out", "linear")
    assert first.id == second.id == (tmp_path / "out" / "logs" / "wandb_run_id").read_text().strip()
    assert (first.exit_code, second.exit_code) == (1, 0)
    assert [row["_step"] for row in second.history] == [2, 3] and "val_miou" in second.history[-1]


def test_batch_normalisation_needs_two_images(tiny, tmp_path):
    data = make_split(tmp_path / "a", 4, semantic=True)
    with pytest.raises(ConfigError, match="batch"):
        train._check_batch(make("semantic", tiny("batch=1")), tiny("batch=1"), data)


def test_released_names_are_urls(monkeypatch):
    seen = []
    monkeypatch.setattr(train, "load_teacher", seen.append)
    for name in ("dinov2_vitb14", "dinov2_vits14_reg", "some/run"):
        train.load_backbone(name)
    assert seen[0].endswith("/dinov2_vitb14/dinov2_vitb14_pretrain.pth")
    assert seen[1].endswith("/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth") and seen[2] == "some/run"


def write_backbone(folder):
    path = folder / "backbone.pth"
    write_torch(portable(make_teacher("patch 14", img_size=32, patch_size=8)), path)
    return path


def test_two_processes_give_the_result_of_one_and_continue_after_a_kill(tmp_path):
    """The validation images are an odd number, so that one process has more batches of them."""
    data, val = (write_coco(make_split(tmp_path / str(n), n, n), tmp_path / str(n) / "labels.json") for n in (8, 9))
    flags = ["--backbone", str(write_backbone(tmp_path)), "--task", "detection", "--train", str(data)]
    flags += ["--val", str(val), *TINY, "epochs=3", "dropout=0", "clip_grad=0.1", "--output-dir"]
    assert train.main(cli.decoder_train_parser().parse_args([*flags, str(tmp_path / "one"), "batch=4"])) == 0
    two = [*flags, str(tmp_path / "two"), "batch=2"]
    command = [sys.executable, str(REPOSITORY / "run/decoder/train.py"), "--ngpus", "2", "--cpu", *two]

    def start():
        with open(tmp_path / "log", "a") as log:
            return subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=log, stderr=log)

    process = start()
    wait_until(lambda: newest_checkpoint(tmp_path / "two" / train.CHECKPOINTS), "a checkpoint", [process])
    ranks = children(process)
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    with pytest.raises(LaunchError, match="another process"):
        train.main(cli.decoder_train_parser().parse_args(two))
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    assert process.wait(timeout=600) == 137
    assert start().wait(timeout=600) == 0, (tmp_path / "log").read_text()
    one, other = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("one", "two"))
    for name, value in one.items():  # a step changes a weight by up to the learning rate, 1e-3
        assert float((other[name] - value).abs().mean()) < 2e-4, name
    rows, again = (read_metrics(tmp_path / name / "training_metrics.json") for name in ("one", "two"))
    assert [row["iteration"] for row in rows] == [row["iteration"] for row in again]
    for key in ("total_loss", "lr", "grad_norm", "val_loss"):
        wanted, got = ([row[key] for row in some if key in row] for some in (rows, again))
        assert got == pytest.approx(wanted, rel=2e-3), key
